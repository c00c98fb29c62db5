"""The command line: one command for each stage, each in a file of its name; files lead from one stage to the next.

    fgsteer collect love -o stats.safetensors
    fgsteer build fgaa --stats stats.safetensors -o love.safetensors
    fgsteer features love.safetensors
    fgsteer generate "I think" --vector love.safetensors --coefficient 200

Nothing heavy is imported before a command runs: ``fgsteer --help`` needs no torch. Besides the commands:

    app.py              the application, and what happens before every command
    options.py          options that several commands share
    values.py           checks of their values before a model is loaded
    choices.py          lists from tables, in help texts and shell completion
    strengths.py        a coefficient for each vector, several to compare, or one found by its cost
    loading.py          models, SAEs, vectors and texts as the options name them
    method_settings.py  the settings of a method, checked against its signature
    bench_setup.py      what ``bench`` makes of its options
    outputs.py          what commands write, apart from what they read
    vector_reports.py   a vector that was made, and what strengths of it cost
    printing.py         results, as text or JSON, and progress
    messages.py         messages with options of the command line in place of arguments
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn

import typer

from fgsteer.cli import (  # noqa: F401  each registers its command
    audit,
    axbench,
    bench,
    build,
    collect,
    demo,
    density,
    describe_contrast,
    diagnose,
    effects,
    eval,
    examples,
    explain,
    export,
    features,
    fold,
    generate,
    info,
    lint,
    orthogonalize,
    patterns,
    play,
    saes,
    serve,
    sweep,
    train,
    train_sae,
)
from fgsteer.cli.app import Command, app
from fgsteer.cli.messages import options_of, with_options
from fgsteer.cli.printing import prepare_streams, say
from fgsteer.errors import FgsteerError, FgsteerWarning

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

for command in app.registered_commands:
    command.cls = Command


def main() -> None:
    """Run the command line. An error of fgsteer or of files ends it with one message and status 2, Ctrl-C with 130."""
    prepare_streams()
    command_name = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")

    def for_terminal(message: object) -> str:
        command = getattr(typer.main.get_command(app), "commands", {}).get(command_name)
        # indented, so that no line within a message looks like a message of fgsteer
        return with_options(str(message), options_of(command)).replace("\n", "\n  ")

    def note(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, FgsteerWarning):
            say(f"note: {for_terminal(message)}", err=True)

    warnings.showwarning = note
    try:
        app()
    except (FgsteerError, OSError) as error:  # OSError: a model that does not exist, a folder that cannot be written
        say(f"error: {for_terminal(error)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # what typer turns Ctrl-C into
            _interrupted()
        raise


def _interrupted() -> NoReturn:
    say("Interrupted. Every file was written completely or not at all.", err=True)
    sys.exit(INTERRUPTED)
