from __future__ import annotations

import pytest

from opensloth.human import human_bytes, human_duration
from runner.quantities import parse_duration, parse_quantity


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("1h30m", 5400)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "12", "h", "0s", "-1h", "30m1h", "1.5h", "1 h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration such as 90s"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "value"), [("4", 4), ("500m", 0.5), ("64Gi", 64 * 2**30), ("200G", 200e9), ("1.5", 1.5)]
)
def test_quantities(text: str, value: float) -> None:
    assert float(parse_quantity(text)) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "64GB", "64 Gi", "1e3", "gi"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="expected a quantity such as 4"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (80, "1m20s"), (7500, "2h05m"), (273600, "3d04h"), (-3, "0s")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (5 * 2**40, "5.0 TiB")]
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text
