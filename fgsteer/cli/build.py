"""``fgsteer build``: build a steering vector by a method's name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import (
    ModelOptions,
    load_effects,
    load_model,
    load_sae,
    model_of,
)
from fgsteer.cli.method_settings import check_inputs, check_settings, feature_weights
from fgsteer.cli.options import DeviceOption, DtypeOption, JsonOption, OutOption, SaeIdOption, SaeOption
from fgsteer.cli.printing import show
from fgsteer.cli.values import parse_settings
from fgsteer.cli.vector_reports import describe_vector, measure_strengths, print_vector
from fgsteer.errors import DataError
from fgsteer.methods import spec


@app.command(short_help="Build a steering vector by a method's name.")
def build(
    method: Annotated[
        str, typer.Argument(help="The method: {build methods}.", autocompletion=completion("build methods"))
    ],
    out: OutOption,
    stats: Annotated[Path | None, typer.Option(help="File of statistics that fgsteer collect wrote.")] = None,
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    effects: Annotated[
        str | None,
        typer.Option(help="The effects measured on the SAE: a file of fgsteer effects, or {shipped models}."),
    ] = None,
    density: Annotated[
        Path | None, typer.Option(help="File of the SAE's feature density, where its folder has none.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Ids of the features to steer with, and their weights: 12:1.5,40.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, such as n_positive=8; repeat for several."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The model on which strengths are measured. By default the one that the vector was made for, where it "
            "is on this machine.",
        ),
    ] = None,
    strengths: Annotated[
        bool,
        typer.Option(
            "--strengths/--no-strengths",
            help="Whether to load the model and measure what strengths of the vector cost neutral text.",
        ),
    ] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build a steering vector by a method's name, write it to a file, and show what its strengths cost."""
    import fgsteer as fg

    inputs: dict[str, Any] = parse_settings(settings or [])
    check_settings(method, inputs)
    check_inputs(method, {"stats": stats, "effects": effects, "features": features})
    if stats is not None:
        inputs["stats"] = fg.ContrastStatistics.load(stats)
    if effects is not None:
        inputs["effects"] = load_effects(effects, sae_id)
    if density is not None:
        inputs["density"] = fg.FeatureDensity.load(density)
    if features is not None:
        inputs["features"] = feature_weights(features)
    if "sae" in spec(method).parameters:
        if stats is not None:
            inputs["stats"].at("feature", next(iter(inputs["stats"].feature), None))  # refuses those without features
        inputs["sae"] = load_sae(sae, sae_id, "" if stats is None else model_of(inputs["stats"].reading))
    vector = fg.build(method, **inputs)
    vector.save(out)
    described = describe_vector(out, method, vector)
    if strengths:
        options = ModelOptions(model or model_of(vector.provenance), device, dtype, fetch=model is not None)

        def load() -> tuple[Any, Any]:
            if not options.name:
                raise DataError(
                    "a vector that names no model", "the model that it was made for", "name it with --model"
                )
            return load_model(options)

        described |= measure_strengths(vector, spec(method).operation, load)
    show(described, as_json, print_vector)
