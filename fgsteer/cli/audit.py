"""``fgsteer audit``: find a direction that was added to a checkpoint, or taken out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, documents, load_model
from fgsteer.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, RevisionOption, TrustOption
from fgsteer.cli.printing import say, show
from fgsteer.cli.values import writable

LISTED = {"added": "added", "missing": "missing", "changed": "changed", "hooked": "with hooks"}
SHOWN = 8  # names of parameters or modules that are printed


@app.command(short_help="Find a direction hidden in a checkpoint.")
def audit(
    reference: Annotated[
        str, typer.Option("--reference", "-r", help="The model that the audited one is said to be: an id or a folder.")
    ],
    model: ModelOption = "default",
    texts: Annotated[
        Path | None, typer.Option("--texts", help="A file of texts that both read; by default sixteen that ship.")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="The field of the texts, in files that have fields.")] = "text",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", callback=writable, help="A file for the vector that is found.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    reference_revision: Annotated[
        str | None, typer.Option("--reference-revision", help="The branch, tag or commit of the reference.")
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare a checkpoint with its reference: whether a direction was added to it, or taken out of it, and where.

    Both read the same texts. It names the first place at which activations differ, and recovers the vector, which --out
    writes as any other. Parameters that one of both lacks, changed ones and hooks are listed.
    """
    import fgsteer as fg

    chosen = None if texts is None else documents(texts, field)
    own, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    other, _ = load_model(ModelOptions(reference, device, dtype, reference_revision, trust_remote_code))
    found = fg.audit(own, tokenizer, other, chosen)
    if out is not None and found.vector is not None:
        found.vector.save(out)
    elif out is not None:
        say(f"{out} was not written: no vector was found.", err=True)
    result = {
        "kind": found.kind,
        "hookpoint": None if found.hookpoint is None else str(found.hookpoint),
        "norm": None if found.vector is None else found.vector.norm,
        "target": found.target,
        "rank": found.rank,
        "unexplained": found.unexplained,
        "places": [{"hookpoint": str(row.hookpoint), "difference": row.difference} for row in found.places],
        **{name: list(getattr(found, name)) for name in LISTED},
        "out": str(out) if out is not None and found.vector is not None else None,
        "summary": str(found),
    }
    show(result, as_json, _print_audit)


def _print_audit(result: dict[str, Any]) -> None:
    say(result["summary"])
    for name, what in LISTED.items():
        if names := result[name]:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            say(f"{what}: {', '.join(names[:SHOWN])}{more}")
    if result["out"]:
        say(f"{result['out']}: the vector")
