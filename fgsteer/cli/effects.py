"""``fgsteer effects``: measure what vectors do to features of generated text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, documents, load_model, load_sae
from fgsteer.cli.options import (
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
from fgsteer.cli.values import fillable, finite, seed_in_range
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks


@app.command(short_help="Measure how vectors change features of generated text.")
def effects(
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    vectors: Annotated[
        int | None,
        typer.Option(
            min=20, max=MAX_COUNT, help="How many of the decoder rows to measure, drawn by --seed. By default all."
        ),
    ] = None,
    rows_of: Annotated[
        str | None,
        typer.Option("--rows-of", help="Another SAE, whose decoder rows are measured instead of those of --sae."),
    ] = None,
    rows_of_id: Annotated[
        str | None, typer.Option("--rows-of-id", help="The id of the SAE of --rows-of within a sae-lens release.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts to continue. By default neutral ones that fgsteer ships.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="A file of texts on which strengths are set. By default neutral ones that fgsteer ships."),
    ] = None,
    field: FieldOption = "text",
    n_texts: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="How many of these texts to use.")] = 8,
    rollouts: Annotated[
        int,
        typer.Option(
            min=2,
            max=MAX_COUNT,
            help="How many continuations of each prompt to generate for each vector: an even number.",
        ),
    ] = 4,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="How many tokens each continuation has.")
    ] = 32,
    temperature: Annotated[float, typer.Option(callback=finite, help="The temperature of sampling.")] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="How many of the most probable tokens sampling chooses from.")
    ] = 50,
    top_p: Annotated[
        float,
        typer.Option(
            callback=finite,
            help="Nucleus sampling: the smallest set of tokens with this total probability. SAE-TS uses 0.3.",
        ),
    ] = 0.3,
    ce_rise: Annotated[
        float,
        typer.Option(
            callback=finite, help="By how many nats a token each vector may raise the cross-entropy of the texts."
        ),
    ] = 0.5,
    seed: Annotated[int, typer.Option(callback=seed_in_range, help="The seed of decoder rows and of sampling.")] = 0,
    rows: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="How many sequences a forward pass has.")] = 512,
    work: Annotated[
        Path | None,
        typer.Option(
            callback=fillable,
            help="A folder for finished parts, from which a stopped run goes on. By default OUT.parts.",
        ),
    ] = None,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how vectors change the features of generated text, fit the linear effect approximator, and write it.

    A run that was stopped goes on from there, to the same result, when the same command is run again. Under torchrun
    the processes share the vectors.
    """
    import fgsteer as fg
    from fgsteer.effects.measuring import decoder_directions
    from fgsteer.effects.rollouts import Sampling

    neutral, starts = fg.load_neutral()
    prompt_texts = documents(prompts, field) if prompts else starts
    cost_texts = documents(texts, field) if texts else neutral
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if not 0 < ce_rise < math.inf:
        raise DataError(f"--ce-rise {ce_rise:g}", "a number of nats above 0 after --ce-rise")
    if rollouts % 2:
        raise DataError(
            f"--rollouts {rollouts}",
            "an even number after --rollouts",
            "half of them are compared with the other half, to tell noise from effect",
        )
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
                prompts=prompt_texts,
                texts=cost_texts[:n_texts],
                rollouts=rollouts,
                sampling=sampling,
                target_ce_rise=ce_rise,
                rows=rows,
                work=work or out.with_name(out.name + ".parts"),
                fresh=fresh,
                progress=progress,
            )
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to go on from here.", err=True)
        raise typer.Exit(130) from None
    if not Ranks.from_env().rank:
        measured.save(out)
    show({"out": str(out), **measured.about}, as_json, _print_effects)


def _print_effects(result: dict[str, Any]) -> None:
    say(
        f"{result['out']}: {count(result['vectors'], 'vector')} measured, {result['skipped']} left out; "
        f"ridge penalty λ = {result['ridge_in_mean_eigenvalues']:.3g} mean eigenvalues"
    )
    say(f"R² about the mean effect, on {count(result['held_out_vectors'], 'held-out vector')}:")
    rows = (
        ("fit", result["r2"]),
        ("bias only", 0.0),
        ("fit to shuffled effects", result["shuffled"]),
        ("ceiling set by sampling noise", result["ceiling"]),
    )
    for name, value in rows:
        say(f"  {name:<30} {value:6.3f}")
    say(
        f"Explained share of the squared effects: fit {result['explained']:.3f}, bias only "
        f"{result['explained_by_bias']:.3f}. Mean cosine of M's columns to decoder rows: "
        f"{result['cosine_to_decoder']:.3f}."
    )
