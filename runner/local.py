"""The local backend: runs are supervised processes on this machine; all state is files.

A run's launcher is started in a session of its own, so that neither a closed terminal nor Ctrl-C reaches it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from opensloth import contract
from opensloth.contract import Cause
from opensloth.files import create_json, read_json
from opensloth.run_config import RunConfig
from runner import log_files
from runner.backend import (
    LOCAL_SCHEME,
    Findings,
    LogLine,
    LogQuery,
    Outcome,
    RunStatus,
    State,
    Submission,
    Waiting,
    no_result,
)
from runner.errors import BusyError, LaunchError, NotFoundError
from runner.identity import name_of
from runner.process import descendants, is_alive
from runner.results import place_result
from runner.run_folder import LAUNCHER_OUTPUT, RunFolder

DEFAULT_LAUNCHER: Final = (sys.executable, "-m", "opensloth.launch")
_POLL_SECONDS: Final = 0.02
_KILL_AFTER_SECONDS: Final = 5.0
"""Between SIGTERM and SIGKILL of `cancel --force`."""


class LocalBackend:
    """Runs below `<root>/runs` (see backend.Backend)."""

    def __init__(self, root: Path, launcher: Sequence[str] = DEFAULT_LAUNCHER) -> None:
        """launcher: the command that gets a run folder as its last argument."""
        self._root = root
        self._launcher = tuple(launcher)

    @property
    def poll_seconds(self) -> float:
        return 0.2

    def handle(self, run: str) -> str:
        return LOCAL_SCHEME + run

    def named(self, wanted: str) -> str | None:
        runs = self.runs()
        if wanted in runs:
            return wanted
        of_name = [run for run in runs if name_of(run) == wanted]
        return max(of_name, key=lambda run: (self._started(run), run), default=None)

    def runs(self) -> list[str]:
        folder = self._root / contract.RUNS_DIR
        if not folder.is_dir():
            return []
        names = (entry.name for entry in folder.iterdir() if not entry.name.startswith("."))  # those are being deleted
        return [name for name in names if self._folder(name).exists()]

    def submit(self, run: str, submission: Submission) -> Outcome:
        folder = self._folder(run)
        with folder.submitting(make=True):
            if not folder.exists() or not folder.attempt_numbers():
                outcome = Outcome.STARTED
            else:
                outcome = _OUTCOME_OF_STATE[_as_if_unlocked(folder).state]
            if outcome in (Outcome.STARTED, Outcome.RESUMED):
                folder.write_config(submission.config_text)
                self._start(folder)
        return outcome

    def get(self, run: str) -> RunStatus:
        return self._folder(run).status()

    def findings(self, run: str) -> Findings:
        folder = self._folder(run)
        return Findings(folder.status(), folder.records())

    def config(self, run: str) -> RunConfig:
        return self._folder(run).config()

    def list_runs(self) -> list[RunStatus]:
        statuses = []
        for run in self.runs():
            with suppress(NotFoundError):  # deleted meanwhile
                statuses.append(self.get(run))
        return sorted(statuses, key=lambda status: (status.started or float("inf"), status.run), reverse=True)

    def logs(self, run: str, query: LogQuery) -> Iterator[LogLine]:
        folder = self._folder(run)
        folder.require()
        return log_files.read(folder, query)

    def follow(self, run: str, query: LogQuery) -> Iterator[LogLine | Waiting]:
        folder = self._folder(run)
        folder.require()
        said: str | None = None
        for line in log_files.follow(folder, query):
            if line is not None:
                yield line
                said = None if line.event is None else said
            elif said is None and (said := self._waits_for(run)):
                yield Waiting(said)

    def cancel(self, run: str, *, force: bool) -> None:
        folder = self._folder(run)
        status = folder.status()
        if status.state.is_over:
            raise BusyError(f"{status.handle} has {_PAST[status.state]}: there is nothing to cancel")
        if status.state is State.PENDING:
            raise BusyError(f"{status.handle} is just starting", "try again in a moment")
        attempt = folder.attempt_folder(status.attempt)
        create_json(attempt / contract.STOP_FILE, {"cause": Cause.CANCELLED, "time": time.time()})
        if force:
            _kill(read_json(attempt / contract.STARTED_FILE))

    def resume(self, run: str) -> None:
        folder = self._folder(run)
        folder.require()
        with folder.submitting():
            status = _as_if_unlocked(folder)
            if status.state is State.SUCCEEDED:
                raise BusyError(
                    f"{status.handle} has succeeded: there is nothing to resume", f"its result: {status.final}"
                )
            if not status.state.is_over:
                raise BusyError(f"{status.handle} is {status.state}", f"oslo logs -f {status.handle}")
            self._start(folder)

    @property
    def keeps_files(self) -> bool:
        return False

    def delete(self, run: str, *, files: bool = True) -> None:
        folder = self._folder(run)
        folder.require()
        with folder.submitting():  # a submit at the same time starts it before, or anew after
            status = _as_if_unlocked(folder)
            if not status.state.is_over:
                raise BusyError(f"{status.handle} is {status.state}", f"oslo cancel {status.handle}")
            folder.remove()

    def pull(self, run: str, destination: Path) -> list[Path]:
        status = self._folder(run).status()
        if status.final is None:
            raise no_result(status)
        return place_result(Path(status.final), destination)

    def _waits_for(self, run: str) -> str:
        """ "" when it waits for nothing, or is gone."""
        try:
            status = self.get(run)
        except NotFoundError:
            return ""
        return "" if status.state.is_over else status.reason or ""

    def _started(self, run: str) -> float:
        """When it started: one that is just starting is the latest, one that was deleted meanwhile the first."""
        try:
            return self.get(run).started or float("inf")
        except NotFoundError:
            return 0.0

    def _folder(self, run: str) -> RunFolder:
        return RunFolder(self._root / contract.RUNS_DIR / run, LOCAL_SCHEME + run)

    def _start(self, folder: RunFolder) -> None:
        """Start the launcher and wait until its attempt has started.

        Raises LaunchError with what it printed when it ends before.
        """
        before = folder.attempt_numbers()
        with (folder.path / LAUNCHER_OUTPUT).open("ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                [*self._launcher, str(folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # `python -m` puts the working directory on the path: not the user's, who may have a folder `datasets`
                cwd=folder.path,
                env={**os.environ, contract.ROOT_ENV: str(self._root)},
                start_new_session=True,
            )
        while not _has_started(folder, before):
            if process.poll() is not None and not _has_started(folder, before):
                said = (folder.path / LAUNCHER_OUTPUT).read_bytes()[begin:].decode(errors="replace").strip()
                message = f"the launcher ended with exit code {process.returncode} before it had started"
                raise LaunchError(f"{message}:\n{said}" if said else message, f"see {folder.path / LAUNCHER_OUTPUT}")
            time.sleep(_POLL_SECONDS)
        if process.returncode is None:
            process.returncode = 0  # it outlives this process on purpose, of which Python would warn


_OUTCOME_OF_STATE: Final = {
    State.PENDING: Outcome.ATTACHED,
    State.PREPARING: Outcome.ATTACHED,
    State.RUNNING: Outcome.ATTACHED,
    State.SUCCEEDED: Outcome.ALREADY_SUCCEEDED,
    State.FAILED: Outcome.RESUMED,
    State.CANCELLED: Outcome.RESUMED,
}
_PAST: Final = {State.SUCCEEDED: "succeeded", State.FAILED: "failed", State.CANCELLED: "been cancelled"}


def _as_if_unlocked(folder: RunFolder) -> RunStatus:
    """The status for who holds the lock: an attempt without started.json is a dead one, not a starting one."""
    return folder.status(submitting=False)


def _has_started(folder: RunFolder, before: Sequence[int]) -> bool:
    return any(
        (folder.attempt_folder(number) / contract.STARTED_FILE).exists()
        for number in folder.attempt_numbers()
        if number not in before
    )


def _kill(started: dict[str, object] | None) -> None:
    """End a launcher and all below it: ask the launcher, then kill what is left."""
    if started is None or not is_alive(started):
        return
    pid = int(str(started["pid"]))
    below = descendants(pid)
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + _KILL_AFTER_SECONDS
    while is_alive(started) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    for process in (pid, *below):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it left by itself
