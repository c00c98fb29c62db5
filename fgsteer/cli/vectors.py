"""Commands that build vectors and steer with them."""

from __future__ import annotations

import json
import math
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.common import (
    MOST,
    SEEDS,
    CoefficientOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OperationOption,
    OutOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    ScopeOption,
    TrustOption,
    VectorOption,
    app,
    console,
    interventions,
    load_model,
    load_sae,
    load_vectors,
    model_of,
    show,
)
from fgsteer.cli.doors import finite, unused
from fgsteer.cli.terminal import say
from fgsteer.errors import DataError
from fgsteer.errors.wording import count


@app.command()
def demo(
    concepts: Annotated[list[str] | None, typer.Argument(help="Shipped concepts; two by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Steer the embedded default towards two concepts by four methods, side by side."""
    from fgsteer.cli.demo import CONCEPTS, run

    result = run(console(), concepts or CONCEPTS, as_json=as_json)
    show(result, as_json, lambda _: None)


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """key=value options as Python values: JSON where it parses, "inf" as a number. Raises DataError."""
    from fgsteer.storage.json_files import parse_json

    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise DataError(f"--set {pair}", "key=value, such as --set n_positive=8")
        try:
            settings[key] = parse_json(value)
        except json.JSONDecodeError:
            settings[key] = math.inf if value == "inf" else value
        except ValueError as error:
            raise DataError(f"--set {pair:.80}: {error}", "key=value, such as --set n_positive=8") from error
    return settings


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


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    vector: VectorOption = None,
    coefficient: CoefficientOption = None,
    operation: OperationOption = "add",
    scope: ScopeOption = "all",
    model: ModelOption = "default",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens to generate.")] = 48,
    temperature: Annotated[float, typer.Option(min=0, callback=finite, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(**SEEDS, help="Seed for sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages, answered by the chat model.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message of each chat; implies --chat.")] = None,
    prefill: Annotated[str | None, typer.Option("--prefill", help="What each answer of a chat begins with.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts, unsteered and steered side by side."""
    import torch

    import fgsteer as fg
    from fgsteer.steering.generation import check_options, parse_prompts

    steering = interventions(load_vectors(vector, coefficient, operation, model, revision), operation, scope)
    asked = _conversations(prompts, system, prefill) if chat or system is not None else prompts
    if prefill is not None and asked is prompts:
        raise DataError("--prefill without --chat", "--chat too", "else write the text at the end of the prompt")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    options |= {"temperature": temperature} if temperature > 0 else {}
    check_options(options)
    parse_prompts(asked)
    language_model, tokenizer = load_model(model, device, dtype, revision, trust_remote_code)

    def run(entries: Any) -> list[str]:
        torch.manual_seed(seed)
        texts: list[str] = fg.generate(language_model, tokenizer, asked, steering=entries, **options)
        return texts

    told: dict[str, Any] = {"prompts": prompts, "unsteered": run(None)}
    if steering:
        told["steered"] = run([steering] * len(prompts))
    if asked is not prompts:
        told |= {"system": system, "prefill": prefill}
    show(told, as_json, _print_texts)


def _conversations(prompts: list[str], system: str | None, prefill: str | None) -> list[list[dict[str, str]]]:
    """Each prompt as a user's message, after a system message and before the beginning of the answer, where given."""
    before = [] if system is None else [{"role": "system", "content": system}]
    after = [] if prefill is None else [{"role": "assistant", "content": prefill}]
    return [[*before, {"role": "user", "content": prompt}, *after] for prompt in prompts]


def _print_texts(told: dict[str, Any]) -> None:
    from rich.text import Text

    screen = console()
    chat = "prefill" in told
    for number, prompt in enumerate(told["prompts"]):
        if chat:
            screen.print(Text.assemble(("user: ", "dim"), prompt))
        before = (told["prefill"] or "") if chat else prompt
        for name in ("unsteered", "steered"):
            if name in told:
                screen.print(Text.assemble((f"{name}: ", "dim"), before, (told[name][number], "bold")))


@app.command()
def fold(
    vector: Annotated[list[Path], typer.Option("--vector", "-v", help="A vector to add; repeat.")],
    out: Annotated[Path, typer.Option("--out", "-o", callback=unused, help="New folder for the checkpoint.")],
    coefficient: Annotated[
        list[float] | None,
        typer.Option("--coefficient", "-c", callback=finite, help="One per vector, in the same order; default: 1."),
    ] = None,
    model: ModelOption = "default",
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint with vectors inside, added to every token: plain transformers loads it, no hooks run."""
    from fgsteer.export import checkpoint

    steering = interventions(load_vectors(vector, coefficient, model=model, revision=revision), "add", "all", bos=True)
    folded = checkpoint.write(steering, out, *load_model(model, "cpu", dtype, revision, trust_remote_code), copy=False)
    told = {"out": str(out), "model": model, "dtype": str(folded.dtype).removeprefix("torch.")}
    show({**told, **(getattr(folded.config, "fgsteer", None) or {"folded": []})}, as_json, _print_folded)


def _print_folded(told: dict[str, Any]) -> None:
    for term in told["folded"]:
        say(
            f"{term['coefficient']:g} x {term['method'] or 'a vector'} (norm {term['norm']:.3f}) "
            f"at {term['hookpoint']} in {term['bias']}"
        )
    lost = f", rounded by {told['rounding']:.1g} of the change" if told["folded"] else ", nothing to fold"
    say(f"{told['out']}: {told['model']} in {told['dtype']}{lost}; every token is steered, position 0 too")
