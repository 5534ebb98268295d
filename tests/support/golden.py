"""Files whose content is held by tests. `OSLO_UPDATE_GOLDEN=1 pytest ...` writes them anew; read the diff."""

from __future__ import annotations

import os
from pathlib import Path


def assert_golden(path: Path, text: str) -> None:
    if os.environ.get("OSLO_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{path.name} is not up to date: OSLO_UPDATE_GOLDEN=1 pytest"
