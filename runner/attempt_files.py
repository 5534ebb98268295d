"""What the files of an attempt tell of it, for `oslo why`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from opensloth import contract
from opensloth.contract import Cause
from opensloth.files import read_json
from runner.backend import AttemptRecord, Word

_STACKS: Final = re.compile(r"rank-(\d+)\.stacks")
_STATE: Final = re.compile(r"^state: (\w)", re.MULTILINE)
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_ODD_STATES: Final = {"T": "stopped by a signal", "t": "held by a debugger", "D": "stuck in the kernel"}
_OUTCOME: Final = re.compile(r"(rank)-(\d+)\.outcome\.json|(node)-(\d+)\.json")


def read_attempt(folder: Path) -> AttemptRecord:
    """folder: `attempts/N`."""
    started, ended = _read(folder / contract.STARTED_FILE), _read(folder / contract.ENDED_FILE)
    return AttemptRecord(
        number=int(folder.name),
        cause=ended.get("cause"),
        message=ended.get("message") or _last_sign(folder) if ended else _last_sign(folder),
        started=started.get("time"),
        ended=ended.get("time"),
        checkpoint_step=started.get("checkpoint_step"),
        words=sorted(_words(folder), key=lambda word: (word.time, word.who)),
        stood={rank: place for rank, place in sorted(_stood(folder)) if place},
    )


def _words(folder: Path) -> Iterator[Word]:
    """Of those that did not end well."""
    for file in folder.iterdir() if folder.is_dir() else ():
        named = _OUTCOME.fullmatch(file.name)
        said = _read(file) if named else {}
        if named and said.get("cause") not in (None, Cause.SUCCEEDED):
            who = " ".join(filter(None, named.groups()))
            yield Word(who, said["cause"], " ".join(str(said.get("message", "")).split()), float(said.get("time", 0)))


def _stood(folder: Path) -> Iterator[tuple[str, str]]:
    """(rank, where its main thread stood when the ranks made no progress)."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if named := _STACKS.fullmatch(file.name):
            yield named[1], _place(file.read_text(errors="replace"))


def _place(stacks: str) -> str:
    """Of what faulthandler wrote, the last thread is the main one; "" when there is nothing to say."""
    *_, main = re.split(r"^(?=(?:Current thread|Thread) )", stacks, flags=re.MULTILINE)
    frame, state = _FRAME.search(main), _STATE.search(stacks)
    where = f"{Path(frame[1]).name}:{frame[2]} in {frame[3]}" if frame else ""
    return ", ".join(filter(None, (_ODD_STATES.get(state[1]) if state else None, where)))


def _last_sign(folder: Path) -> str | None:
    """What there is to say of an attempt without an end."""
    lost, stop = _read(folder / contract.LOST_FILE), _read(folder / contract.STOP_FILE)
    if lost:
        return f"the pod of node {lost.get('node')} vanished without a word: it was deleted, or its machine was lost"
    if stop:
        return f"it was asked to stop ({stop.get('cause')}), and was killed before it had said how it ended"
    return None


def _read(file: Path) -> dict[str, Any]:
    """{} where there is no such file, or none that is whole."""
    found = read_json(file)
    return found if isinstance(found, dict) else {}
