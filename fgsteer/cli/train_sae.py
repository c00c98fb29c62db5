"""``fgsteer train-sae``: train a sparse autoencoder for a model that has none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, load_model
from fgsteer.cli.options import (
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    FreshOption,
    JsonOption,
    ModelOption,
    PrependBosOption,
    RevisionOption,
    TrustOption,
)
from fgsteer.cli.printing import progress_bar, say, show
from fgsteer.cli.values import fillable, hookpoints, seed_in_range
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.storage.ranks import Ranks


@app.command("train-sae", short_help="Train a sparse autoencoder for a model that has none.")
def train_sae(
    corpus: Annotated[
        list[Path],
        typer.Argument(
            help="Corpora: .txt (one document a line), .jsonl, .json, .csv, .tsv or .parquet files. Rows without a "
            'text may hold a conversation, as a list of messages in the field "messages".'
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", callback=fillable, help="The folder of the trained SAE.")],
    hookpoint: Annotated[
        str,
        typer.Option("--hookpoint", help="Where it reads and writes, such as blocks.12.hook_resid_post, or a layer."),
    ],
    model: ModelOption = "default",
    kind: Annotated[
        str, typer.Option("--kind", help="The kind of SAE: topk, batchtopk, jumprelu or matryoshka.")
    ] = "topk",
    features: Annotated[
        int | None, typer.Option("--features", min=2, max=MAX_COUNT, help="Number of features. By default 8 · d_model.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=MAX_COUNT, help="Features active at a token.")] = 32,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=10**12, help="Tokens trained on. Fewer are read several times.")
    ] = 2_000_000,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=MAX_COUNT, help="Tokens in a step of the optimizer.")
    ] = 2048,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr", min=1e-9, max=10, help="The learning rate; by default 2e-3, less for more than 2,000 steps."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", callback=seed_in_range, help="The seed of the first weights and of the order.")
    ] = 0,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            max=MAX_COUNT,
            help="Tokens of a block; longer texts are cut into several. By default 128, or the model's window.",
        ),
    ] = None,
    held_out: Annotated[
        int, typer.Option("--held-out", min=1, max=MAX_COUNT, help="How many texts are kept for the quality report.")
    ] = 100,
    store: Annotated[
        bool,
        typer.Option(
            "--store/--no-store",
            help="Whether activations are kept in the work folder, two bytes a number, and recorded only once.",
        ),
    ] = True,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            callback=fillable,
            help="The folder of activations and checkpoints, from which a run that was stopped goes on. By default "
            "OUT.work.",
        ),
    ] = None,
    field: FieldOption = "text",
    prepend_bos: PrependBosOption = None,
    fresh: FreshOption = False,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a sparse autoencoder on the activations of a model at one place, and measure it on held-out text.

    The documents of all corpora are shuffled together. The first token of a text, special tokens, and the few
    activations of a huge norm are left out. The folder that is written is one of sae-lens. A run that was stopped
    goes on when the same command is given again.
    """
    import fgsteer as fg

    settings = fg.SAETraining(kind=kind, d_sae=features, k=k, tokens=tokens, batch=batch, lr=lr, seed=seed)  # type: ignore[arg-type]
    at = (hookpoints([hookpoint]) or [])[0]
    check_device(device, dtype)
    if Ranks.from_env().world > 1:
        raise DataError(
            "several processes for train-sae",
            "one process",
            "record activations by several with fg.store_activations, then train with fg.fit_sae",
        )
    texts = shuffled_texts(corpus, field, seed)
    if len(texts) <= held_out:
        raise DataError(f"{len(texts)} texts, of which {held_out} are held out", "more texts", "lower --held-out")
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    with progress_bar("training a sparse autoencoder", settings.steps, as_json) as progress:
        sae, quality = fg.train_sae(
            language_model,
            tokenizer,
            texts,
            at,
            out,
            settings=settings,
            held_out=held_out,
            context=context,
            prepend_bos=prepend_bos,
            batch_tokens=batch_tokens,
            store=store,
            work=work,
            fresh=fresh,
            progress=progress,
        )
    show({"out": str(out), "features": sae.d_sae, **quality.as_dict()}, as_json, _print_quality)


def shuffled_texts(corpora: list[Path], field: str, seed: int) -> list[Any]:
    """All texts of all files, in random order. Raises DataError for a file without one."""
    from fgsteer.data.corpora import read_texts

    texts: list[Any] = []
    for path in corpora:
        read = list(read_texts(path, field))
        if not read:
            raise DataError(f"{path}, which holds no document", "at least one document")
        texts += read
    random.Random(seed).shuffle(texts)
    return texts


def _print_quality(result: dict[str, Any]) -> None:
    say(
        f"{result['out']}: {result['features']:,} features. On {result['tokens']:,} held-out tokens it explains "
        f"{result['explained_variance']:.1%} of the variance with {result['l0']:.1f} features a token; "
        f"{result['dead']:.1%} of the features fired on none of them."
    )
    say(
        f"The model's cross-entropy there is {result['ce']:.3f} nats a token, {result['ce_spliced']:.3f} with the "
        f"SAE's reconstructions in place of its activations, and {result['ce_zeroed']:.3f} with zeros."
    )
