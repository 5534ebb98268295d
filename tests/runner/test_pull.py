"""A folder of the volume to this machine: the real command on the other side of real pipes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder_volume import FolderVolume, ProcessStream

from opensloth.fingerprint import folder_sha256
from runner import channel, transfer
from runner.channel import VolumeError
from runner.errors import RunnerError
from runner.results import staged

MIB = 1 << 20
FINAL = "runs/sft-12345678/final"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_PAUSE_SECONDS", 0.01)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of a volume with a result of 40 MiB."""
    final = tmp_path / "volume" / FINAL
    (final / "sub dir").mkdir(parents=True)
    (final / "adapter.safetensors").write_bytes(random.Random(0).randbytes(40 * MIB))
    (final / "sub dir" / "ünder ☃.json").write_text("{}\n")
    (final / "empty").touch()
    return tmp_path / "volume"


def faulty(root: Path, change: Callable[[ProcessStream], None]) -> FolderVolume:
    """A volume whose first `send` something happens to."""
    done: list[bool] = []

    def opened(verb: str, stream: ProcessStream) -> None:
        if verb == "send" and not done:
            done.append(True)
            change(stream)

    return FolderVolume(root, opened)


def kill_after(received_bytes: int) -> Callable[[ProcessStream], None]:
    def change(stream: ProcessStream) -> None:
        def look(stream: ProcessStream) -> None:
            if stream.received >= received_bytes:
                stream.kill()

        stream.after_receive = look

    return change


def siblings(destination: Path) -> list[str]:
    return [path.name for path in destination.parent.iterdir() if path.name.startswith(".")]


def test_all_of_it(tmp_path: Path, root: Path) -> None:
    destination = tmp_path / "results" / "adapter"
    events: list[dict[str, Any]] = []
    files = transfer.pull(FolderVolume(root), FINAL, destination, events.append)
    assert [path.relative_to(destination).as_posix() for path in files] == [
        "adapter.safetensors",
        "empty",
        "sub dir/ünder ☃.json",
    ]
    assert folder_sha256(destination) == folder_sha256(root / FINAL)
    assert "40.0 MiB" in events[-1]["message"]


def test_again(tmp_path: Path, root: Path) -> None:
    transfer.pull(FolderVolume(root), FINAL, tmp_path / "here")
    volume = FolderVolume(root)
    assert len(transfer.pull(volume, FINAL, tmp_path / "here")) == 3
    assert volume.verbs == ["list"]


def test_into_an_empty_folder(tmp_path: Path, root: Path) -> None:
    (tmp_path / "here").mkdir()
    assert len(transfer.pull(FolderVolume(root), FINAL, tmp_path / "here")) == 3


@pytest.mark.parametrize("change", ["another file", "another byte", "a missing file"])
def test_into_a_folder_with_something_else(tmp_path: Path, root: Path, change: str) -> None:
    here = tmp_path / "here"
    shutil.copytree(root / FINAL, here)
    if change == "another file":
        (here / "notes.txt").write_text("mine")
    elif change == "another byte":
        (here / "sub dir" / "ünder ☃.json").write_text("[]\n")
    else:
        (here / "empty").unlink()
    before = folder_sha256(here)
    volume = FolderVolume(root)
    with pytest.raises(RunnerError, match="holds other files"):
        transfer.pull(volume, FINAL, here)
    assert (volume.verbs, folder_sha256(here)) == (["list"], before)


def test_a_killed_sender_is_gone_on_from(tmp_path: Path, root: Path) -> None:
    volume = faulty(root, kill_after(25 * MIB))
    streams: list[ProcessStream] = []
    opened = volume._opened
    volume._opened = lambda verb, stream: (opened(verb, stream), streams.append(stream))[0]
    transfer.pull(volume, FINAL, tmp_path / "here")
    assert folder_sha256(tmp_path / "here") == folder_sha256(root / FINAL)
    assert volume.verbs == ["list", "send", "send"]
    assert sum(stream.received for stream in streams) < 42 * MIB, "it began anew instead of going on"


def test_nothing_is_left_of_what_fails(tmp_path: Path, root: Path) -> None:
    volume = FolderVolume(root, lambda verb, stream: verb == "send" and kill_after(1)(stream))
    with pytest.raises(channel.LostError):
        transfer.pull(volume, FINAL, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert siblings(tmp_path / "here") == []


@pytest.mark.parametrize("change", ["byte", "size", "shorter"])
def test_a_file_that_changes_after_it_was_listed(tmp_path: Path, root: Path, change: str) -> None:
    path = root / FINAL / "adapter.safetensors"

    def tamper(stream: ProcessStream) -> None:
        if change == "byte":
            path.write_bytes(b"\0" * (40 * MIB))
        elif change == "size":
            path.write_bytes(b"\0")
        else:
            stream.after_receive = lambda stream: os.truncate(path, 0)

    with pytest.raises(RunnerError, match=r"does not arrive|has changed|became shorter"):
        transfer.pull(faulty(root, tamper), FINAL, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_what_is_not_there(tmp_path: Path, root: Path) -> None:
    with pytest.raises(VolumeError, match=r"runs/other/final does not exist"):
        transfer.pull(FolderVolume(root), "runs/other/final", tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_link_out_of_the_volume(tmp_path: Path, root: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the node")
    (root / FINAL / "link").symlink_to(secret)
    with pytest.raises(VolumeError, match="leads out of"):
        transfer.pull(FolderVolume(root), FINAL, tmp_path / "here")


def test_into_the_folder_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged(Path(".")) as aside:
        (aside / "adapter").write_text("x")
    assert (tmp_path / "here" / "adapter").read_text() == "x"
