"""The `job` section of the defaults file, for commands that are given no config file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner import yaml12


def read_job_defaults(path: Path) -> Mapping[str, Any]:
    """As it stands there, unchecked; nothing when it cannot be read."""
    try:
        values = yaml12.parse(yaml12.decode(path.read_bytes())).values
    except (OSError, ValueError):
        return {}
    job = values.get("job") if isinstance(values, dict) else None
    return job if isinstance(job, dict) else {}
