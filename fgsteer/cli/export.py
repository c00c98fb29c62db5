"""The command that writes vectors for other engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, interventions, load_model, load_sae, load_vectors, model_of
from fgsteer.cli.options import (
    CoefficientOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OperationOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    ScopeOption,
    TrustOption,
)
from fgsteer.cli.printing import say, show
from fgsteer.cli.values import unused, writable
from fgsteer.errors import DataError
from fgsteer.errors.wording import count

TARGETS = {
    "checkpoint": "an ordinary checkpoint of --model with the vectors inside",
    "gguf": "a control vector for llama.cpp and repeng",
    "lm-eval": "a file for lm-eval's steered model",
    "easysteer": "a spec for EasySteer, with its GGUF files",
    "neuronpedia": "a request to Neuronpedia's steering API",
}


@app.command()
def export(
    vectors: Annotated[list[Path], typer.Argument(help="Vectors by fgsteer build, to apply together.")],
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(TARGETS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, or new folder.")],
    coefficient: CoefficientOption = None,
    operation: OperationOption = "add",
    scope: ScopeOption = "all",
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Act on position 0 too. Default: only where the target cannot spare it."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="checkpoint: the model; lm-eval: it too, for its modules' names."),
    ] = None,
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    prompt: Annotated[str, typer.Option(help="neuronpedia: the text to continue.")] = "I think",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write vectors, at a strength, in the format of another engine; refuse what it cannot say."""
    from fgsteer import export as formats
    from fgsteer.export.places import every_token

    if to not in TARGETS:
        raise DataError(f"--to {to}", ", ".join(TARGETS))
    if to in ("checkpoint", "lm-eval"):
        if model is None:
            raise DataError("no --model", f"the model that is steered: {to} needs it")
        check_device(device, dtype)
    (unused if to == "checkpoint" else writable)(out)
    loaded = load_vectors(vectors, coefficient, operation, model, revision)
    acts_on_first = to != "easysteer" if bos is None else bos
    items = interventions(loaded, operation, scope, bos=acts_on_first)
    model_type = next(filter(None, (_model_type(vector) for vector, _ in loaded)), "")
    files = [out]
    if to == "checkpoint":
        formats.checkpoint.write(
            items, out, *load_model(ModelOptions(str(model), "cpu", dtype, revision, trust_remote_code)), copy=False
        )
    elif to == "gguf":
        formats.gguf.write(items, out, model_type=model_type)
    elif to == "lm-eval":
        formats.lm_eval.write(
            items, out, load_model(ModelOptions(str(model), device, dtype, revision, trust_remote_code))[0]
        )
    elif to == "easysteer":
        files = formats.easysteer.write(items, out, model_type=model_type)
    else:
        if operation != "add" or len(items) != 1:
            raise DataError(f"--op {operation} of {count(len(items), 'vector')}", "add of one, as Neuronpedia does")
        every_token(items[0], "Neuronpedia")
        vector, strength = loaded[0]
        formats.neuronpedia.write(
            vector, out, load_sae(sae, sae_id, model_of(vector.provenance)), coefficient=strength, prompt=prompt
        )
    told = {
        "to": to,
        "files": [str(file) for file in files],
        "operation": operation,
        "coefficients": [strength for _, strength in loaded],
        "hookpoints": [str(item.hookpoint) for item in items],
        "scope": scope,
        "bos": acts_on_first,
    }
    show(told, as_json, _print_export)


def _print_export(told: dict[str, Any]) -> None:
    say(f"{', '.join(told['files'])}: {TARGETS[told['to']]}")
    tokens = {"all": "every token"}.get(told["scope"], told["scope"])
    first = "" if told["scope"] == "generated" else ", position 0 too" if told["bos"] else ", position 0 spared"
    for hookpoint, strength in zip(told["hookpoints"], told["coefficients"], strict=True):
        what = told["operation"] + ("" if told["operation"] == "ablate" else f" {strength:g}")
        say(f"  {what} at {hookpoint}, {tokens}{first}")


def _model_type(vector: Any) -> str:
    """The Hugging Face model type that a vector remembers, or ""."""
    made = vector.provenance.get("model")
    return str(made.get("type") or "") if isinstance(made, Mapping) else ""
