"""Kernels are compiled once for all tests and the processes that they start, not once for the home of each."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
