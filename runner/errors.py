"""The errors that end an `oslo` command; the exit code is on the class.

RunnerError               1    message + hint: what went wrong, what to do next
├── UsageError            2    flags that do not go together, something this version cannot do
│   └── InvalidFileError  2    every Problem of a config file at once
├── MissingExtraError     1    a command that needs torch where it is not installed
├── BusyError             1    the run is in a state in which this cannot be done
├── LaunchError           1    the launcher ended before it had started
├── ClusterError          1    the cluster refuses or does not answer (see runner.kube.errors)
│   └── UnreachableError  1    no answer, or one that says to ask again
├── JobFailedError        100
├── NotFoundError         102  no such run
├── JobCancelledError     103  cancelled or deleted
├── WaitTimeoutError      124
└── Interrupted           130, or 143 after SIGTERM; the job goes on
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from opensloth.errors import ExplainedError, Problem

_SHOWN_PROBLEMS: Final = 100
"""A file with more is no config: lines without end would hide the first."""
INSTALL_TRAIN_EXTRA = "pip install 'opensloth[train]'"


class RunnerError(ExplainedError):
    exit_code: int = 1


class UsageError(RunnerError):
    exit_code = 2


class InvalidFileError(UsageError):
    """Every problem of a config file, in the order of its lines."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{count} in {file}:", *(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])]
        if len(problems) > _SHOWN_PROBLEMS:
            lines.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


class MissingExtraError(RunnerError):
    """The base install has no torch, and this command needs it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} needs the training packages, which are not installed", INSTALL_TRAIN_EXTRA)


class BusyError(RunnerError):
    pass


class LaunchError(RunnerError):
    pass


class ClusterError(RunnerError):
    pass


class UnreachableError(ClusterError):
    pass


class JobFailedError(RunnerError):
    exit_code = 100


class NotFoundError(RunnerError):
    exit_code = 102


class JobCancelledError(RunnerError):
    exit_code = 103


class WaitTimeoutError(RunnerError):
    exit_code = 124


class Interrupted(RunnerError):
    """The person or the pipeline stopped watching; nothing happened to the job."""

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
