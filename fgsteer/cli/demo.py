"""The main job on the embedded default, in under a minute: ``fgsteer demo``.

For each concept: vectors by CAA, ACE, STA and FGAA (through decoder rows and through
effects), their strengths matched by what they cost neutral text, one continuation each
beside the unsteered one, and the features that the two SAE methods chose.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fgsteer as fg
from fgsteer.cli.app import app
from fgsteer.cli.options import JsonOption
from fgsteer.cli.printing import console
from fgsteer.cli.printing import show as show_result

if TYPE_CHECKING:
    from rich.console import Console

    from fgsteer.features.description import FeatureRow
    from fgsteer.interventions import Intervention

CONCEPTS = ("love", "wedding")
METHODS = ("caa", "ace", "sta", "fgaa", "fgaa_effects")
EFFECTS = {"mu": 0.1, "bias_weight": 0.0}  # of the projection through effects
CE_RISE = 0.3  # nats per token of neutral text that every method is allowed to cost


@app.command(short_help="Steer the embedded default towards two concepts.")
def demo(
    concepts: Annotated[list[str] | None, typer.Argument(help="Shipped concepts; two by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Steer the embedded default towards two concepts by four methods, side by side."""
    result = run(console(), concepts or CONCEPTS, as_json=as_json)
    show_result(result, as_json, lambda _: None)


@dataclass(frozen=True)
class ConceptDemo:
    """What the demo shows of one concept."""

    concept: str
    prompt: str
    coefficients: dict[str, float]
    texts: dict[str, list[str]]
    features: Mapping[str, Sequence[FeatureRow]]


def run_concept(
    concept: str,
    parts: tuple[Any, Any, fg.SAE, fg.EffectApproximator],
    prompts: Sequence[str],
    *,
    ce_rise: float = CE_RISE,
    seed: int = 0,
) -> ConceptDemo:
    """Build, calibrate and apply every method for one concept."""
    import torch

    model, tokenizer, sae, effects = parts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.SelectionWarning)  # 40 sentences a side: said in the footer
        stats = fg.collect(model, tokenizer, fg.load_contrast(concept), sae=sae)
        vectors, makers = build_vectors(stats, sae, effects)
    neutral, _ = fg.load_neutral()
    coefficients = {
        name: fg.calibrate(model, tokenizer, make, neutral[:24], target_ce_rise=ce_rise)
        for name, make in makers.items()
    }
    steering = [None, *(makers[name](coefficients[name]) for name in METHODS)]
    texts: dict[str, list[str]] = {name: [] for name in ("unsteered", *METHODS)}
    for prompt in prompts:
        torch.manual_seed(seed)
        outputs = fg.generate(
            model,
            tokenizer,
            [prompt] * len(steering),
            steering=steering,
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
        for name, text in zip(texts, outputs, strict=True):
            texts[name].append(prompt + " ".join(text.replace("\n", " ").split(" ")))
    features = {name: fg.describe_features(model, tokenizer, sae, vectors[name], top=5) for name in ("sta", "fgaa")}
    return ConceptDemo(concept, prompts[0], coefficients, texts, features)


def show_concept(demo: ConceptDemo, screen: Console) -> None:
    """Print one concept: texts by method, then the features."""
    from rich.table import Table
    from rich.text import Text

    screen.print(Text(f"\n{demo.concept.upper()}", style="bold"))
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=True, header_style="dim")
    table.add_column("method", no_wrap=True)
    table.add_column("strength", justify="right", no_wrap=True)
    table.add_column("text")
    for name, lines in demo.texts.items():
        strength = f"{demo.coefficients[name]:.2f}" if name in demo.coefficients else "-"
        for number, line in enumerate(lines):
            table.add_row(Text(name if not number else ""), strength if not number else "", Text(line))
    screen.print(table)
    for name, rows in demo.features.items():
        screen.print(Text(f"\n{name} chose, strongest first:", style="dim"))
        listing = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for heading, justify in (("feature", "right"), ("weight", "right"), ("density", "right"), ("raises", "left")):
            listing.add_column(heading, justify=justify, no_wrap=heading != "raises")  # type: ignore[arg-type]
        for row in rows:
            density = f"{row.density:.2%}" if row.density is not None else "?"
            listing.add_row(str(row.id), f"{row.weight:.3f}", density, Text(" ".join(row.tokens)))
        screen.print(listing)


def run(screen: Console, concepts: Sequence[str] = CONCEPTS, *, as_json: bool = False) -> list[dict[str, Any]]:
    """The whole demo; returns it as plain JSON."""
    began = time.perf_counter()
    model, tokenizer = fg.load_model("default")
    sae, effects = fg.load_sae("default"), fg.load_effects("default")
    prompts = ["The next day", "I think"]
    if not as_json:
        screen.print(
            f"The embedded default: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
            f"{sae.d_sae} features at {sae.hookpoint}. Every method costs neutral text {CE_RISE} nats "
            "a token; strength multiplies the unit vector (for ace it is alpha)."
        )
    shown = []
    for concept in concepts:
        result = run_concept(concept, (model, tokenizer, sae, effects), prompts)
        if not as_json:
            show_concept(result, screen)
        shown.append(
            {
                "concept": concept,
                "coefficients": result.coefficients,
                "texts": result.texts,
                "features": {name: [row.as_dict() for row in rows] for name, rows in result.features.items()},
            }
        )
    if not as_json:
        took = time.perf_counter() - began
        screen.print(
            f"\nVectors from 40 sentences a side (STA's frequencies are coarse below 80). {took:.0f} s.", style="dim"
        )
    return shown


def build_vectors(
    stats: fg.ContrastStatistics, sae: fg.SAE, effects: fg.EffectApproximator
) -> tuple[dict[str, fg.SteeringVector], dict[str, Callable[[float], Intervention]]]:
    """Build the vector of every method by its name, and the functions from a strength to its intervention.

    Only the methods that need effects get them.
    """
    from fgsteer.methods import spec

    vectors, makers = {}, {}
    for name in METHODS:
        method = spec(name)
        through = {"effects": effects, **EFFECTS} if method.needs == "effects" else {}
        vectors[name] = method.build(stats=stats, sae=sae, **through)
        makers[name] = method.maker(vectors[name])
    return vectors, makers
