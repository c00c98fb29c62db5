"""``fgsteer density``: measure how often the features of an SAE fire."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, count_documents, load_model, load_sae, work_folder
from fgsteer.cli.options import (
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    FreshOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    OutOption,
    PrependBosOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    TrustOption,
    WorkOption,
)
from fgsteer.cli.printing import progress_bar, say, show
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks


@app.command(short_help="Measure how often each feature fires on a corpus.")
def density(
    corpus: Annotated[
        Path,
        typer.Argument(help="The corpus: a .txt (one document a line), .jsonl, .json, .csv, .tsv or .parquet file."),
    ],
    out: OutOption,
    field: FieldOption = "text",
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    max_tokens: MaxTokensOption = 256,
    prepend_bos: PrependBosOption = None,
    work: WorkOption = None,
    fresh: FreshOption = False,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on which share of a corpus's tokens each feature fires, and write it to a file.

    A file named density.safetensors in an SAE's folder is loaded with the SAE. Under torchrun the processes share the
    texts.
    """
    import fgsteer as fg
    from fgsteer.data.corpora import read_documents

    total = count_documents(corpus, field)
    check_device(device, dtype)
    autoencoder = load_sae(sae, sae_id, model)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    with progress_bar("measuring density", total, as_json) as progress:
        measured = fg.measure_density(
            language_model,
            tokenizer,
            autoencoder,
            read_documents(corpus, field),
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            prepend_bos=prepend_bos,
            corpus={"name": corpus.name, "texts": total},
            work=work_folder(work, out),
            fresh=fresh,
            progress=progress,
        )
    if not Ranks.from_env().rank:
        measured.save(out)
    shares = measured.density
    result = {
        "out": str(out),
        "tokens": measured.tokens,
        "l0": float(shares.sum()),
        "dead": int((shares == 0).sum()),
        "bos_features": measured.bos_features().nonzero()[:, 0].tolist(),
    }
    show(
        result,
        as_json,
        lambda v: say(
            f"{v['out']}: {count(v['tokens'], 'token')}, L0 {v['l0']:.1f}, {count(v['dead'], 'feature')} never fired, "
            f"{len(v['bos_features'])} only at the beginning of texts"
        ),
    )
