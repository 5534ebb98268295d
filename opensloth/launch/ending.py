"""How an attempt ends: the first cause, found among what the ranks and the nodes wrote. Pure."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opensloth.contract import EXIT_CODE_OF_CAUSE, Cause
from opensloth.orders import CAUSES as ASKED

_LOST = (Cause.PEER_LOST,)
_KILLED = (Cause.KILLED, Cause.HUNG, Cause.VOLUME)


@dataclass(frozen=True)
class Ending:
    """time: seconds since the epoch at which it came about; it does not tell endings apart."""

    cause: str
    message: str
    hint: str = ""
    time: float = field(default_factory=time.time, compare=False)

    @property
    def exit_code(self) -> int:
        return int(EXIT_CODE_OF_CAUSE[self.cause])

    def record(self) -> dict[str, Any]:
        """As ended.json and node-<k>.json have it."""
        return {"cause": self.cause, "exit_code": self.exit_code, "message": self.message, "hint": self.hint}


def read_ending(record: Mapping[str, Any]) -> Ending:
    """Of a file that a rank or a launcher wrote."""
    return Ending(record["cause"], record["message"], record["hint"], record["time"])


@dataclass(frozen=True)
class NodeFacts:
    """What a launcher knows when its ranks have left.

    code: torchrun's, or that of the only rank, which is alone without it. outcomes: what this node's ranks wrote.
    asked: the cause in stop.json. cut: why the launcher killed the ranks, if it did. memory_limit: the container's
    limit that killed one of its processes ("2.0 GiB"), None: none was. torchrun_log: where torchrun_says stands.
    nodes: how many take part.
    """

    code: int
    outcomes: Sequence[Ending]
    torchrun_says: str
    asked: str | None = None
    cut: Ending | None = None
    memory_limit: str | None = None
    torchrun_log: str = ""
    nodes: int = 1
    alone: bool = False


def first_cause(endings: Iterable[Ending]) -> Ending | None:
    """The earliest fault of somebody's own, else what was asked for, else who was killed or hung, or met
    a fault of the volume.

    Victims come last.
    """
    written = sorted((e for e in endings if e.cause != Cause.SUCCEEDED), key=lambda ending: ending.time)
    own = [e for e in written if e.cause not in (*ASKED, *_KILLED, *_LOST)]
    for kind in (own, *([e for e in written if e.cause in causes] for causes in (ASKED, _KILLED, _LOST))):
        if kind:
            return kind[0]
    return None


def ending_of_node(facts: NodeFacts) -> Ending:
    """How it ended on one node."""
    if facts.code == 0:
        return Ending(Cause.SUCCEEDED, "")
    said = first_cause(e for e in facts.outcomes if e.cause != Cause.PEER_LOST)
    if said is not None:
        return said
    if facts.cut is not None:
        return facts.cut
    if facts.asked:
        return Ending(facts.asked, f"{facts.asked}; the ranks had to be killed, the last checkpoint stands")
    victim, number = _first_killed(facts.torchrun_says) or ("rank 0" if facts.alone else "torchrun", -facts.code)
    if number > 0:
        return killed(victim, number, facts.memory_limit)
    lost = first_cause(facts.outcomes)
    if lost is not None:
        return lost
    hint = f"see {facts.torchrun_log} and the ranks' logs"
    if facts.nodes > 1 and "Root Cause" not in facts.torchrun_says:  # no rank failed: torchrun itself did
        return Ending(Cause.PEER_LOST, "torchrun lost the other nodes", hint)
    return Ending(Cause.ERROR, f"the ranks could not be run (exit code {facts.code})", hint)


def killed(who: str, number: int, memory_limit: str | None) -> Ending:
    """who was ended by a signal. memory_limit: as NodeFacts has it."""
    name = signal.Signals(number).name
    if memory_limit is not None and name == "SIGKILL":
        return Ending(
            Cause.OUT_OF_MEMORY,
            f"{who} was killed (SIGKILL): the container reached its memory limit of {memory_limit}",
            "raise job.memory, or try a smaller batch or model",
        )
    return Ending(Cause.KILLED, f"{who} was killed ({name})", _memory_hint(name))


def _first_killed(torchrun_says: str) -> tuple[str, int] | None:
    """The rank that torchrun calls the root cause, else another that it did not end itself, and the signal."""
    block = r"rank\s*: (\d+)[^\n]*\n\s*exitcode\s*: -(\d+)"
    failures, _, root_cause = torchrun_says.partition("Root Cause")
    by_itself = str(int(signal.SIGTERM))
    others = (found for found in re.finditer(block, failures) if found[2] != by_itself)
    found = re.search(block, root_cause) or next(others, None)
    return (f"rank {found[1]}", int(found[2])) if found else None


def _memory_hint(signal_name: str) -> str:
    if signal_name == "SIGKILL":
        return "if nobody killed it, the machine ran out of memory: see `dmesg`, and try a smaller batch or model"
    return ""
