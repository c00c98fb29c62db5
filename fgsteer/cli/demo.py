"""The main job on a real model, within a minute or two: ``fgsteer demo``.

For each concept: vectors by CAA, ACE, STA and FGAA (through decoder rows and, where effects were measured, through
them), their strengths matched by what they cost neutral text, the same prompts continued and the same question answered
by each beside the unsteered model, and the features that the two SAE methods chose.
"""

from __future__ import annotations

import math
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fgsteer as fg
from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, load_model, load_sae
from fgsteer.cli.options import JsonOption, SaeIdOption, SaeOption
from fgsteer.cli.printing import console, say
from fgsteer.cli.printing import show as show_result
from fgsteer.errors import DataError, FgsteerError

if TYPE_CHECKING:
    from rich.console import Console

    from fgsteer.features.description import FeatureRow
    from fgsteer.interventions import Intervention

REAL, EMBEDDED = "smollm2", "default"  # the model that is shown where it is installed, and the one that always is
CONCEPTS = ("love", "wedding")  # of a model that chats, which takes longer, the second alone
METHODS = ("caa", "ace", "sta", "fgaa", "fgaa_effects")
CE_RISE = 0.5  # nats per token of neutral text that every method is allowed to cost: the rule of SAE-TS
TOLERANCE = 0.15  # of that cost
LEAST_DOSE = 1e-3  # of the activations' norm: a search that ends below found a cost at strength 0 already
PROMPTS = ("The next day", "I think")
QUESTION = "What did you do yesterday?"
NEW_TOKENS = 32
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


@app.command(short_help="Steer a model towards concepts by several methods.")
def demo(
    concepts: Annotated[
        list[str] | None,
        typer.Argument(help="Shipped concepts. By default wedding, and love too where the model does not chat."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f'The model, with its SAE: a name or path, as in other commands. By default "{REAL}" where it is '
            f'installed, and otherwise "{EMBEDDED}", the small embedded one.',
        ),
    ] = None,
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    as_json: JsonOption = False,
) -> None:
    """Steer a model towards concepts by several methods, side by side, as a text and in a chat."""
    if model is None and (sae is not None or sae_id is not None):
        raise DataError("an SAE without --model", "the model that it was trained on", "name it with --model")
    result = run(console(), concepts, model=model, sae=sae, sae_id=sae_id, as_json=as_json)
    show_result(result, as_json, lambda _: None)


@dataclass(frozen=True)
class Parts:
    """What the demo runs on: model, tokenizer, SAE and, where they were measured, effects; and how commands name it."""

    model: Any
    tokenizer: Any
    sae: fg.SAE
    effects: fg.EffectApproximator | None
    chats: bool
    model_option: str
    sae_options: str


@dataclass(frozen=True)
class ConceptDemo:
    """What the demo shows of one concept: by method, coefficients, continuations of the prompts, and answers."""

    concept: str
    coefficients: dict[str, float]
    texts: dict[str, list[str]]
    answers: dict[str, str]
    features: Mapping[str, Sequence[FeatureRow]]


def run(
    screen: Console,
    concepts: Sequence[str] | None = None,
    *,
    model: str | None = None,
    sae: str | None = None,
    sae_id: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """The whole demo; returns it as plain JSON."""
    began = time.perf_counter()
    parts = load_parts(model, sae, sae_id)
    concepts = concepts or (CONCEPTS[1:] if parts.chats else CONCEPTS)
    if not as_json:
        show_parts(parts, screen)
    shown = []
    for concept in concepts:
        result = run_concept(concept, parts)
        if not as_json:
            show_concept(result, screen)
        shown.append(
            {
                "concept": concept,
                "coefficients": result.coefficients,
                "texts": result.texts,
                "answers": result.answers,
                "features": {name: [row.as_dict() for row in rows] for name, rows in result.features.items()},
            }
        )
    if not as_json:
        took = time.perf_counter() - began
        screen.print(
            f"\nVectors from 40 sentences a side (STA's frequencies are coarse below 80). {took:.0f} s.", style="dim"
        )
        screen.print("\nNext, by hand:", *next_commands(concepts[0], parts), sep="\n", soft_wrap=True)
    return shown


def load_parts(model: str | None, sae: str | None, sae_id: str | None) -> Parts:
    """Load model, SAE and effects; without a name the real model, or the embedded one with a note that says why."""
    from fgsteer.models.chat import is_chat_model

    if model is None:
        try:
            return load_parts(REAL, None, None)
        except (FgsteerError, OSError) as error:
            say(f"note: The embedded model is shown, as {REAL} cannot be loaded. {error}", err=True)
            return load_parts(EMBEDDED, None, None)
    autoencoder = load_sae(sae, sae_id, model)
    language_model, tokenizer = load_model(ModelOptions(model))
    effects = None
    if sae is None:
        try:
            effects = fg.load_effects(model, sae_id).check(autoencoder)
        except FgsteerError:  # none were measured on this SAE
            effects = None
    chats = is_chat_model(language_model, tokenizer)
    sae_options = "".join(f" {option} {shlex.quote(v)}" for option, v in (("--sae", sae), ("--sae-id", sae_id)) if v)
    return Parts(language_model, tokenizer, autoencoder, effects, chats, f" -m {shlex.quote(model)}", sae_options)


def run_concept(concept: str, parts: Parts, *, ce_rise: float = CE_RISE, seed: int = 0) -> ConceptDemo:
    """Build, calibrate and apply every method for one concept."""
    model, tokenizer, sae = parts.model, parts.tokenizer, parts.sae
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.SelectionWarning)  # 40 sentences a side: said in the footer
        stats = fg.collect(model, tokenizer, fg.load_contrast(concept), sae=sae)
        vectors, makers = build_vectors(stats, sae, parts.effects)
    steering = calibrated(parts, vectors, makers, ce_rise)
    names = ["unsteered", *steering]
    items = [None, *(item for _, item in steering.values())]
    texts = sample(parts, PROMPTS, items, seed)
    answers = sample(parts, [[{"role": "user", "content": QUESTION}]], items, seed) if parts.chats else []
    features = {name: fg.describe_features(model, tokenizer, sae, vectors[name], top=5) for name in ("sta", "fgaa")}
    return ConceptDemo(
        concept,
        {name: coefficient for name, (coefficient, _) in steering.items()},
        {name: [prompt + text for prompt, text in zip(PROMPTS, texts[n], strict=True)] for n, name in enumerate(names)},
        {name: answer for name, (answer,) in zip(names, answers, strict=False)},
        features,
    )


def build_vectors(
    stats: fg.ContrastStatistics, sae: fg.SAE, effects: fg.EffectApproximator | None
) -> tuple[dict[str, fg.SteeringVector], dict[str, Callable[[float], Intervention]]]:
    """Build the vector of every method by its name, and the functions from a strength to its intervention.

    Only the methods that need effects get them, and are left out where there are none.
    """
    from fgsteer.methods import spec

    vectors, makers = {}, {}
    for name in METHODS:
        method = spec(name)
        if method.needs == "effects" and effects is None:
            continue
        through = {"effects": effects} if method.needs == "effects" else {}
        vectors[name] = method.build(stats=stats, sae=sae, **through)
        makers[name] = method.maker(vectors[name])
    return vectors, makers


def calibrated(
    parts: Parts,
    vectors: Mapping[str, fg.SteeringVector],
    makers: Mapping[str, Callable[[float], Intervention]],
    ce_rise: float,
) -> dict[str, tuple[float, Intervention]]:
    """The strength of each method that costs neutral text ``ce_rise`` nats a token, and its intervention there.

    All steer from the last token of a prompt on, and so leave alone the first token of a text, whose activations are
    in many models some hundred times the others'. Of a model that chats, one of the texts is a reply. Strengths are
    searched in units of the activations' norm, from the same first guess for all; a method that costs too much at
    every strength, or too little, is left out.
    """
    from fgsteer.likelihood.strengths import FIRST_GUESS, StrengthMeter, neutral_texts
    from fgsteer.methods import spec

    meter = StrengthMeter(parts.model, parts.tokenizer, vectors["caa"], makers["caa"], chat=False)
    norms = {name: 1.0 if spec(name).unit else vectors[name].norm for name in makers}
    units = {name: meter.activation_norm / norm for name, norm in norms.items()}

    def at_dose(name: str) -> Callable[[float], Intervention]:
        return lambda dose: replace(makers[name](dose * units[name]), scope="reply")

    doses = fg.calibrate_many(
        parts.model,
        parts.tokenizer,
        [at_dose(name) for name in makers],
        [meter.texts[0], neutral_texts(chat=parts.chats)[1]],
        target_ce_rise=ce_rise,
        start=FIRST_GUESS,
        tolerance=TOLERANCE,
    )
    found = {name: dose for name, dose in zip(makers, doses, strict=True) if LEAST_DOSE < dose < math.inf}
    return {name: (dose * units[name], at_dose(name)(dose)) for name, dose in found.items()}


def sample(parts: Parts, prompts: Sequence[Any], steering: Sequence[Intervention | None], seed: int) -> list[list[str]]:
    """One continuation of each prompt under each entry of ``steering``, in one batch, without line breaks."""
    import torch

    torch.manual_seed(seed)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS if isinstance(prompts[0], str) else None}
    entries = [[] if item is None else [item] for item in steering for _ in prompts]
    rows = list(prompts) * len(steering)
    texts = fg.generate(parts.model, parts.tokenizer, rows, steering=entries, per_row=True, **SAMPLING, **length)
    lines = [text.replace("\n", " ") for text in texts]
    return [lines[start : start + len(prompts)] for start in range(0, len(lines), len(prompts))]


def show_parts(parts: Parts, screen: Console) -> None:
    """Print what is steered."""
    size = sum(p.numel() for p in parts.model.parameters()) / 1e6
    screen.print(
        f"{parts.sae.model_name or parts.model_option.removeprefix(' -m ')}: {size:.1f} M parameters, "
        f"{parts.sae.d_sae} features at {parts.sae.hookpoint}. Every method costs neutral text {CE_RISE} nats a token; "
        "strength multiplies the unit vector (for ace it is alpha)."
    )


def show_concept(demo: ConceptDemo, screen: Console) -> None:
    """Print one concept: texts by method, answers by method, then the features."""
    from rich.text import Text

    screen.print(Text(f"\n{demo.concept.upper()}", style="bold"))
    table = _table(("method", "left"), ("strength", "right"), ("text", "left"))
    for name, lines in demo.texts.items():
        strength = f"{demo.coefficients[name]:.2f}" if name in demo.coefficients else "-"
        for number, line in enumerate(lines):
            table.add_row(Text(name if not number else ""), strength if not number else "", Text(line))
    screen.print(table)
    if demo.answers:
        screen.print(Text(f"\n{QUESTION}", style="bold"))
        table = _table(("method", "left"), ("reply in a chat, steered from its first word on", "left"))
        for name, answer in demo.answers.items():
            table.add_row(Text(name), Text(answer))
        screen.print(table)
    for name, rows in demo.features.items():
        screen.print(Text(f"\n{name} chose, strongest first:", style="dim"))
        table = _table(
            ("feature", "right"), ("weight", "right"), ("fires on", "right"), ("label", "left"), ("raises", "left")
        )
        for row in rows:
            density = f"{row.density:.2%}" if row.density is not None else "?"
            label, raises = Text(row.label or "-"), Text(" ".join(row.tokens))
            table.add_row(str(row.id), f"{row.weight:.3f}", density, label, raises)
        screen.print(table)


def _table(*columns: tuple[str, Any]) -> Any:
    """A table with these headings, in which texts wrap and numbers do not."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for heading, justify in columns:
        table.add_column(heading, justify=justify, no_wrap=justify == "right" or heading == "method")
    return table


def next_commands(concept: str, parts: Parts) -> list[str]:
    """Three commands that go on from here, as they can be pasted."""
    prompt = QUESTION if parts.chats else PROMPTS[0]
    stats, vector = shlex.quote(f"{concept}-stats.safetensors"), shlex.quote(f"{concept}.safetensors")
    return [
        f"fgsteer collect {shlex.quote(concept)}{parts.model_option}{parts.sae_options} -o {stats}",
        f"fgsteer build fgaa --stats {stats}{parts.sae_options} -o {vector}",
        f"fgsteer generate {shlex.quote(prompt)}{parts.model_option} -v {vector}",
    ]
