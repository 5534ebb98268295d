"""Tables on stdout, progress and warnings on stderr, one JSON document with -o json."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TextIO

import click

from opensloth.contract import LAUNCHER_RANK
from opensloth.event_lines import render_event
from opensloth.human import human_duration
from runner.backend import CLUSTER_SCHEME, LOCAL_SCHEME, LogLine, RunStatus, State

_COLOURS: Final = {
    State.PENDING: "yellow",
    State.PREPARING: "yellow",
    State.RUNNING: "cyan",
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.CANCELLED: "magenta",
}
_UNKNOWN: Final = "-"


def use_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Colour is for terminals whose user has not said NO_COLOR."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """Progress, warnings, next commands: for people, on stderr."""
    click.echo(text, err=True)


def event_sayer() -> Callable[[Mapping[str, Any]], None]:
    """Says events on stderr, one line each; the same progress again is not said again."""
    last = ""

    def say_event(event: Mapping[str, Any]) -> None:
        nonlocal last
        line = render_event(event)
        if event["event"] != "progress" or line != last:
            say(line)
        last = line

    return say_event


def show(text: str) -> None:
    """The answer, on stdout."""
    click.echo(text, color=use_colour(sys.stdout, os.environ))


def show_json(value: Any) -> None:
    """The answer as one document, on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_json_line(value: Any) -> None:
    """One answer of several, as they come."""
    click.echo(json.dumps(value, ensure_ascii=False))


def yaml_text(value: Any) -> str:
    """A plain value as YAML: keys in the order of the value, no aliases, the same bytes each time."""
    import yaml  # only `render` needs it

    base: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

    class Dumper(base):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_representer(
        str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
    )
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110).rstrip("\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(click.unstyle(line[i])) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell + " " * (width - len(click.unstyle(cell))) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def log_line(line: LogLine) -> str:
    """`[0] step 12/60  loss 1.234`; a launcher's lines as [launcher], on other nodes [launcher 1]."""
    return f"[{_who(line.rank)}] {line.text}"


def _who(rank: int) -> str:
    if rank > LAUNCHER_RANK:
        return str(rank)
    return "launcher" if rank == LAUNCHER_RANK else f"launcher {LAUNCHER_RANK - rank}"


def log_json(line: LogLine) -> dict[str, Any]:
    return {"rank": line.rank, "text": line.text, "event": line.event}


def status_text(status: RunStatus, now: float) -> str:
    """One run as `KEY  value` lines; keys that have nothing to say are left out."""
    shown: list[tuple[str, str | None]] = [
        ("run", status.run),
        ("state", state_text(status)),
        ("step", _step(status)),
        ("loss", None if status.loss is None else f"{status.loss:.4g}"),
        ("evaluation loss", None if status.eval_loss is None else f"{status.eval_loss:.4g}"),
        ("speed", _speed(status)),
        ("ETA", None if status.eta is None else human_duration(status.eta)),
        ("restarts", str(status.attempt - 1) if status.attempt > 1 else None),
        ("age", _age(status, now)),
        ("took", _took(status)),
        ("reason", status.reason),
        ("result", status.final),
        ("folder", status.folder),
    ]
    rows = [(key, value) for key, value in shown if value is not None]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def status_line(status: RunStatus) -> str:
    """One run as one line, for `wait` and for `status -w` off a terminal."""
    parts = [str(status.state)]
    if (step := _step(status)) is not None:
        parts.append(f"step {step}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4g}")
    if status.eta is not None:
        parts.append(f"ETA {human_duration(status.eta)}")
    if status.reason:
        parts.append(status.reason)
    return "  ".join(parts)


def list_text(statuses: Sequence[RunStatus], now: float) -> str:
    header = ("RUN", "WHERE", "STATE", "STEP", "LOSS", "TOK/S", "ETA", "RESTARTS", "AGE")
    rows = [
        (
            status.run,
            _where(status.handle),
            state_text(status),
            _step(status) or _UNKNOWN,
            _UNKNOWN if status.loss is None else f"{status.loss:.4g}",
            _UNKNOWN if status.target_tokens_per_second is None else f"{status.target_tokens_per_second:,.0f}",
            _UNKNOWN if status.eta is None else human_duration(status.eta),
            str(max(0, status.attempt - 1)),
            _age(status, now) or _UNKNOWN,
        )
        for status in statuses
    ]
    return table(header, rows)


def _where(handle: str) -> str:
    """`here`, or the cluster's namespace."""
    return "here" if handle.startswith(LOCAL_SCHEME) else handle.removeprefix(CLUSTER_SCHEME).partition("/")[0]


def state_text(status: RunStatus) -> str:
    cause = f" ({status.cause})" if status.state is State.FAILED and status.cause else ""
    return click.style(str(status.state), fg=_COLOURS[status.state]) + cause


def _step(status: RunStatus) -> str | None:
    if status.step is None:
        return None
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def _speed(status: RunStatus) -> str | None:
    rate = status.target_tokens_per_second
    return None if rate is None else f"{rate:,.0f} target tok/s"


def _age(status: RunStatus, now: float) -> str | None:
    return None if status.started is None else human_duration(now - status.started)


def _took(status: RunStatus) -> str | None:
    if status.started is None or status.ended is None:
        return None
    return human_duration(status.ended - status.started)
