"""The folder of one attempt: what the launchers of all nodes and the ranks say to each other, in files.

Whether a file is there is asked by listing its folder: NFS answers a question for one name from memory, for up
to a minute, while opening a folder asks the server.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from opensloth import contract
from opensloth.contract import Cause
from opensloth.files import create_json, read_json, write_json
from opensloth.launch.ending import Ending, read_ending
from opensloth.process import identify_self


class Attempt:
    """Attempt `number` of a run; made by node 0, joined by the others."""

    def __init__(self, run: Path, number: int) -> None:
        self.run, self.number = run, number
        self.folder = run / contract.ATTEMPTS_DIR / str(number)

    @classmethod
    def allocate(cls, run: Path, nodes: int) -> Attempt:
        """Make attempts/<n> for the first n that nobody has: the number is the token that fences older ones."""
        (run / contract.ATTEMPTS_DIR).mkdir(parents=True, exist_ok=True)
        number = 1 + max(attempt_numbers(run), default=0)
        while True:
            attempt = cls(run, number)
            try:
                attempt.folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                break
        facts = {"nodes": nodes, "checkpoint_step": newest_checkpoint_step(run)}
        write_json(attempt.folder / contract.STARTED_FILE, identify_self() | facts)
        return attempt

    def files(self) -> set[str]:
        """The names in the folder; none when it has been deleted."""
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> Any | None:
        return read_json(self.folder / name)

    # --- asking to stop -----------------------------------------------------------------------------

    def ask_to_stop(self, cause: str) -> None:
        """The first to ask decides the cause."""
        create_json(self.folder / contract.STOP_FILE, {"cause": cause, "time": time.time()})

    def stop_cause(self) -> str | None:
        """Why the attempt was asked to stop, if it was."""
        if contract.STOP_FILE not in self.files():
            return None
        return str((self.read(contract.STOP_FILE) or {}).get("cause", Cause.TERMINATED))

    def superseded_by(self) -> int | None:
        newest = max(attempt_numbers(self.run), default=0)
        return newest if newest > self.number else None

    # --- nodes --------------------------------------------------------------------------------------

    def take_place(self, node: int, token: str) -> bool:
        """Whether the place of `node` is this launcher's, by now or already. token: of this launcher."""
        name = contract.JOINED_FILE.format(node=node)
        me = {"host": socket.gethostname(), "token": token, "pid": os.getpid(), "time": time.time()}
        if name not in self.files() and create_json(self.folder / name, me):
            return True
        return (self.read(name) or {}).get("token") == token

    def declare_lost(self, node: int) -> None:
        """Say that whoever had the place of `node` vanished without a word."""
        who = {"node": node, "host": socket.gethostname(), "time": time.time()}
        create_json(self.folder / contract.LOST_FILE, who)

    def declare_hung(self, node: int, rank: int, seconds: float, doing: str) -> None:
        """Say that a rank of `node` makes no progress; the first to say so counts."""
        what = {"node": node, "rank": rank, "seconds": round(seconds, 1), "doing": doing}
        create_json(self.folder / contract.HUNG_FILE, what)

    def missing(self, pattern: str, nodes: int) -> list[int]:
        """The nodes from 1 whose file (JOINED_FILE, READY_FILE, NODE_FILE) is not there."""
        there = self.files()
        return [node for node in range(1, nodes) if pattern.format(node=node) not in there]

    def write_node(self, node: int, ending: Ending) -> None:
        write_json(self.folder / contract.NODE_FILE.format(node=node), ending.record() | {"time": ending.time})

    def node_endings(self, nodes: int) -> dict[int, Ending]:
        """How it ended on those nodes that have said so."""
        there = self.files()
        names = {node: contract.NODE_FILE.format(node=node) for node in range(1, nodes)}
        found = {node: self.read(name) for node, name in names.items() if name in there}
        return {node: read_ending(record) for node, record in found.items() if record}

    def outcomes(self, ranks: range) -> list[Ending]:
        """Why ranks left, of those that could say it."""
        records = (self.read(contract.RANK_OUTCOME.format(rank=rank)) for rank in ranks)
        return [read_ending(record) for record in records if record]

    # --- the end ------------------------------------------------------------------------------------

    def end(self, ending: Ending) -> None:
        write_json(self.folder / contract.ENDED_FILE, ending.record() | {"time": time.time()})

    def ended(self) -> Ending | None:
        record = self.read(contract.ENDED_FILE) if contract.ENDED_FILE in self.files() else None
        return read_ending(record) if record else None


def attempt_numbers(run: Path) -> list[int]:
    """Of all attempts there are, the oldest first."""
    try:
        return sorted(int(name) for name in os.listdir(run / contract.ATTEMPTS_DIR) if name.isdigit())
    except FileNotFoundError:
        return []


def newest_checkpoint_step(run: Path) -> int | None:
    """By name: whether it is whole is looked at when it is resumed from."""
    prefix = contract.CHECKPOINT_PREFIX
    try:
        names = os.listdir(run / contract.CHECKPOINTS_DIR)
    except FileNotFoundError:
        return None
    steps = [int(name.removeprefix(prefix)) for name in names if name.removeprefix(prefix).isdigit()]
    return max(steps, default=None)
