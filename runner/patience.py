"""Asks again while an API server does not answer: it may be restarting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from runner.errors import UnreachableError

OUTAGE_SECONDS: Final = 300.0
"""How long who watches a run waits for an API server that does not answer."""
_PAUSE_SECONDS: Final = 1.0
Answer = TypeVar("Answer")


def patiently(
    call: Callable[[], Answer],
    seconds: float,
    report: Callable[[str], None],
    miss: type[UnreachableError] = UnreachableError,
) -> Answer:
    """Call until there is an answer, at most for `seconds`. report: hears of a first miss; miss: what is one."""
    end, said = time.monotonic() + seconds, False
    while True:
        try:
            return call()
        except miss as error:
            if time.monotonic() >= end:
                raise
            if not said:
                report(f"{error.message}; trying again")
                said = True
            time.sleep(min(_PAUSE_SECONDS, max(0.0, end - time.monotonic())))
