"""What this machine can do, and a config brought in line with it.

A value that the machine cannot honour is an error when a person wrote it, and gives way with one line of
warning when it is a default. Looked at where training runs, never where a job is rendered.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from opensloth.dist import is_launched
from opensloth.errors import ConfigError, Problem
from opensloth.opensloth_config import OpenSlothConfig, TrainingArguments
from opensloth.run_config import RunConfig
from opensloth.training_keys import PLAIN_OPTIMIZER, needs_bitsandbytes

_RECOMPUTE = "opensloth.fast_model_args.use_gradient_checkpointing"


@dataclass(frozen=True)
class Hardware:
    """cuda: how many devices; bf16: whether they compute in it; bitsandbytes: whether it is installed."""

    cuda: int
    bf16: bool
    bitsandbytes: bool

    @property
    def quantises(self) -> bool:
        return self.cuda > 0 and self.bitsandbytes


def detect(training: TrainingArguments) -> Hardware:
    """The machine as this run may use it: `use_cpu` hides its CUDA devices."""
    cuda = 0 if training.use_cpu else torch.cuda.device_count()
    return Hardware(
        cuda=cuda,
        bf16=cuda > 0 and torch.cuda.is_bf16_supported(including_emulation=False),
        bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
    )


def bring_in_line(
    config: RunConfig, hardware: Hardware, *, model_is_loaded: bool = False
) -> tuple[RunConfig, list[str]]:
    """Replace defaults that this machine cannot honour.

    model_is_loaded: how the model is loaded is past asking.

    Returns the config to train with, and a line for each value that gave way.
    Raises ConfigError with every written value that cannot be honoured, each with the --set that mends it.
    """
    problems, warnings = [], []
    opensloth, training = config.opensloth, config.training
    why = "needs CUDA, and this machine has none" if not hardware.cuda else "needs the package bitsandbytes"
    install = "" if not hardware.cuda else "; or pip install 'opensloth[gpu]'"
    for path, name in _quantised(opensloth, training):
        if hardware.quantises or (model_is_loaded and path.startswith("opensloth")):
            continue
        mended = "false" if path.startswith("opensloth") else PLAIN_OPTIMIZER
        if path in config.explicit:
            problems.append(Problem(path, f"{name} {why}", f"--set {path}={mended}{install}"))
        else:
            warnings.append(f"{path}: the default {name} {why}; using {mended}")
    problems += _missing_devices(opensloth, hardware)
    if training.bf16 and hardware.cuda and not hardware.bf16:
        problems.append(Problem("training.bf16", "this GPU does not compute in bfloat16", "--set training.bf16=false"))
    if problems:
        raise ConfigError(problems)
    return _replaced(config, hardware), warnings


def _missing_devices(opensloth: OpenSlothConfig, hardware: Hardware) -> list[Problem]:
    """The launcher has checked the numbers, and shows its ranks the chosen devices only."""
    path, devices = "opensloth.devices", opensloth.devices
    if not is_launched() and len(devices) > 1:
        hint = "start it with `oslo submit --local`, or give one device"
        return [Problem(path, f"{devices} takes a process each, and this is one process", hint)]
    if not is_launched() and 0 < hardware.cuda <= devices[0]:
        have = ", ".join(map(str, range(hardware.cuda)))
        return [Problem(path, f"asks for {devices}; this machine has {have}")]
    return []


def _quantised(opensloth: OpenSlothConfig, training: TrainingArguments) -> list[tuple[str, str]]:
    """(path, what it is) of each value that takes bitsandbytes on CUDA."""
    model = opensloth.fast_model_args
    found = []
    if model.load_in_4bit:
        found.append(("opensloth.fast_model_args.load_in_4bit", "4-bit loading"))
    if model.load_in_8bit:
        found.append(("opensloth.fast_model_args.load_in_8bit", "8-bit loading"))
    if needs_bitsandbytes(training.optim):
        found.append(("training.optim", training.optim))
    return found


def _replaced(config: RunConfig, hardware: Hardware) -> RunConfig:
    """A deep copy in which the defaults have given way; what counts as written stays the same."""
    config = config.model_copy(deep=True)
    if not hardware.quantises:
        for path, _ in _quantised(config.opensloth, config.training):
            section = config.opensloth.fast_model_args if path.startswith("opensloth") else config.training
            section.__dict__[path.rpartition(".")[2]] = False if path.startswith("opensloth") else PLAIN_OPTIMIZER
    if config.training.bf16 is None:
        config.training.__dict__["bf16"] = hardware.bf16
    model = config.opensloth.fast_model_args
    if isinstance(model.use_gradient_checkpointing, str):
        asked = _RECOMPUTE in config.explicit and model.use_gradient_checkpointing
        model.__dict__["use_gradient_checkpointing"] = (asked or "auto") if hardware.cuda else False
    return config
