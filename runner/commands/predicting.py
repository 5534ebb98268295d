"""The prediction of a run's GPU memory and time: put into its plan, and held against it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from opensloth.errors import ConfigError
from runner import output
from runner.config_file import LoadedFile
from runner.gpu import Gpu, gpu_of_job, gpu_of_this_machine
from runner.model_config import NoModelConfigError, read_model_config
from runner.plan import Plan
from runner.prediction import Prediction, predict


def gpu_of_cluster(loaded: LoadedFile) -> Gpu | None:
    """None: the job has no GPU."""
    if loaded.run.training.use_cpu or not loaded.job.gpus_per_node:
        return None
    return gpu_of_job(loaded.job)


def gpu_of_here(loaded: LoadedFile) -> Gpu | None:
    """None: this machine has no GPU, or the run uses none."""
    return None if loaded.run.training.use_cpu else gpu_of_this_machine(loaded.run.opensloth.devices)


def with_prediction(plan: Plan, loaded: LoadedFile, gpu: Gpu | None, *, here: bool) -> Plan:
    """here: on this machine, whose packages decide whether 4-bit and 8-bit defaults are honoured."""
    if gpu is None:
        return plan
    args = loaded.run.opensloth.fast_model_args
    quantises = not here or _has_bitsandbytes()
    try:
        model_config = read_model_config(args.model_name, args.revision, loaded.sources)
        return replace(plan, prediction=predict(loaded.run, model_config, gpu, plan, quantises=quantises))
    except (NoModelConfigError, ValueError) as error:
        return replace(plan, prediction=str(error))


def require_room(plan: Plan, loaded: LoadedFile, *, force: bool = False) -> None:
    """Raises InvalidFileError when the run cannot fit on its GPU; with `force` a line says so instead."""
    problem = plan.prediction.problem if isinstance(plan.prediction, Prediction) else None
    if problem is None:
        return
    if not force:
        raise loaded.invalid(ConfigError([problem]))
    output.say(f"warning: {problem.message}\n  submitted all the same: --force")


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
