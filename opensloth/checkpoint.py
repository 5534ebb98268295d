"""Checkpoints: complete or absent, verified before use.

`checkpoints/step-00000020/` holds the weights as peft or transformers load them, the optimizer, the schedule,
the random state of every rank, and manifest.json, written last, with the size and hash of every other file and
a hash of itself.
The folder is filled under another name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensloth.contract import CHECKPOINT_PREFIX
from opensloth.dist import World, barrier, sum_over_ranks
from opensloth.files import may_pass, read_json, sync_folder, sync_tree, write_json
from opensloth.fingerprint import file_sha256

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
RANDOM_STATE = "random-state-{rank}.pt"
PREFIX = CHECKPOINT_PREFIX
_OWN_NAME = re.compile(re.escape(PREFIX) + "[0-9]{8}")
SEAL = "sha256"
"""Key of the manifest: the hash of all its other keys. A flipped bit in `step` or `world` would resume elsewhere."""


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of the run besides tensors.

    plan: the rows and their order. rows_per_step: rows of a step over all ranks. world: ranks that wrote it.
    """

    step: int
    plan: str
    rows_per_step: int
    world: int
    targets_seen: int


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, folder: Path, *, keep: int | None, world: World, fence: Callable[[], None] = lambda: None
    ) -> None:
        """keep: how many of the newest stay; None: all. fence: raises when this process may not write any more."""
        self._folder, self._keep, self._world, self._fence = folder, keep, world, fence

    def save(self, state: CheckpointState, write_model: Callable[[Path], None], tensors: dict[str, Any] | None) -> Path:
        """Write one checkpoint; every rank calls this, at the same step.

        write_model: writes the weights into a folder. tensors: what torch.save keeps; None: model only.
        """
        final = self._folder / f"{PREFIX}{state.step:08d}"
        aside = self._make_aside(final.name)
        try:
            if tensors is not None:
                _save(random_state(self._world.device), aside / RANDOM_STATE.format(rank=self._world.rank))
            barrier(self._world)
            if self._world.is_main:
                write_model(aside)
                if tensors is not None:
                    _save(tensors, aside / OPTIMIZER)
                self._publish(aside, final, state)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # on a full volume this makes room for saying so
            raise
        if self._world.is_main:
            self._prune(state.step)
        barrier(self._world)
        return final

    def _make_aside(self, name: str) -> Path:
        """A folder that was never there before, the same on every rank: NFS keeps of an older one what is read."""
        token = secrets.randbits(32) if self._world.is_main else 0
        if self._world.is_main:
            (self._folder / _aside_name(name, token)).mkdir(parents=True)
        return self._folder / _aside_name(name, int(sum_over_ranks([float(token)], self._world)[0]))

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole and resumable; `warn` hears of those that are not.

        Every rank calls this, and is told what rank 0 has found: they must go on from the same one.
        """
        found = self._newest_whole(warn) if self._world.is_main else None
        nth = int(sum_over_ranks([float(1 + _step_of(found)) if found else 0.0], self._world)[0])
        return self._folder / f"{PREFIX}{nth - 1:08d}" if nth else None

    def _newest_whole(self, warn: Callable[[str], None]) -> Path | None:
        for folder in self._all():
            fault = fault_in(folder)
            if fault is None:
                return folder
            warn(f"checkpoint {folder.name} is passed over: {fault}")
        return None

    def _all(self) -> list[Path]:
        """Newest first."""
        named = (path for path in self._folder.glob(f"{PREFIX}*") if _OWN_NAME.fullmatch(path.name))
        return sorted((path for path in named if path.is_dir()), reverse=True)

    def _publish(self, aside: Path, final: Path, state: CheckpointState) -> None:
        files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
        listed = {
            str(path.relative_to(aside)): {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files
        }
        sync_tree(aside)
        content = {**vars(state), "files": listed}
        write_json(aside / MANIFEST, {**content, SEAL: _seal_of(content)})
        self._fence()
        replaced = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.replaced.tmp")
        if final.exists():  # an earlier attempt got as far and was set back
            final.rename(replaced)
        aside.rename(final)
        sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, step: int) -> None:
        """Keep the newest up to `step`; what is beyond it is of a training that was set back or started anew."""
        behind = [folder for folder in self._all() if _step_of(folder) <= step]
        kept = behind[: self._keep]
        for folder in self._all():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)  # NFS keeps what somebody still reads: gone the next time


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _aside_name(name: str, token: int) -> str:
    return f".{name}.{token:08x}.tmp"


def _save(tensors: Any, path: Path) -> None:
    """By way of Python's file: torch's own hides why it could not be written."""
    with path.open("wb") as stream:
        torch.save(tensors, stream)


def fault_in(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None when it can.

    Raises OSError at a fault of the volume that may pass: the checkpoint may be whole.
    """
    try:
        manifest = _manifest_of(folder)
        return "its manifest is missing, torn or altered" if manifest is None else _fault_in_files(folder, manifest)
    except OSError as error:
        if may_pass(error):
            raise
        return f"it cannot be read: {error.strerror}"


def _fault_in_files(folder: Path, manifest: dict[str, Any]) -> str | None:
    if OPTIMIZER not in manifest["files"]:
        return "it holds the model only (save_only_model)"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["size"]:
            return f"{name} is missing or cut short"
        if file_sha256(path) != expected["sha256"]:
            return f"{name} does not match its hash"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest["files"]:
            return f"{path.name} was not saved with it, and would be loaded"
    return None


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest less its seal; None when it is not as `save` wrote it."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else None  # a pipe of that name would be waited for
    if not isinstance(manifest, dict):
        return None
    seal = manifest.pop(SEAL, None)
    return manifest if seal == _seal_of(manifest) else None


def _seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> CheckpointState:
    """What the manifest says; the checkpoint has been found whole."""
    manifest = _manifest_of(folder)
    assert manifest is not None, folder
    return CheckpointState(**{key: value for key, value in manifest.items() if key != "files"})


def read_tensors(folder: Path, world: World) -> dict[str, Any]:
    """The tensors that `save` was given; the random state of this rank is put back as well.

    When other ranks wrote the checkpoint, the random state is left as it is: there is none for each.
    """
    tensors: dict[str, Any] = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    if read_state(folder).world == world.size:
        set_random_state(torch.load(folder / RANDOM_STATE.format(rank=world.rank), weights_only=True), world.device)
    return tensors


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Where this rank's generators stand, for `set_random_state`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Delete what a killed process left half-written under a dotted name."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
