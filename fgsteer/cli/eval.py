"""``fgsteer eval``: tasks of lm-evaluation-harness under steering."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, interventions, load_model, load_vectors
from fgsteer.cli.options import (
    CoefficientOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OperationOption,
    RevisionOption,
    ScopeOption,
    TrustOption,
    VectorOption,
)
from fgsteer.cli.printing import console, show
from fgsteer.cli.values import finite
from fgsteer.errors import JudgeError
from fgsteer.errors.limits import MAX_COUNT


@app.command(name="eval", short_help="Run lm-evaluation-harness without and with steering.")
def evaluate(
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", "-t", help="Names of lm-eval's tasks with commas between them, such as hellaswag,arc_easy."
        ),
    ],
    vector: VectorOption = None,
    coefficient: CoefficientOption = None,
    operation: OperationOption = "add",
    scope: ScopeOption = "all",
    model: ModelOption = "default",
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", exists=True, file_okay=False, help="A folder of your own task files."),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="Number of documents of each task; a share of them where below 1."),
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, max=MAX_COUNT, help="Number of examples before each question.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=MAX_COUNT, help="Number of requests in a forward pass.")
    ] = 1,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Whether to run the tasks on the unsteered model too, which takes as long again.",
        ),
    ] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-evaluation-harness without and with steering, or without a vector on the unsteered model."""
    import fgsteer as fg

    if find_spec("lm_eval") is None:
        raise JudgeError("lm-eval is not installed.", change="install it with pip install 'fgsteer[lm-eval]'")
    steering = interventions(load_vectors(vector, coefficient, operation, model, revision), operation, scope)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))

    def run(items: list[Any]) -> dict[str, Any]:
        return fg.run_tasks(
            language_model,
            tokenizer,
            [task.strip() for task in tasks.split(",")],
            steering=items,
            include_path=include_path,
            limit=limit,
            num_fewshot=fewshot,
            batch_size=batch_size,
        )

    unsteered = run([])["results"] if steering and baseline else None
    results = run(steering)
    output = {
        "model": model,
        "vectors": [str(path) for path in vector or []],
        "coefficients": coefficient or [1.0] * len(vector or []),
        "operation": operation if vector else None,
        "scope": scope,
        "limit": limit,
        "results": results["results"],
        "unsteered": unsteered,
        "versions": results["versions"],
        "samples": results["n-samples"],
    }
    show(output, as_json, _print_results)


def _print_results(output: dict[str, Any]) -> None:
    from rich.table import Table

    unsteered = output["unsteered"]
    headings = ["value"] if unsteered is None else ["unsteered", "steered", "difference"]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for number, heading in enumerate(("task", "metric", *headings, "stderr")):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for task, figures in output["results"].items():
        for key, value in figures.items():
            name, _, rule = key.partition(",")
            if not isinstance(value, int | float) or name.endswith("_stderr") or not rule:
                continue
            before = None if unsteered is None else unsteered[task][key]
            shown = [f"{value:.4f}"] if before is None else [f"{before:.4f}", f"{value:.4f}", f"{value - before:+.4f}"]
            error = figures.get(f"{name}_stderr,{rule}")
            shown.append(f"{error:.4f}" if isinstance(error, float) else "-")
            table.add_row(task, name if rule == "none" else key, *shown)
    console().print(table)
