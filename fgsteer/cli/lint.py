"""``fgsteer lint``: what may be wrong with contrast data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.options import JsonOption
from fgsteer.cli.printing import say, show
from fgsteer.data.file_kinds import CONTRAST_KINDS


@app.command(short_help="Look through contrast data for faults.")
def lint(
    contrast: Annotated[
        str, typer.Argument(help=f"The contrast: the name of a shipped contrast set, or a {CONTRAST_KINDS} file.")
    ],
    strict: Annotated[bool, typer.Option("--strict", help="End with exit status 1 where anything was found.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look through contrast data for what makes a vector learn something else than the behavior.

    Lengths, duplicates, words and prompts of one side, held-out texts that are not new, languages: each with its
    number, an example and what to do. No model is read.
    """
    import fgsteer as fg

    given = fg.load_contrast(contrast)
    advice = fg.lint_contrast(given)
    texts = [given.count(True), given.count(False)]
    result = {"source": contrast, "name": given.name, "texts": texts, "advice": [one.as_dict() for one in advice]}

    def print_advice(told: dict[str, Any]) -> None:
        say(f"{told['name']}: {texts[0]} positive and {texts[1]} negative texts")
        for one in advice:
            say(f"- {'Serious. ' if one.serious else ''}{one}")
        if not advice:
            say("Nothing was found.")

    show(result, as_json, print_advice)
    if strict and advice:
        raise typer.Exit(1)
