"""The golden manifests: tests/runner/golden/NAME.sft.yaml and what it renders to, NAME.pytorchjob.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

GOLDEN: Final = Path(__file__).parents[1] / "runner" / "golden"
GOLDEN_NAMES: Final = sorted(path.name.removesuffix(".sft.yaml") for path in GOLDEN.glob("*.sft.yaml"))


def golden_input(name: str) -> Path:
    return GOLDEN / f"{name}.sft.yaml"


def golden_output(name: str) -> Path:
    return GOLDEN / f"{name}.pytorchjob.yaml"


def golden_job(name: str) -> dict[str, Any]:
    """The PyTorchJob."""
    job: dict[str, Any] = yaml.safe_load(golden_output(name).read_text(encoding="utf-8"))
    return job


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates: the master's, then the workers' if there are any."""
    return [replica["template"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]
