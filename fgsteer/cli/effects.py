"""``fgsteer effects``: measure what vectors do to features of generated text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, documents, load_model, load_sae
from fgsteer.cli.options import (
    SEEDS,
    DeviceOption,
    DtypeOption,
    FieldOption,
    FreshOption,
    JsonOption,
    ModelOption,
    OutOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    TrustOption,
)
from fgsteer.cli.printing import progress_bar, say, show
from fgsteer.cli.values import fillable, finite
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks


@app.command()
def effects(
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    vectors: Annotated[
        int | None, typer.Option(min=20, max=MAX_COUNT, help="Decoder rows to measure, drawn by seed; default: all.")
    ] = None,
    rows_of: Annotated[str | None, typer.Option("--rows-of", help="Another SAE whose decoder rows to measure.")] = None,
    rows_of_id: Annotated[str | None, typer.Option("--rows-of-id", help="Its id within a sae-lens release.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts; default: shipped neutral ones.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="File of texts that set the strength; default: shipped neutral.")
    ] = None,
    field: FieldOption = "text",
    n_texts: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="How many of the texts to use.")] = 8,
    rollouts: Annotated[
        int, typer.Option(min=2, max=MAX_COUNT, help="Continuations of each prompt per vector; even.")
    ] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Tokens of each continuation.")] = 32,
    temperature: Annotated[float, typer.Option(callback=finite, help="Of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Of sampling.")] = 50,
    top_p: Annotated[float, typer.Option(callback=finite, help="Of sampling; 0.3 in SAE-TS.")] = 0.3,
    ce_rise: Annotated[
        float, typer.Option(callback=finite, help="Nats a token that each vector may cost the texts.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(**SEEDS, help="Seed of vectors and sampling.")] = 0,
    rows: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Sequences in a forward pass.")] = 512,
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
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
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
