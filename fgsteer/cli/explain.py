"""``fgsteer explain``: what carries a vector's effect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_fit, documents, load_model
from fgsteer.cli.options import (
    DeviceOption,
    DtypeOption,
    FieldOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    TrustOption,
)
from fgsteer.cli.printing import progress_bar, say, show
from fgsteer.cli.values import finite, seed_in_range, writable
from fgsteer.errors.limits import MAX_COUNT

PROMPTS = 16  # that ship, of which half chooses and half measures
TOP = 10  # heads and MLPs that are printed
STAGES = 6
DEFAULT_COST = 0.5


@app.command(short_help="Show which heads and MLPs carry a vector's effect.")
def explain(
    file: Annotated[Path, typer.Argument(help="A vector that fgsteer build wrote.")],
    coefficient: Annotated[
        float | None,
        typer.Option(
            "--coefficient",
            "-c",
            callback=finite,
            help="How many times the vector is added. Without it, as strongly as makes neutral text less probable by "
            f"{DEFAULT_COST} nats a token.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts; by default sixteen that ship. Half of them choose.")
    ] = None,
    field: FieldOption = "text",
    html: Annotated[
        Path | None, typer.Option(callback=writable, help="A file to write all of it to, as one HTML page.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="How many steps the integral of gradients has.")] = 10,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="How many tokens of each continuation are read.")
    ] = 12,
    seed: Annotated[int, typer.Option(callback=seed_in_range, help="The seed of the random controls.")] = 0,
    model: ModelOption = "default",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what carries a vector's effect: which heads and MLPs, what is left without them, how sparse it may be.

    Effects are integrated gradients along the vector. Circuits and sparse vectors are chosen on every other prompt and
    measured on the rest. --html writes maps and curves, and what the vector says through each head.
    """
    import fgsteer as fg
    from fgsteer.mechanisms.page import write_explanation

    vector = fg.SteeringVector.load(file)
    check_fit({file: vector}, model, revision)
    chosen = None if prompts is None else documents(prompts, field)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    vector.check(language_model)
    asked = _shipped_prompts(language_model, tokenizer) if chosen is None else chosen
    if coefficient is None:
        texts = list(fg.load_neutral()[0])[:PROMPTS]
        coefficient = fg.calibrate(language_model, tokenizer, vector.add, texts, target_ce_rise=DEFAULT_COST)
    with progress_bar("explaining", STAGES, as_json) as report:
        begun: list[str] = []

        def tell(stage: str) -> None:
            begun.append(stage)
            report(len(begun), STAGES)

        found = fg.explain(
            language_model,
            tokenizer,
            vector,
            coefficient,
            asked,
            steps=steps,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=tell,
        )
    if html is not None:
        write_explanation(html, found)
    show({**found.as_dict(), "html": None if html is None else str(html)}, as_json, lambda _: _print(found, html))


def _shipped_prompts(model: Any, tokenizer: Any) -> list[Any]:
    """Prompts that ship: a user's messages for a chat model, or openers of texts."""
    from fgsteer.data.shipped import load_bench_prompts, load_chat_prompts
    from fgsteer.models.chat import is_chat_model

    chats = is_chat_model(model, tokenizer)
    return list(load_chat_prompts() if chats else load_bench_prompts())[:PROMPTS]


def _print(found: Any, html: Path | None) -> None:
    from fgsteer.display.tables import Table

    own = found.attribution
    say(f"{found.settings['vector']}, times {found.settings['coefficient']:g}")
    say(
        f"M(src) - M(dest) = {own.difference:.4g} at {sum(own.positions)} positions of {len(own.texts)} texts; "
        f"error of completeness {own.error:.2g}; left out {own.left_out + found.held_out.left_out}"
    )
    for heading, rows in (
        ("strongest heads and MLPs", Table(own.table()[:TOP])),
        ("circuits of edges", found.edges),
        ("circuits of heads, with all MLPs", found.heads),
        ("with parts of the unsteered run", found.freezing),
        ("sparse vectors", found.sparsity),
        ("what each layer's heads write", Table(row for row in found.values if row.head is None)),
    ):
        say(f"\n{heading}")
        for line in str(rows).splitlines():
            say(f"  {line}")
    if html is not None:
        say(f"\n{html}: the page")
