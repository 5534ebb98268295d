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
KUBECONFIG: Final = _ENVIRONMENT.get("KUBECONFIG")
HAS_CLUSTER: Final = bool(KUBECONFIG)
needs_cluster = pytest.mark.skipif(not HAS_CLUSTER, reason="KUBECONFIG is not set")


def kubectl(*arguments: str, given: object = None, check: bool = True, seconds: float = 600) -> str:
    """What it prints. given: an object, or a text, for its standard input."""
    done = subprocess.run(
        ["kubectl", *arguments],
        input=given if given is None or isinstance(given, str) else json.dumps(given),
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
    """The image that OSLO_E2E_IMAGE names, else this working tree's, brought to the cluster if it is not there."""
    if named := _ENVIRONMENT.get("OSLO_E2E_IMAGE"):
        return named
    script = REPOSITORY / "tests" / "e2e" / "image.sh"
    done = subprocess.run([str(script)], env=_ENVIRONMENT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]
