"""A run's id: `<name>-<8 hex of content>`, with `-2`, `-3` for runs that start anew. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from opensloth.run_config import RunConfig

_GIVE_WAY: Final = {
    "opensloth.fast_model_args.load_in_4bit",
    "opensloth.fast_model_args.load_in_8bit",
    "training.optim",
    "training.eval_strategy",
}
"""Keys whose default may give way to what the machine or the data allows; a written value never does."""
_MAY_BE_PATHS: Final = {
    "path", "eval_path", "data_cache_path", "model_name", "pretrained_lora", "resume_from_checkpoint",
}  # fmt: skip
_RUN: Final = re.compile(r"(?P<name>.+)-(?P<content>[0-9a-f]{8})(?:-(?P<fresh>\d{1,4}))?")


def content_hash(config: RunConfig, data: Mapping[str, str], job: Mapping[str, Any] | None = None) -> str:
    """Hex SHA-256 of what decides a run's result.

    data: path in `config` -> SHA-256 of what is there. A hash stands in the path's place, so that a moved or
    renamed file or folder is the same content and an edited one is not. With a `dataset` the cache's place is left
    out.
    job: on a cluster the `job` section.
    """
    content = config.model_dump(mode="json", exclude={"explicit"})
    if config.dataset is not None:
        del content["opensloth"]["data_cache_path"]
    opensloth = content["opensloth"]
    for section in (*(content["dataset"] or ()), opensloth, opensloth["fast_model_args"], content["training"]):
        for key in _MAY_BE_PATHS & section.keys():
            if section[key] in data:
                section[key] = f"sha256:{data[section[key]]}"
    content["written"] = sorted(_GIVE_WAY.intersection(config.explicit))
    content["job"] = job
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_id(name: str, content: str) -> str:
    """The first run of a content."""
    return f"{name}-{content[:8]}"


def latest_of_content(base: str, existing: Iterable[str]) -> str | None:
    """The newest of `base`, `base-2`, ... among the existing runs; None when there is none."""
    numbers = _numbers(base, existing)
    return _numbered(base, max(numbers)) if numbers else None


def next_fresh(base: str, existing: Iterable[str]) -> str:
    """The id that `--fresh` gives."""
    return _numbered(base, max(_numbers(base, existing), default=0) + 1)


def name_of(run: str) -> str:
    """The plain name in a run id; the id itself when it is not one."""
    match = _RUN.fullmatch(run)
    return match["name"] if match else run


def _numbers(base: str, existing: Iterable[str]) -> list[int]:
    numbers = []
    for run in existing:
        match = _RUN.fullmatch(run)
        if match and f"{match['name']}-{match['content']}" == base:
            numbers.append(int(match["fresh"] or 1))
    return numbers


def _numbered(base: str, number: int) -> str:
    return base if number == 1 else f"{base}-{number}"
