"""``fgsteer build``: build a steering vector by a method's name."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import load_sae, model_of
from fgsteer.cli.options import JsonOption, OutOption, SaeIdOption, SaeOption
from fgsteer.cli.printing import say, show
from fgsteer.cli.values import parse_settings
from fgsteer.errors import DataError
from fgsteer.errors.wording import count


@app.command()
def build(
    method: Annotated[str, typer.Argument(help="caa, ace, sta, fgaa, sae_ts or from_features.")],
    out: OutOption,
    stats: Annotated[Path | None, typer.Option(help="Statistics written by fgsteer collect.")] = None,
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    effects: Annotated[str | None, typer.Option(help='Effect approximator: a file, or "default".')] = None,
    density: Annotated[Path | None, typer.Option(help="Density of the SAE, if not in its folder.")] = None,
    features: Annotated[str | None, typer.Option(help="Feature ids with weights, such as 12:1.5,40.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the method, such as n_positive=8.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build a steering vector by a method's name; write it."""
    import fgsteer as fg

    inputs: dict[str, Any] = parse_settings(settings or [])
    _check_settings(method, inputs)
    _check_needs(method, {"stats": stats, "effects": effects, "features": features})
    if stats is not None:
        inputs["stats"] = fg.ContrastStatistics.load(stats)
    if effects is not None:
        inputs["effects"] = fg.load_effects(effects)
    if density is not None:
        inputs["density"] = fg.FeatureDensity.load(density)
    if features is not None:
        inputs["features"] = _feature_weights(features)
    if "sae" in signature(fg.METHODS[method]).parameters:
        if stats is not None:
            inputs["stats"].at("feature", next(iter(inputs["stats"].feature), None))  # refuses those without features
        inputs["sae"] = load_sae(sae, sae_id, "" if stats is None else model_of(inputs["stats"].reading))
    vector = fg.build(method, **inputs)
    vector.save(out)
    told = {
        "out": str(out),
        "method": method,
        "hookpoint": str(vector.hookpoint),
        "norm": vector.norm,
        "features": len(vector.features),
    }
    show(
        told,
        as_json,
        lambda v: say(
            f"{v['out']}: {v['method']} at {v['hookpoint']}, norm {v['norm']:.3f}, {count(v['features'], 'feature')}"
        ),
    )


def _check_needs(method: str, given: dict[str, Any]) -> None:
    """Raises DataError for a method without an option that it works on."""
    from fgsteer.methods import METHODS

    parameters = signature(METHODS[method]).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and n != "sae" and given.get(n) is None]
    if needed:
        raise DataError(f"{method} without {', '.join(f'--{name}' for name in needed)}", "what the method works on")


def _check_settings(method: str, settings: dict[str, Any]) -> None:
    """Raises DataError for an unknown method or parameter, a value of another type, or one with its own option."""
    from fgsteer.methods import METHODS

    if method not in METHODS:
        raise DataError(f"method {method!r}", f"one of {', '.join(METHODS)}")
    parameters = signature(METHODS[method]).parameters
    for key, value in settings.items():
        if key not in parameters:
            own = [name for name in parameters if name not in ("stats", "sae", "effects", "density", "features")]
            raise DataError(f"--set {key}={value}: unknown {key}", f"one of {method}'s parameters: {', '.join(own)}")
        expected = str(parameters[key].annotation)
        names = expected.split(" | ")
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool),
            "bool": isinstance(value, bool),
            "str": isinstance(value, str),
            "None": value is None,
        }
        if key in ("stats", "sae", "effects", "density", "features"):
            raise DataError(f"--set {key}={value}", f"--{key}, an option of its own")
        if expected.startswith("Literal[") or key == "hookpoint":
            fits, names = {"str": fits["str"]}, ["str"]
        if not any(fits.get(name, False) for name in names):
            known = " or ".join({"None": "null"}.get(name, name) for name in names if name in fits)
            raise DataError(f"--set {key}={value}", known)


def _feature_weights(text: str) -> dict[int, float]:
    """{id: weight} of "12:1.5,40". Raises DataError."""
    weights: dict[int, float] = {}
    for part in text.split(","):
        feature, _, weight = part.partition(":")
        try:
            given = int(feature)
            value = float(weight or 1.0)
        except ValueError as error:
            raise DataError(f"--features {text}", "ids with optional weights, such as 12:1.5,40") from error
        if given in weights:
            raise DataError(f"--features {text} names {given} twice", "each id once")
        weights[given] = value
    return weights
