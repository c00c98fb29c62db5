"""``fgsteer build``: build a steering vector by a method's name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import load_effects, load_sae, model_of
from fgsteer.cli.method_settings import check_inputs, check_settings, feature_weights
from fgsteer.cli.options import JsonOption, OutOption, SaeIdOption, SaeOption
from fgsteer.cli.printing import say, show
from fgsteer.cli.values import parse_settings
from fgsteer.errors.wording import count
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
    as_json: JsonOption = False,
) -> None:
    """Build a steering vector by a method's name, and write it to a file."""
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
    described = {
        "out": str(out),
        "method": method,
        "hookpoint": str(vector.hookpoint),
        "norm": vector.norm,
        "features": len(vector.features),
    }
    show(
        described,
        as_json,
        lambda v: say(
            f"{v['out']}: {v['method']} at {v['hookpoint']}, norm {v['norm']:.3f}, {count(v['features'], 'feature')}"
        ),
    )
