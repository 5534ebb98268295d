"""oslo schema"""

from __future__ import annotations

import click

from runner import output
from runner.schema import file_schema


@click.command()
def schema() -> None:
    """Print the JSON schema of the config file.

    An editor with a YAML language server completes and checks by it.
    """
    output.show_json(file_schema())
