"""A memory cgroup in which a command runs, and which it sees as a container sees its own."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_CGROUP = Path("/sys/fs/cgroup")
_ENTER = """
set -e
echo $$ > {group}/cgroup.procs
exec unshare --mount sh -c 'mount --bind {group} {mounted} && exec "$@"' -- "$@"
"""


@contextmanager
def limited_to(limit_bytes: int) -> Iterator[tuple[str, ...]]:
    """What to put before a command; skips the test where that is not permitted."""
    old = (_CGROUP / "memory").is_dir()  # version 1
    top = _CGROUP / "memory" if old else _CGROUP
    group = top / f"oslo-test-{uuid.uuid4().hex[:8]}"
    wrapper = ("sh", "-c", _ENTER.format(group=group, mounted=top), "sh")
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit_bytes))
        subprocess.run([*wrapper, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"a memory limit cannot be set here: {error}")
    try:
        yield wrapper
    finally:
        with suppress(OSError):
            os.rmdir(group)
