"""oslo init, validate"""

from __future__ import annotations

from pathlib import Path

import click

from opensloth import run_config
from opensloth.errors import ConfigError
from runner import output
from runner.commands.common import cluster_options, file_argument, json_option, set_option, settings
from runner.commands.predicting import gpu_of_cluster, gpu_of_here, require_room, with_prediction
from runner.commands.submit import choose_run
from runner.config_file import LoadedFile, Target, load_file
from runner.errors import INSTALL_TRAIN_EXTRA, InvalidFileError, RunnerError
from runner.identity import run_id
from runner.model_config import is_asked_of_hub
from runner.plan import BuiltData, Plan, build_plan, plan_text
from runner.rendering import cluster_content
from runner.starter import STARTER
from runner.training_side import build_data, has_train_extra


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("sft.yaml"))
@json_option
def init(file: Path, as_json: bool) -> None:
    """Write a commented config file to start from.

    FILE is sft.yaml unless you say otherwise; one that is there is never overwritten.
    """
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(STARTER)
    except FileExistsError as error:
        raise RunnerError(f"{file} is there already", "give another name: oslo init other.yaml") from error
    except OSError as error:
        raise RunnerError(f"{file} cannot be written: {error.strerror}") from error
    output.say(f"wrote {file}: change model_name and path, then run\n  oslo validate {file}")
    if as_json:
        output.show_json({"file": str(file)})
    else:
        output.show(str(file))


@click.command()
@file_argument
@click.option("--cluster", is_flag=True, help="Check it for a cluster, and plan with the processes of `job`.")
@click.option("--server", is_flag=True, help="The same, and ask the cluster whether it would accept the job.")
@set_option
@cluster_options
@json_option
def validate(file: Path, cluster: bool, server: bool, sets: tuple[str, ...], as_json: bool) -> None:
    """Check a config file and print what the run will do.

    Prepares the dataset, or finds it in the cache, to count rows and steps; without the training packages it
    prints what can be known without.
    """
    try:
        plan = _plan_for_cluster(file, sets) if cluster or server else _plan_for_here(file, sets)
    except InvalidFileError as error:
        if as_json:
            problems = [vars(problem) for problem in error.problems]
            output.show_json({"valid": False, "problems": problems})
        raise
    if server:
        from runner.commands.submit_cluster import check_file_on_server  # 0.3 s that others need not pay

        check_file_on_server(file, sets)
    if as_json:
        output.show_json({"valid": True, "problems": [], "plan": plan.to_json()})
    else:
        output.show(plan_text(plan))
    for warning in plan.warnings:
        output.say(f"warning: {warning}")


def _plan_for_here(file: Path, sets: tuple[str, ...]) -> Plan:
    """Raises InvalidFileError with the problems of the file, and with those that come to light by counting rows."""
    now = settings()
    loaded = load_file(file, sets, now.defaults, Target(now.root))
    run = choose_run(loaded, now.local.runs(), fresh=False)
    return _plan(run, loaded, _count(loaded), for_cluster=False)


def _plan_for_cluster(file: Path, sets: tuple[str, ...]) -> Plan:
    """The same for a cluster; rows are counted where the data is on this machine."""
    now = settings()
    loaded = load_file(file, sets, now.defaults, Target.of_cluster())
    run = run_id(loaded.run.name, cluster_content(loaded))
    try:
        data = _count(load_file(file, sets, now.defaults, Target(now.root)))
    except InvalidFileError:  # good for a cluster, but not for this machine: the data is on the volume, say
        output.say("rows and steps are not counted: what they are counted from is not on this machine")
        data = None
    return _plan(run, loaded, data, for_cluster=True)


def _count(loaded: LoadedFile) -> BuiltData | None:
    """Prepare the dataset here; None without the training packages."""
    if not has_train_extra():
        output.say(f"rows and steps are counted with the training packages: {INSTALL_TRAIN_EXTRA}")
        return None
    model = loaded.run.opensloth.fast_model_args
    if is_asked_of_hub(model.model_name, model.revision, loaded.sources):
        output.say(f"asking the hub for the tokenizer of {model.model_name}")
    return build_data(run_config.dump(loaded.run), output.event_sayer())


def _plan(run: str, loaded: LoadedFile, data: BuiltData | None, *, for_cluster: bool) -> Plan:
    try:
        plan = build_plan(run, loaded.run, loaded.job if for_cluster else None, data, loaded.origins)
    except ConfigError as error:
        raise loaded.invalid(error) from error
    gpu = None if for_cluster else gpu_of_here(loaded)
    here = gpu is not None
    if gpu is None:
        gpu = gpu_of_cluster(loaded)
        if gpu is not None and gpu.memory is None and not for_cluster:
            gpu = None  # no GPU here, and none is named
    plan = with_prediction(plan, loaded, gpu, here=here)
    require_room(plan, loaded)
    return plan
