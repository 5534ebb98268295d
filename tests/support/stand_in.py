"""The stand-in launcher as a command, and what a run of `oslo` answered."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALLEST = "opensloth: {fast_model_args: {model_name: a/b}}\ndataset: {path: train.jsonl}\n"


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def handle(self) -> str:
        """The last line of stdout."""
        return self.out.splitlines()[-1]

    def json(self) -> Any:
        return json.loads(self.out)


def launcher_command(**options: Any) -> Sequence[str]:
    """options: see stand_in_launcher.py."""
    return (sys.executable, str(Path(__file__).with_name("stand_in_launcher.py")), json.dumps(options))
