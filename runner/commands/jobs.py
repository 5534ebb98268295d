"""oslo status, list, wait, cancel, resume, delete"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import click

from opensloth.run_config import RunConfig
from runner import compare, output, why
from runner.backend import Backend, RunStatus, State
from runner.commands import watching
from runner.commands.common import cluster_options, confirm, job_argument, json_option, settings, yes_option
from runner.commands.locate import cluster_backend, locate
from runner.commands.logs import seconds
from runner.errors import ClusterError, NotFoundError, WaitTimeoutError
from runner.identity import name_of
from runner.patience import OUTAGE_SECONDS

_WATCH_SECONDS = 1.0
_HEARTBEAT_SECONDS = 30.0
"""A pipeline that hears nothing for long kills its job."""


@click.command()
@job_argument
@cluster_options
@click.option("-w", "--watch", is_flag=True, help="Show it again and again until the run is over.")
@json_option
def status(job: str, watch: bool, as_json: bool) -> None:
    """Show where a run stands."""
    backend, run = locate(job, past=True)
    last = _watch(backend, run, as_json) if watch else backend.get(run)
    if not watch and as_json:
        output.show_json(last.to_json())
    elif not watch:
        output.show(output.status_text(last, time.time()))
    if last.state is State.FAILED:
        output.say(f"{why.sentence(last)}\n  {why.next_step(last)}")


@click.command(name="list")
@click.option("--name", help="Only runs of this name, with what differs between them and their final loss.")
@cluster_options
@json_option
def list_(name: str | None, as_json: bool) -> None:
    """List the runs, newest first."""
    found = sorted(_everywhere(), key=lambda pair: (pair[1].started or float("inf"), pair[1].run), reverse=True)
    statuses = [status for _, status in found if name in (None, name_of(status.run))]
    differing: dict[str, dict[str, Any]] = {}
    if name is not None:
        configs = _configs([pair for pair in found if pair[1] in statuses])
        statuses = [one for one in statuses if one.run in configs]
        differing = compare.differences(configs)
    if as_json:
        output.show_json([one.to_json() | ({"differs": differing[one.run]} if name else {}) for one in statuses])
    elif name:
        output.show(compare.text(statuses, differing))
    elif statuses:
        output.show(output.list_text(statuses, time.time()))
    else:
        output.say("no runs yet: oslo submit FILE --local starts one")


@click.command()
@job_argument
@cluster_options
@click.option(
    "--timeout",
    metavar="DURATION",
    callback=seconds,
    help="Give up after this time, as in 2h, with exit code 124. The run goes on.",
)
@json_option
def wait(job: str, timeout: int | None, as_json: bool) -> None:
    """Wait until a run is over; the exit code says how it ended."""
    backend, run = locate(job)
    last = _wait(backend, run, timeout)
    if as_json:
        output.show_json(last.to_json())
    watching.report_end(last)


@click.command()
@job_argument
@cluster_options
@click.option("--force", is_flag=True, help="Kill it at once: what came after the last checkpoint is lost.")
@json_option
def cancel(job: str, force: bool, as_json: bool) -> None:
    """Save a checkpoint and stop; the run can be resumed."""
    backend, run = locate(job)
    backend.cancel(run, force=force)
    last = _wait(backend, run, None, goes_on="is still being cancelled")
    output.say(f"{last.handle} is {last.state}\n  {why.next_step(last)}")
    if as_json:
        output.show_json(last.to_json())


@click.command()
@job_argument
@cluster_options
@click.option("--follow", is_flag=True, help="Show the log until the run is over; the exit code says how it ended.")
@json_option
def resume(job: str, follow: bool, as_json: bool) -> None:
    """Go on from the last checkpoint."""
    backend, run = locate(job)
    backend.resume(run)
    status = backend.get(run)
    output.say(f"{status.handle} goes on" + (f" as attempt {status.attempt}" if status.attempt else ""))
    try:
        if follow:
            watching.follow_and_report(backend, run, as_json)
        else:
            output.say(f"  oslo logs -f {status.handle}")
    finally:
        watching.show_run(backend, run, status.handle, as_json)


@click.command()
@job_argument
@cluster_options
@click.option("--files", is_flag=True, help="On a cluster: its files on the volume too. Here they go anyway.")
@yes_option
@json_option
def delete(job: str, files: bool, yes: bool, as_json: bool) -> None:
    """Delete a run; on a cluster its files stay unless you say --files."""
    backend, run = locate(job, past=files)
    status = backend.get(run)
    keeps = backend.keeps_files and not files
    what = "its files stay on the volume" if keeps else "with its checkpoints and result"
    confirm(f"Delete {status.handle} ({status.state}), {what}?", yes)
    backend.delete(run, files=files)
    if as_json:
        output.show_json({"run": run, "deleted": True})
    else:
        left = f"; {status.folder} stays on the volume\n  oslo logs {run}   still reads it" if keeps else ""
        output.say(f"{status.handle} deleted{left}")


def _everywhere() -> list[tuple[Backend, RunStatus]]:
    """The runs here and on the cluster, if there is one; one that does not answer does not hide what is here."""
    now = settings()
    found = [(now.local, status) for status in now.local.list_runs()]
    access = now.effective_access
    if not access.is_configured:
        return found
    try:
        backend = cluster_backend(access)
        return found + [(backend, status) for status in backend.list_runs()]
    except ClusterError as error:
        output.say(f"warning: runs on the cluster are not shown: {error}")
        return found


def _configs(found: Sequence[tuple[Backend, RunStatus]]) -> dict[str, RunConfig]:
    """By run; without those that were deleted meanwhile."""
    configs = {}
    for backend, status in found:
        with suppress(NotFoundError):
            configs[status.run] = backend.config(status.run)
    return configs


def _watch(backend: Backend, run: str, as_json: bool) -> RunStatus:
    """Show the status whenever it has changed; on a terminal in place."""
    handle = backend.get(run).handle
    in_place = sys.stdout.isatty() and not as_json
    with watching.may_be_interrupted(handle):
        for status in _changes(backend, run, handle, max(_WATCH_SECONDS, backend.poll_seconds)):
            if as_json:
                output.show_json_line(status.to_json())
            elif in_place:
                click.clear()
                output.show(output.status_text(status, time.time()))
            else:
                output.show(output.status_line(status))
    return status


def _changes(backend: Backend, run: str, handle: str, interval: float) -> Iterator[RunStatus]:
    """The status, and again each time that it differs, to the end."""
    last = None
    while last is None or not last.state.is_over:
        if last is not None:
            time.sleep(interval)
        status = watching.still_there(backend, run, handle)
        if status != last:
            yield status
        last = status


def _wait(backend: Backend, run: str, timeout: float | None, goes_on: str = "goes on") -> RunStatus:
    """Poll until the run is over, with a line on stderr when its state changes and every half minute.

    timeout: seconds. goes_on: what becomes of the run when the waiting is interrupted.
    Raises WaitTimeoutError, Interrupted, JobCancelledError.
    """
    status = backend.get(run)
    end = None if timeout is None else time.monotonic() + timeout
    said_state, said_at = None, 0.0
    with watching.may_be_interrupted(status.handle, goes_on):
        while not status.state.is_over:
            if status.state != said_state or time.monotonic() - said_at > _HEARTBEAT_SECONDS:
                output.say(output.status_line(status))
                said_state, said_at = status.state, time.monotonic()
            if end is not None and time.monotonic() >= end:
                message = f"gave up after {timeout:.0f} s: {why.sentence(status)}"
                raise WaitTimeoutError(message, f"it goes on: oslo logs -f {status.handle}")
            time.sleep(backend.poll_seconds)
            left = OUTAGE_SECONDS if end is None else min(OUTAGE_SECONDS, end - time.monotonic())
            status = watching.still_there(backend, run, status.handle, left)
    return status
