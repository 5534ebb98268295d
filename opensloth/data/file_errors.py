"""What the operating system refuses (a missing right, a full disk), as an error for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensloth.contract import Cause
from opensloth.errors import DataError
from opensloth.files import NO_ROOM, may_pass


@contextmanager
def file_errors(where: Path | str) -> Iterator[None]:
    """Raise every OSError of the block as a DataError with path and reason.

    where: named in place of a path that the system does not tell, as when a disk is full.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads our report any more: nothing is wrong with a file
        raise
    except OSError as error:
        reason = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
        hint = "make room, for example by oslo data prune --unused" if error.errno in NO_ROOM else ""
        problem = DataError(f"{error.filename or where}: {reason}", hint)
        if may_pass(error):
            problem.cause = Cause.VOLUME
        raise problem from error
