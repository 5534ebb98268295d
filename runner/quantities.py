"""Durations (`12h`) and Kubernetes quantities (`500m`, `64Gi`) as a config file writes them. Pure."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTPE]|[KMGTPE]i|)")
_FACTORS: Final = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `30m`, `12h`, `7d` or a chain such as `1h30m`.

    Raises ValueError for anything else, and for 0.
    """
    match = _DURATION.fullmatch(text)
    seconds = 0
    if match:
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if seconds == 0:
        raise ValueError(f"expected a duration such as 90s, 30m, 12h or 1h30m, got {text!r}")
    return seconds


def parse_quantity(text: str) -> Decimal:
    """Value of a Kubernetes quantity: cores for cpu, bytes for memory.

    Raises ValueError for anything else, and for 0.
    """
    match = _QUANTITY.fullmatch(text)
    value = Decimal(match[1]) * _FACTORS[match[2]] if match else Decimal(0)
    if value == 0:
        raise ValueError(f"expected a quantity such as 4, 500m, 64Gi or 200G, got {text!r}")
    return value
