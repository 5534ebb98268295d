"""Seeded fuzzing: input number N of a seed is always the same, whatever was tried before it.

OSLO_FUZZ_SEED chooses the seed (0), OSLO_FUZZ_CASE tries a single input again.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from measured import at_most

SECONDS = 2.0
"""What one input may cost, in seconds of this process: the machine may be busy with others."""
_SHOWN_FAILURES = 20

AMOUNTS = [
    pytest.param(int(os.environ.get("N", "2000")), id="sample"),
    pytest.param(100_000, id="whole", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]
"""For `parametrize`: a sample among the fast tests, all of it among the slow ones."""

Case = Callable[[random.Random], str]
"""Makes one input, tries it, and says how it ended: `ok`, `refused`, ... Raises whatever should not happen."""


class Hang(BaseException):
    """Not an Exception: nothing that is tried may catch it."""


def fuzz(target: str, case: Case, amount: int) -> Counter[str]:
    """Try `amount` inputs; fail with every distinct failure, each with the case that shows it.

    Returns how often each outcome came.
    """
    seed = int(os.environ.get("OSLO_FUZZ_SEED", "0"))
    only = os.environ.get("OSLO_FUZZ_CASE")
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}
    slowest, began = (0.0, 0), time.perf_counter()
    spent = time.process_time()
    for number in [int(only)] if only else range(amount):
        started = time.process_time()
        try:
            with _interrupted():
                outcomes[case(random.Random(f"{target} {seed} {number}"))] += 1
        except (Exception, Hang) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} in {where.name}: {error}"
            failures.setdefault(f"{what:.60}{where.filename}:{where.lineno}", f"case {number}: {what:.800}")
            if len(failures) == _SHOWN_FAILURES:
                break
        slowest = max(slowest, (time.process_time() - started, number))
    told = "\n".join(failures.values())
    assert not failures, f"{target}, seed {seed} (OSLO_FUZZ_SEED, OSLO_FUZZ_CASE try one again):\n{told}"
    took = f"{time.perf_counter() - began:.0f} s, {time.process_time() - spent:.0f} s of this process"
    print(f"{target}: {amount} inputs in {took}, {dict(outcomes)}, the slowest is {slowest}")  # noqa: T201
    at_most("Seconds that a fuzzed input takes", slowest[0], SECONDS)
    return outcomes


@contextmanager
def _interrupted() -> Iterator[None]:
    """Raise Hang when the block takes more than twice SECONDS of this process's time."""

    def stop(_: int, __: FrameType | None) -> None:
        raise Hang(f"more than {2 * SECONDS:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def is_one_sentence(text: str, longest: int) -> bool:
    """Whether a message is short, on one line, and free of what a terminal would obey."""
    return 0 < len(text) <= longest and text.isprintable() and "Traceback" not in text


# --- what any input may be hurt by ----------------------------------------------------------------

ODD_TEXTS = (
    "", " ", "\n", "\t", "\0", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffe", "\U0010ffff",
    "\U000f0000", "é", "é", "😀", "ſ", "İ", "\ud800", "..", "/", "~", "~nosuchuser/x", ".jinja", "x.jsonl", "pvc:",
    "pvc:/", "a" * 300, "null", "true", "1e999", "-0", "0x", "{}", "[]", "{{ x }}", "{% x %}", "<|im_end|>",
    "</s>", "<think>", "</think>", "%s", "{0}",
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5,
    5e-324, 1.7e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def odd_value(r: random.Random, depth: int = 0) -> object:
    """Something that is most likely of the wrong type or out of range."""
    kind = r.randrange(8 if depth < 3 else 5)
    match kind:
        case 0:
            return None
        case 1:
            return r.random() < 0.5
        case 2:
            return r.choice(ODD_NUMBERS)
        case 3 | 4:
            return r.choice(ODD_TEXTS)
        case 5 | 6:
            return [odd_value(r, depth + 1) for _ in range(r.randrange(4))]
    return {r.choice(ODD_TEXTS): odd_value(r, depth + 1) for _ in range(r.randrange(4))}


def mutated_bytes(r: random.Random, data: bytes, words: tuple[bytes, ...]) -> bytes:
    """Up to four edits: bits flipped, pieces cut out, doubled, moved, or words put in."""
    for _ in range(r.randint(1, 4)):
        at, end = sorted((r.randint(0, len(data)), r.randint(0, len(data))))
        match r.randrange(7):
            case 0 if data:
                at = min(at, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[min(end, at + r.randint(1, 8)) :]
            case 3:
                data = data[:at] + data[at : min(end, at + 200)] + data[at:]
            case 4:
                data = data[end:] + data[at:end] + data[:at]
            case _:
                data = data[:at] + r.choice(words) + data[at:]
    return data
