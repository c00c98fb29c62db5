"""``fgsteer examples``: find the excerpts of a corpus on which features fire most."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, count_documents, load_model, load_sae
from fgsteer.cli.options import (
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    OutOption,
    PrependBosOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    TrustOption,
)
from fgsteer.cli.printing import progress_bar, say, show
from fgsteer.errors.wording import count


@app.command(short_help="Find where in a corpus each feature fires most.")
def examples(
    corpus: Annotated[
        Path,
        typer.Argument(help="The corpus: a .txt (one document a line), .jsonl, .json, .csv, .tsv or .parquet file."),
    ],
    out: OutOption,
    field: FieldOption = "text",
    top: Annotated[int, typer.Option(min=1, max=1 << 16, help="How many excerpts of each feature to keep.")] = 8,
    window: Annotated[
        int, typer.Option(min=0, max=1 << 16, help="How many tokens to keep on either side of the strongest one.")
    ] = 12,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    max_tokens: MaxTokensOption = 256,
    prepend_bos: PrependBosOption = None,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find where in a corpus each feature fires most, and write these excerpts for fgsteer features --examples."""
    count_documents(corpus, field)
    check_device(device, dtype)
    autoencoder = load_sae(sae, sae_id, model)
    parts = (*load_model(ModelOptions(model, device, dtype, revision, trust_remote_code)), autoencoder)
    sizes = {"top": top, "window": window, "max_tokens": max_tokens, "batch_tokens": batch_tokens}
    measured = measure_excerpts(corpus, field, parts, as_json, prepend_bos=prepend_bos, **sizes)
    measured.save(out)
    fired = int((measured.documents >= 0).any(1).sum())
    result = {"out": str(out), "texts": measured.corpus["texts"], "features": len(measured.features), "fired": fired}
    show(
        result,
        as_json,
        lambda v: say(
            f"{v['out']}: {v['fired']} of {count(v['features'], 'feature')} fired in {count(v['texts'], 'text')}"
        ),
    )


def measure_excerpts(corpus: Path, field: str, parts: tuple[Any, Any, Any], as_json: bool, **options: Any) -> Any:
    """Excerpts of a corpus file, with a progress bar. Raises DataError for one without documents."""
    import fgsteer as fg
    from fgsteer.data.corpora import read_documents

    total = count_documents(corpus, field)
    model, tokenizer, sae = parts
    about = {"name": corpus.name, "texts": total}
    with progress_bar("measuring excerpts", total, as_json) as progress:
        return fg.measure_examples(
            model, tokenizer, sae, read_documents(corpus, field), corpus=about, progress=progress, **options
        )
