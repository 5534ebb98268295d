"""A volume that cannot be written: one sentence that says who may not, and where."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from opensloth.contract import Cause
from opensloth.launch.ending import Ending

_REFUSED = {
    errno.EACCES: "may not write",
    errno.EPERM: "may not write",
    errno.EROFS: "cannot write, because it is mounted read-only,",
}


def unwritable(error: OSError, run: Path) -> Ending | None:
    """The end of an attempt that met `error`; None when it is another kind of error."""
    root = run.parent.parent
    if not root.exists():
        return Ending(Cause.CONFIG, f"{root} does not exist: the volume is not mounted there", "see job.volume")
    if error.errno not in _REFUSED or error.filename is None:
        return None
    found = Path(os.fsdecode(error.filename))
    while not found.is_dir():  # what was to be made in it is not there
        found = found.parent
    status = found.stat()
    return Ending(
        Cause.CONFIG,
        f"uid {os.getuid()}, gid {os.getgid()} {_REFUSED[error.errno]} in {found} "
        f"(mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}:{status.st_gid})",
        "make the volume writable for that uid or gid; hostPath and many NFS servers ignore fsGroup",
    )
