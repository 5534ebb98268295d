"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import MakePods, Pods


@pytest.fixture
def pods(tmp_path: Path, model: Path) -> Iterator[MakePods]:
    """Makes launchers of several nodes on one folder, each training the file's own `model`; none outlives the test."""
    made: list[Pods] = []

    def make(**options: Any) -> Pods:
        made.append(Pods(tmp_path, model, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop_all()
