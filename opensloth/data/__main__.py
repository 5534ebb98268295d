"""`python -m opensloth.data build|preview|ls|prune|verify`: JSON lines on stdout, for programs.

Only `preview` speaks to people, unless it is asked for JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth.contract import EXIT_CODE_OF_CAUSE, Cause, ExitCode
from opensloth.data.file_errors import file_errors
from opensloth.errors import OpenSlothError
from opensloth.run_config import RunConfig, load

if TYPE_CHECKING:
    from opensloth.data.losses import Report

_STDOUT, _STDERR = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of its outcome's cause."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is not for our users
    options = _parser().parse_args(arguments)
    if options.output == "text":
        return _run(options, _say_to_people)
    try:
        with _stdout_for_events() as say:
            return _run(options, say)
    except BrokenPipeError:  # nobody reads any more
        return ExitCode.ERROR
    except OSError as error:
        sys.stderr.write(f"error: standard output: {error.strerror}\n")
        return ExitCode.ERROR


def _run(options: argparse.Namespace, say: Report) -> int:
    command: Callable[[argparse.Namespace, Report], None] = options.command
    try:
        with file_errors(getattr(options, "cache", None) or "opensloth.data_cache_path"):
            command(options, say)
    except OpenSlothError as error:
        say("error", cause=error.cause, message=error.message, hint=error.hint)
        return EXIT_CODE_OF_CAUSE[error.cause]
    return ExitCode.SUCCEEDED


@contextmanager
def _stdout_for_events() -> Iterator[Report]:
    """Standard output for the events alone; what else is printed, by any library, goes to standard error."""
    sys.stdout.flush()
    # Half a surrogate pair, as in names of files that are not UTF-8, stays readable JSON: \udc80.
    with os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8", errors="backslashreplace") as lines:

        def say(event: str, /, **fields: Any) -> None:
            lines.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
            lines.flush()

        os.dup2(_STDERR, _STDOUT)
        try:
            with redirect_stdout(sys.stderr):
                yield say
        finally:
            os.dup2(lines.fileno(), _STDOUT)


def _say_to_people(event: str, /, **fields: Any) -> None:
    """Only errors: a preview has its notes in its text."""
    if event == "error":
        hint = f"\n  {fields['hint']}" if fields["hint"] else ""
        sys.stderr.write(f"error: {fields['message']}{hint}\n")


def _build(options: argparse.Namespace, say: Report) -> None:
    from opensloth.data.build import build

    say("result", **asdict(build(_config(options), say)))


def _preview(options: argparse.Namespace, say: Report) -> None:
    from opensloth.data.preview import as_text, preview

    seen = preview(_config(options), options.rows)
    if options.output == "json":
        say("result", **asdict(seen))
    else:
        color = sys.stdout.isatty() if options.color is None else options.color
        sys.stdout.write(as_text(seen, color=color))


def _ls(options: argparse.Namespace, say: Report) -> None:
    from opensloth.data.cache import entries

    say("result", entries=[_shown(entry) for entry in entries(_cache(options))])


def _prune(options: argparse.Namespace, say: Report) -> None:
    from opensloth.data.cache import entries, remove_entry, select_for_pruning

    found = entries(_cache(options))
    chosen = select_for_pruning(found, older_than_days=options.older_than, unused=options.unused)
    if options.yes:
        for entry in chosen:
            remove_entry(entry)
    say("result", removed=options.yes, entries=[_shown(entry) for entry in chosen])


def _verify(options: argparse.Namespace, say: Report) -> None:
    from opensloth.data.cache import damaged_files, entry_folders
    from opensloth.errors import DataError

    folder = _cache(options)
    paths = [folder] if (folder / "oslo.json").is_file() else entry_folders(folder)
    for path in paths:
        if damaged := damaged_files(path):
            raise DataError(f"{path}: damaged: {', '.join(damaged)}", "remove it and prepare it again: oslo data build")
    say("result", verified=[str(path) for path in paths])


def _shown(entry: Any) -> dict[str, Any]:
    return asdict(entry) | {"path": str(entry.path)}


def _config(options: argparse.Namespace) -> RunConfig:
    return load(sys.stdin.read() if options.config == "-" else _text(Path(options.config)))


def _cache(options: argparse.Namespace) -> Path:
    return Path(options.cache) if options.cache else Path(_config(options).opensloth.data_cache_path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        problem = OpenSlothError(f"{path}: {error.strerror}")
        problem.cause = Cause.CONFIG
        raise problem from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m opensloth.data", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, command: Callable[[argparse.Namespace, Report], None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name)
        sub.set_defaults(command=command, output="json")
        return sub

    def add_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--config", required=True, help="a resolved config; - reads it from stdin")

    def add_cache(sub: argparse.ArgumentParser) -> None:
        where = sub.add_mutually_exclusive_group(required=True)
        where.add_argument("--config", help="a resolved config, whose cache is meant; - reads it from stdin")
        where.add_argument("--cache", help="the cache folder")

    add_config(add("build", _build))
    preview = add("preview", _preview)
    add_config(preview)
    preview.add_argument("--rows", type=int, default=3, help="rows to show from the start; as many are sampled")
    preview.add_argument("--color", action=argparse.BooleanOptionalAction, default=None)
    preview.add_argument("-o", "--output", choices=("text", "json"), default="text")
    add_cache(add("ls", _ls))
    prune = add("prune", _prune)
    add_cache(prune)
    prune.add_argument("--older-than", type=float, metavar="DAYS", help="last used before so many days")
    prune.add_argument("--unused", action="store_true", help="not used by any run that still exists")
    prune.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")
    verify = add("verify", _verify)
    add_cache(verify)
    return parser


if __name__ == "__main__":
    sys.exit(main())
