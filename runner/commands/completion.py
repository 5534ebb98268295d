"""oslo completion"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from runner import output


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell code that completes oslo's commands.

    For bash: put eval "$(oslo completion bash)" into ~/.bashrc.
    """
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    root = click.get_current_context().find_root()
    output.show(shell_class(root.command, {}, "oslo", "_OSLO_COMPLETE").source())
