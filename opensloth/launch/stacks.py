"""Where ranks stand that make no progress: their stacks, saved in the attempt's folder, and a sentence about them."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from opensloth import contract
from opensloth.contract import Cause
from opensloth.files import write_atomically
from opensloth.human import human_duration
from opensloth.launch.attempt import Attempt
from opensloth.launch.ending import Ending
from opensloth.process import PROC, stat_fields
from opensloth.pulse import STACKS_SIGNAL, Standing, read_standing, stacks_file

STACKS_SECONDS: Final = 3.0
"""Python writes them from a signal's handler in milliseconds, unless the process is stuck in the kernel."""
OTHERS_SECONDS: Final = 6.0
"""Other nodes look every second or so, and then take STACKS_SECONDS at most."""
_POLL_SECONDS: Final = 0.1
_NAMED: Final = 4
"""So many ranks are told of in the message; the rest are in the files."""
_STATES: Final = {"T": "was stopped by a signal", "t": "is held by a debugger", "D": "is stuck in the kernel"}
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_COLLECTIVES: Final = ("torch/distributed/", "/opensloth/dist.py")


@dataclass(frozen=True)
class Stack:
    """state: what is odd about the process, for people, or "". frames: of its main thread, (file, line, function)."""

    rank: int
    state: str
    frames: Sequence[tuple[str, str, str]]

    @property
    def waits(self) -> bool:
        """Whether it only waits for other ranks."""
        return not self.state and any(part in file for file, _, _ in self.frames for part in _COLLECTIVES)

    def __str__(self) -> str:
        said = [self.state] if self.state else []
        if self.frames:
            own = next((frame for frame in self.frames if "/opensloth/" in frame[0]), self.frames[0])
            top = f"stands at {_place(self.frames[0])}"
            said.append(top if own == self.frames[0] else f"{top}, called at {_place(own)}")
        return f"rank {self.rank} " + (" and ".join(said) or "has not begun, or has left")


def _place(frame: tuple[str, str, str]) -> str:
    file, line, function = frame
    return f"{'/'.join(Path(file).parts[-2:])}:{line} in {function}"


def save_stacks(attempt: Attempt, ranks: range, folder: Path) -> None:
    """Write rank-R.stacks of this node's ranks. folder: where they say where they stand (`opensloth.pulse`)."""
    standings = {rank: _living(read_standing(folder, rank)) for rank in ranks}
    states = {rank: _state(standing) for rank, standing in standings.items()}
    for standing in standings.values():
        if standing is not None:
            with suppress(ProcessLookupError):
                os.kill(standing.pid, STACKS_SIGNAL)
                os.kill(standing.pid, signal.SIGCONT)  # one that was stopped hears nothing
    _wait_for([stacks_file(folder, rank) for rank, standing in standings.items() if standing])
    for rank, standing in standings.items():
        doing = f"process {standing.pid}, {standing.doing}" if standing else "it has not begun, or has left"
        file = stacks_file(folder, rank)
        text = file.read_text(errors="replace") if file.exists() else ""
        head = f"rank {rank}: {doing}\nstate: {states[rank]}\n\n"
        write_atomically(attempt.folder / contract.RANK_STACKS.format(rank=rank), (head + text).encode())


def await_stacks(attempt: Attempt, ranks: int) -> None:
    """Until those of all `ranks` of the attempt are there: once a node kills its own, the others' leave by themselves.

    In vain for a node that stands still as a whole.
    """
    end = time.monotonic() + OTHERS_SECONDS
    while len(_stack_files(attempt)) < ranks and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _living(standing: Standing | None) -> Standing | None:
    """None for a rank that has left: its number may be another process's by now."""
    try:
        is_rank = standing and b"opensloth.train" in (PROC / str(standing.pid) / "cmdline").read_bytes()
    except OSError:
        is_rank = not PROC.exists()
    return standing if is_rank else None


def _state(standing: Standing | None) -> str:
    """What the kernel says of the process: a letter, and where in the kernel it sleeps."""
    fields = stat_fields(standing.pid) if standing else None
    if standing is None or fields is None:
        return "gone"
    try:
        return f"{fields[0]} {(PROC / str(standing.pid) / 'wchan').read_text()}"
    except OSError:
        return fields[0]


def _wait_for(files: Sequence[Path]) -> None:
    """Until all have been written and grow no more; in vain for a process that is stuck in the kernel."""
    end, before = time.monotonic() + STACKS_SECONDS, [0]
    while time.monotonic() < end:
        sizes = [file.stat().st_size for file in files]
        if all(sizes) and sizes == before:
            return
        before = sizes
        time.sleep(_POLL_SECONDS)


def hung_ending(attempt: Attempt, silent: Sequence[int] = ()) -> Ending:
    """From what the launcher that noticed it said, and the stacks that have been saved so far.

    silent: the nodes that said nothing about it.
    """
    said = attempt.read(contract.HUNG_FILE) or {}
    found = sorted((_read_stack(path) for path in _stack_files(attempt)), key=lambda stack: stack.rank)
    culprits = [stack for stack in found if not stack.waits]
    waiting = len(found) - len(culprits)
    told = [str(stack) for stack in culprits[:_NAMED]]
    if len(culprits) > _NAMED:
        told.append(f"{len(culprits) - _NAMED} more stand still")
    if waiting:
        who, wait = ("other" if culprits else "rank"), ("wait" if waiting > 1 else "waits")
        told.append(f"{waiting} {who}{'s' * (waiting > 1)} {wait} for {'it' if culprits else 'others'}")
    if silent:
        told.append(f"nothing was heard of node {', '.join(map(str, silent))}")
    head = f"no progress for {human_duration(said.get('seconds', 0.0))} at {said.get('doing', 'an unknown place')}"
    return Ending(
        Cause.HUNG,
        f"{head}: {'; '.join(told) or 'no rank could be looked at'}",
        f"the stacks of all ranks are in {attempt.folder / contract.RANK_STACKS.format(rank='*')}",
    )


def _stack_files(attempt: Attempt) -> list[Path]:
    prefix, suffix = contract.RANK_STACKS.split("{rank}")
    return [attempt.folder / name for name in attempt.files() if name.startswith(prefix) and name.endswith(suffix)]


def _read_stack(path: Path) -> Stack:
    rank = int(path.name.split("-")[1].split(".")[0])
    text = path.read_text(errors="replace")
    state = re.search(r"^state: (\S+)", text, re.MULTILINE)
    *_, main = re.split(r"^(?=Thread )", text, flags=re.MULTILINE)
    current = text.partition("Current thread")[2].partition("\n\n")[0]
    frames = _FRAME.findall(current or main)
    return Stack(rank, _STATES.get(state[1], "") if state else "", frames)
