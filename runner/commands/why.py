"""oslo why"""

from __future__ import annotations

import click

from runner import output
from runner import why as reasons
from runner.commands.common import cluster_options, job_argument, json_option
from runner.commands.locate import locate


@click.command()
@job_argument
@cluster_options
@json_option
def why(job: str, as_json: bool) -> None:
    """Say why a run failed, waits or began again, and what to do next."""
    backend, run = locate(job, past=True)
    findings = backend.findings(run)
    found = reasons.explain(findings)
    if as_json:
        output.show_json(found.to_json())
    else:
        output.show(reasons.text(found, findings))
