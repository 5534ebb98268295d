"""Makes trainers from a model, a tokenizer and rows."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import nn

from opensloth import hardware, run_config
from opensloth.check_memory import CheckMemory
from opensloth.contract import CHECKPOINTS_DIR, EVENTS_FILE, TENSORBOARD_DIR
from opensloth.data.batch import Batch
from opensloth.data.in_memory import InMemoryDocuments
from opensloth.data.prepared import PreparedDataset
from opensloth.data.training_data import PreparedDocuments, Rows, make_rows
from opensloth.dist import World, join_world
from opensloth.errors import ConfigError, DataError, Problem
from opensloth.events import Events, NullEvents
from opensloth.isolation import isolate_documents
from opensloth.model import attach_adapter, base_of, check_fits, recompute_activations, vocabulary_of
from opensloth.opensloth_config import OpenSlothConfig, TrainingArguments
from opensloth.packing_check import bounds_of, require_same_gradient
from opensloth.reporting import check_reporters
from opensloth.run_config import RunConfig, from_python
from opensloth.step import Objective
from opensloth.trainer import Place, SftTrainer
from opensloth.training_keys import refusal_of_transformers_key

NAME = "sft"
"""What a run is called that was started from Python."""


def create_sft_trainer(
    model: nn.Module,
    tokenizer: Any,
    train_dataset: Any,
    opensloth_config: OpenSlothConfig,
    hf_train_args: TrainingArguments | transformers.TrainingArguments,
    eval_dataset: Any = None,
) -> SftTrainer:
    """A trainer for a model that the caller has loaded.

    model: a transformers model, or one with a peft adapter; without one it is given the adapter of
        `opensloth_config`, unless that says full_finetuning.
    train_dataset, eval_dataset: a PreparedDataset, a Hugging Face Dataset or a list of rows, each with
        `input_ids` and `labels` (token ids, -100 where a position is no target).
    hf_train_args: ours or transformers'.

    Raises ConfigError for what cannot be honoured, DataError for rows that cannot be trained on; it names
    row and column.
    """
    training = _our_arguments(hf_train_args)
    config = from_python(opensloth_config, training, NAME)
    config, warnings = hardware.bring_in_line(config, hardware.detect(training), model_is_loaded=True)
    check_reporters(config.training)
    device = next(model.parameters()).device
    world = join_world(cuda=device.type == "cuda", timeout_seconds=training.ddp_timeout, devices=[device.index or 0])
    place = place_in(Path(training.output_dir or TrainingArguments().output_dir or "."))
    events = python_events(place, world)
    for warning in warnings:
        events.warn(warning)
    if not hasattr(model, "peft_config"):
        model = attach_adapter(base_of(model), config.opensloth)
    asked = getattr(hf_train_args, "gradient_checkpointing", False)
    recompute_activations(model, wanted=bool(asked or config.opensloth.fast_model_args.use_gradient_checkpointing))
    base_of(model).config.use_cache = False
    documents = _documents(train_dataset, "train_dataset", model, config)
    eval_documents = None if eval_dataset is None else _documents(eval_dataset, "eval_dataset", model, config)
    return assemble(model, tokenizer, (documents, eval_documents), config, world=world, place=place, events=events)


def assemble(
    model: nn.Module,
    tokenizer: Any,
    documents: tuple[PreparedDocuments, PreparedDocuments | None],
    config: RunConfig,
    *,
    world: World,
    place: Place,
    events: Events,
) -> SftTrainer:
    """Plan the rows of (train, eval) documents, packed if model and config allow it, and make the trainer.

    Raises ConfigError when the model could be packed by its architecture, and packing changes what it learns.
    """
    check_fits(model, tokenizer)
    if config.training.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = config.training.tf32
    capacity = config.opensloth.fast_model_args.max_seq_length
    packed = config.opensloth.sequence_packing
    if packed:
        obstacle = isolate_documents(model, _longest(documents, capacity))
        if obstacle:
            packed = False
            events.warn(f"trained without packing, one document a row: {obstacle}")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    train_rows, eval_rows = (
        make_rows(part, capacity, packed=packed, pad_id=pad_id) if part is not None and len(part) else None
        for part in documents
    )
    if train_rows is None or not len(train_rows):
        raise DataError("there is nothing to train on", "the dataset has no document that fits max_seq_length")
    trainer = SftTrainer(model, tokenizer, train_rows, eval_rows, config, world=world, place=place, events=events)
    if packed:
        try:
            _check_packing(trainer, train_rows, config, world, events)
        finally:  # a caller may go on with the model
            trainer.objective.release()
    plan = trainer.plan
    events.emit(
        "plan",
        rows=len(train_rows),
        documents=len(train_rows.members),
        tokens=train_rows.tokens,
        target_tokens=train_rows.targets,
        row_fill=round(train_rows.fill, 4),
        packed=packed,
        rows_per_step=plan.shape.rows_per_step,
        accumulation=plan.shape.accumulation,
        world=plan.shape.world,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    events.emit("engine", engine=trainer.engine, reason=trainer.engine_reason)
    return trainer


def _longest(documents: tuple[PreparedDocuments, PreparedDocuments | None], capacity: int) -> int:
    """Tokens of the longest document that fits a row."""
    lengths = [part.lengths[part.lengths <= capacity] for part in documents if part is not None]
    return max((int(fitting.max()) for fitting in lengths if len(fitting)), default=0)


def _check_packing(trainer: SftTrainer, rows: Rows, config: RunConfig, world: World, events: Events) -> None:
    model, trains = trainer.model, trainer.objective
    autocast = torch.bfloat16 if config.training.bf16 else None
    plain = Objective(model, autocast=autocast)

    def packed(batch: Batch, targets: float) -> None:
        trains.begin_step()
        trains.accumulate(batch, targets)

    require_same_gradient(
        model,
        packed,
        plain.accumulate,
        rows,
        CheckMemory("packing", model, engine=trains.engine, autocast=autocast),
        bounds=bounds_of(model, autocast),
        world=world,
        events=events,
    )


def place_in(folder: Path) -> Place:
    """Where a run that was started from Python keeps its files: the result lies in the folder itself."""
    return Place(checkpoints=folder / CHECKPOINTS_DIR, final=folder, tensorboard=folder / TENSORBOARD_DIR)


def python_events(place: Place, world: World) -> Events:
    """Events of a run that was started from Python."""
    if not world.is_main:
        return NullEvents()
    return Events(place.final / EVENTS_FILE, rank=world.rank, attempt=1, for_people=True)


def _documents(dataset: Any, name: str, model: nn.Module, config: RunConfig) -> PreparedDocuments:
    if isinstance(dataset, PreparedDataset):
        return dataset
    return InMemoryDocuments(
        dataset,
        name=name,
        vocabulary=vocabulary_of(model),
        max_length=config.opensloth.fast_model_args.max_seq_length,
    )


def _our_arguments(given: TrainingArguments | transformers.TrainingArguments) -> TrainingArguments:
    """transformers' arguments as ours: each one honoured or refused, as in a file."""
    if isinstance(given, TrainingArguments):
        return given
    defaults = transformers.TrainingArguments(output_dir=given.output_dir, use_cpu=given.use_cpu)
    kept: dict[str, Any] = {}
    problems = []
    for field in dataclasses.fields(given):
        if field.name == "gradient_checkpointing":  # honoured by the factory itself
            continue
        value = _plain(getattr(given, field.name))
        if field.name in TrainingArguments.model_fields:
            kept[field.name] = value
        elif value != _plain(getattr(defaults, field.name)):
            reason = refusal_of_transformers_key(field.name, value)
            if reason:
                problems.append(Problem(f"hf_train_args.{field.name}", reason))
    if problems:
        raise ConfigError(problems)
    try:
        return TrainingArguments(**_translated(kept))
    except ValidationError as error:
        raise ConfigError(run_config.problems_from(error, "hf_train_args", TrainingArguments)) from error


def _translated(values: dict[str, Any]) -> dict[str, Any]:
    """Values that transformers spells in another way than we do."""
    if values.get("eval_strategy") != "steps":
        values.pop("eval_steps", None)
    if values.get("save_strategy") != "steps":
        values.pop("save_steps", None)
    for name in ("save_steps", "eval_steps", "logging_steps"):
        if values.get(name) is not None and values[name] == int(values[name]):
            values[name] = int(values[name])  # a fraction of all steps is left as it is, and refused
    values["report_to"] = values.get("report_to") or "none"
    return values


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
