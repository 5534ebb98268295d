"""Checkpoints while they are written: killed, out of room, in place of others, agreed upon by all ranks."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from measured import at_least
from safetensors.torch import save_file
from volumes import small_volume

from opensloth import checkpoint
from opensloth.checkpoint import Checkpoints, CheckpointState, fault_in
from opensloth.contract import Cause
from opensloth.dist import World
from opensloth.errors import StopRequested
from opensloth.files import fault_of_volume
from opensloth.train import _cause_of

ALONE = World(0, 0, 1, torch.device("cpu"))
KILLS = 150
SCRIPT = Path(__file__).parents[1] / "support" / "save_and_be_killed.py"


def save(checkpoints: Checkpoints, step: int, *, weights: int = 10, optimizer: int = 10) -> Path:
    """weights, optimizer: numbers in each."""
    state = CheckpointState(step=step, plan="", rows_per_step=1, world=1, targets_seen=0)

    def write_model(folder: Path) -> None:
        save_file({"weight": torch.zeros(weights)}, folder / "model.safetensors")

    return checkpoints.save(state, write_model, {"optimizer": torch.zeros(optimizer)})


def of(folder: Path, keep: int | None = None, **options: Any) -> Checkpoints:
    return Checkpoints(folder, keep=keep, world=ALONE, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- killed -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_any_moment_of_saving_there_is_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "checkpoints"), str(KILLS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    answer = json.loads(done.stdout)
    at_least(
        "kills -9 in the middle of saving a checkpoint, each leaving one to go on from", answer["half_written"], 30
    )
    assert answer["step"] > 5, "it saved some in between"


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would lose cannot be seen by killing: what was written, synced and renamed is looked at."""
    synced: dict[int, int] = {}
    fsync, rename = os.fsync, Path.rename
    renamed = []

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_mtime_ns

    def check(path: Path, target: Path) -> Path:
        if path.is_dir():
            inside = [path, *path.rglob("*")]
            assert checkpoint.MANIFEST in names(path)
            late = [str(p) for p in inside if synced.get(p.stat().st_ino) != p.stat().st_mtime_ns]
            assert late == [], "renamed before these were on the disk"
            renamed.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(Path, "rename", check)
    save(of(tmp_path), 1)
    assert renamed == ["step-00000001"]
    assert synced[tmp_path.stat().st_ino] == tmp_path.stat().st_mtime_ns, "and its name is on the disk too"


def test_nothing_is_published_when_a_newer_attempt_has_started(tmp_path: Path) -> None:
    def fence() -> None:
        raise StopRequested(Cause.SUPERSEDED, "a newer attempt has started")

    with pytest.raises(StopRequested):
        save(of(tmp_path, fence=fence), 1)
    assert names(tmp_path) == []


# --- damaged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["step", "plan", "rows_per_step", "world", "targets_seen", "files", "sha256"])
def test_a_manifest_that_says_something_else_is_not_believed(tmp_path: Path, key: str) -> None:
    """One flipped bit in `world`, and the random state would not be put back."""
    good, newest = save(of(tmp_path), 1), save(of(tmp_path), 2)
    manifest = json.loads((newest / checkpoint.MANIFEST).read_text())
    manifest[key] = {int: 3, str: "x", dict: {"optimizer.pt": {"size": 1}}}[type(manifest[key])]
    (newest / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    heard: list[str] = []
    assert of(tmp_path).newest(heard.append) == good
    assert heard == ["checkpoint step-00000002 is passed over: its manifest is missing, torn or altered"]


@pytest.mark.parametrize("content", [b"[]", b"1", b"[" * 100_000, b"\xff", b'{"files": 1}'])
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = save(of(tmp_path), 1)
    (folder / checkpoint.MANIFEST).write_bytes(content)
    assert fault_in(folder) == "its manifest is missing, torn or altered"


def test_a_pipe_in_place_of_the_manifest_is_not_waited_for(tmp_path: Path) -> None:
    folder = save(of(tmp_path), 1)
    (folder / checkpoint.MANIFEST).unlink()
    os.mkfifo(folder / checkpoint.MANIFEST)
    assert fault_in(folder) == "its manifest is missing, torn or altered"


def test_weights_that_were_not_saved_with_it_are_not_loaded(tmp_path: Path) -> None:
    folder = save(of(tmp_path), 1)
    (folder / "README.md").write_text("notes of a person")
    assert fault_in(folder) is None
    save_file({"weight": torch.ones(10)}, folder / "zz.safetensors")
    assert fault_in(folder) == "zz.safetensors was not saved with it, and would be loaded"


@pytest.mark.parametrize("name", ["step-9", "step-٣", "step-000000009", "step-99999999999999999999"])
def test_a_name_that_is_nearly_a_checkpoints_is_none(tmp_path: Path, name: str) -> None:
    whole = save(of(tmp_path), 1)
    shutil.copytree(whole, tmp_path / name)
    assert of(tmp_path).newest(lambda _: None) == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_fault_of_the_volume_is_not_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What may pass is tried again by another attempt; going on from an older one would lose steps for nothing."""
    folder = save(of(tmp_path), 1)

    def refuse(_: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    if number == errno.EACCES:
        assert fault_in(folder) == "it cannot be read: Permission denied"
    else:
        with pytest.raises(OSError, match="Input/output"):
            fault_in(folder)


# --- in place of others -------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps what somebody still reads; two crashes in a row leave two."""
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    for _ in range(3):
        assert fault_in(save(of(tmp_path), 1, weights=20)) is None
    left = [name for name in names(tmp_path) if name.startswith(".")]
    assert len(left) == 2, left
    monkeypatch.undo()
    checkpoint.remove_leftovers([tmp_path])
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_killed_process_left_of_the_same_step_does_not_get_in(tmp_path: Path) -> None:
    stale = tmp_path / ".step-00000001.tmp"
    stale.mkdir()
    (stale / "rubbish").write_text("of an earlier attempt")
    whole = save(of(tmp_path), 1)
    assert "rubbish" not in names(whole)


def test_all_ranks_go_on_from_what_rank_0_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for itself might see another one, on a volume that remembers or fails."""
    for step in (0, 3, 5):
        save(of(tmp_path), step)
    said: list[float] = []

    def sums(values: list[float], world: World) -> list[float]:
        said.append(values[0] if world.rank == 0 else 4.0)
        return [said[-1]]

    monkeypatch.setattr(checkpoint, "sum_over_ranks", sums)
    heard: list[str] = []
    main, other = (Checkpoints(tmp_path, keep=None, world=World(rank, rank, 2, ALONE.device)) for rank in (0, 1))
    (tmp_path / "step-00000005" / checkpoint.MANIFEST).write_text('{"step": 5, "files"')
    assert main.newest(heard.append) == tmp_path / "step-00000003"
    assert said == [4.0]
    assert other.newest(heard.append) == tmp_path / "step-00000003"
    assert heard == ["checkpoint step-00000005 is passed over: its manifest is missing, torn or altered"], (
        "once, by rank 0"
    )
    for step in (3, 0):
        (tmp_path / f"step-{step:08d}" / checkpoint.OPTIMIZER).unlink()
    said.clear()
    assert main.newest(heard.append) is None
    assert said == [0.0]


# --- no room ------------------------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """4 MiB."""
    with small_volume(tmp_path / "volume", 4) as folder:
        yield folder


@pytest.mark.parametrize("too_large", ["weights", "optimizer"])
def test_a_full_volume_is_said_and_leaves_the_checkpoint_before(volume: Path, too_large: str) -> None:
    kept = save(of(volume), 1)
    free = shutil.disk_usage(volume).free
    with pytest.raises(Exception) as caught:  # noqa: PT011 torch's and safetensors' own
        save(of(volume), 2, **{too_large: 2_000_000})
    cause, message, hint = _cause_of(caught.value)
    assert cause == Cause.CONFIG
    assert message == "no room is left on the volume ([Errno 28] No space left on device)"
    assert "submit again" in hint
    assert names(volume) == [kept.name]
    assert shutil.disk_usage(volume).free == free, "there is room to write down why it ended"
    assert of(volume).newest(pytest.fail) == kept


def test_a_tokenizer_that_finds_no_room(volume: Path) -> None:
    (volume / "ballast").write_bytes(bytes(4 << 20))
    with pytest.raises(Exception) as caught:  # noqa: PT011 the tokenizers package's own
        tiny.make_tokenizer().backend_tokenizer.save(str(volume / "tokenizer.json"))
    assert _cause_of(caught.value)[0] == Cause.CONFIG


@pytest.mark.parametrize(
    ("number", "cause"), [(errno.EDQUOT, Cause.CONFIG), (errno.EIO, Cause.VOLUME), (errno.EACCES, Cause.ERROR)]
)
def test_what_is_behind_a_librarys_error(number: int, cause: str) -> None:
    def python() -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # noqa: B904

    def rust() -> None:
        raise Exception(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    library: Callable[[], None]
    for library in (python, rust):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            library()
        assert _cause_of(caught.value)[0] == cause
    assert fault_of_volume(RuntimeError("a mistake")) is None


def test_what_tells_of_memory_is_found_behind_what_came_after() -> None:
    def after(first: BaseException) -> BaseException:
        try:
            try:
                raise first
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            return error

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for error in (
        full,
        after(full),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ):
        cause, message, hint = _cause_of(error)
        assert cause == Cause.OUT_OF_MEMORY
        assert message.startswith("out of memory: ")
        assert "use_gradient_checkpointing: unsloth" in hint
    assert _cause_of(after(ValueError("a mistake")))[0] == Cause.ERROR
