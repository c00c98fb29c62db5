"""``fgsteer export``: write vectors in the format of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
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
from fgsteer.cli.values import parse_settings, unused, writable
from fgsteer.errors import DataError
from fgsteer.export import ExportInputs, spec


@app.command(short_help="Write vectors in the format of another engine.")
def export(
    vectors: Annotated[list[Path], typer.Argument(help="The vectors, which fgsteer build wrote, to apply together.")],
    to: Annotated[str, typer.Option("--to", autocompletion=completion("exports"), help="The format: {exports}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file, or the new folder, to write.")],
    coefficient: CoefficientOption = None,
    operation: OperationOption = "add",
    scope: ScopeOption = "all",
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Steer the token at position 0 too, or leave it alone. By default it is left alone where the format "
            "can express that.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The model that is steered: {shipped models}, or a Hugging Face id or path."
        ),
    ] = None,
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the export, such as n_tokens=32; repeat. {export options}."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The same as --set prompt=TEXT.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write vectors, at a strength, in the format of another engine; what the format cannot express is refused.

    {what exports write}
    """
    row = spec(to)
    if "model" in row.needs:
        if model is None:
            raise DataError(f"no --model for --to {to}", "the model that is steered", "add --model NAME")
        check_device(device, dtype)
    options = parse_settings(settings or []) | ({} if prompt is None else {"prompt": prompt})
    (unused if row.folder else writable)(out)
    loaded = load_vectors(vectors, coefficient, operation, model, revision)
    steers_position_0 = not row.spares_position_0 if bos is None else bos
    items = interventions(loaded, operation, scope, bos=steers_position_0)
    place = "cpu" if row.model_on_cpu else device
    inputs = ExportInputs(
        [vector for vector, _ in loaded],
        lambda: load_model(ModelOptions(str(model), place, dtype, revision, trust_remote_code)),
        lambda: load_sae(sae, sae_id, model_of(loaded[0][0].provenance)),
        options,
    )
    files = row.write(items, out, inputs)
    result = {
        "to": to,
        "files": [str(file) for file in files],
        "operation": operation,
        "coefficients": [strength for _, strength in loaded],
        "hookpoints": [str(item.hookpoint) for item in items],
        "scope": scope,
        "bos": steers_position_0,
    }
    show(result, as_json, _print_export)


def _print_export(result: dict[str, Any]) -> None:
    say(f"{', '.join(result['files'])}: {spec(result['to']).writes}")
    tokens = {"all": "every token"}.get(result["scope"], result["scope"])
    position_0 = ", position 0 too" if result["bos"] else ", position 0 left alone"
    for hookpoint, strength in zip(result["hookpoints"], result["coefficients"], strict=True):
        operation = result["operation"] + ("" if result["operation"] == "ablate" else f" {strength:g}")
        say(f"  {operation} at {hookpoint}, {tokens}{'' if result['scope'] == 'generated' else position_0}")
