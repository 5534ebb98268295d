"""A checked file -> the one object that `render` prints and `submit` sends. Offline; the same input, the same bytes."""

from __future__ import annotations

from typing import Final

from opensloth import run_config
from runner.config_file import LoadedFile
from runner.data_paths import hash_in
from runner.identity import content_hash
from runner.pytorchjob import Manifest, render_pytorchjob

_NOT_CONTENT: Final = {
    *("context", "namespace", "queue", "priority_class"),
    *("deadline", "max_restarts", "start_timeout", "grace_period", "ttl"),
    "gpu_memory",
}
"""Where a job runs, when and for how long is not what it does: with a longer deadline the same run goes on. Nor is what
a prediction is compared with."""


def cluster_content(loaded: LoadedFile) -> str:
    """Hex SHA-256 of all that decides the result on a cluster: config, data, model folders, image and pods.

    loaded: for a target that is a cluster.
    """
    hashes = {seen: hash_in(seen) for seen in loaded.sources}
    return content_hash(loaded.run, hashes, loaded.job.model_dump(mode="json", exclude=_NOT_CONTENT))


def job_manifest(loaded: LoadedFile, run: str, content: str) -> Manifest:
    """run: its name; content: as cluster_content has it. Raises UsageError when it does not fit an object."""
    config_text = run_config.dump(loaded.run)
    return render_pytorchjob(run, loaded.run.name, content, config_text, loaded.job, tuple(loaded.sources))
