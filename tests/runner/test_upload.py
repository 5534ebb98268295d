"""Local files to a volume: the real command on the other side of real pipes, and what may happen to it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from folder_volume import FolderVolume, ProcessStream

from opensloth.fingerprint import source_sha256
from runner import channel, transfer
from runner.channel import VolumeError
from runner.errors import RunnerError

MIB = 1 << 20
Events = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_PAUSE_SECONDS", 0.01)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of the volume."""
    folder = tmp_path / "volume"
    folder.mkdir()
    return folder


def some_file(folder: Path, mebibytes: float, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(random.Random(mebibytes).randbytes(int(mebibytes * MIB)))
    return path


def as_input(path: Path) -> dict[str, Path]:
    """As data_paths.resolve names it."""
    return {f"/shared/inputs/{source_sha256(path)}/{path.name}": path}


def place(root: Path, source: Path) -> Path:
    return root / "inputs" / source_sha256(source) / source.name


def leftovers(root: Path) -> list[str]:
    return [path.name for path in (root / "inputs").glob(".*")]


def messages(events: Events) -> str:
    return "\n".join(event["message"] for event in events if event["event"] == "note")


def once(verb: str, change: Callable[[ProcessStream], None]) -> Callable[[str, ProcessStream], None]:
    """Do something to the first stream of a verb."""
    done: list[bool] = []

    def opened(which: str, stream: ProcessStream) -> None:
        if which == verb and not done:
            done.append(True)
            change(stream)

    return opened


def after(sent_bytes: int, act: Callable[[ProcessStream], None]) -> Callable[[ProcessStream], None]:
    """Act once a stream has taken so many bytes."""

    def change(stream: ProcessStream) -> None:
        done: list[bool] = []

        def look(stream: ProcessStream) -> None:
            if stream.sent >= sent_bytes and not done:
                done.append(True)
                act(stream)

        stream.before_send = look

    return change


# --- what arrives ---------------------------------------------------------------------------------------


def test_a_file(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 20.5, "my träin data ☃.jsonl")
    volume = FolderVolume(root)
    assert transfer.missing_bytes(volume, as_input(source)) == source.stat().st_size

    events: Events = []
    report = transfer.upload(volume, as_input(source), events.append)

    assert place(root, source).read_bytes() == source.read_bytes()
    assert report.sent_bytes == source.stat().st_size
    assert leftovers(root) == []
    assert "20.5 MiB" in messages(events)


def test_a_folder(tmp_path: Path, root: Path) -> None:
    source = tmp_path / "a folder"
    (source / "sub dir" / "ünder").mkdir(parents=True)
    some_file(source, 3, "one.jsonl")
    some_file(source / "sub dir" / "ünder", 0.01, "two ' \" .jsonl")
    (source / "empty.txt").touch()
    (source / ".hidden").write_text("not part of the hash, not sent")
    elsewhere = some_file(tmp_path, 0.5, "elsewhere")
    (source / "link.jsonl").symlink_to(elsewhere)

    transfer.upload(FolderVolume(root), as_input(source), lambda event: None)

    there = place(root, source)
    assert source_sha256(there) == source_sha256(source)
    found = sorted(path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file())
    assert found == ["empty.txt", "link.jsonl", "one.jsonl", "sub dir/ünder/two ' \" .jsonl"]
    assert (there / "link.jsonl").read_bytes() == elsewhere.read_bytes()
    assert not (there / "link.jsonl").is_symlink()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_in_it(tmp_path: Path, root: Path, kind: str) -> None:
    source = tmp_path / "nothing"
    source.touch() if kind == "file" else source.mkdir()
    transfer.upload(FolderVolume(root), as_input(source), lambda event: None)
    assert place(root, source).is_file() if kind == "file" else place(root, source).is_dir()


def test_once_per_content(tmp_path: Path, root: Path) -> None:
    source, same = some_file(tmp_path, 1), some_file(tmp_path, 1, "same.jsonl")
    volume = FolderVolume(root)
    transfer.upload(volume, as_input(source), lambda event: None)
    place(root, source).touch()
    os.utime(place(root, source), (1, 1))

    for path in (source, same):
        volume.commands.clear()
        events: Events = []
        assert transfer.missing_bytes(volume, as_input(path)) == 0
        report = transfer.upload(volume, as_input(path), events.append)
        assert (report.sent, report.sent_bytes, volume.verbs) == ((), 0, ["have", "have"])
        assert "on the volume already" in messages(events)
    assert place(root, same).read_bytes() == same.read_bytes()
    assert place(root, source).stat().st_mtime > 1, "pruning would take it for unused"


def test_a_folder_of_the_same_content(tmp_path: Path, root: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        (folder / "sub").mkdir(parents=True)
        some_file(folder / "sub", 1)
    reports = [transfer.upload(FolderVolume(root), as_input(one), lambda event: None) for one in folders]
    assert [report.sent_bytes for report in reports] == [MIB, 0]
    assert source_sha256(place(root, folders[1])) == source_sha256(folders[1])
    assert leftovers(root) == []


# --- what goes wrong on the way -------------------------------------------------------------------------


def test_a_killed_receiver_is_gone_on_from(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 60)
    volume = FolderVolume(root, once("receive", after(40 * MIB, ProcessStream.kill)))
    events: Events = []
    report = transfer.upload(volume, as_input(source), events.append)

    assert volume.verbs == ["have", "receive", "receive"]
    assert source_sha256(place(root, source)) == source_sha256(source)
    assert report.sent_bytes < 64 * MIB, "it began anew instead of going on"
    assert leftovers(root) == []
    assert "trying again" in messages(events)


def test_an_interrupted_upload_is_gone_on_from_at_once(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 60)

    def interrupt(stream: ProcessStream) -> None:
        raise KeyboardInterrupt

    volume = FolderVolume(root, once("receive", after(50 * MIB, interrupt)))
    with pytest.raises(KeyboardInterrupt):
        transfer.upload(volume, as_input(source), lambda event: None)
    assert not place(root, source).exists()
    assert transfer.missing_bytes(FolderVolume(root), as_input(source)) <= 12 * MIB

    report = transfer.upload(FolderVolume(root), as_input(source), lambda event: None)
    assert report.sent_bytes <= 12 * MIB
    assert report.seconds < 1.5, "it waited for an upload that had said goodbye"
    assert source_sha256(place(root, source)) == source_sha256(source)


def test_a_folder_is_gone_on_from_in_the_middle_of_a_file(tmp_path: Path, root: Path) -> None:
    source = tmp_path / "folder"
    source.mkdir()
    for i in range(6):
        some_file(source, 5 + i / 8, f"{i}.jsonl")
    volume = FolderVolume(root, once("receive", after(17 * MIB, ProcessStream.kill)))
    report = transfer.upload(volume, as_input(source), lambda event: None)
    assert source_sha256(place(root, source)) == source_sha256(source)
    assert report.sent_bytes < 35 * MIB  # of 32


def test_a_flipped_byte_in_the_partial(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 30)

    def flip_and_kill(stream: ProcessStream) -> None:
        stream.kill()
        stream.process.wait()
        (partial,) = (root / "inputs").glob(".*.partial/content")
        with partial.open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))

    volume = FolderVolume(root, once("receive", after(20 * MIB, flip_and_kill)))
    events: Events = []
    transfer.upload(volume, as_input(source), events.append)
    assert place(root, source).read_bytes() == source.read_bytes()
    assert "not what was announced" in messages(events)
    assert leftovers(root) == []


def test_another_hash_than_announced(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 2)
    sources = as_input(source)
    source.write_bytes(b"x" + source.read_bytes()[1:])
    volume = FolderVolume(root)
    with pytest.raises(RunnerError, match=r"train\.jsonl changed while it was being copied"):
        transfer.upload(volume, sources, lambda event: None)
    assert volume.verbs == ["have", "receive"], "it was sent twice"
    assert [path for path in (root / "inputs").rglob("*") if path.is_file()] == []


def test_a_source_that_becomes_shorter(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 20)
    shorten = once("receive", after(5 * MIB, lambda stream: os.truncate(source, 6 * MIB)))
    with pytest.raises(RunnerError, match="changed while it was being copied"):
        transfer.upload(FolderVolume(root, shorten), as_input(source), lambda event: None)
    assert not any((root / "inputs").glob("[!.]*"))


def test_a_source_that_cannot_be_read(tmp_path: Path, root: Path) -> None:
    good, loop = some_file(tmp_path, 1), tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    volume = FolderVolume(root)
    for bad in (loop, tmp_path / "missing.jsonl"):
        sources = as_input(good) | {f"/shared/inputs/{'f' * 64}/{bad.name}": bad}
        with pytest.raises(RunnerError, match=rf"{bad.name} cannot be read"):
            transfer.upload(volume, sources, lambda event: None)
    assert volume.commands == []


def test_a_connection_that_never_holds(tmp_path: Path, root: Path) -> None:
    volume = FolderVolume(root, lambda verb, stream: stream.kill())
    with pytest.raises(channel.LostError):
        transfer.upload(volume, as_input(some_file(tmp_path, 1)), lambda event: None)
    assert len(volume.commands) == 4


# --- two at once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_of_the_same_content_at_once(tmp_path: Path, root: Path, kind: str) -> None:
    source = some_file(tmp_path, 40)
    if kind == "folder":
        source = tmp_path / "folder"
        source.mkdir()
        for i in range(5):
            some_file(source, 8 + i / 8, f"{i}.jsonl")
    meet = threading.Barrier(2, timeout=30)
    both_began = after(1, lambda stream: meet.wait())
    volumes = [FolderVolume(root, once("receive", both_began)) for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        sources = as_input(source)
        uploads = [pool.submit(transfer.upload, volume, sources, lambda event: None) for volume in volumes]
        for done in uploads:
            done.result()

    assert source_sha256(place(root, source)) == source_sha256(source)
    assert leftovers(root) == []


def test_one_is_complete_before_the_other(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 100)

    def others_upload(stream: ProcessStream) -> None:
        transfer.upload(FolderVolume(root), as_input(source), lambda event: None)

    volume = FolderVolume(root, once("receive", after(10 * MIB, others_upload)))
    report = transfer.upload(volume, as_input(source), lambda event: None)
    assert report.sent_bytes < 60 * MIB, "it did not notice"
    assert place(root, source).read_bytes() == source.read_bytes()
    assert leftovers(root) == []


def test_the_largest_of_what_was_broken_off(tmp_path: Path, root: Path) -> None:
    source = some_file(tmp_path, 20)
    sha256 = source_sha256(source)
    for token, mebibytes in (("a", 3), ("b", 17), ("c", 5)):
        partial = root / "inputs" / f".{sha256}.{token}.partial"
        partial.mkdir(parents=True)
        (partial / "content").write_bytes(source.read_bytes()[: mebibytes * MIB])
    report = transfer.upload(FolderVolume(root), as_input(source), lambda event: None)
    assert report.sent_bytes == 3 * MIB
    assert place(root, source).read_bytes() == source.read_bytes()
    assert leftovers(root) == []


def test_a_frozen_receiver_that_was_taken_over(tmp_path: Path, root: Path) -> None:
    """The first pod's machine stands still, somebody else uploads the same, and then it wakes up."""
    source = some_file(tmp_path, 60)
    frozen: list[ProcessStream] = []
    is_frozen, may_go_on = threading.Event(), threading.Event()

    def freeze(stream: ProcessStream) -> None:
        stream.process.send_signal(signal.SIGSTOP)
        frozen.append(stream)
        is_frozen.set()
        assert may_go_on.wait(30)
        stream.process.send_signal(signal.SIGCONT)

    first = FolderVolume(root, once("receive", after(20 * MIB, freeze)))
    second = FolderVolume(root)
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(transfer.upload, first, as_input(source), lambda event: None)
        assert is_frozen.wait(30)
        report = transfer.upload(second, as_input(source), lambda event: None)
        assert report.sent_bytes < 50 * MIB, "it did not go on from the frozen one"
        may_go_on.set()
        upload.result(30)
    assert place(root, source).read_bytes() == source.read_bytes()
    assert leftovers(root) == []


# --- the volume itself ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_volume_that_is_too_small(tmp_path: Path, small_disk: Path) -> None:
    source = some_file(tmp_path, 10)
    volume = FolderVolume(small_disk)
    with pytest.raises(VolumeError, match=r"has [\d,]+ bytes free, and 10,485,760 are needed") as caught:
        transfer.upload(volume, as_input(source), lambda event: None)
    assert caught.value.kind == "full"


def test_a_volume_that_fills_up_meanwhile(tmp_path: Path, small_disk: Path) -> None:
    source = some_file(tmp_path, 7)
    hog = small_disk / "hog"
    fill = after(2 * MIB, lambda stream: hog.write_bytes(bytes(3 * MIB)))
    with pytest.raises(VolumeError, match="no space is left on the volume") as caught:
        transfer.upload(FolderVolume(small_disk, once("receive", fill)), as_input(source), lambda event: None)
    assert caught.value.kind == "full"
    hog.unlink()
    report = transfer.upload(FolderVolume(small_disk), as_input(source), lambda event: None)
    assert report.sent_bytes < 6 * MIB, "what had arrived was lost"
    assert place(small_disk, source).read_bytes() == source.read_bytes()


def test_the_last_word_before_the_connection_broke(tmp_path: Path, small_disk: Path) -> None:
    source = some_file(tmp_path, 7)

    def fill_and_break(stream: ProcessStream) -> None:
        with suppress(OSError), (small_disk / "hog").open("wb", buffering=0) as hog:
            while True:
                hog.write(bytes(MIB // 16))
        stream.process.stdin.write(bytes(MIB))
        while not stream.stderr:
            time.sleep(0.01)
        raise channel.LostError("reset by peer")

    volume = FolderVolume(small_disk, once("receive", after(2 * MIB, fill_and_break)))
    with pytest.raises(VolumeError, match="no space is left on the volume"):
        transfer.upload(volume, as_input(source), lambda event: None)
    assert volume.verbs == ["have", "receive"]


def test_a_volume_that_is_read_only(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(VolumeError, match=r"Read-only.*belongs to uid 0, gid 0, mode d\S+; this process is uid 0"):
        transfer.upload(FolderVolume(small_disk), as_input(some_file(tmp_path, 1)), lambda event: None)


def test_an_image_without_the_command(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "VOLUME_COMMAND", ("python", "-m", "opensloth.volume_of_yesterday"))
    monkeypatch.setattr(FolderVolume, "open", lambda self, command: ProcessStream(["python3", *command[1:]], root))
    with pytest.raises(VolumeError, match="the image has no command for the volume"):
        transfer.upload(FolderVolume(root), as_input(some_file(tmp_path, 1)), lambda event: None)
