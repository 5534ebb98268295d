"""`python -m opensloth.start`: how a rank begins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import transformers
from launched import Run

from opensloth.optimizer import choose_optimizer

MODULE = """
import gc
WHILE_IMPORTED = gc.isenabled()

def main():
    print(WHILE_IMPORTED, gc.isenabled(), gc.get_freeze_count() > 0)
    return 7
"""


def test_garbage_is_looked_for_after_the_imports_and_the_exit_code_is_mains(tmp_path: Path) -> None:
    (tmp_path / "ends_with_seven.py").write_text(MODULE)
    command = [sys.executable, "-m", "opensloth.start", "ends_with_seven"]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.split()) == (7, ["False", "True", "True"]), run.stderr


@pytest.mark.slow
def test_what_the_first_step_does_not_need_is_not_imported(tmp_path: Path) -> None:
    """By no process of a run whose dataset is in the cache: each takes tenths of a second."""
    model = tiny.save(tmp_path / "model")
    assert Run(tmp_path / "first", model, max_steps=1).finish() == 0
    run = Run(tmp_path / "second", model, max_steps=1)
    shutil.copytree(tmp_path / "first" / "cache", tmp_path / "second" / "cache")
    run.env = {"PYTHONPROFILEIMPORTTIME": "1"}
    assert run.finish() == 0
    logs = "".join(log.read_text() for log in (run.folder / "attempts" / "1").glob("*.log"))
    imported = set(re.findall(r"^import time: .*\| +(\w+)$", logs, re.MULTILINE))
    assert {"torch", "opensloth", "pyarrow"} <= imported
    assert not imported & {"datasets", "pandas", "trl"}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_optimizers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), optim=name, learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5,
        use_cpu=True, report_to="none",
    )  # fmt: skip
    assert choose_optimizer(arguments) == transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
