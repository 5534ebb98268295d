"""What commands share: settings from the environment, common options, JOB -> run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from opensloth import contract
from runner.backend import Backend
from runner.defaults import read_job_defaults
from runner.kube.access import Access

DEFAULTS_ENV: Final = "OSLO_DEFAULTS"
DEFAULTS_FILE: Final = "~/.config/oslo/defaults.yaml"
_META: Final = "oslo.cluster."
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """What commands take from outside.

    root: the root folder, absolute; defaults: the defaults file, None when there is none;
    launcher: the command that local runs are started with, None: opensloth's; access: what the flags say of a cluster.
    """

    root: Path
    defaults: Path | None
    launcher: Sequence[str] | None = None
    access: Access = field(default_factory=Access)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        root = Path(environ.get(contract.ROOT_ENV) or "~/.oslo").expanduser().absolute()
        named = environ.get(DEFAULTS_ENV)
        if named is not None:
            return cls(root, Path(named).expanduser() if named else None)
        usual = Path(DEFAULTS_FILE).expanduser()
        return cls(root, usual if usual.exists() else None)

    @property
    def local(self) -> Backend:
        from runner.local import DEFAULT_LAUNCHER, LocalBackend  # 25 ms that `render` need not pay

        return LocalBackend(self.root, self.launcher or DEFAULT_LAUNCHER)

    @property
    def job_defaults(self) -> Mapping[str, Any]:
        """The `job` section of the defaults file; what is wrong with it, a submit says."""
        return {} if self.defaults is None else read_job_defaults(self.defaults)

    @property
    def effective_access(self) -> Access:
        """How commands that have no config file reach the cluster: by the flags, then by the defaults file."""
        return self.access_for(self.job_defaults.get("context"), self.job_defaults.get("namespace"))

    def access_for(self, context: str | None, namespace: str | None) -> Access:
        """The flags beat what a file says."""
        flags = self.access
        return Access(flags.kubeconfig, flags.context or context, flags.namespace or namespace)


def settings() -> Settings:
    """The settings of the command that runs."""
    context = click.get_current_context()
    given = context.find_object(Settings)
    found = given if given is not None else Settings.from_environ(os.environ)
    flags = Access(*(context.meta.get(f"{_META}{flag}") for flag in ("kubeconfig", "context", "namespace")))
    return replace(found, access=flags)


def cluster_options(command: Command) -> Command:
    """`-n`, `--context`, `--kubeconfig`, as kubectl has them; they go into the settings."""

    def keep(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        context.meta[f"{_META}{parameter.name}"] = value

    for names, metavar, text in (
        (
            ["--kubeconfig"],
            "FILE",
            "Default: $KUBECONFIG, ~/.kube/config, or a pod's own credentials.",
        ),
        (["--context"], "NAME", "Context of the kubeconfig."),
        (["-n", "--namespace"], "NAME", "Namespace of the cluster. Default: the file's, then the context's."),
    ):
        command = click.option(*names, metavar=metavar, callback=keep, expose_value=False, help=text)(command)
    return command


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
    runs = Settings.from_environ(os.environ).local.runs()
    return sorted(run for run in runs if run.startswith(incomplete))


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal; elsewhere, and with -y, go on. Raises click.Abort on no."""
    if not yes and is_interactive():
        click.confirm(question, default=True, abort=True, err=True)


def is_interactive() -> bool:
    """Whether there is somebody who could answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()
