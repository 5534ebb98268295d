"""A checked file -> the one object that `render` prints and `submit` sends. Offline; the same input, the same bytes."""

from __future__ import annotations

from opensloth import run_config
from opensloth.fingerprint import source_sha256
from runner.config_file import LoadedFile
from runner.identity import content_hash
from runner.pytorchjob import Manifest, render_pytorchjob

_NOT_CONTENT = {"context", "namespace"}
"""Where a job runs is not what it does."""


def cluster_content(loaded: LoadedFile) -> str:
    """Hex SHA-256 of all that decides the result on a cluster: config, data, image and pods."""
    hashes = {seen: source_sha256(local) for seen, local in loaded.sources.items()}
    return content_hash(loaded.run, hashes, loaded.job.model_dump(mode="json", exclude=_NOT_CONTENT))


def job_manifest(loaded: LoadedFile, run: str, content: str) -> Manifest:
    """run: its name; content: as cluster_content has it. Raises UsageError when it does not fit an object."""
    return render_pytorchjob(run, loaded.run.name, content, run_config.dump(loaded.run), loaded.job)
