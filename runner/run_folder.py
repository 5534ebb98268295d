"""The files of one local run. Read here, and written where the submitting side writes them."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from opensloth import contract, run_config
from opensloth.files import create_json, read_json, write_atomically
from opensloth.process import identify_self
from opensloth.run_config import RunConfig
from runner.attempt_files import read_attempt
from runner.backend import AttemptRecord, RunStatus
from runner.errors import NotFoundError
from runner.event_log import tail_events
from runner.identity import name_of
from runner.process import is_alive
from runner.status import AttemptFacts, RunFacts, derive

LAUNCHER_OUTPUT: Final = "launcher.out"
"""stdout and stderr of the launcher, of all attempts."""
LOCK_FILE: Final = "submit.lock"
_OUTPUT_BYTES: Final = 4096
_POLL_SECONDS: Final = 0.05
_TOLD_OF: Final = 8
"""So many attempts `oslo why` looks at."""


class RunFolder:
    """`<root>/runs/<run>`."""

    def __init__(self, path: Path, handle: str) -> None:
        self.path = path
        self.handle = handle

    @property
    def run(self) -> str:
        return self.path.name

    def exists(self) -> bool:
        return (self.path / contract.CONFIG_FILE).is_file()

    def require(self) -> None:
        """Raises NotFoundError when the run is not there (any more)."""
        if not self.exists():
            raise self._not_found()

    def config(self) -> RunConfig:
        """Raises ConfigError when another version wrote it and this one cannot read it."""
        try:
            text = (self.path / contract.CONFIG_FILE).read_text()
        except FileNotFoundError as error:
            raise self._not_found() from error
        return run_config.load(text)

    def _not_found(self) -> NotFoundError:
        return NotFoundError(f"{self.handle} is not there (any more)", "oslo list shows what is")

    def write_config(self, text: str) -> None:
        write_atomically(self.path / contract.CONFIG_FILE, text.encode())

    # --- attempts ---------------------------------------------------------------------------------

    def attempt_numbers(self) -> list[int]:
        attempts = self.path / contract.ATTEMPTS_DIR
        try:
            return sorted(int(entry.name) for entry in attempts.iterdir() if entry.name.isdigit())
        except FileNotFoundError:
            return []

    def attempt_folder(self, number: int) -> Path:
        return self.path / contract.ATTEMPTS_DIR / str(number)

    def attempt(self, number: int) -> AttemptFacts:
        folder = self.attempt_folder(number)
        started = read_json(folder / contract.STARTED_FILE)
        alive = started is not None and is_alive(started)
        # Read after the look at the process: one that just left has written its end by now.
        ended = read_json(folder / contract.ENDED_FILE)
        return AttemptFacts(number, started, ended, read_json(folder / contract.STOP_FILE), alive)

    def records(self) -> list[AttemptRecord]:
        """The latest attempts, the oldest first."""
        return [read_attempt(self.attempt_folder(number)) for number in self.attempt_numbers()[-_TOLD_OF:]]

    # --- the whole run ----------------------------------------------------------------------------

    def status(self, submitting: bool | None = None) -> RunStatus:
        """submitting: whether somebody is starting it; None: as the lock says.

        Raises NotFoundError when the run is not there.
        """
        self.require()
        if submitting is None:
            submitting = self.is_being_submitted()
        numbers = self.attempt_numbers()
        attempts = [self.attempt(number) for number in dict.fromkeys((*numbers[:1], *numbers[-1:]))]
        events = tail_events(self.path / contract.EVENTS_FILE, numbers[-1]) if numbers else []
        final = self.path / contract.FINAL_DIR
        facts = RunFacts(
            run=self.run,
            handle=self.handle,
            name=name_of(self.run),
            folder=str(self.path),
            submitting=submitting,
            last_words=self.last_words(),
            final=str(final) if final.is_dir() else None,
        )
        return derive(facts, attempts, events)

    def last_words(self) -> str:
        """The last line that the launcher printed after its last event; "" when there is none."""
        try:
            with (self.path / LAUNCHER_OUTPUT).open("rb") as stream:
                stream.seek(max(0, stream.seek(0, 2) - _OUTPUT_BYTES))
                lines = stream.read().decode(errors="replace").strip().split("\n")
        except FileNotFoundError:
            return ""
        return "" if lines[-1].startswith(contract.EVENT_PREFIX) else lines[-1]

    def remove(self) -> None:
        """Take the run away at once, then delete its files."""
        aside = self.path.with_name(f".{self.run}.{uuid.uuid4().hex[:8]}.deleted")
        self.path.rename(aside)
        while aside.exists():
            with suppress(FileNotFoundError):  # who waits for the lock takes its own temporary file away
                shutil.rmtree(aside)

    # --- the submit lock --------------------------------------------------------------------------

    def is_being_submitted(self) -> bool:
        owner = read_json(self.path / LOCK_FILE)
        return owner is not None and is_alive(owner)

    @contextmanager
    def submitting(self, *, make: bool = False) -> Iterator[None]:
        """Hold the run's lock; wait for another who holds it. A lock whose owner is gone is taken over.

        make: make the folder when it is not there; otherwise raises NotFoundError.
        """
        me = identify_self() | {"token": uuid.uuid4().hex}
        lock = self.path / LOCK_FILE
        while not self._create(lock, me, make):
            owner = read_json(lock)
            if owner is not None and not is_alive(owner):
                _take_away(lock, owner["token"])
            else:
                time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            # Whoever deleted the run took the lock along; one that is here may be the next one's.
            owner = read_json(lock)
            if owner is not None and owner["token"] == me["token"]:
                lock.unlink()

    def _create(self, lock: Path, me: dict[str, Any], make: bool) -> bool:
        """Write the lock unless there is one; False also when the folder was deleted under our hands."""
        if make:
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            return create_json(lock, me)
        except FileNotFoundError as error:
            if make:
                return False
            raise self._not_found() from error


def _take_away(lock: Path, token: str) -> None:
    """Remove the lock of a dead owner, unless somebody else was quicker and it is a living one's by now."""
    aside = lock.with_name(f".{lock.name}.{uuid.uuid4().hex[:8]}")
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    taken = read_json(aside)
    if taken is not None and taken["token"] != token:
        create_json(lock, taken)
    aside.unlink()
