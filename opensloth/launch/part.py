"""One launcher's part in one attempt: its files, its events, and what tells it to leave."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from opensloth import contract
from opensloth.beat import Beat, Watch
from opensloth.contract import Cause
from opensloth.events import Events
from opensloth.launch import machine
from opensloth.launch.attempt import Attempt
from opensloth.launch.ending import Ending
from opensloth.launch.relay import PodLog, Relay
from opensloth.launch.settings import Settings
from opensloth.pod_log import launcher_rank

REPEAT_SECONDS = 30.0
"""What is waited for is said again after so long."""
Found = TypeVar("Found")


def open_events(settings: Settings, path: Path, attempt: int) -> tuple[Events, PodLog | None]:
    """A launcher's events, and in a pod the log that they are printed to. attempt: 0: none yet."""
    log = PodLog(attempt, settings.node) if settings.in_pod else None
    rank = launcher_rank(settings.node)
    return Events(path, rank=rank, attempt=attempt, say=log.say if log else None), log


class Teller:
    """Says what is waited for: at once, when it changes, and every half minute."""

    def __init__(self, events: Events, clock: Callable[[], float] = time.monotonic) -> None:
        self._events, self._clock = events, clock
        self._said, self._said_at = "", 0.0

    def say(self, what: str) -> None:
        if what != self._said or self._clock() - self._said_at >= REPEAT_SECONDS:
            self._said, self._said_at = what, self._clock()
            self._events.note(what)


class Part:
    """Entered when the attempt is allocated or joined; closed when everything has been said."""

    def __init__(self, settings: Settings, attempt: Attempt) -> None:
        self.settings, self.attempt = settings, attempt
        self.began_at = time.monotonic()
        self.events, log = open_events(settings, self._events_path(), attempt.number)
        self.relay = Relay(log, attempt, self.launcher_log) if log else None
        self._beat = Beat(attempt.folder / contract.BEAT_FILE, lambda: {"train_seconds": round(self.trained(), 1)})
        self._keeps_beat = settings.is_main and settings.in_pod
        self._master_watch = Watch()
        self._trained = 0.0
        self._training_since: float | None = None
        self._oom_kills_before = machine.oom_kills()
        if self._keeps_beat:
            self._beat.write()
            self._beat.start()

    # --- files ---------------------------------------------------------------------------------------

    def _events_path(self) -> Path:
        if self.settings.is_main:
            return self.attempt.run / contract.EVENTS_FILE
        return self.attempt.folder / contract.NODE_EVENTS.format(node=self.settings.node)

    @property
    def launcher_log(self) -> Path:
        return self._own_file(contract.LAUNCHER_LOG, contract.NODE_LAUNCHER_LOG)

    @property
    def torchrun_log(self) -> Path:
        return self._own_file(contract.TORCHRUN_LOG, contract.NODE_TORCHRUN_LOG)

    def _own_file(self, of_main: str, of_others: str) -> Path:
        node = self.settings.node
        return self.attempt.folder / (of_main if node == 0 else of_others.format(node=node))

    # --- training time -------------------------------------------------------------------------------

    def begin_training(self) -> None:
        self._training_since = time.monotonic()

    def end_training(self) -> None:
        self._trained, self._training_since = self.trained(), None

    def trained(self) -> float:
        """Seconds for which the ranks have run."""
        return self._trained if self._training_since is None else time.monotonic() - self._training_since

    def memory_limit_hit(self) -> str | None:
        """The container's memory limit, if the kernel has killed one of its processes for it since the start."""
        hit = self.settings.in_pod and machine.oom_kills() > self._oom_kills_before
        return machine.memory_limit() if hit else None

    # --- reasons to leave ----------------------------------------------------------------------------

    def interruption(self) -> Ending | None:
        """Why this launcher must leave at once, ranks or no ranks."""
        newer = self.attempt.superseded_by()
        if newer is not None:
            return Ending(Cause.SUPERSEDED, f"attempt {newer} has started")
        if not self.settings.is_main and (ended := self.attempt.ended()):
            return ended
        if self.settings.nodes > 1 and contract.LOST_FILE in self.attempt.files():
            node = (self.attempt.read(contract.LOST_FILE) or {}).get("node", "?")
            return Ending(Cause.PEER_LOST, f"the pod of node {node} vanished without a word and was replaced")
        if self.master_is_silent():
            silent = f"node 0 has not been heard of for {self.settings.stale_seconds:.0f} s"
            return Ending(Cause.PEER_LOST, silent)
        return None

    def master_is_silent(self) -> bool:
        """Whether node 0, as another node sees it, is gone."""
        if self.settings.is_main:
            return False
        return self._master_watch.unchanged_seconds(self.master_beat()) >= self.settings.stale_seconds

    def master_beat(self) -> Any:
        return (self.attempt.read(contract.BEAT_FILE) or {}).get("beat")

    def failed_elsewhere(self) -> Ending | None:
        """What the first other node to have failed said about it."""
        if self.settings.nodes == 1:
            return None
        endings = self.attempt.node_endings(self.settings.nodes)
        others = {node: ending for node, ending in endings.items() if node != self.settings.node}
        failed = [(ending.time, node, ending) for node, ending in others.items() if ending.cause != Cause.SUCCEEDED]
        if not failed:
            return None
        _, node, ending = min(failed, key=lambda entry: entry[:2])
        return Ending(ending.cause, f"node {node}: {ending.message}", ending.hint, ending.time)

    def reason_to_leave(self, doing: str) -> Ending | None:
        """For what is done without ranks, which need no time to leave."""
        found = self.interruption() or self.failed_elsewhere()
        if found is not None:
            return found
        asked = self.attempt.stop_cause()
        return Ending(asked, f"{asked} while {doing}") if asked else None

    def wait_for(self, look: Callable[[], Found | None], waiting: Callable[[], str], doing: str) -> Found | Ending:
        """What `look` finds, or why there is no more reason to wait.

        waiting: the sentence that is said meanwhile. doing: as in "terminated while DOING".
        """
        teller = Teller(self.events)
        while True:
            leave = self.reason_to_leave(doing)
            if leave is not None:
                return leave
            found = look()
            if found is not None:
                return found
            teller.say(waiting())
            time.sleep(self.settings.poll_seconds)

    def close(self, last_event: Callable[[], None] = lambda: None) -> None:
        """Hand on what the ranks have said to the last line, then say the last event."""
        if self._keeps_beat:
            self._beat.stop()
        if self.relay:
            self.relay.close()
        last_event()
        self.events.close()

    def write_last_beat(self) -> None:
        """What the ranks have trained, to the second: the deadline is counted from it."""
        if self._keeps_beat:
            self._beat.stop()
            self._beat.write()


def quiet_events(settings: Settings, attempt: int) -> Events:
    """For what belongs to no attempt: it is printed and not written."""
    return open_events(settings, Path(os.devnull), attempt)[0]
