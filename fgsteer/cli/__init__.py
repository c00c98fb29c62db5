"""The command line: one subcommand per stage, composing through files.

    fgsteer collect wedding -o stats.safetensors
    fgsteer build fgaa --stats stats.safetensors -o wedding.safetensors
    fgsteer features wedding.safetensors
    fgsteer generate "I think" --vector wedding.safetensors --coefficient 8

Nothing heavy is imported before a command runs: ``fgsteer --help`` needs no torch.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from fgsteer.cli import bench, evaluate, export, harness, measure, read, sweep, vectors  # noqa: F401  each registers its commands
from fgsteer.cli.common import app
from fgsteer.errors import FgsteerError, FgsteerWarning


def main() -> None:
    """Run the command line; errors of fgsteer and of files end with one message and exit status 2."""

    def note(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, FgsteerWarning):
            typer.echo(f"note: {message}", err=True)

    warnings.showwarning = note
    try:
        app()
    except (FgsteerError, OSError) as error:  # OSError: a model that is not there, a folder that is not writable
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
