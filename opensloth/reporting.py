"""TensorBoard, W&B and MLflow, through transformers' own callbacks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import TrainerControl, TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from opensloth.errors import ConfigError, Problem
from opensloth.opensloth_config import TrainingArguments


def check_reporters(training: TrainingArguments) -> None:
    """Raise ConfigError when a reporter's package is missing, before anything expensive is done."""
    missing = [name for name in training.reporters() if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                Problem(
                    "training.report_to",
                    f"needs the package {', '.join(missing)}",
                    f"pip install {' '.join(missing)}",
                )
            ]
        )


def transformers_arguments(training: TrainingArguments, output_dir: Path, run_name: str) -> Any:
    """The config as transformers' TrainingArguments, which its optimizers and callbacks read."""
    names = {field for field in transformers.TrainingArguments.__dataclass_fields__}
    shared = {name: value for name, value in training.model_dump().items() if name in names and value is not None}
    for own in ("resume_from_checkpoint", "save_total_limit", "bf16", "tf32"):  # acted on by oslo alone
        shared.pop(own, None)
    shared |= {"output_dir": str(output_dir), "run_name": training.run_name or run_name}
    shared |= {"report_to": training.reporters() or "none", "disable_tqdm": True}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would warn that ranks were not started for its own Trainer
    try:
        return transformers.TrainingArguments(**shared)
    finally:
        transformers.logging.set_verbosity(verbosity)


class Reporting:
    """Hands a run's logs to transformers' callbacks; rank 0 only has any."""

    def __init__(self, arguments: Any, state: TrainerState, model: nn.Module, tensorboard: Path) -> None:
        """arguments: transformers' TrainingArguments. tensorboard: folder of its event files."""
        self._arguments, self._state, self._model = arguments, state, model
        self._control = TrainerControl()
        callbacks = []
        if state.is_world_process_zero:
            callbacks = [kind() for kind in get_reporting_integration_callbacks(arguments.report_to)]
        for callback in callbacks:
            if hasattr(callback, "tb_writer"):
                callback.logging_dir = str(tensorboard)
        # transformers warns of a handler without its flow callback; the flow itself is the loop's own.
        self._handler = CallbackHandler([DefaultFlowCallback(), *callbacks], model, None, None, None)

    def begin(self) -> None:
        self._handler.on_train_begin(self._arguments, self._state, self._control)

    def log(self, values: dict[str, float]) -> None:
        """Record values at the state's step, as transformers' Trainer does."""
        entry = {"epoch": self._state.epoch, **values}
        self._state.log_history.append({**entry, "step": self._state.global_step})
        self._handler.on_log(self._arguments, self._state, self._control, entry)

    def end(self) -> None:
        self._handler.on_train_end(self._arguments, self._state, self._control)
