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
from typing import Any, NoReturn

import typer

from fgsteer.cli import (  # noqa: F401  each registers its command
    bench,
    build,
    collect,
    demo,
    density,
    diagnose,
    effects,
    eval,
    examples,
    export,
    features,
    fold,
    generate,
    info,
    saes,
    serve,
    sweep,
)
from fgsteer.cli.app import Command, app
from fgsteer.cli.messages import options_of, with_options
from fgsteer.cli.printing import prepare_streams, say
from fgsteer.errors import FgsteerError, FgsteerWarning

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

for command in app.registered_commands:
    command.cls = Command


def main() -> None:
    """Run the command line; errors of fgsteer and of files end with one message and status 2, Ctrl-C with 130."""
    prepare_streams()
    named = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")

    def plainly(message: object) -> str:
        command = getattr(typer.main.get_command(app), "commands", {}).get(named)
        # no line of a message can pass for one of ours
        return with_options(str(message), options_of(command)).replace("\n", "\n  ")

    def note(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, FgsteerWarning):
            say(f"note: {plainly(message)}", err=True)

    warnings.showwarning = note
    try:
        app()
    except (FgsteerError, OSError) as error:  # OSError: a model that is not there, a folder that is not writable
        say(f"error: {plainly(error)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # what typer makes of Ctrl-C
            _interrupted()
        raise


def _interrupted() -> NoReturn:
    say("interrupted; every file is whole", err=True)
    sys.exit(INTERRUPTED)
