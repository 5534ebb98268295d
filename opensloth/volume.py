"""Files on the volume, for whoever is not there: `python -m opensloth.volume COMMAND`, run in a helper pod.

    have SHA256/NAME ...                 which inputs are complete, and what is there of the others
    receive SHA256/NAME [--folder]       an input from stdin; goes on where an earlier upload was broken off
    list PATH                            the files below it, with size and hash
    send PATH                            the bytes of files below it, as stdin asks for them
    runs                                 the runs that have left files
    remove runs/RUN                      all files of a run

Answers are JSON lines on stdout. The last one is {"error", "hint", "kind"} where something went wrong, and the
sentence is on stderr too. Standard library only: it starts in a tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from opensloth import contract
from opensloth.fingerprint import file_sha256, visible_files
from opensloth.uploads import STALE_SECONDS, Input, Partial, content_bytes
from opensloth.volume_io import VolumeError, alive, confined, emit, explain, nearest_existing

_TICK_BYTES: Final = 8 << 20
_TICK_SECONDS: Final = 1.0
_CHUNK_BYTES: Final = 1 << 20
_DRAIN_SECONDS: Final = 10.0


# --- inputs -------------------------------------------------------------------------------------------


def have(root: Path, names: Sequence[str]) -> None:
    """{"input", "complete", "partial": bytes} each. Complete ones count as used now."""
    for name in names:
        wanted = Input.parse(root, name)
        complete = wanted.is_complete() or wanted.adopt()
        if complete:
            wanted.renew()
        begun = [] if complete else wanted.partials()
        emit({"input": name, "complete": complete, "partial": content_bytes(begun[0]) if begun else 0})


def receive(root: Path, name: str, *, folder: bool, fresh: bool, need: int) -> None:
    """An input, in one conversation.

    -> {"ready": {file: bytes that are there}}, and at any time {"received": bytes, counted over all files},
       {"busy"} as a sign of life, {"complete": true} as the last word: it is in its place
    <- {"file", "size", "offset"} and then the bytes from offset to size, for each file; {"commit": true}

    file: relative, "" for an input that is a file. A stdin that ends leaves a partial for the next upload.
    """
    wanted = Input.parse(root, name)
    partial = Partial(wanted)
    with alive("receiving"):
        if wanted.is_complete():
            return _complete()
        partial.claim(fresh=fresh, stale_seconds=float(os.environ.get(contract.STALE_ENV) or STALE_SECONDS))
        try:
            _require_space(root, need - sum(partial.sizes().values()))
            if folder:
                partial.make_folder()
            emit({"ready": partial.sizes()})
            _receive_files(sys.stdin.buffer, wanted, partial)
        finally:
            partial.release()
    return _complete()


def _receive_files(stream: BinaryIO, wanted: Input, partial: Partial) -> None:
    """Until it is complete, by this or by another upload."""
    ticks = _Ticks(wanted)
    try:
        while "commit" not in (order := _order(stream)):
            ticks.require_incomplete()
            partial.receive(stream, order["file"], order["size"], order["offset"], ticks.count)
        partial.commit()
    except _AlreadyComplete:
        partial.discard()
    except VolumeError:
        if not wanted.is_complete():
            raise  # else: whoever completed it has cleared this partial away


class _AlreadyComplete(Exception):
    """Another upload was first."""


class _Ticks:
    """Says how much has arrived, now and then: the sender goes on when it hears so. And looks for other uploads."""

    def __init__(self, wanted: Input) -> None:
        self._input = wanted
        self._total, self._said, self._time = 0, 0, time.monotonic()

    def count(self, received: int) -> None:
        self._total += received
        now = time.monotonic()
        if self._total - self._said >= _TICK_BYTES or now - self._time >= _TICK_SECONDS:
            emit({"received": self._total})
            self._said, self._time = self._total, now
            self.require_incomplete()

    def require_incomplete(self) -> None:
        if self._input.is_complete():
            raise _AlreadyComplete


def _require_space(root: Path, need: int) -> None:
    free = shutil.disk_usage(nearest_existing(root)).free
    if need > free:
        hint = "free some: oslo delete RUN --files; the pruning job of k8s/ does so every night"
        raise VolumeError(f"the volume at {root} has {free:,} bytes free, and {need:,} are needed", hint, "full")


def _complete() -> None:
    emit({"complete": True})


# --- results ------------------------------------------------------------------------------------------


def list_files(root: Path, text: str) -> None:
    """{"file", "size", "sha256"} each, then {"files": how many}. A file by itself is named ""."""
    path = _existing(root, text)
    count = 0
    with alive("hashing"):
        for name, file in [("", path)] if path.is_file() else visible_files(path):
            confined(root, file.relative_to(root).as_posix())
            emit({"file": str(name), "size": file.stat().st_size, "sha256": file_sha256(file)})
            count += 1
    emit({"files": count})


def send(root: Path, text: str) -> None:
    """<- {"file", "offset"}; -> {"size": of the file} and then its bytes from offset on. Until {"end": true}."""
    path = _existing(root, text)
    while not (order := _order(sys.stdin.buffer)).get("end"):
        file = confined(root, (path / order["file"]).relative_to(root).as_posix())
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            emit({"size": size})
            stream.seek(order["offset"])
            left = size - order["offset"]
            while left > 0:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise VolumeError(f"{file} became shorter while it was read", "does the run still go on?")
                sys.stdout.buffer.write(chunk)
                left -= len(chunk)
            sys.stdout.buffer.flush()


def _existing(root: Path, text: str) -> Path:
    path = confined(root, text)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return path


# --- runs ---------------------------------------------------------------------------------------------


def runs(root: Path) -> None:
    """{"runs": ids, in the order of their first attempts}."""
    folder = root / contract.RUNS_DIR
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    found = [path for path in found if not path.name.startswith(".")]
    emit({"runs": [path.name for path in sorted(found, key=lambda path: (_made(path), path.name))]})


def _made(run: Path) -> float:
    """Seconds since the epoch; the folder's own time is of the last change in it."""
    for path in (run / contract.ATTEMPTS_DIR / "1" / contract.STARTED_FILE, run):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def remove(root: Path, text: str) -> None:
    """All files of a run; nobody sees it half removed under its name."""
    path = confined(root, text)
    if path.parent != root / contract.RUNS_DIR or path.name.startswith("."):
        raise VolumeError(f"{text!r} is not {contract.RUNS_DIR}/RUN", kind="usage", exit_code=2)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.deleted")
    path.rename(aside)
    with alive("removing"):
        shutil.rmtree(aside)
    emit({"removed": text})


# --- the command --------------------------------------------------------------------------------------


def _order(stream: BinaryIO) -> dict[str, Any]:
    """The next line of stdin. Raises EOFError when the other side has left."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    order: dict[str, Any] = json.loads(line)
    return order


def _drain() -> None:
    """Take what is still being sent: a connection with unread bytes is torn down before its last answer arrives."""
    end = time.monotonic() + _DRAIN_SECONDS
    while (left := end - time.monotonic()) > 0:
        readable, _, _ = select.select([sys.stdin], [], [], left)
        if not readable or not os.read(sys.stdin.fileno(), _CHUNK_BYTES):
            return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m opensloth.volume", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("have").add_argument("inputs", nargs="+", metavar="SHA256/NAME")
    command = commands.add_parser("receive")
    command.add_argument("input", metavar="SHA256/NAME")
    command.add_argument("--folder", action="store_true", help="it is a folder")
    command.add_argument("--fresh", action="store_true", help="go on from no earlier upload")
    command.add_argument("--need", type=int, default=0, metavar="BYTES", help="its size: ends at once if space lacks")
    for name in ("list", "send", "remove"):
        commands.add_parser(name).add_argument("path")
    commands.add_parser("runs")
    return parser


def _run(root: Path, options: argparse.Namespace) -> None:
    match options.command:
        case "have":
            have(root, options.inputs)
        case "receive":
            receive(root, options.input, folder=options.folder, fresh=options.fresh, need=options.need)
            _drain()
        case "list":
            list_files(root, options.path)
        case "send":
            send(root, options.path)
        case "runs":
            runs(root)
        case "remove":
            remove(root, options.path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1, 2 for what cannot be meant, 102 where there is no such path."""
    options = _parser().parse_args(arguments)
    root = Path(os.environ.get(contract.ROOT_ENV) or Path.home() / ".oslo")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of `finally`
    try:
        _run(root, options)
    except EOFError:
        return 1  # nobody is there to tell
    except BrokenPipeError:
        return 1
    except VolumeError as error:
        return _fail(error, options.command)
    except OSError as error:
        return _fail(explain(error, root), options.command)
    return 0


def _fail(error: VolumeError, command: str) -> int:
    if command != "send":  # there it could come among a file's bytes
        emit({"error": error.message, "hint": error.hint, "kind": error.kind})
    sys.stderr.write(f"error: {error}\n")
    if command == "receive":
        _drain()
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
