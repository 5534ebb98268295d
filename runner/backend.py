"""What a backend can do, and the values that it deals in. Commands know only this."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

from opensloth.run_config import RunConfig
from runner.errors import BusyError

LOCAL_SCHEME: Final = "local://"
CLUSTER_SCHEME: Final = "kubernetes://"
"""A handle is `local://RUN` or `kubernetes://NAMESPACE/RUN`."""


class State(StrEnum):
    """Where a run stands."""

    PENDING = "pending"
    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class RunStatus:
    """One run as `status`, `list` and `wait` show it; `-o json` has these keys.

    Times are seconds since the epoch, durations seconds; null: not known (yet).
    """

    run: str
    """Its id."""
    handle: str
    """`local://RUN` or `kubernetes://NAMESPACE/RUN`."""
    name: str
    state: State
    phase: str | None = None
    """What the attempt does: data, model, train, done."""
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    """Of the last step; of the last steps' mean when logging_steps is above 1."""
    eval_loss: float | None = None
    target_tokens_per_second: float | None = None
    eta: float | None = None
    """Seconds to the end."""
    attempt: int = 0
    """The latest; 0: none has started."""
    cause: str | None = None
    """Why it ended, a word of opensloth.contract.Cause."""
    reason: str | None = None
    """The same as a sentence; while it runs, what it waits for."""
    hint: str | None = None
    """What to do next."""
    exit_code: int | None = None
    """Of the launcher."""
    started: float | None = None
    """The first attempt; on a cluster the job's object."""
    ended: float | None = None
    folder: str | None = None
    """The run folder."""
    final: str | None = None
    """The result, once the run has succeeded."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Word:
    """How a rank or a node says that it ended. who: `rank 1`, `node 1`. time: seconds since the epoch."""

    who: str
    cause: str
    message: str
    time: float


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt, as its files tell."""

    number: int
    cause: str | None = None
    """Why it ended; null: it has no end, it runs or its launcher was killed."""
    message: str | None = None
    """The same as a sentence."""
    started: float | None = None
    ended: float | None = None
    checkpoint_step: int | None = None
    """The newest checkpoint when it started; null: none."""
    words: list[Word] = field(default_factory=list)
    """What ranks and nodes say of how they ended, the first first: {who, cause, message, time}."""
    stood: dict[str, str] = field(default_factory=dict)
    """Of ranks that hung: where each stood, as in `step.py:41 in forward`, by its number."""


@dataclass(frozen=True)
class Findings:
    """What `oslo why` is told from.

    attempts: the latest ones, the oldest first; none: there are none, or they could not be read.
    seen: what else bears witness, sentences, the most telling first. deleted: the cluster has its object no more, and
    another submit is the only way on.
    """

    status: RunStatus
    attempts: Sequence[AttemptRecord] = ()
    seen: Sequence[str] = ()
    deleted: bool = False


@dataclass(frozen=True)
class LogQuery:
    """Which log lines. Filters that are None let all pass."""

    attempt: int | None = None
    """None: the latest."""
    rank: int | None = None
    tail: int | None = None
    """The last so many lines of each rank."""
    since: float | None = None
    """Seconds since the epoch."""
    grep: re.Pattern[str] | None = None


@dataclass(frozen=True)
class LogLine:
    """One line of a log.

    rank: contract.LAUNCHER_RANK and below are launchers. text: as people read it. event: the line's, if any.
    """

    rank: int
    text: str
    event: dict[str, Any] | None = None


@dataclass(frozen=True)
class Waiting:
    """What a run that is followed waits for; said again only when it has changed."""

    reason: str


def no_result(status: RunStatus) -> BusyError:
    """What `pull` says of a run that has not succeeded."""
    return BusyError(f"{status.handle} has no result: it is {status.state}", f"oslo logs {status.handle}")


class Outcome(StrEnum):
    """What a submit came to."""

    STARTED = "started"
    RESUMED = "resumed"
    ATTACHED = "attached"
    ALREADY_SUCCEEDED = "already_succeeded"


@dataclass(frozen=True)
class Submission:
    """What a submit hands over.

    config_text: the resolved config. manifest: the object to create on a cluster, which holds the config too.
    """

    config_text: str
    manifest: dict[str, Any] | None = None


class Backend(Protocol):
    """Where runs run. Methods that take a run raise NotFoundError when it is not there."""

    @property
    def poll_seconds(self) -> float:
        """How often a waiting command may ask."""
        ...

    def runs(self) -> list[str]:
        """Ids of all runs, unordered."""
        ...

    def named(self, wanted: str) -> str | None:
        """The run of that id, else the latest of that plain name; None when there is neither."""
        ...

    def handle(self, run: str) -> str: ...

    def submit(self, run: str, submission: Submission) -> Outcome:
        """Start `run`, or take up what is there of it. Raises LaunchError when it ends before it started."""
        ...

    def get(self, run: str) -> RunStatus: ...

    def findings(self, run: str) -> Findings:
        """The status, and what bears witness to why it is so."""
        ...

    def config(self, run: str) -> RunConfig:
        """The resolved config."""
        ...

    def list_runs(self) -> list[RunStatus]:
        """All runs, newest first."""
        ...

    def logs(self, run: str, query: LogQuery) -> Iterator[LogLine]:
        """The lines that are there now."""
        ...

    def follow(self, run: str, query: LogQuery) -> Iterator[LogLine | Waiting]:
        """Lines as they come, over all coming attempts, until the run is over or deleted."""
        ...

    def cancel(self, run: str, *, force: bool) -> None:
        """Ask the run to save and stop. force: kill it. Raises BusyError when it is over."""
        ...

    def resume(self, run: str) -> None:
        """Go on from the last checkpoint. Raises BusyError when it runs or has succeeded."""
        ...

    @property
    def keeps_files(self) -> bool:
        """Whether a run's files outlive it."""
        ...

    def delete(self, run: str, *, files: bool) -> None:
        """Remove the run, and its files where they would stay. Raises BusyError while it runs."""
        ...

    def pull(self, run: str, destination: Path) -> list[Path]:
        """Copy the result into a folder, hash-checked; returns its files. Raises BusyError while there is none."""
        ...
