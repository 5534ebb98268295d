"""Runs `python -m opensloth.<module>` for what needs a tokenizer or a model, and reads its JSON lines."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from opensloth.contract import Cause
from runner.errors import MissingExtraError, RunnerError, UsageError
from runner.plan import BuiltData

_NEEDED: Final = ("torch", "transformers", "peft", "datasets", "accelerate", "pyarrow")
Event = dict[str, Any]


def has_train_extra() -> bool:
    """Whether the packages that train are installed; imports none of them."""
    return all(importlib.util.find_spec(name) is not None for name in _NEEDED)


def require_train_extra(what: str) -> None:
    if not has_train_extra():
        raise MissingExtraError(what)


def build_data(config_text: str, report: Callable[[Event], None]) -> BuiltData:
    """Prepare the dataset of a resolved config, or find it in the cache.

    report: gets every progress and note event. Raises RunnerError with what the build said.
    """
    with as_file(config_text) as config:
        return BuiltData.from_event(ask_data(["build", "--config", config], report))


def ask_data(arguments: Sequence[str], report: Callable[[Event], None] | None = None) -> Event:
    """Run `python -m opensloth.data ...`; returns its result event.

    Raises RunnerError with the error event, or with the last line of stderr when it died without one.
    """
    require_train_extra(f"oslo data {arguments[0]}")
    result: Event | None = None
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(data_command(*arguments), stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "error":
                    raise _error(event)
                if event["event"] == "result":
                    result = event
                elif report is not None:
                    report(event)
        if result is None:
            errors.seek(0)
            said = errors.read().strip().rpartition("\n")[2]
            raise RunnerError(f"oslo data {arguments[0]} ended with exit code {process.returncode}: {said}")
    return {key: value for key, value in result.items() if key != "event"}


def show_data(arguments: Sequence[str]) -> int:
    """Run `python -m opensloth.data ...` on this terminal; returns its exit code."""
    require_train_extra(f"oslo data {arguments[0]}")
    return subprocess.run(data_command(*arguments), check=False).returncode


@contextmanager
def as_file(config_text: str) -> Iterator[str]:
    """The path of a file that holds the text, so that stdin stays the user's."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="oslo-") as file:
        file.write(config_text)
        file.flush()
        yield file.name


def data_command(*arguments: str) -> list[str]:
    # -P: the user's working directory, which may have a folder `datasets`, is not on the path.
    return [sys.executable, "-P", "-m", "opensloth.data", *arguments]


def _error(event: Event) -> RunnerError:
    kind = UsageError if event["cause"] == Cause.CONFIG else RunnerError
    return kind(event["message"], event.get("hint", ""))
