"""Whatever becomes of a checkpoint's files: it is read as it was written, or passed over with a sentence."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import AMOUNTS, fuzz, is_one_sentence, mutated_bytes, odd_value
from safetensors.torch import load_file, save_file

from opensloth.checkpoint import MANIFEST, OPTIMIZER, Checkpoints, CheckpointState, fault_in, read_state, read_tensors
from opensloth.dist import World

LONGEST = 300
ALONE = World(0, 0, 1, torch.device("cpu"))
WEIGHTS = "adapter_model.safetensors"
WORDS = (
    b"\0",
    b'"',
    b"{",
    b"}",
    b",",
    b"null",
    b"NaN",
    b"-1",
    b"9" * 5000,
    b"[" * 100_000,
    b"../",
    b"/etc/passwd",
    b"\xff",
)
ODD_NAMES = (
    "step-3",
    "step-٣",
    "step-000000009",
    "step-99999999999999999999",
    "step-",
    "step--1",
    "step-1e3",
    "step-latest",
)

Files = dict[str, bytes]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_checkpoints(scratch: Path, amount: int) -> None:
    before = torch.get_rng_state()
    folder = scratch / "checkpoints"
    checkpoints = Checkpoints(folder, keep=None, world=ALONE)
    older, newer = (save(checkpoints, step) for step in (3, 7))
    as_written = {path.name: path.read_bytes() for path in newer.iterdir()}
    expected = {path: contents(path) for path in (older, newer)}

    def case(r: random.Random) -> str:
        try:
            for _ in range(r.choice((1, 1, 1, 2))):
                r.choice(DAMAGES)(r, newer)
            said: list[str] = []
            found = checkpoints.newest(said.append)
            assert found in (older, newer), found
            if found == older:
                assert all(is_one_sentence(line, LONGEST) for line in said), said
                assert len(said) == (1 if newer.is_dir() else 0), said
                assert not newer.exists() or fault_in(newer)
            else:
                assert said == [], said
            if found == newer or r.random() < 0.05:  # nobody has touched the older one
                assert contents(found) == expected[found]
            return "read" if found == newer else "passed over"
        finally:
            restore(newer, as_written)

    try:
        outcomes = fuzz("checkpoints", case, amount)
    finally:
        torch.set_rng_state(before)
    assert min(outcomes.values()) > amount / 50


def save(checkpoints: Checkpoints, step: int) -> Path:
    state = CheckpointState(step=step, plan="f" * 64, rows_per_step=4, world=1, targets_seen=10 * step)

    def write_model(folder: Path) -> None:
        save_file({"lora_A": torch.full((4,), float(step))}, folder / WEIGHTS)
        (folder / "adapter_config.json").write_text("{}")

    torch.manual_seed(step)
    return checkpoints.save(state, write_model, {"optimizer": torch.full((3,), float(step)), "scheduler": {"at": step}})


def contents(folder: Path) -> Any:
    """All that resuming takes from a checkpoint."""
    torch.manual_seed(0)
    tensors = read_tensors(folder, ALONE)
    weights = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    flat = {name: value.tolist() for name, value in (*weights.items(), ("optimizer", tensors["optimizer"]))}
    return read_state(folder), flat, tensors["scheduler"], torch.get_rng_state().tolist()


def restore(folder: Path, as_written: Files) -> None:
    for path in folder.parent.iterdir():
        if path.name != "step-00000003":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir()
    for name, data in as_written.items():
        (folder / name).write_bytes(data)


# --- damages --------------------------------------------------------------------------------------


def _some_file(r: random.Random, folder: Path) -> Path:
    files = sorted(path for path in folder.glob("*") if _is_plain(path))
    return r.choice(files) if files else folder / "none"


def _is_plain(path: Path) -> bool:
    """Not a pipe, which would be waited for, nor a link, behind which the older checkpoint may stand."""
    return path.is_file() and not path.is_symlink()


def _bytes(r: random.Random, folder: Path) -> None:
    path = _some_file(r, folder)
    if _is_plain(path):
        path.write_bytes(mutated_bytes(r, path.read_bytes(), WORDS))


def _one_bit(r: random.Random, folder: Path) -> None:
    path = _some_file(r, folder)
    if data := bytearray(path.read_bytes() if _is_plain(path) else b""):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        path.write_bytes(data)


def _one_bit_of_the_manifest(r: random.Random, folder: Path) -> None:
    path = folder / MANIFEST
    if data := bytearray(path.read_bytes() if _is_plain(path) else b""):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        path.write_bytes(data)


def _zeros(r: random.Random, folder: Path) -> None:
    """What a crash leaves of a file whose size was written before its blocks."""
    path = _some_file(r, folder)
    if _is_plain(path):
        size = path.stat().st_size
        os.truncate(path, r.randint(0, size))
        os.truncate(path, size)


def _gone(r: random.Random, folder: Path) -> None:
    path = _some_file(r, folder)
    if _is_plain(path):
        path.unlink()


def _more(r: random.Random, folder: Path) -> None:
    if folder.is_dir():
        name = r.choice((".nfs0001", "README.md", "adapter_model.bin", "zz.safetensors", "x/y", "optimizer.pt.tmp"))
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"lora_A": torch.zeros(4)}, folder / name)
        else:
            (folder / name).write_bytes(b"x")


def _another_kind(r: random.Random, folder: Path) -> None:
    """A folder, a pipe or a link in place of a file."""
    path = _some_file(r, folder)
    if not _is_plain(path):
        return
    data = path.read_bytes()
    path.unlink()
    kind = r.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.symlink_to("/no/such/file")
    elif kind == 4:
        path.symlink_to(folder.parent / "step-00000003" / path.name)
    else:  # as good as a file
        elsewhere = folder.parent / "elsewhere"
        elsewhere.write_bytes(data)
        path.symlink_to(elsewhere)


def _swapped(r: random.Random, folder: Path) -> None:
    one, other = _some_file(r, folder), _some_file(r, folder)
    if _is_plain(one) and _is_plain(other):
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


def _from_the_other(r: random.Random, folder: Path) -> None:
    """A file of the checkpoint before: whole, and wrong."""
    path = _some_file(r, folder)
    if _is_plain(path) and (theirs := folder.parent / "step-00000003" / path.name).is_file():
        path.write_bytes(theirs.read_bytes())


def _manifest(r: random.Random, folder: Path) -> None:
    """Another value, a key less or more, names that lead elsewhere."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes() if _is_plain(path) else b"")
    except (ValueError, RecursionError):
        return
    if not (places := list(_places(manifest))):
        return
    container, key = r.choice(places)
    names = ("../step-00000003/" + OPTIMIZER, "/etc/passwd", "..", "", "x" * 5000, "\0", "\ud800", "sha257")
    match r.randrange(4):
        case 0:
            del container[key]
        case 1:
            container[r.choice(names)] = container.pop(key)
        case 2:
            container[r.choice(names)] = odd_value(r)
        case _:
            container[key] = odd_value(r)
    path.write_text(json.dumps(manifest, indent=r.choice((None, 1))))


def _same_manifest(_: random.Random, folder: Path) -> None:
    """Other white space, same values."""
    path = folder / MANIFEST
    if _is_plain(path):
        try:
            path.write_text(json.dumps(json.loads(path.read_bytes())))
        except (ValueError, RecursionError):
            return


def _places(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(value, dict):
        for key, item in list(value.items()):
            yield value, key
            yield from _places(item)


def _beside(r: random.Random, folder: Path) -> None:
    """Folders and files whose names are nearly those of checkpoints."""
    path = folder.with_name(r.choice(ODD_NAMES))
    if not path.exists():
        path.mkdir() if r.random() < 0.7 else path.write_bytes(b"x")


def _whole_folder(r: random.Random, folder: Path) -> None:
    if not folder.is_dir() or folder.is_symlink():
        return
    kind = r.randrange(4)
    if kind == 0:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    elsewhere = folder.with_name(".moved")
    folder.rename(elsewhere)
    if kind == 1:
        folder.symlink_to(elsewhere)  # as good as a folder
    elif kind == 2:
        folder.write_bytes(b"x")


DAMAGES: list[Callable[[random.Random, Path], None]] = [
    _bytes, _bytes, _one_bit, _one_bit, _one_bit_of_the_manifest, _zeros, _gone, _more, _another_kind, _swapped,
    _from_the_other, _manifest, _manifest, _manifest, _same_manifest, _beside, _whole_folder,
]  # fmt: skip
