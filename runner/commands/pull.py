"""oslo pull"""

from __future__ import annotations

from pathlib import Path

import click

from runner import output
from runner.commands import watching
from runner.commands.common import cluster_options, job_argument, json_option
from runner.commands.locate import locate


@click.command()
@job_argument
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@cluster_options
@json_option
def pull(job: str, folder: Path | None, as_json: bool) -> None:
    """Copy the result of a run into a folder, each file checked by its hash.

    FOLDER is ./RUN unless you say otherwise. The last line of stdout is the folder.
    """
    backend, run = locate(job, past=True)
    destination = folder if folder is not None else Path(run)
    files = backend.pull(run, destination)
    if as_json:
        names = sorted(file.relative_to(destination).as_posix() for file in files)
        output.show_json({"run": run, "folder": str(destination), "files": names})
        return
    output.say(f"{len(files)} files of {backend.handle(run)}\n{watching.usage(destination)}")
    output.show(str(destination))
