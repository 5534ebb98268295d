"""A smaller GPU: a process that holds the rest of this one's memory, so that a run finds no more than it is to have.

python -m training.ballast BYTES: takes all but so much of what is free, says so, and keeps it until its input ends.
"""

# ruff: noqa: T201 (its parent reads the line)

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from opensloth.memory_estimate import CONTEXT_BYTES, GIB


@contextlib.contextmanager
def held(room_gib: float | None, beside: int = CONTEXT_BYTES) -> Iterator[None]:
    """While `room_gib` is all that is free; None: everything is. beside: bytes for a CUDA context still to come.

    Raises RuntimeError where less is free to begin with.
    """
    if room_gib is None:
        yield
        return
    command = [sys.executable, "-m", "training.ballast", str(int(room_gib * GIB) + beside)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            if not holder.stdout.readline():
                raise RuntimeError(f"{room_gib} GiB are not free, or could not be kept free")
            yield
        finally:
            holder.kill()


def main() -> None:
    import torch

    free, _ = torch.cuda.mem_get_info()
    kept = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
    print("held", kept.nbytes, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
