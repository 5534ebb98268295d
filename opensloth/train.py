"""Runs a training: from Python with two config objects, or as a rank of a run."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import logging
import os
import shutil
import sys
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import transformers

from opensloth import __version__, contract, hardware, run_config
from opensloth.checkpoint import remove_leftovers
from opensloth.contract import Cause
from opensloth.data.build import build
from opensloth.data.prepared import EVAL_DIR, PreparedDataset
from opensloth.dist import World, barrier, join_world, leave_world
from opensloth.errors import OpenSlothError, chain
from opensloth.events import Events, NullEvents, finite
from opensloth.files import MAKE_ROOM, fault_of_volume, may_pass, sync_tree, write_json
from opensloth.launch import volume
from opensloth.launch.ending import Ending
from opensloth.model import load_model, published_dtype
from opensloth.opensloth_config import OpenSlothConfig, TrainingArguments
from opensloth.orders import Orders
from opensloth.pulse import Pulse
from opensloth.reporting import check_reporters
from opensloth.run_config import RunConfig
from opensloth.tokenizer import load_tokenizer
from opensloth.trainer import Place, SftTrainer, TrainResult
from opensloth.trainer_factory import NAME, assemble, place_in, python_events


def train(opensloth_config: OpenSlothConfig, training_config: TrainingArguments) -> TrainResult:
    """Fine-tune on the prepared dataset at `opensloth_config.data_cache_path`, in this process.

    Checkpoints, events and the final adapter (or model) with its tokenizer go to `training_config.output_dir`.
    Raises ConfigError, DataError, NonFiniteError (`opensloth.errors`).
    """
    config = run_config.from_python(opensloth_config, training_config, NAME)
    config, warnings = hardware.bring_in_line(config, hardware.detect(training_config))
    world = join_world(
        cuda=_on_cuda(training_config),
        timeout_seconds=training_config.ddp_timeout,
        devices=opensloth_config.devices,
    )
    place = place_in(Path(training_config.output_dir or "."))
    events = python_events(place, world)
    built = build(config, events.emit)
    trainer = _trainer(config, _open_parts(Path(built.path)), warnings, world=world, place=place, events=events)
    result = trainer.train()
    trainer.save_model(dtype=_saved_dtype(config))
    barrier(world)
    return result


def run_rank(run: Path, attempt: int, pulse: Pulse) -> None:
    """One rank of attempt `attempt` of the run in folder `run`. pulse: where it says that it makes progress."""
    config = run_config.load((run / contract.CONFIG_FILE).read_text())
    training = config.training
    world = join_world(cuda=_on_cuda(training), timeout_seconds=training.ddp_timeout)
    events = Events(run / contract.EVENTS_FILE, rank=0, attempt=attempt) if world.is_main else NullEvents()
    config, warnings = hardware.bring_in_line(config, hardware.detect(training))
    folder = run / contract.ATTEMPTS_DIR / str(attempt)
    place = Place(
        checkpoints=run / contract.CHECKPOINTS_DIR,
        final=run / contract.FINAL_DIR,
        tensorboard=run / contract.TENSORBOARD_DIR,
        orders=Orders(folder, int(os.environ[contract.LAUNCHER_ENV])),
        pulse=pulse,
    )
    if world.is_main:
        remove_leftovers((run, place.checkpoints))
    data = json.loads((folder / contract.DATA_FILE).read_text())
    parts = _open_parts(Path(data["path"]))
    trainer = _trainer(config, parts, warnings, world=world, place=place, events=events)
    events.emit("phase", phase="train")
    # What this run has done itself counts for more than the checkpoint it was once started from.
    result = trainer.train(trainer.newest_checkpoint() or training.resume_from_checkpoint or False)
    pulse.at("the result")
    if world.is_main:
        _publish(trainer, config, place, run, result, events)
        events.emit("result", final=str(place.final), **_report(result))
    barrier(world)


def _trainer(
    config: RunConfig,
    parts: tuple[PreparedDataset, PreparedDataset | None],
    warnings: list[str],
    *,
    world: World,
    place: Place,
    events: Events,
) -> SftTrainer:
    check_reporters(config.training)
    for warning in warnings:
        events.warn(warning)
    if config.opensloth.log_level == "debug":
        logging.basicConfig(level=logging.DEBUG)
        transformers.logging.set_verbosity_debug()
    events.emit("phase", phase="model")
    model_args = config.opensloth.fast_model_args
    tokenizer = load_tokenizer(
        model_args.model_name, revision=model_args.revision, chat_template=_chat_template(config)
    )
    model = load_model(config.opensloth, world.device, bf16=bool(config.training.bf16))
    return assemble(model, tokenizer, parts, config, world=world, place=place, events=events)


def _open_parts(path: Path) -> tuple[PreparedDataset, PreparedDataset | None]:
    evaluated = PreparedDataset.open(path, EVAL_DIR) if PreparedDataset.has_eval(path) else None
    return PreparedDataset.open(path), evaluated


def _chat_template(config: RunConfig) -> str | None:
    """The template that the first dataset was rendered with: what is saved beside the adapter."""
    return config.dataset[0].chat_template if config.dataset else None


def _on_cuda(training: TrainingArguments) -> bool:
    return not training.use_cpu and torch.cuda.is_available()


def _saved_dtype(config: RunConfig) -> torch.dtype | None:
    model = config.opensloth.fast_model_args
    return published_dtype(model) if model.full_finetuning else None


def _publish(
    trainer: SftTrainer, config: RunConfig, place: Place, run: Path, result: TrainResult, events: Events
) -> None:
    """Put the result in place whole, then the report that says so; copy it to output_dir if that is given.

    Raises StopRequested, and leaves what is there, when a newer attempt has started.
    """
    final, aside = place.final, run / f".{contract.FINAL_DIR}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        trainer.save_model(aside, _saved_dtype(config))
        sync_tree(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # on a full volume this makes room for saying so
        raise
    place.orders.fence()
    replaced = run / f".{contract.FINAL_DIR}.{uuid.uuid4().hex[:8]}.replaced.tmp"
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)  # NFS keeps what somebody still reads: gone the next time
    versions = {
        "opensloth": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    report = {"final": str(final), "output_dir": config.training.output_dir, "versions": versions}
    place.orders.fence()
    write_json(run / contract.REPORT_FILE, report | _report(result))
    if config.training.output_dir:
        try:
            shutil.copytree(final, config.training.output_dir, dirs_exist_ok=True)
        except OSError as error:  # the run has succeeded all the same
            events.warn(f"training.output_dir got no copy of {final}: {error}")


def _report(result: TrainResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "loss": result.loss,
        "eval_loss": finite(result.eval_loss),
        "target_tokens": result.target_tokens,
        "seconds": round(result.seconds, 1),
    }


def _cause_of(error: BaseException, run: Path | None = None) -> tuple[str, str, str]:
    """(cause, message, hint) of whatever ended this rank. run: its folder."""
    if isinstance(error, OpenSlothError):
        return error.cause, error.message, error.hint
    if (lack := _lack_of_memory(error)) is not None:
        hint = (
            "try a smaller training.per_device_train_batch_size or opensloth.fast_model_args.max_seq_length; "
            "load_in_4bit and use_gradient_checkpointing: unsloth (both of fast_model_args) take least"
        )
        return Cause.OUT_OF_MEMORY, f"out of memory: {str(lack).splitlines()[0] if str(lack) else 'host'}", hint
    fault = fault_of_volume(error)
    if fault is not None and may_pass(fault):
        return Cause.VOLUME, f"the volume failed ({fault})", ""
    if fault is not None:
        return Cause.CONFIG, f"no room is left on the volume ({fault})", MAKE_ROOM
    refused = _refused(error, run) if run else None
    if refused is not None:
        return refused.cause, refused.message, refused.hint
    text = f"{type(error).__name__}: {error}"
    lost = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection refused",
        "Broken pipe",
        "gloo/transport",
    )
    if isinstance(error, torch_dist.DistError) or any(sign in str(error) for sign in lost):
        return Cause.PEER_LOST, f"another rank went away ({text.splitlines()[0]})", ""
    return Cause.ERROR, text.splitlines()[0], "the whole traceback is in the rank's log"


_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def _lack_of_memory(error: BaseException) -> BaseException | None:
    """The error of this chain that tells of it: what ends a graph's capture or a `finally` can come after it."""
    for link in chain(error):
        if isinstance(link, torch.OutOfMemoryError | MemoryError) or any(sign in str(link) for sign in _NO_MEMORY):
            return link
    return None


def _refused(error: BaseException, run: Path) -> Ending | None:
    """What the volume does not let this process write into the run's folder; None of any other error."""
    if not isinstance(error, OSError) or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return None
    of_the_run = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(run)
    return volume.fault(error, run) if of_the_run else None


def _redirect_output(log: Path) -> None:
    """Send this process's stdout and stderr to its log, at the level of descriptors: a crash leaves its words."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def main() -> int:
    """A rank, told by the launcher through the environment where its run lies."""
    run, attempt = Path(os.environ[contract.RUN_DIR_ENV]), int(os.environ[contract.ATTEMPT_ENV])
    rank = int(os.environ.get("RANK", "0"))  # none: it is alone
    folder = run / contract.ATTEMPTS_DIR / str(attempt)
    _redirect_output(folder / contract.RANK_LOG.format(rank=rank))
    faulthandler.enable()  # a crash in native code leaves the stacks in the log
    transformers.logging.disable_progress_bar()  # a log is no terminal
    cause, message, hint = Cause.SUCCEEDED, "", ""
    try:
        run_rank(run, attempt, Pulse(Path(os.environ[contract.PULSE_DIR_ENV]), rank))
    except Exception as error:  # the boundary: everything is classified, nothing is swallowed
        cause, message, hint = _cause_of(error, run)
        with contextlib.suppress(OSError):  # the volume may be full, or gone
            if cause in (Cause.ERROR, Cause.PEER_LOST, Cause.OUT_OF_MEMORY, Cause.VOLUME):
                traceback.print_exc()
            else:
                print(f"{message}\n  {hint}" if hint else message, file=sys.stderr)  # noqa: T201
    outcome = {"cause": cause, "message": message, "hint": hint, "time": time.time()}
    with contextlib.suppress(OSError):
        write_json(folder / contract.RANK_OUTCOME.format(rank=rank), outcome)
    if cause == Cause.SUCCEEDED:
        leave_world()
    return int(contract.EXIT_CODE_OF_CAUSE[cause])


if __name__ == "__main__":
    sys.exit(main())
