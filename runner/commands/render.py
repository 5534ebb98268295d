"""oslo render"""

from __future__ import annotations

from pathlib import Path

import click

from runner import output
from runner.commands.common import file_argument, set_option, settings
from runner.config_file import Target, load_file
from runner.identity import run_id
from runner.pytorchjob import notes
from runner.rendering import cluster_content, job_manifest


@click.command()
@file_argument
@set_option
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["yaml", "json"]),
    default="yaml",
    show_default=True,
    help="The same object either way.",
)
def render(file: Path, sets: tuple[str, ...], form: str) -> None:
    """Print the PyTorchJob of a config file.

    Offline, and the same for the same file, data and options.
    """
    loaded = load_file(file, sets, settings().defaults, Target.of_cluster())
    content = cluster_content(loaded)
    manifest = job_manifest(loaded, run_id(loaded.run.name, content), content)
    for note in notes(loaded.job):
        output.say(f"note: {note}")
    for seen, local in loaded.sources.items():
        output.say(f"note: pods read {local} as {seen}: `oslo submit` copies it there")
    if form == "json":
        output.show_json(manifest)
    else:
        output.show(output.yaml_text(manifest))
