"""What the text of a data path names: a place on a cluster's volume, a hub dataset, or a file. Standard library only.

The submitting side resolves a config by this rule and the training side opens what it says: they must agree.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

VOLUME_PREFIX: Final = "pvc:"
"""`pvc:PATH` is PATH below the volume's root."""
VOLUME_ROOT: Final = "/shared"
"""Where pods mount the volume."""
_HUB_NAME: Final = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_FILE_SUFFIXES: Final = (
    ".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".yaml",
)  # fmt: skip


def is_hub_name(text: str, folder: Path) -> bool:
    """Whether `text` names a hub dataset rather than a file below `folder`.

    A name is a hub's when no such file is there, it has the form NAME or OWNER/NAME, no suffix of a data file,
    and OWNER is no folder here.
    """
    if os.path.exists(folder / expanded(text)) or not _HUB_NAME.fullmatch(text):
        return False
    owner, slash, _ = text.partition("/")
    return not text.endswith(_FILE_SUFFIXES) and not (slash and os.path.isdir(folder / owner))


def expanded(text: str) -> Path:
    """`text` with ~ and ~user replaced as a shell does; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(text))
