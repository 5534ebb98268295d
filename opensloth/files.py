"""Files that are whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any, Final

from opensloth.errors import chain

_STALE_READS: Final = 3
_NO_LINKS: Final = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What volumes without hard links (SMB, some buckets) answer."""
_MAY_PASS: Final = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOLCK,
)
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)
MAKE_ROOM: Final = "free some (oslo delete RUN --files) and submit again: it goes on from the last checkpoint"


def may_pass(error: BaseException) -> bool:
    """Whether it is a fault of a volume (its server or the network to it) that another try may not meet."""
    return isinstance(error, OSError) and error.errno in _MAY_PASS


def fault_of_volume(error: BaseException | None) -> OSError | None:
    """What a volume refused (no room) or failed in (may_pass), of an error or behind that of a library.

    torch raises an error of its own while it handles Python's; what is written in Rust (safetensors, tokenizers) names
    the number only.
    """
    for link in chain(error):
        said = re.search(r"\(os error (\d+)\)", str(link))
        found = OSError(int(said[1]), os.strerror(int(said[1]))) if said else link
        if isinstance(found, OSError) and (found.errno in NO_ROOM or may_pass(found)):
            return found
    return None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` with `data`; a reader sees the old bytes or the new, never a part."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def create_json(path: Path, value: Any) -> bool:
    """Write `path` unless it exists; say whether this call made it.

    By way of a link, so that it is whole or absent; on a volume without links by O_EXCL, and a reader may meet it torn.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    write_json(aside, value)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create(path, aside.read_bytes())
    finally:
        aside.unlink()
    return True


def _create(path: Path, data: bytes) -> bool:
    try:
        with path.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        return False
    sync_folder(path.parent)
    return True


def read_json(path: Path) -> Any | None:
    """The file's value; None when it does not exist or is torn.

    On NFS a file that another machine replaces between open and read is stale: then the new one is read.
    """
    for _ in range(_STALE_READS):
        try:
            return json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return None


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """fsync every file and folder below `path`, for files that a library wrote."""
    for found in sorted(path.rglob("*")):
        if found.is_dir():
            sync_folder(found)
        else:
            with found.open("rb+") as stream:
                os.fsync(stream.fileno())
    sync_folder(path)
