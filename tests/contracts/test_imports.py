"""What a command may import, in a process of its own; and the layers, by import-linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINING = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "tokenizers",
    "numpy",
    "pyarrow",
    "unsloth",
}
FILE = """\
opensloth: {fast_model_args: {model_name: a/b}}
dataset: {path: train.jsonl}
job: {image: registry.example/opensloth:1.0, volume: training}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n")
    path = tmp_path / "sft.yaml"
    path.write_text(FILE)
    return path


def imported_by(*arguments: str) -> set[str]:
    """Top-level names of the modules that `oslo ARGUMENTS` imports."""
    script = (
        "import sys, runner.cli\n"
        f"code = runner.cli.run({list(arguments)!r})\n"
        "assert code == 0, code\n"
        "print('modules:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", [("--help",), ("--version",)])
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    assert not imported_by(*arguments) & (TRAINING | {"pydantic", "yaml", "rich", "kubernetes"})


def test_render_needs_neither_torch_nor_a_cluster(file: Path) -> None:
    modules = imported_by("render", str(file))
    assert not modules & (TRAINING | {"kubernetes", "rich"})
    assert {"pydantic", "yaml"} <= modules


@pytest.mark.parametrize("arguments", [("list",), ("schema",), ("completion", "zsh")])
def test_commands_that_do_not_train(arguments: tuple[str, ...]) -> None:
    assert not imported_by(*arguments) & (TRAINING | {"kubernetes"})


def test_layers() -> None:
    """.importlinter holds the rules; `lint-imports` says which import breaks one."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
