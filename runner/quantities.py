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


def human_duration(seconds: float) -> str:
    """Two units at most: `45s`, `1m20s`, `2h05m`, `3d04h`."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def human_bytes(count: float) -> str:
    """`512 B`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
