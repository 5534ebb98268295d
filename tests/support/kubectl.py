"""The cluster of KUBECONFIG, for tests marked e2e. Read at import: the tests' environment has no KUBECONFIG."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

REPOSITORY: Final = Path(__file__).parents[2]
_ENVIRONMENT: Final = dict(os.environ)
needs_cluster = pytest.mark.skipif("KUBECONFIG" not in _ENVIRONMENT, reason="KUBECONFIG is not set")


def kubectl(*arguments: str, given: object = None, check: bool = True, seconds: float = 120) -> str:
    """What it prints. given: an object for its standard input."""
    done = subprocess.run(
        ["kubectl", *arguments],
        input=None if given is None else json.dumps(given),
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if check:
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr or done.stdout}"
    return done.stdout


def get(*arguments: str) -> Any:
    return json.loads(kubectl("get", "-o", "json", *arguments))


def built_image() -> str:
    """The image of this working tree, brought to the cluster if it is not there."""
    script = REPOSITORY / "tests" / "e2e" / "image.sh"
    done = subprocess.run([str(script)], env=_ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]
