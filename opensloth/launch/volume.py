"""A volume that cannot be written or read: one sentence that says why, and where."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from opensloth.contract import Cause
from opensloth.files import MAKE_ROOM, NO_ROOM, may_pass
from opensloth.human import human_bytes
from opensloth.launch.ending import Ending

_REFUSED = {
    errno.EACCES: "may not write",
    errno.EPERM: "may not write",
    errno.EROFS: "cannot write, because it is mounted read-only,",
}


def fault(error: OSError, run: Path) -> Ending | None:
    """The end of an attempt that met `error`; None when it is another kind of error."""
    root = run.parent.parent
    if may_pass(error):  # and while it lasts, nothing can be asked of the volume
        return Ending(Cause.VOLUME, f"the volume at {root} failed: {error.strerror}: {error.filename or 'a file'}")
    if not _exists(root):
        return Ending(Cause.CONFIG, f"{root} does not exist: the volume is not mounted there", "see job.volume")
    if error.errno in NO_ROOM:
        return _full(error, root)
    if error.errno not in _REFUSED or error.filename is None:
        return None
    found = Path(os.fsdecode(error.filename))
    while not os.path.isdir(found):  # what was to be made in it is not there, or cannot be looked at
        found = found.parent
    status = found.stat()
    return Ending(
        Cause.CONFIG,
        f"uid {os.getuid()}, gid {os.getgid()} {_REFUSED[error.errno]} in {found} "
        f"(mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}:{status.st_gid})",
        "make the volume writable for that uid or gid; hostPath and many NFS servers ignore fsGroup",
    )


def _exists(path: Path) -> bool:
    """Also when it may not be looked at."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _full(error: OSError, root: Path) -> Ending:
    if error.errno == errno.EDQUOT:
        what = f"the quota of uid {os.getuid()}, gid {os.getgid()} on the volume at {root} is used up"
    else:
        what = f"no space is left on the volume at {root} ({human_bytes(shutil.disk_usage(root).free)} free)"
    return Ending(Cause.CONFIG, what, MAKE_ROOM)
