"""`python -m opensloth.start`: how a rank begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
