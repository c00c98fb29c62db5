"""``fgsteer train``: train a steering vector by gradient descent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import ModelOptions, check_device, load_model, load_sae
from fgsteer.cli.options import (
    SCOPE_HELP,
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
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
from fgsteer.cli.values import hookpoints, parse_settings, present_scope, writable
from fgsteer.cli.vector_reports import describe_vector, measure_strengths, print_vector
from fgsteer.data.file_kinds import CONTRAST_KINDS
from fgsteer.errors import DataError
from fgsteer.storage.ranks import Ranks


@app.command(short_help="Train a steering vector by gradient descent.")
def train(
    contrast: Annotated[
        str,
        typer.Argument(
            help=f"What it learns from: the name of a shipped contrast set, or a {CONTRAST_KINDS} file, whose positive "
            "texts are the winning answers."
        ),
    ],
    out: OutOption,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="What is minimised: reps_relative (winning against losing answers) and lm_relative (the winning ones "
            "alone), which suit any model; or with the constants of papers lm and lm_factors, bipo, reps and simpo, or "
            "reft_r1 (both, at a strength that each text sets).",
        ),
    ] = "reps_relative",
    space: Annotated[
        str,
        typer.Option(
            "--space", help="What is trained: the vector itself (residual), or weights of an SAE's features (sae)."
        ),
    ] = "residual",
    hookpoint: Annotated[
        str | None,
        typer.Option(
            "--hookpoint", help="Where it acts, such as blocks.12.hook_resid_post, or a layer. By default the SAE's."
        ),
    ] = None,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    features: Annotated[
        str,
        typer.Option(
            "--features",
            help="Which features are trained: how many, those that differ most; 0 for all; or a selection, such as "
            "spare:0.07, corrsteer:32 or ssv:128.",
        ),
    ] = "256",
    nonnegative: Annotated[
        bool, typer.Option("--nonnegative", help="Keep feature activations from becoming negative, as YaPO does.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the training, such as epochs=6 or patience=3; repeat for several."),
    ] = None,
    scope: Annotated[
        str,
        typer.Option("--scope", autocompletion=completion("scopes"), callback=present_scope, help=SCOPE_HELP),
    ] = "all",
    work: Annotated[
        Path | None,
        typer.Option("--work", callback=writable, help="A file for checkpoints, from which a stopped run goes on."),
    ] = None,
    fresh: FreshOption = False,
    strengths: Annotated[
        bool, typer.Option("--strengths/--no-strengths", help="Whether to measure what strengths cost neutral text.")
    ] = True,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a steering vector by gradient descent through the model, which stays as it is.

    Rates, strengths and epochs are those of the objective's recipe. The vector is written to a file, and
    what its strengths cost is shown, as fgsteer build does.
    """
    import fgsteer as fg

    recipe = fg.VectorTraining.recipe(objective, **parse_settings(settings or []))
    data = fg.load_contrast(contrast)
    at = None if hookpoint is None else (hookpoints([hookpoint]) or [None])[0]
    chosen = _features(features)
    check_device(device, dtype)
    if Ranks.from_env().world > 1:
        raise DataError("several processes for train", "one process", "train other vectors in the other processes")
    autoencoder = None
    if space == "sae" or at is None:
        autoencoder = load_sae(sae, sae_id, model)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    with progress_bar("training", None, as_json) as progress:
        vector = fg.train(
            language_model,
            tokenizer,
            data,
            objective=recipe,
            space=space,  # type: ignore[arg-type]
            hookpoint=at,
            sae=autoencoder,
            features=chosen,
            nonnegative=nonnegative,
            scope=scope,  # type: ignore[arg-type]
            batch_tokens=batch_tokens,
            work=work,
            fresh=fresh,
            progress=progress,
        )
    vector.save(out)
    described = {**describe_vector(out, objective, vector), "training": vector.provenance["training"]}
    if strengths:
        described |= measure_strengths(vector, "add", lambda: (language_model, tokenizer))
    show(described, as_json, _print_trained)


def _features(text: str) -> Any:
    """What ``fg.train`` takes: a number, a selection, or None for all. Raises SelectionError and DataError."""
    from fgsteer.learning.selections import parse_selection

    number = int(text) if re.fullmatch("[0-9]{1,15}", text) else text
    features = None if number == 0 else number
    parse_selection(features)
    return features


def _print_trained(v: dict[str, Any]) -> None:
    training = v["training"]
    first, last = (training["losses"][n][1] for n in (0, -1))
    say(f"{training['steps']:,} steps; the loss was {first:.3f} at the beginning and {last:.3f} at the end.")
    print_vector(v)
