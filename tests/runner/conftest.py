"""`oslo` in this process with a launcher that does not train, and a file that passes the check."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from stand_in import SMALLEST, Answer, launcher_command

from runner.cli import run
from runner.commands.common import Settings
from runner.errors import BusyError
from runner.local import LocalBackend


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root folder; launchers that still run at the end of a test are killed."""
    root = tmp_path / "root"
    yield root
    backend = LocalBackend(root)
    for status in backend.list_runs():
        if not status.state.is_over:
            with suppress(BusyError):  # it has ended by itself in between
                backend.cancel(status.run, force=True)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine knows of a cluster is not for these tests."""
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


@pytest.fixture
def oslo(root: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """oslo("status", "sft", steps=3): run a command; keywords are the stand-in's options."""

    def call(*arguments: object, defaults: Path | None = None, **options: Any) -> Answer:
        capfd.readouterr()
        settings = Settings(root, defaults, launcher_command(**options))
        code = run([str(argument) for argument in arguments], obj=settings)
        captured = capfd.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    """The smallest config file, with its data."""
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    file = tmp_path / "sft.yaml"
    file.write_text(SMALLEST)
    return file


@pytest.fixture
def trainable(sft: Path) -> Path:
    """The smallest file whose model and data are there: its data can be prepared."""
    from tiny import make_tokenizer  # 3 s of imports that few tests need

    make_tokenizer().save_pretrained(sft.parent / "a" / "b")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (sft.parent / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return sft
