"""``fgsteer orthogonalize``: write a checkpoint that cannot express directions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, load_model, load_vector_files
from fgsteer.cli.options import DtypeOption, JsonOption, ModelOption, RevisionOption, TrustOption
from fgsteer.cli.printing import say, show
from fgsteer.cli.values import unused
from fgsteer.errors.wording import count


@app.command(short_help="Write a checkpoint that cannot express a direction.")
def orthogonalize(
    vector: Annotated[
        list[Path], typer.Option("--vector", "-v", help="A vector whose direction is removed; repeat for several.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", callback=unused, help="A new folder for the checkpoint.")],
    model: ModelOption = "default",
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint whose weights write nothing along the directions of vectors, at any layer and token.

    It computes what ablating them everywhere with hooks computes, and plain transformers loads it and runs it. Norm and
    hookpoint of a vector do not count. Name several vectors together: one run after the other would put back what they
    have in common.
    """
    import fgsteer as fg
    from fgsteer.export import checkpoint

    vectors = load_vector_files(vector, model, revision)
    own, tokenizer = load_model(ModelOptions(model, "cpu", dtype, revision, trust_remote_code))
    changed = fg.orthogonalize(own, vectors, copy=False)
    checkpoint.save(changed, out, tokenizer)
    result = {"out": str(out), "model": model, "dtype": str(changed.dtype).removeprefix("torch.")}
    show({**result, "orthogonalised": changed.config.fgsteer["orthogonalised"]}, as_json, _print_orthogonalised)


def _print_orthogonalised(result: dict[str, Any]) -> None:
    removed = count(len(result["orthogonalised"]), "direction")
    say(f"{result['out']}: {result['model']} in {result['dtype']}, without {removed}")
