"""oslo data: thin fronts of `python -m opensloth.data`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from opensloth import run_config
from opensloth.human import human_bytes, human_duration
from opensloth.run_config import DEFAULT_DATA_CACHE_PATH
from runner import output
from runner.commands.common import file_argument, is_interactive, json_option, set_option, settings, yes_option
from runner.config_file import Target, load_file
from runner.errors import UsageError
from runner.training_side import as_file, ask_data, build_data, show_data

_cache_of = click.argument("file", type=click.Path(path_type=Path), required=False)


@click.group()
def data() -> None:
    """Look at, build and tidy up prepared datasets."""


@data.command()
@file_argument
@click.option("--rows", type=click.IntRange(min=1), default=3, help="Rows from the start; as many are sampled.")
@set_option
@json_option
def preview(file: Path, rows: int, sets: tuple[str, ...], as_json: bool) -> int:
    """Show samples with their targets in colour, and what would be dropped or cut."""
    with as_file(_resolved(file, sets)) as config:
        arguments = ["preview", "--config", config, "--rows", str(rows)]
        if as_json:
            output.show_json(ask_data([*arguments, "-o", "json"]))
            return 0
        color = "--color" if output.use_colour(sys.stdout, os.environ) else "--no-color"
        return show_data([*arguments, color])


@data.command()
@file_argument
@set_option
@json_option
def build(file: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Prepare the dataset of a config file, or find it in the cache.

    The last line of stdout is the dataset's path.
    """
    built = build_data(_resolved(file, sets), output.event_sayer())
    if as_json:
        output.show_json(vars(built))
        return
    found = "found in the cache" if built.reused else "prepared"
    output.say(f"{found}: {built.documents:,} documents, {built.rows:,} rows, {built.target_tokens:,} target tokens")
    output.show(built.path)


@data.command()
@_cache_of
@json_option
def ls(file: Path | None, as_json: bool) -> None:
    """List the prepared datasets.

    FILE: of its data_cache_path instead of the usual one.
    """
    entries = ask_data(["ls", "--cache", _cache(file)])["entries"]
    if as_json:
        output.show_json(entries)
    elif entries:
        output.show(_table(entries))
    else:
        output.say("no prepared datasets yet: oslo data build FILE prepares one")


@data.command()
@_cache_of
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Last used before so many days.")
@click.option("--unused", is_flag=True, help="Used by no run that still exists.")
@yes_option
@json_option
def prune(file: Path | None, older_than: float | None, unused: bool, yes: bool, as_json: bool) -> None:
    """Delete prepared datasets that nobody needs.

    Shows them and asks; without a terminal and without -y nothing is deleted.
    """
    choice = ["prune", "--cache", _cache(file), *(["--unused"] if unused else [])]
    choice += ["--older-than", str(older_than)] if older_than is not None else []
    if older_than is None and not unused:
        raise UsageError("say which: --older-than DAYS, --unused or both")
    found = ask_data(choice)
    if not as_json and found["entries"]:
        output.show(_table(found["entries"]))
    if found["entries"] and (yes or (is_interactive() and click.confirm("Delete these?", err=True))):
        found = ask_data([*choice, "--yes"])
    if as_json:
        output.show_json(found)
    elif found["entries"]:
        output.say("deleted" if found["removed"] else "nothing deleted: -y deletes them")
    else:
        output.say("nothing to delete")


@data.command()
@_cache_of
@json_option
def verify(file: Path | None, as_json: bool) -> None:
    """Compare every file of the prepared datasets with its hash."""
    verified = ask_data(["verify", "--cache", _cache(file)])["verified"]
    if as_json:
        output.show_json({"verified": verified})
    else:
        output.say("1 dataset is whole" if len(verified) == 1 else f"{len(verified)} datasets are whole")


def _resolved(file: Path, sets: tuple[str, ...]) -> str:
    now = settings()
    return run_config.dump(load_file(file, sets, now.defaults, Target(now.root)).run)


def _cache(file: Path | None) -> str:
    now = settings()
    if file is None:
        return str(now.root / DEFAULT_DATA_CACHE_PATH)
    return load_file(file, (), now.defaults, Target(now.root)).run.opensloth.data_cache_path


def _table(entries: list[dict[str, Any]]) -> str:
    rows = [
        (
            entry["key"][:12],
            entry["name"],
            f"{entry['documents']:,}",
            f"{entry['tokens']:,}",
            human_bytes(entry["size"]),
            human_duration(time.time() - entry["last_used"]),
            str(len(entry["used_by"])),
        )
        for entry in entries
    ]
    return output.table(("KEY", "NAME", "DOCUMENTS", "TOKENS", "SIZE", "UNUSED FOR", "RUNS"), rows)
