"""`oslo`: parses the command line, runs a command, turns errors into one message and an exit code.

`oslo --help` answers from the table below; a command's module, and what it imports, is loaded when it runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from opensloth import __version__
from opensloth.errors import OpenSlothError
from runner.errors import RunnerError

COMMANDS: Final = {
    "init": ("config", "Write a commented config file to start from."),
    "validate": ("config", "Check a config file and print what the run will do."),
    "schema": ("schema", "Print the JSON schema of the config file."),
    "render": ("render", "Print the PyTorchJob of a config file."),
    "submit": ("submit", "Train as a config file says, on a cluster or with --local here."),
    "logs": ("logs", "Show the log of a run, all ranks."),
    "status": ("jobs", "Show where a run stands."),
    "why": ("why", "Say why a run failed, waits or began again, and what to do next."),
    "list": ("jobs", "List the runs, newest first."),
    "wait": ("jobs", "Wait until a run is over; the exit code says how it ended."),
    "cancel": ("jobs", "Save a checkpoint and stop; the run can be resumed."),
    "resume": ("jobs", "Go on from the last checkpoint."),
    "pull": ("pull", "Copy the result of a run into a folder, each file checked by its hash."),
    "delete": ("jobs", "Delete a run; on a cluster its files stay unless you say --files."),
    "data": ("data", "Look at, build and tidy up prepared datasets."),
    "completion": ("completion", "Print the shell code that completes oslo's commands."),
}
"""Command: its module in runner.commands, its line of help (the same as in its docstring)."""


class _Commands(click.Group):
    """Loads a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"runner.commands.{COMMANDS[cmd_name][0]}")
        # A command must not shadow a builtin: `list` is `list_` in its module.
        command: click.Command = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="oslo")
def cli() -> None:
    """One YAML in, a fine-tuned model out.

    JOB is a handle (local://RUN, kubernetes://NAMESPACE/RUN), a run's id, or a plain name: its latest run, looked
    for on this machine and then on the cluster.
    """


def run(arguments: Sequence[str] | None = None, obj: Any = None) -> int:
    """Run one command line; returns the exit code.

    obj: the commands' settings (runner.commands.common.Settings). None: from the environment.
    """
    try:
        code = cli.main(arguments, prog_name="oslo", standalone_mode=False, obj=obj)
    except click.Abort as abort:
        click.echo("aborted", err=True)
        return 130 if isinstance(abort.__cause__, KeyboardInterrupt) else 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except RunnerError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except OpenSlothError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except BrokenPipeError:
        raise  # no error of ours: see main
    except OSError as error:  # a full disk, a missing right: nothing that a traceback would explain
        reason = error.strerror or str(error)
        click.echo(f"error: {error.filename}: {reason}" if error.filename else f"error: {reason}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def main() -> None:
    try:
        code = run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
