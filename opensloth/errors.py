"""The errors that a user may see from the training side.

OpenSlothError            message + hint; `cause` is a word of contract.Cause
├── ConfigError           one or more Problems in a config (final)
├── DataError             rows, tokenizer or template do not fit (final)
├── NonFiniteError        loss or gradient is not finite (final)
└── StopRequested         the ranks agreed to stop: cancelled, terminated, deadline
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opensloth.contract import Cause

_LONGEST_PATH, _LONGEST_MESSAGE, _LONGEST_DATA, _LONGEST_HINT = 200, 500, 1000, 1200
"""Characters; the longest hint names every key of TrainingArguments."""


def one_line(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """`text` as a message may show it: what a terminal would obey is escaped, and the end of a long one left out."""
    shown = text[: longest + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then what it came of or came after, as far back as that goes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config.

    path: dotted key, `training.learning_rate`; list items as `dataset[1].path`; "" for the whole file.
    message: what was found and what is expected, one sentence.
    hint: what to do next, or "".
    where: `sft.yaml:12`, `--set training.x=1`, or "" when the config was built in Python.
    """

    path: str
    message: str
    hint: str = ""
    where: str = ""

    def __str__(self) -> str:
        head = ": ".join(one_line(part, _LONGEST_PATH) for part in (self.where, self.path) if part)
        message = one_line(self.message)
        text = f"{head}: {message}" if head else message
        return f"{text} ({one_line(self.hint, _LONGEST_HINT)})" if self.hint else text


class ExplainedError(Exception):
    """What went wrong in `message`, what to do next in `hint`: the base of both programs' errors."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class OpenSlothError(ExplainedError):
    cause: str = Cause.ERROR


class ConfigError(OpenSlothError):
    """Holds every problem that was found, not only the first."""

    cause = Cause.CONFIG

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class DataError(OpenSlothError):
    """message, hint: may quote what stands in the data; they are put on one line, with an end."""

    cause = Cause.DATA

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(one_line(message, _LONGEST_DATA), one_line(hint, _LONGEST_HINT))


class NonFiniteError(OpenSlothError):
    cause = Cause.NON_FINITE


class StopRequested(OpenSlothError):
    """Raised on every rank at the same step, after the checkpoint was written."""

    def __init__(self, cause: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.cause = cause
