"""oslo render"""

from __future__ import annotations

from pathlib import Path

import click

from opensloth import contract, run_config
from opensloth.fingerprint import source_sha256
from runner import output
from runner.commands.common import file_argument, set_option, settings
from runner.config_file import Target, load_file
from runner.identity import content_hash, run_id
from runner.pytorchjob import notes, render_pytorchjob
from runner.spec import SHARED_MOUNT


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
    root = Path(SHARED_MOUNT)
    loaded = load_file(file, sets, settings().defaults, Target(root, root / contract.INPUTS_DIR))
    hashes = {seen: source_sha256(local) for seen, local in loaded.sources.items()}
    content = content_hash(loaded.run, hashes, loaded.job.model_dump(mode="json", exclude={"context"}))
    run = run_id(loaded.run.name, content)
    manifest = render_pytorchjob(run, loaded.run.name, content, run_config.dump(loaded.run), loaded.job)
    for note in notes(loaded.job):
        output.say(f"note: {note}")
    for seen, local in loaded.sources.items():
        output.say(f"note: pods read {local} as {seen}: copy it to the volume first")
    if form == "json":
        output.show_json(manifest)
    else:
        output.show(output.yaml_text(manifest))
