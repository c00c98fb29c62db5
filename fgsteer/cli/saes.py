"""``fgsteer saes``: list pretrained SAEs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.options import JsonOption
from fgsteer.cli.printing import say, show
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT


@app.command(short_help="List the pretrained SAEs that sae-lens knows.")
def saes(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="List only SAEs of this model, or of models with this part of a name."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", min=0, max=MAX_COUNT, help="List only SAEs of this layer, counted from 0.")
    ] = None,
    search: Annotated[
        str, typer.Option("--search", help="List only SAEs with all of these words in their release, id or hookpoint.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """List the pretrained SAEs in the registry of sae-lens, which --sae RELEASE --sae-id ID takes."""
    from fgsteer.saes.registry import models_like, models_named, registry

    if model is not None and not models_named(model):
        near = ", ".join(models_like(model))
        raise DataError(
            f"The registry of the installed sae-lens has no SAE of a model {model!r}.",
            f"the name of a model or a part of it, such as {near}" if near else "the name of a model or a part of it",
            "look for it in the names of releases with fgsteer saes --search TEXT",
        )
    show([row.as_dict() for row in registry(model, layer, search)], as_json, _print_saes)


def _print_saes(rows: list[dict[str, Any]]) -> None:
    """Print a paragraph for each release and a line for each SAE, which is never wrapped, so that ids can be copied."""
    from itertools import groupby

    if not rows:
        say("The registry of the installed sae-lens has none. --search finds words of releases, ids and hookpoints.")
    for (release, model), members in groupby(rows, key=lambda row: (row["release"], row["model"])):
        lines = [
            (r["sae_id"], r["hookpoint"], r["width"], "" if r["l0"] is None else f"L0 {r['l0']:g}", r["neuronpedia"])
            for r in members
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        say(f"{release}  ({model})")
        for line in lines:
            say("  " + "  ".join(map(str.ljust, line, widths)).rstrip())
