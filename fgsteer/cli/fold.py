"""``fgsteer fold``: write a checkpoint with vectors inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, interventions, load_model, load_vectors
from fgsteer.cli.options import DtypeOption, JsonOption, ModelOption, RevisionOption, TrustOption
from fgsteer.cli.printing import say, show
from fgsteer.cli.values import finite, unused


@app.command(short_help="Write a checkpoint with vectors inside.")
def fold(
    vector: Annotated[list[Path], typer.Option("--vector", "-v", help="A vector to add; repeat for several.")],
    out: Annotated[Path, typer.Option("--out", "-o", callback=unused, help="A new folder for the checkpoint.")],
    coefficient: Annotated[
        list[float] | None,
        typer.Option(
            "--coefficient",
            "-c",
            callback=finite,
            help="The coefficient of a vector; repeat for several, in the same order. By default 1.",
        ),
    ] = None,
    model: ModelOption = "default",
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint with vectors inside, which are added to every token.

    Plain transformers loads it and runs it without hooks.
    """
    from fgsteer.export import checkpoint

    steering = interventions(load_vectors(vector, coefficient, model=model, revision=revision), "add", "all", bos=True)
    folded = checkpoint.write(
        steering, out, *load_model(ModelOptions(model, "cpu", dtype, revision, trust_remote_code)), copy=False
    )
    result = {"out": str(out), "model": model, "dtype": str(folded.dtype).removeprefix("torch.")}
    show({**result, **(getattr(folded.config, "fgsteer", None) or {"folded": []})}, as_json, _print_folded)


def _print_folded(result: dict[str, Any]) -> None:
    for term in result["folded"]:
        say(
            f"{term['coefficient']:g} x {term['method'] or 'a vector'} (norm {term['norm']:.3f}) "
            f"at {term['hookpoint']} in {term['bias']}"
        )
    rounding = f"rounded by {result['rounding']:.1g} of the change" if result["folded"] else "with nothing to fold"
    say(f"{result['out']}: {result['model']} in {result['dtype']}, {rounding}; every token is steered, position 0 too")
