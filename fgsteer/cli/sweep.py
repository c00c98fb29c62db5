"""``fgsteer sweep``: layers, strengths and signs compared without generating."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import ModelOptions, check_device, check_fit, documents, load_model
from fgsteer.cli.options import (
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    FieldOption,
    FreshOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    TokensOption,
    TrustOption,
)
from fgsteer.cli.printing import console, duration, progress_lines, say, show
from fgsteer.cli.values import fillable, finite, token_rule
from fgsteer.data.file_kinds import CONTRAST_KINDS
from fgsteer.errors import DataError
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.limits import MAX_COUNT

SECONDS_WORTH_SAYING = 10.0  # that a sweep takes by its estimate


@app.command(short_help="Find the best layer, strength and sign for steering.")
def sweep(
    contrast: Annotated[
        str, typer.Argument(help=f"The name of a shipped contrast set, or a {CONTRAST_KINDS} file of one.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            callback=fillable,
            help="The folder for sweep.json, the pictures and sweep.html. A sweep that was stopped goes on there.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="The method that builds a vector at each layer: {sweep methods}.",
            autocompletion=completion("sweep methods"),
        ),
    ] = "caa",
    vector: Annotated[
        list[Path] | None,
        typer.Option("--vector", "-v", help="A file of a vector, in place of --method. Repeat for several layers."),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=MAX_COUNT,
            help="A layer to sweep at all costs. Repeat for several; by default all of few, some of many.",
        ),
    ] = None,
    ce_rise: Annotated[
        list[float] | None,
        typer.Option(
            callback=finite,
            help="A cost in nats a token at which strength is set. Repeat for several; by default 0.05 to 1.",
        ),
    ] = None,
    coefficient: Annotated[
        list[float] | None,
        typer.Option(
            "--coefficient", "-c", callback=finite, help="A strength in place of costs, tried with both signs. Repeat."
        ),
    ] = None,
    matched: Annotated[
        float | None,
        typer.Option(callback=finite, help="The cost in nats a token at which layers and signs are compared."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="The contrast set that effects are measured on; by default the held-out part of the other."),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="A file of your own neutral texts, on which costs are measured.")
    ] = None,
    field: FieldOption = "text",
    controls: Annotated[
        int,
        typer.Option(
            min=0, max=MAX_COUNT, help="Number of random directions at each layer, with which signs are compared."
        ),
    ] = 4,
    full: Annotated[
        bool, typer.Option("--full", help="Sweep every layer at every cost, however many layers there are.")
    ] = False,
    fresh: FreshOption = False,
    model: ModelOption = "default",
    tokens: TokensOption = "all",
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find where steering works best, how it fades as strength grows, and whether the negative sign is stronger.

    Tries layers, strengths and signs without generating. The effect is how much more probable texts with the
    behavior become than texts without it; the cost is how much less probable neutral texts become.

    Of a model of many layers some are swept first, then those around the best. --full sweeps all of them.
    """
    import fgsteer as fg
    from fgsteer.evaluation.sweep.kept import PARTS_FILE
    from fgsteer.evaluation.sweep.page import write_page
    from fgsteer.evaluation.sweep.plots import save_pictures
    from fgsteer.methods import spec
    from fgsteer.storage.json_files import write_json
    from fgsteer.storage.targets import make_folder

    vectors = [fg.SteeringVector.load(path) for path in vector or []]
    if vectors and method != "caa":
        raise DataError("both", f"either --vector or --method {method}", "leave out --method: a vector has its own")
    spec(method, "sweep")
    pairs, rule = fg.load_contrast(contrast), token_rule(tokens)
    measured_on = None if held_out is None else fg.load_contrast(held_out)
    plain = None if neutral is None else documents(neutral, field)
    check_device(device, dtype)
    check_fit(dict(zip(vector or [], vectors, strict=True)), model, revision)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))

    def announce(seconds: float) -> None:
        if seconds >= SECONDS_WORTH_SAYING:
            say(f"This sweep takes about {duration(seconds)}.", err=True)

    with progress_lines("sweeping", as_json) as report:
        swept = fg.sweep(
            language_model,
            tokenizer,
            pairs,
            vectors=vectors or method,
            layers=layer,
            ce_rises=ce_rise and sorted(ce_rise),
            coefficients=coefficient and sorted(coefficient),
            matched=matched,
            held_out=measured_on,
            neutral=plain,
            controls=controls,
            tokens=rule,
            batch_tokens=batch_tokens,
            full=full,
            work=out,
            fresh=fresh,
            announce=announce,
            progress=report,
        )
    command = " ".join(map(shlex.quote, ["fgsteer", *sys.argv[1:]]))
    output = {"command": command, **swept.as_dict()}
    if out is not None:
        write_json(make_folder(out) / "sweep.json", output)
        save_pictures(swept, out)
        write_page(swept, out / "sweep.html", command)
        (out / PARTS_FILE).unlink(missing_ok=True)  # last: a command that is killed goes on from it
    show(output, as_json, lambda _: _print_sweep(swept))
    if out is not None and not as_json:
        say(f"sweep.json, the pictures and sweep.html are in {out}.")


def _print_sweep(swept: Any) -> None:
    """Print effects by layer, sign and step, then the answers and the notes."""
    from rich.table import Table

    by_cost = all(cell.target is not None for cell in swept.cells)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("layer", "sign", *(f"{step:g}" for step in swept.steps)):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = {
        (cell.layer, cell.sign, cell.step): f"{cell.effect.mean:+.3f}" + ("" if by_cost else f" ({cell.cost:.2f})")
        for cell in swept.cells
    }
    for layer, sign in dict.fromkeys((cell.layer, cell.sign) for cell in swept.cells):
        table.add_row(str(layer), f"{sign:+d}"[0], *(shown.get((layer, sign, step), "-") for step in swept.steps))
    console().print(table)
    columns = "cost in nats a token" if by_cost else "coefficient (cost in nats a token)"
    say(f"{swept.method} on {escape_text(swept.measured_on, keep='')}: effect in {swept.unit}, by {columns}\n")
    for answer in swept.answers:
        say(answer)
    for note in swept.notes:
        say(f"note: {note}")
