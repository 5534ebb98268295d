"""How the launchers of several nodes come together: join an attempt, wait for each other, begin."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensloth import contract
from opensloth.contract import Cause
from opensloth.events import Events
from opensloth.files import write_json
from opensloth.human import human_duration
from opensloth.launch import machine
from opensloth.launch.attempt import Attempt, attempt_numbers
from opensloth.launch.ending import Ending
from opensloth.launch.part import Part, Teller
from opensloth.launch.settings import Settings


class Entrance:
    """Where the launcher of a node above 0 finds the attempt to take part in."""

    def __init__(self, settings: Settings, token: str, events: Events) -> None:
        """token: of this launcher. events: heard while there is no attempt yet."""
        self._settings, self._token = settings, token
        self._teller = Teller(events)
        self._silent: tuple[int, Any] | None = None

    def avoid(self, attempt: Attempt, beat: Any) -> None:
        """Do not join `attempt` again while node 0's beat is still this one."""
        self._silent = (attempt.number, beat)

    def join(self, leave: Callable[[], Ending | None]) -> Attempt | Ending:
        """The newest attempt, when it waits for this node; waits for one. leave: why there is no more reason to."""
        while True:
            reason = leave()
            if reason is not None:
                return reason
            newest = max(attempt_numbers(self._settings.run), default=0)
            attempt = Attempt(self._settings.run, newest)
            waits = self._obstacle(attempt) if newest else "waiting for node 0 to start"
            if waits is None:
                return attempt
            self._teller.say(waits)
            time.sleep(self._settings.poll_seconds)

    def _obstacle(self, attempt: Attempt) -> str | None:
        """Why the attempt cannot be joined, as a sentence; None: it has been joined."""
        node, files = self._settings.node, attempt.files()
        another = f"waiting for node 0 to start another attempt: attempt {attempt.number}"
        if contract.STARTED_FILE not in files:
            return f"waiting for node 0 to start attempt {attempt.number}"
        if contract.ENDED_FILE in files:
            return f"{another} has ended"
        if contract.LOST_FILE in files:
            return f"{another} has lost a node"
        if contract.NODE_FILE.format(node=node) in files:
            return f"{another} has ended on this node"
        if self._silent == (attempt.number, (attempt.read(contract.BEAT_FILE) or {}).get("beat")):
            return f"waiting for node 0, which is not heard of in attempt {attempt.number}"
        if not attempt.take_place(node, self._token):
            attempt.declare_lost(node)  # who had the place vanished without a word: all of it must begin again
            return f"{another} has lost the pod that was here before"
        return None


def wait_for_all(part: Part) -> Ending | None:
    """Node 0: until every node has started and has its data; how the attempt ends if they do not come."""
    settings, attempt = part.settings, part.attempt
    limit = settings.start_timeout_seconds

    def all_started() -> bool | Ending | None:
        missing = attempt.missing(contract.JOINED_FILE, settings.nodes)
        if missing and time.monotonic() - part.began_at >= limit:
            return _not_started(missing, settings.nodes, limit)
        return None if missing else True

    def all_ready() -> bool | None:
        return None if attempt.missing(contract.READY_FILE, settings.nodes) else True

    def for_start() -> str:
        missing = attempt.missing(contract.JOINED_FILE, settings.nodes)
        return f"waiting for {_nodes(missing, settings.nodes)} to start, for at most {human_duration(limit)}"

    def for_data() -> str:
        missing = attempt.missing(contract.READY_FILE, settings.nodes)
        return f"waiting for {_nodes(missing, settings.nodes)} to have the dataset ready"

    for look, waiting in ((all_started, for_start), (all_ready, for_data)):
        found = part.wait_for(look, waiting, "waiting for the other nodes")
        if isinstance(found, Ending):
            return found
    return None


def _not_started(missing: list[int], nodes: int, limit: float) -> Ending:
    return Ending(
        Cause.START_TIMEOUT,
        f"{_nodes(missing, nodes)} did not start within {human_duration(limit)} (job.start_timeout)",
        "`oslo status JOB` says what those pods wait for; submitting again goes on from the files",
    )


def _nodes(numbers: list[int], nodes: int) -> str:
    return f"node{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of {nodes}"


def say_go(part: Part) -> str:
    """Node 0: all is ready; returns the address that the ranks meet at."""
    address = machine.own_address(part.settings.master_address)
    write_json(part.attempt.folder / contract.GO_FILE, {"address": address, "time": time.time()})
    return address


def wait_for_go(part: Part, data: dict[str, Any]) -> str | Ending:
    """Another node: say that the dataset is there, and wait for the address that the ranks meet at."""
    settings, attempt = part.settings, part.attempt
    write_json(_ready_file(attempt, settings.node), {"data": data["path"], "time": time.time()})

    def go() -> str | None:
        said = attempt.read(contract.GO_FILE) if contract.GO_FILE in attempt.files() else None
        return str(said["address"]) if said else None

    return part.wait_for(go, lambda: "waiting for node 0 to say go", "waiting for node 0")


def _ready_file(attempt: Attempt, node: int) -> Path:
    return attempt.folder / contract.READY_FILE.format(node=node)
