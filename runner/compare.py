"""What differs between runs of one name. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opensloth.run_config import RunConfig
from runner import output
from runner.backend import RunStatus
from runner.plan import plain


def differences(configs: Mapping[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """run -> {dotted key: value} of the keys whose values are not the same in all runs."""
    flat = {run: _leaves(config.model_dump(mode="json", exclude={"explicit"})) for run, config in configs.items()}
    keys = {key: None for leaves in flat.values() for key in leaves}
    differing = [key for key in keys if len({repr(leaves.get(key)) for leaves in flat.values()}) > 1]
    return {run: {key: leaves.get(key) for key in differing} for run, leaves in flat.items()}


def text(statuses: Sequence[RunStatus], differing: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a column for each key that differs."""
    keys = list(next(iter(differing.values()), {}))
    rows = [
        (
            status.run,
            output.state_text(status),
            "-" if status.loss is None else f"{status.loss:.4g}",
            "-" if status.eval_loss is None else f"{status.eval_loss:.4g}",
            *(plain(differing[status.run][key]) for key in keys),
        )
        for status in statuses
    ]
    return output.table(("RUN", "STATE", "LOSS", "EVAL LOSS", *keys), rows)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """{dotted path: scalar or empty container}; items of lists as `dataset[0].path`."""
    if isinstance(value, dict) and value:
        parts = {f"{path}.{key}" if path else key: inner for key, inner in value.items()}
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        parts = {f"{path}[{index}]": inner for index, inner in enumerate(value)}
    else:
        return {path: value}
    return {leaf: found for at, inner in parts.items() for leaf, found in _leaves(inner, at).items()}
