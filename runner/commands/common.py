"""What commands share: settings from the environment, common options, JOB -> run."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from opensloth import contract
from runner.backend import LOCAL_SCHEME, Backend
from runner.errors import NotFoundError, UsageError
from runner.identity import name_of

DEFAULTS_ENV: Final = "OSLO_DEFAULTS"
DEFAULTS_FILE: Final = "~/.config/oslo/defaults.yaml"
CLUSTER_SCHEME: Final = "kubernetes://"
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """What commands take from outside.

    root: the root folder, absolute; defaults: the defaults file, None when there is none;
    launcher: the command that local runs are started with, None: opensloth's.
    """

    root: Path
    defaults: Path | None
    launcher: Sequence[str] | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        root = Path(environ.get(contract.ROOT_ENV) or "~/.oslo").expanduser().absolute()
        named = environ.get(DEFAULTS_ENV)
        if named is not None:
            return cls(root, Path(named).expanduser() if named else None)
        usual = Path(DEFAULTS_FILE).expanduser()
        return cls(root, usual if usual.exists() else None)

    @property
    def backend(self) -> Backend:
        from runner.local import DEFAULT_LAUNCHER, LocalBackend  # 25 ms that `render` need not pay

        return LocalBackend(self.root, self.launcher or DEFAULT_LAUNCHER)


def settings() -> Settings:
    """The settings of the command that runs."""
    given = click.get_current_context().find_object(Settings)
    return given if given is not None else Settings.from_environ(os.environ)


def json_option(command: Command) -> Command:
    """`-o json`; the command gets `as_json`."""
    return click.option(
        "-o",
        "--output",
        "as_json",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        callback=lambda _ctx, _param, value: value == "json",
        help="json: one document with stable keys on stdout.",
    )(command)


def yes_option(command: Command) -> Command:
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(command)


def set_option(command: Command) -> Command:
    return click.option(
        "--set",
        "sets",
        metavar="KEY=VALUE",
        multiple=True,
        help="Change a value of the file, as in training.max_steps=10 or dataset[1].path=x. May be repeated.",
    )(command)


def file_argument(command: Command) -> Command:
    return click.argument("file", type=click.Path(path_type=Path))(command)


def job_argument(command: Command) -> Command:
    return click.argument("job", metavar="JOB", shell_complete=_complete_job)(command)


def _complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    runs = Settings.from_environ(os.environ).backend.runs()
    return sorted(run for run in runs if run.startswith(incomplete))


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal; elsewhere, and with -y, go on. Raises click.Abort on no."""
    if not yes and is_interactive():
        click.confirm(question, default=True, abort=True, err=True)


def is_interactive() -> bool:
    """Whether there is somebody who could answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def find_run(backend: Backend, job: str) -> str:
    """The run that JOB means: a handle, an id, or a name, whose latest run it is.

    Raises NotFoundError with the nearest names.
    """
    if job.startswith(CLUSTER_SCHEME):
        raise UsageError("jobs on a cluster are not in this version", "handles begin with local://")
    wanted = job.removeprefix(LOCAL_SCHEME)
    runs = backend.runs()
    if wanted in runs:
        return wanted
    of_name = [run for run in runs if name_of(run) == wanted] if not job.startswith(LOCAL_SCHEME) else []
    if of_name:
        return max(of_name, key=lambda run: (_started(backend, run), run))
    names = sorted({*runs, *map(name_of, runs)})
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "oslo list shows all runs"
    raise NotFoundError(f"there is no run {job}", hint)


def _started(backend: Backend, run: str) -> float:
    """When it started: one that is just starting is the latest, one that was deleted meanwhile the first."""
    try:
        return backend.get(run).started or float("inf")
    except NotFoundError:
        return 0.0
