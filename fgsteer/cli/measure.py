"""Commands that run a model over text and write what they measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.common import (
    MOST,
    SEEDS,
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
    TokensOption,
    TrustOption,
    WorkOption,
    app,
    documents,
    load_model,
    load_sae,
    progress_bar,
    show,
    work_folder,
)
from fgsteer.cli.doors import check_device, fillable, finite, hookpoints, token_rule
from fgsteer.cli.terminal import say
from fgsteer.errors import DataError
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks


@app.command()
def collect(
    contrast: Annotated[str, typer.Argument(help="A shipped contrast set, or a .json or .jsonl file.")],
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    no_sae: Annotated[bool, typer.Option("--no-sae", help="Residual statistics only (with --hookpoint).")] = False,
    hookpoint: Annotated[
        list[str] | None, typer.Option("--hookpoint", help="More hookpoints, such as blocks.2.hook_resid_post.")
    ] = None,
    tokens: TokensOption = "all",
    bos: Annotated[bool, typer.Option("--bos", help="Read the special token before a text too.")] = False,
    prepend_bos: PrependBosOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, max=MOST, help="Tokens read of each text. Default: the model's window."),
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled/--no-pooled", help="Keep every text's mean activations, for fgsteer diagnose.")
    ] = True,
    work: WorkOption = None,
    fresh: FreshOption = False,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read both sides of a contrast through the model and the SAE; write statistics.

    Under torchrun (torchrun … -m fgsteer collect …) the processes share the texts.
    """
    import fgsteer as fg

    pairs = fg.load_contrast(contrast)
    wanted, rule = hookpoints(hookpoint), token_rule(tokens)
    if no_sae and not wanted:
        raise DataError(
            "--no-sae without --hookpoint", "a place to read", "such as --hookpoint blocks.2.hook_resid_post"
        )
    check_device(device, dtype)
    autoencoder = None if no_sae else load_sae(sae, sae_id, model)
    language_model, tokenizer = load_model(model, device, dtype, revision, trust_remote_code)
    total = pairs.count(True) + pairs.count(False)
    with progress_bar("collecting", total, as_json) as progress:
        stats = fg.collect(
            language_model,
            tokenizer,
            pairs,
            sae=autoencoder,
            hookpoints=wanted,
            tokens=rule,
            bos=bos,
            prepend_bos=prepend_bos,
            max_tokens=max_tokens,
            keep_pooled=pooled,
            batch_tokens=batch_tokens,
            work=work_folder(work, out),
            fresh=fresh,
            progress=progress,
        )
    if not Ranks.from_env().rank:
        stats.save(out)
    told = {"out": str(out), "hookpoints": [str(at) for at in stats.residual], "data": [dict(d) for d in stats.data]}
    show(told, as_json, _print_collected)


def _print_collected(told: dict[str, Any]) -> None:
    positive, negative = told["data"][0]["count"]
    say(f"{told['out']}: {positive} + {count(negative, 'text')} at {', '.join(told['hookpoints'])}")


def count_documents(corpus: Path, field: str) -> int:
    """How many documents a corpus has, every line read. Raises DataError for none or one that cannot be read."""
    from fgsteer.data.corpora import read_documents

    total = sum(1 for _ in read_documents(corpus, field))
    if not total:
        raise DataError(f"{corpus} has no document", "one at least")
    return total


@app.command()
def density(
    corpus: Annotated[
        Path, typer.Argument(help="A .txt (a document a line), .jsonl, .json, .csv, .tsv or .parquet file.")
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
    """Measure on which share of a corpus's tokens each feature fires; write it beside the SAE.

    A file density.safetensors in an SAE's folder is loaded with it. Under torchrun the processes share the texts.
    """
    import fgsteer as fg
    from fgsteer.data.corpora import read_documents

    total = count_documents(corpus, field)
    check_device(device, dtype)
    autoencoder = load_sae(sae, sae_id, model)
    language_model, tokenizer = load_model(model, device, dtype, revision, trust_remote_code)
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
    told = {
        "out": str(out),
        "tokens": measured.tokens,
        "l0": float(shares.sum()),
        "dead": int((shares == 0).sum()),
        "bos_features": measured.bos_features().nonzero()[:, 0].tolist(),
    }
    show(
        told,
        as_json,
        lambda v: say(
            f"{v['out']}: {count(v['tokens'], 'token')}, L0 {v['l0']:.1f}, {count(v['dead'], 'feature')} never fired, "
            f"{len(v['bos_features'])} only at the beginning of texts"
        ),
    )


@app.command()
def effects(
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    vectors: Annotated[
        int | None, typer.Option(min=20, max=MOST, help="Decoder rows to measure, drawn by seed; default: all.")
    ] = None,
    rows_of: Annotated[str | None, typer.Option("--rows-of", help="Another SAE whose decoder rows to measure.")] = None,
    rows_of_id: Annotated[str | None, typer.Option("--rows-of-id", help="Its id within a sae-lens release.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts; default: shipped neutral ones.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="File of texts that set the strength; default: shipped neutral.")
    ] = None,
    field: FieldOption = "text",
    n_texts: Annotated[int, typer.Option(min=1, max=MOST, help="How many of the texts to use.")] = 8,
    rollouts: Annotated[int, typer.Option(min=2, max=MOST, help="Continuations of each prompt per vector; even.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of each continuation.")] = 32,
    temperature: Annotated[float, typer.Option(callback=finite, help="Of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=1, max=MOST, help="Of sampling.")] = 50,
    top_p: Annotated[float, typer.Option(callback=finite, help="Of sampling; 0.3 in SAE-TS.")] = 0.3,
    ce_rise: Annotated[
        float, typer.Option(callback=finite, help="Nats a token that each vector may cost the texts.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(**SEEDS, help="Seed of vectors and sampling.")] = 0,
    rows: Annotated[int, typer.Option(min=1, max=MOST, help="Sequences in a forward pass.")] = 512,
    work: Annotated[
        Path | None,
        typer.Option(callback=fillable, help="Folder of measured parts, to go on from; default: OUT.parts."),
    ] = None,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how vectors move features of generated text, fit the linear effect approximator, write it.

    A killed run goes on where it stopped, to the same result: say the same command again. Under torchrun the
    processes share the vectors.
    """
    import fgsteer as fg
    from fgsteer.effects.measuring import decoder_directions
    from fgsteer.effects.rollouts import Sampling

    neutral, starts = fg.load_neutral()
    asked = documents(prompts, field) if prompts else starts
    costed = documents(texts, field) if texts else neutral
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if not 0 < ce_rise < math.inf or rollouts % 2:
        raise DataError(f"--ce-rise {ce_rise:g}, --rollouts {rollouts}", "nats above 0, and an even number")
    check_device(device, dtype)
    autoencoder = load_sae(sae, sae_id, model)
    source = load_sae(rows_of, rows_of_id, model) if rows_of is not None else autoencoder
    directions = decoder_directions(source, vectors, seed)
    language_model, tokenizer = load_model(model, device, dtype, revision, trust_remote_code)
    try:
        with progress_bar("measuring effects", len(directions), as_json) as progress:
            measured = fg.EffectApproximator.measure(
                language_model,
                tokenizer,
                autoencoder,
                vectors=directions,
                prompts=asked,
                texts=costed[:n_texts],
                rollouts=rollouts,
                sampling=sampling,
                target_ce_rise=ce_rise,
                rows=rows,
                work=work or out.with_name(out.name + ".parts"),
                fresh=fresh,
                progress=progress,
            )
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    if not Ranks.from_env().rank:
        measured.save(out)
    show({"out": str(out), **measured.about}, as_json, _print_effects)


def _print_effects(told: dict[str, Any]) -> None:
    say(
        f"{told['out']}: {count(told['vectors'], 'vector')}, {told['skipped']} left out; "
        f"λ = {told['ridge_in_mean_eigenvalues']:.3g} mean eigenvalues"
    )
    say(f"on {count(told['held_out_vectors'], 'vector')} held out, R² about the mean effect")
    rows = (
        ("fit", told["r2"]),
        ("bias only", 0.0),
        ("fit to shuffled effects", told["shuffled"]),
        ("ceiling set by sampling noise", told["ceiling"]),
    )
    for name, value in rows:
        say(f"  {name:<30} {value:6.3f}")
    say(
        f"share of all squared effect: fit {told['explained']:.3f}, bias only {told['explained_by_bias']:.3f}; "
        f"mean cosine of M's columns to decoder rows {told['cosine_to_decoder']:.3f}"
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


@app.command()
def examples(
    corpus: Annotated[
        Path, typer.Argument(help="A .txt (a document a line), .jsonl, .json, .csv, .tsv or .parquet file.")
    ],
    out: OutOption,
    field: FieldOption = "text",
    top: Annotated[int, typer.Option(min=1, max=1 << 16, help="Excerpts kept of each feature.")] = 8,
    window: Annotated[int, typer.Option(min=0, max=1 << 16, help="Tokens kept on either side of a peak.")] = 12,
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
    """Find where in a corpus each feature fires most; write the excerpts for fgsteer features --examples."""
    count_documents(corpus, field)
    check_device(device, dtype)
    autoencoder = load_sae(sae, sae_id, model)
    parts = (*load_model(model, device, dtype, revision, trust_remote_code), autoencoder)
    sizes = {"top": top, "window": window, "max_tokens": max_tokens, "batch_tokens": batch_tokens}
    measured = measure_excerpts(corpus, field, parts, as_json, prepend_bos=prepend_bos, **sizes)
    measured.save(out)
    fired = int((measured.documents >= 0).any(1).sum())
    told = {"out": str(out), "texts": measured.corpus["texts"], "features": len(measured.features), "fired": fired}
    show(
        told,
        as_json,
        lambda v: say(
            f"{v['out']}: {v['fired']} of {count(v['features'], 'feature')} fired in {count(v['texts'], 'text')}"
        ),
    )
