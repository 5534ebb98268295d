"""The one training loop: supervised steps, logs, evaluation, checkpoints, agreed stops."""

from __future__ import annotations

import math
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from transformers import TrainerState

from opensloth import arithmetic, checkpoint, engine
from opensloth.contract import Cause
from opensloth.data.ahead import Ahead
from opensloth.data.batch import Batch
from opensloth.data.order import RowOrder
from opensloth.data.training_data import Rows
from opensloth.dist import World, broadcast_parameters, sum_over_ranks
from opensloth.errors import DataError, NonFiniteError, StopRequested
from opensloth.events import Events
from opensloth.flops import measured_peak, work_of
from opensloth.meter import Meter
from opensloth.model import load_weights, save_model, trainable_parameters
from opensloth.optimizer import kept, make_optimizer, make_scheduler, restore
from opensloth.orders import CAUSES, Orders
from opensloth.pulse import Pulse
from opensloth.reporting import Reporting, transformers_arguments
from opensloth.run_config import RunConfig
from opensloth.step import StepTotals, accumulate_gradients

TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files, who may ask it to stop, and where this rank says that it makes progress."""

    checkpoints: Path
    final: Path
    tensorboard: Path
    orders: Orders = field(default_factory=Orders)
    pulse: Pulse = field(default_factory=Pulse)


@dataclass(frozen=True)
class TrainResult:
    """steps: optimizer steps done. loss, eval_loss: nats a target, the last that were measured."""

    steps: int
    loss: float | None
    eval_loss: float | None
    target_tokens: int
    seconds: float


class SftTrainer:
    """Supervised fine-tuning of one model on prepared rows.

    Public, as transformers' Trainer has them: `model`, `state`, `train()`, `evaluate()`, `save_model()`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        train_rows: Rows,
        eval_rows: Rows | None,
        config: RunConfig,
        *,
        world: World,
        place: Place,
        events: Events,
    ) -> None:
        """config: brought in line with this machine (`opensloth.hardware`)."""
        self.model, self.tokenizer = model, tokenizer
        self._train_rows, self._eval_rows = train_rows, eval_rows
        self._config, self._training = config, config.training
        self._world, self._place, self._events = world, place, events
        self.plan = arithmetic.step_plan(config.training, len(train_rows), world.size, has_eval=eval_rows is not None)
        self._order = RowOrder(
            rows=len(train_rows),
            shape=self.plan.shape,
            seed=self._training.seed if self._training.data_seed is None else self._training.data_seed,
            shuffle=self._training.train_sampling_strategy == "random",
            drop_last=self._training.dataloader_drop_last,
        )
        order = self._order
        self._plan_id = f"{train_rows.sha256()} seed {order.seed} shuffle {order.shuffle} drop_last {order.drop_last}"
        self._parameters = trainable_parameters(model)
        broadcast_parameters(self._parameters, world)
        autocast = torch.bfloat16 if self._training.bf16 else None
        self.objective, why = engine.choose(
            model,
            train_rows,
            config.opensloth,
            optim=self._training.optim,
            longest_document=max(rows.longest for rows in (train_rows, eval_rows) if rows is not None and len(rows)),
            rows_per_batch=self.plan.shape.per_device,
            autocast=autocast,
            beat=place.pulse.beat,
        )
        self.engine, self.engine_reason = self.objective.engine, why
        arguments = transformers_arguments(self._training, place.final, config.name)
        self._optimizer = make_optimizer(self._parameters, arguments, flat_gradients=self.objective.has_flat_gradients)
        self._scheduler = make_scheduler(self._optimizer, self._training, self.plan)
        self.state = TrainerState(
            max_steps=self.plan.total_steps,
            num_train_epochs=math.ceil(self._training.num_train_epochs),
            is_local_process_zero=world.local_rank == 0,
            is_world_process_zero=world.is_main,
        )
        self._reporting = Reporting(arguments, self.state, model, place.tensorboard)
        self._checkpoints = checkpoint.Checkpoints(
            place.checkpoints, keep=self._training.save_total_limit, world=world, fence=place.orders.fence
        )
        self._found_whole: Path | None = None
        """What newest_checkpoint has verified: hashing gigabytes once is enough."""
        self._last_good: Path | None = None
        """The checkpoint that this training wrote last, or else went on from, and its step."""
        self._saved_step = 0
        self._work = work_of(model)
        self._peak = measured_peak(world.device, autocast or torch.float32) if self._work else None
        self._meter = Meter(world.device, self.plan.total_steps, self._peak)
        self._targets_seen = 0
        self._rate = 0.0
        self._loss: float | None = None
        self._eval_loss: float | None = None

    # --- what users call ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainResult:
        """Train to the end of the plan.

        resume_from_checkpoint: a folder; True: the newest of this run, if there is one; False: from the start;
            None: as the config's resume_from_checkpoint says.
        Raises NonFiniteError after a checkpoint of the step before, and StopRequested after a checkpoint when
        somebody asked to stop.
        """
        started = time.monotonic()
        torch.manual_seed(self._training.seed + self._world.rank)
        wanted = self._training.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self._meter = Meter(self._world.device, self.plan.total_steps, self._peak)
        first = self._resume(wanted)
        self._reporting.begin()
        self.model.train()
        if self._training.eval_on_start and first == 0:
            self._evaluate()
        try:
            with self._place.orders, Ahead(self._batches, self.plan.total_steps) as ahead:
                for step in range(first, self.plan.total_steps):
                    self._place.pulse.step(step + 1, first=step == first)
                    self._leave_if_asked(step)
                    self._meter.add(self._step(step, ahead))
                    self._after_step(step + 1)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # what the batch kept is in the way of giving weights back
            raise
        finally:
            try:
                self.objective.release()
            finally:
                self._reporting.end()
        return TrainResult(
            self.plan.total_steps, self._loss, self._eval_loss, self._targets_seen, time.monotonic() - started
        )

    def evaluate(self) -> dict[str, float]:
        """Mean loss over all targets of the evaluation split: {"eval_loss": nats, "eval_targets": count}.

        A loss that is not finite draws a warning and stops nothing: the steps say whether training can go on.
        Raises DataError when there is no such split.
        """
        try:
            return self._evaluate()
        finally:
            self.objective.release()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        if self._eval_rows is None:
            raise DataError("there is no evaluation split", "set dataset.eval_fraction or dataset.eval_path")
        started = time.monotonic()
        self._place.pulse.at("evaluation")
        size = self._training.per_device_eval_batch_size or self._training.per_device_train_batch_size
        mine = np.arange(self._world.rank, len(self._eval_rows), self._world.size)
        loss_sum, targets = 0.0, 0
        self.model.eval()
        for begin in range(0, len(mine), size):
            batch = self._eval_rows.batch(mine[begin : begin + size])
            if len(batch.targets):
                loss_sum += self.objective.loss_sum(batch).item()
                targets += len(batch.targets)
        self.model.train()
        loss_sum, all_targets = sum_over_ranks([loss_sum, float(targets)], self._world)
        self._eval_loss = loss_sum / max(1.0, all_targets)
        metrics = {"eval_loss": self._eval_loss, "eval_targets": all_targets}
        self._reporting.log(metrics)
        self._events.emit(
            "eval",
            step=self.state.global_step,
            loss=self._eval_loss,
            target_tokens=int(all_targets),
            seconds=round(time.monotonic() - started, 3),
        )
        if not math.isfinite(self._eval_loss):
            said = f"evaluation after step {self.state.global_step}: the loss is {self._eval_loss:g}"
            self._events.warn(f"{said}; that stops nothing, but look at the evaluation's rows and the learning rate")
        return metrics

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of this run that is whole, if there is one."""
        self._found_whole = self._checkpoints.newest(self._events.warn)
        return self._found_whole

    def save_model(self, output_dir: str | Path | None = None, dtype: torch.dtype | None = None) -> Path:
        """Write adapter or model, tokenizer and template; rank 0 writes, the others return at once.

        output_dir: None: the run's final folder. dtype: what fully trained weights are rounded to.
        """
        folder = Path(output_dir) if output_dir is not None else self._place.final
        if self._world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, folder, dtype)
            self.tokenizer.save_pretrained(folder)
        return folder

    # --- one step ----------------------------------------------------------------------------------

    def _batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step that have any rows."""
        micro_batches = self._order.micro_batches(step, self._world.rank)
        return [self._train_rows.batch(rows) for rows in micro_batches if len(rows)]

    def _step(self, step: int, ahead: Ahead) -> StepTotals:
        random_state = checkpoint.random_state(self._world.device)
        if self._config.opensloth.log_level == "debug":
            self._say_rows(step)
        started = time.monotonic()
        batches = ahead.batches(step)
        waited = time.monotonic() - started
        self._meter.add_work(
            operations=sum(self._work.of(batch) for batch in batches) if self._work else 0.0,
            waited=waited,
            positions=sum(self.objective.positions(batch) for batch in batches),
            tokens=sum(batch.tokens for batch in batches),
        )
        totals = accumulate_gradients(self.objective, batches, self._world, self._training.max_grad_norm)
        if not (math.isfinite(totals.loss_sum) and math.isfinite(totals.grad_norm)):
            checkpoint.set_random_state(random_state, self._world.device)
            self._give_up(step, totals)
        self._rate = float(self._optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._targets_seen += totals.targets
        self.state.num_input_tokens_seen += totals.tokens
        return totals

    def _say_rows(self, step: int) -> None:
        """Which rows of the plan this rank trains, in its own log: what all ranks say together is the step."""
        rows = " ".join(str(row) for batch in self._order.micro_batches(step, self._world.rank) for row in batch)
        sys.stdout.write(f"step {step + 1} rows {rows}\n")
        sys.stdout.flush()

    def _give_up(self, step: int, totals: StepTotals) -> NoReturn:
        """Save the weights of the step before and raise; every rank holds the same sums, so all of them come here."""
        rows = self._order.step_rows(step)
        named = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        sound = all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters)
        if sound and step != self._saved_step:
            self._save(step)
        standing = f"the weights after step {step} were not finite already"
        if sound:
            standing = f"the weights after step {step} are saved" if step else "no step came before it"
        options = "a smaller training.learning_rate" + (" or training.bf16=false" if self._training.bf16 else "")
        if self._last_good and not self._training.save_only_model:
            options += " and training.resume_from_checkpoint, with this checkpoint or an earlier one"
        raise NonFiniteError(
            f"step {step + 1}: loss {totals.loss:g}, gradient norm {totals.grad_norm:g} (rows {named} of the plan)",
            f"{standing}; last good checkpoint: {self._last_good or 'none'}; try {options}",
        )

    def _after_step(self, done: int) -> None:
        self.state.global_step = done
        self.state.epoch = done / self.plan.steps_per_epoch
        last = done == self.plan.total_steps
        if done == 1 or last or done % self._training.logging_steps == 0:
            self._log(done)
        if self.plan.eval_interval and (last or done % self.plan.eval_interval == 0):
            self._evaluate()
        if self.plan.checkpoint_interval and not last and done % self.plan.checkpoint_interval == 0:
            self._save(done)

    def _log(self, done: int) -> None:
        reading = self._meter.read(done)
        self._loss = reading.loss
        self._reporting.log(
            {
                "loss": reading.loss,
                "grad_norm": reading.grad_norm,
                "learning_rate": self._rate,
                "target_tokens_per_second": reading.target_tokens_per_second,
                "tokens_per_second": reading.tokens_per_second,
                "padding": reading.padding,
                "data_wait": reading.data_wait,
                **({"mfu": reading.mfu} if reading.mfu is not None else {}),
            }
        )
        self._events.emit(
            "step",
            step=done,
            total_steps=self.plan.total_steps,
            epoch=round(self.state.epoch or 0.0, 4),
            learning_rate=self._rate,
            **vars(reading),
        )

    # --- stopping, saving, resuming ---------------------------------------------------------------

    def _leave_if_asked(self, step: int) -> None:
        """All ranks learn of a request that any of them has seen, and leave after the same step."""
        asked = self._place.orders.cause()
        votes = sum_over_ranks([float(asked == cause) for cause in CAUSES], self._world)
        cause = next((cause for cause, vote in zip(CAUSES, votes, strict=True) if vote), None)
        if cause is None:
            return
        if step != self._saved_step and cause != Cause.SUPERSEDED:
            self._save(step)
        raise StopRequested(cause, f"{cause} after step {step} of {self.plan.total_steps}")

    def _save(self, step: int) -> None:
        self._place.pulse.at(f"the checkpoint of step {step}")
        started = time.monotonic()
        state = checkpoint.CheckpointState(
            step=step,
            plan=self._plan_id,
            rows_per_step=self.plan.shape.rows_per_step,
            world=self._world.size,
            targets_seen=self._targets_seen,
        )
        tensors = None
        if not self._training.save_only_model:
            tensors = kept(self._optimizer, self._scheduler) | {"unlogged": self._meter.pending}
        folder = self._checkpoints.save(state, self._write_model, tensors)
        self._last_good, self._saved_step = folder, step
        seconds = round(time.monotonic() - started, 3)
        self._events.emit("checkpoint", step=step, path=str(folder), seconds=seconds)

    def _write_model(self, folder: Path) -> None:
        self.save_model(folder)
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def _resume(self, wanted: str | Path | bool | None) -> int:
        """Put everything back as it was after the checkpoint's step; returns that step."""
        self._last_good, self._saved_step = None, 0
        if not wanted:
            return 0
        folder = self.newest_checkpoint() if wanted is True else Path(wanted)
        if folder is None:
            return 0
        fault = None if folder == self._found_whole else checkpoint.fault_in(folder)
        if fault:
            raise DataError(f"cannot resume from {folder}: {fault}", "choose another checkpoint, or start anew")
        state = checkpoint.read_state(folder)
        if (state.plan, state.rows_per_step) != (self._plan_id, self.plan.shape.rows_per_step):
            raise DataError(
                f"cannot resume from {folder}: it was trained on other rows, in another order or on other rows a step",
                "restore the data, the seed and the batch size it was written with, or start anew",
            )
        if state.step >= self.plan.total_steps:
            raise DataError(f"cannot resume from {folder}: it has all {self.plan.total_steps} steps of the plan")
        load_weights(self.model, folder)
        tensors = checkpoint.read_tensors(folder, self._world)
        restore(self._optimizer, self._scheduler, tensors)
        self._meter.take_up(tensors.get("unlogged", ()))  # of an older version: none
        restored = TrainerState.load_from_json(str(folder / TRAINER_STATE))
        self.state.log_history, self.state.epoch = restored.log_history, restored.epoch
        self.state.global_step, self._targets_seen = state.step, state.targets_seen
        self.state.num_input_tokens_seen = restored.num_input_tokens_seen
        self._last_good, self._saved_step = folder, state.step
        self._events.emit("resumed", step=state.step, checkpoint=str(folder))
        return state.step
