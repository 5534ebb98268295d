"""`python -m opensloth.volume` by itself: what it refuses, what it removes, how little it loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHA = "a" * 64


def volume(root: Path, *arguments: str, given: bytes = b"") -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, answers, stderr."""
    command = [sys.executable, "-m", "opensloth.volume", *arguments]
    ran = subprocess.run(command, input=given, capture_output=True, env={**os.environ, "OSLO_ROOT": str(root)})
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "../elsewhere"),
        ("list", "/etc"),
        ("list", "runs/../../elsewhere"),
        ("list", "link"),
        ("send", "link"),
        ("remove", "link/x"),
        ("remove", "runs"),
        ("remove", "inputs/x"),
        ("remove", "runs/x/final"),
        ("remove", "runs/.x"),
        ("have", f"{SHA}/../x"),
        ("have", f"{SHA}/.."),
        ("have", "short/x"),
        ("receive", f"{SHA}/a/b"),
    ],
)
def test_paths_stay_below_the_root(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "runs" / "x" / "final", root / "runs" / ".x", root / "inputs" / "x", elsewhere / "x"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (root / "link").symlink_to(elsewhere)
    code, answers, stderr = volume(root, *arguments)
    assert code == 2
    assert stderr.startswith("error: ")
    assert [answer["kind"] for answer in answers] == ([] if arguments[0] == "send" else ["usage"])
    assert all(path.exists() for path in (root / "runs/x/final/file", root / "inputs/x/file", elsewhere / "x/file"))


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "sub/../../../escaped"])
def test_names_of_received_files_stay_below_the_input(tmp_path: Path, name: str) -> None:
    given = json.dumps({"file": name, "size": 1, "offset": 0}).encode() + b"\nx"
    code, answers, _ = volume(tmp_path / "root", "receive", f"{SHA}/x", "--folder", given=given)
    assert (code, answers[-1]["kind"]) == (2, "usage")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_names_of_files_to_send_stay_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "runs").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    code, answers, stderr = volume(
        tmp_path / "root", "send", "runs", given=b'{"file": "../../secret", "offset": 0}\n{"end": true}\n'
    )
    assert (code, answers) == (2, [])
    assert "is not a path below" in stderr


def test_an_offset_behind_what_is_there(tmp_path: Path) -> None:
    """It would leave a hole of zeros."""
    given = b'{"file": "", "size": 9, "offset": 5}\nabcd'
    code, answers, _ = volume(tmp_path, "receive", f"{SHA}/x", given=given)
    assert code == 1
    assert "fewer than 5 bytes" in answers[-1]["error"]


def test_runs_in_the_order_of_their_first_attempts(tmp_path: Path) -> None:
    assert volume(tmp_path, "runs")[1] == [{"runs": []}]
    for name, time in (("later-1", 2000), ("first-1", 1000), (".gone.deleted", 1)):
        started = tmp_path / "runs" / name / "attempts" / "1" / "started.json"
        started.parent.mkdir(parents=True)
        started.touch()
        os.utime(started, (time, time))
    assert volume(tmp_path, "runs") == (0, [{"runs": ["first-1", "later-1"]}], "")


def test_remove(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name / "final").mkdir(parents=True)
        (tmp_path / "runs" / name / "final" / "file").touch()
    assert volume(tmp_path, "remove", "runs/one")[0] == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]

    code, answers, stderr = volume(tmp_path, "remove", "runs/one")
    assert code == 102
    assert "does not exist" in stderr
    assert answers[-1]["kind"] == "missing"


def test_it_loads_little() -> None:
    code = "import opensloth.volume, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "pydantic", "yaml", "transformers", "datasets", "asyncio"}
    assert heavy.isdisjoint(name.partition(".")[0] for name in loaded)
