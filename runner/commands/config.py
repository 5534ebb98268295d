"""oslo init, validate"""

from __future__ import annotations

from pathlib import Path

import click

from opensloth import run_config
from opensloth.errors import ConfigError
from runner import output
from runner.commands.common import file_argument, json_option, set_option, settings
from runner.commands.submit import choose_run
from runner.config_file import Target, load_file
from runner.errors import INSTALL_TRAIN_EXTRA, InvalidFileError, RunnerError
from runner.plan import Plan, build_plan, plan_text
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
@click.option("--cluster", is_flag=True, help="Plan with the processes of `job` instead of opensloth.devices.")
@set_option
@json_option
def validate(file: Path, cluster: bool, sets: tuple[str, ...], as_json: bool) -> None:
    """Check a config file and print what the run will do.

    Prepares the dataset, or finds it in the cache, to count rows and steps; without the training packages it
    prints what can be known without.
    """
    try:
        plan = _plan(file, sets, cluster)
    except InvalidFileError as error:
        if as_json:
            problems = [vars(problem) for problem in error.problems]
            output.show_json({"valid": False, "problems": problems})
        raise
    if as_json:
        output.show_json({"valid": True, "problems": [], "plan": plan.to_json()})
    else:
        output.show(plan_text(plan))
    for warning in plan.warnings:
        output.say(f"warning: {warning}")


def _plan(file: Path, sets: tuple[str, ...], cluster: bool) -> Plan:
    """Raises InvalidFileError with the problems of the file, and with those that come to light by counting rows."""
    now = settings()
    loaded = load_file(file, sets, now.defaults, Target(now.root))
    data = None
    if has_train_extra():
        data = build_data(run_config.dump(loaded.run), output.event_sayer())
    else:
        output.say(f"rows and steps are counted with the training packages: {INSTALL_TRAIN_EXTRA}")
    run = choose_run(loaded, now.local.runs(), fresh=False)
    try:
        return build_plan(run, loaded.run, loaded.job if cluster else None, data, loaded.origins)
    except ConfigError as error:
        raise loaded.invalid(error) from error
