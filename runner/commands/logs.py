"""oslo logs"""

from __future__ import annotations

import re
import time

import click

from runner import output
from runner.backend import LogLine, LogQuery
from runner.commands import watching
from runner.commands.common import cluster_options, job_argument, json_option
from runner.commands.locate import locate
from runner.quantities import parse_duration


def seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of options that take a duration."""
    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _pattern(ctx: click.Context, param: click.Parameter, value: str | None) -> re.Pattern[str] | None:
    try:
        return None if value is None else re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value!r} is not a regular expression: {error}", ctx, param) from error


@click.command()
@job_argument
@cluster_options
@click.option("-f", "--follow", is_flag=True, help="Go on until the run is over; the exit code says how it ended.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank.")
@click.option("--tail", type=click.IntRange(min=0), help="Only the last so many lines of each rank.")
@click.option("--since", metavar="DURATION", callback=seconds, help="Only what is younger, as in 10m.")
@click.option("--attempt", type=click.IntRange(min=1), help="This attempt instead of the latest.")
@click.option("--grep", metavar="REGEX", callback=_pattern, help="Only lines that match.")
@json_option
def logs(
    job: str,
    follow: bool,
    rank: int | None,
    tail: int | None,
    since: int | None,
    attempt: int | None,
    grep: re.Pattern[str] | None,
    as_json: bool,
) -> None:
    """Show the log of a run, all ranks."""
    backend, run = locate(job, past=True)
    query = LogQuery(attempt, rank, tail, None if since is None else time.time() - since, grep)

    def show(line: LogLine) -> None:
        if as_json:
            output.show_json_line(output.log_json(line))
        else:
            output.show(output.log_line(line))

    if follow:
        watching.report_end(watching.follow(backend, run, query, show))
        return
    for line in backend.logs(run, query):
        show(line)
