"""``fgsteer generate``: continue prompts, or answer them in a chat, unsteered and steered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import (
    ModelOptions,
    interventions,
    load_model,
    load_sae,
    load_steering_file,
    load_vector_files,
    note_default_strength,
)
from fgsteer.cli.options import (
    SCOPE_HELP,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OperationOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    TrustOption,
    VectorOption,
)
from fgsteer.cli.printing import console, say, show
from fgsteer.cli.strengths import DEFAULT_COST, describe_strength, given_strengths
from fgsteer.cli.values import finite, present_scope, seed_in_range, traced_to, whole_numbers
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT


@app.command(short_help="Continue or answer prompts, without and with steering.")
def generate(
    prompts: Annotated[list[str], typer.Argument(help="The texts to continue, or the messages to answer.")],
    vector: VectorOption = None,
    coefficient: Annotated[
        list[str] | None,
        typer.Option(
            "--coefficient",
            "-c",
            help="The strength of a vector: add's coefficient, affine's alpha or clamp's target; repeat for several "
            "vectors, in the same order. -c 1,2,4 shows several strengths of a vector one below the other. Without -c, "
            "--cost finds one.",
        ),
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option(
            "--cost",
            callback=finite,
            help="Find the strength of the vector that makes neutral text less probable by so many nats a token. "
            f"Without it and without -c it is {DEFAULT_COST}; at 0.1 a vector does little, and at 1 the language "
            "suffers.",
        ),
    ] = None,
    operation: OperationOption = "add",
    steering_file: Annotated[
        Path | None,
        typer.Option(
            "--steering",
            help="A file of fg.save_steering: interventions of every kind with their strengths, scopes and gates. They "
            "act after those of the vectors. --sae and --sae-id name the SAE whose features it reads or changes.",
        ),
    ] = None,
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    scope: Annotated[
        str | None,
        typer.Option(
            "--scope",
            autocompletion=completion("scopes"),
            callback=present_scope,
            help=f"{SCOPE_HELP} By default reply in a chat, whose question is then read as it is, and otherwise all.",
        ),
    ] = None,
    model: ModelOption = "default",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="How many tokens to generate.")] = 48,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, callback=finite, help="The temperature of sampling. At 0 the most probable token is taken."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(callback=seed_in_range, help="The seed of sampling.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Whether each prompt is a user's message, which the model answers, or a text, which it continues. By "
            "default a chat model answers.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="The system message of each chat. It implies --chat.")
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option("--prefill", help="The text with which each answer of a chat begins. It implies --chat."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            callback=traced_to,
            help="A file for what steering did to each token: trace.html, a page, or trace.json, numbers. It shows "
            "features of the SAE of --sae and --sae-id, by default of the one that ships with the model.",
        ),
    ] = None,
    trace_features: Annotated[
        str,
        typer.Option(
            "--trace-features",
            help="The features that --trace shows, such as 12,40. By default the eight that change most.",
        ),
    ] = "",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts, or answer them in a chat, without and with steering, and show both."""
    from fgsteer.likelihood.strengths import StrengthMeter
    from fgsteer.models.chat import is_chat_model
    from fgsteer.steering.generation import check_options, parse_prompts

    strengths = given_strengths(coefficient or [], vector or [], operation, cost)
    vectors = load_vector_files(vector or [], model, revision)
    saved = [] if steering_file is None else load_steering_file(steering_file, sae, sae_id, model)
    if saved and not vectors and (operation != "add" or scope is not None):
        raise DataError(
            "--op or --scope with --steering and no vector",
            "neither, as the file says what its interventions do, and where",
            "leave them out, or name a vector with -v that they are for",
        )
    if saved and not vectors:
        strengths = [()]  # all that steers has its strength
    traced_sae, features = _traced_features(trace, trace_features, sae, sae_id, model, len(strengths))
    if strengths and not coefficient:
        note_default_strength(vectors, operation)

    def steering(*strength: float) -> list[Any]:
        return [*interventions(list(zip(vectors, strength, strict=True)), operation, scope or "all"), *saved]

    steering(*(strengths[0] if strengths else (1.0,) * len(vectors)))  # refuses what cannot be made
    chat = _asks_for_chat(chat, system, prefill)
    conversations = _conversations(prompts, system, prefill)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    options |= {"temperature": temperature} if temperature > 0 else {}
    check_options(options)
    parse_prompts(conversations if chat else prompts)
    parts = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    chats = is_chat_model(*parts) if chat is None else chat
    if chats and chat is None:
        say("note: A chat model answers each prompt as a user's message; --no-chat continues it as a text.", err=True)
    scope = scope or ("reply" if chats else "all")
    strength_found = None
    if vectors and not strengths:
        meter = StrengthMeter(*parts, vectors[0], lambda c: steering(c)[0], chat=chats)
        strength_found = meter.find(DEFAULT_COST if cost is None else cost).as_dict()
        strengths = [(strength_found["coefficient"],)]

    asked = (*parts, conversations if chats else prompts)
    entries = [steering(*strength) for strength in strengths]
    if trace is None:
        unsteered, *texts = [_write(asked, items, seed, options) for items in (None, *entries)]
    else:
        items = entries[0] if entries else []
        unsteered, *texts = _write_traced(trace, asked, items, traced_sae, features, seed, options)[: len(entries) + 1]
    result: dict[str, Any] = {"prompts": prompts, "unsteered": unsteered}
    result |= {"steered": texts[0]} if len(texts) == 1 else {}
    rows = [{"coefficients": list(c), "texts": t} for c, t in zip(strengths, texts, strict=True)]
    result |= {"strengths": rows, "found": strength_found} if strengths else {}
    result |= {"scope": scope} if vectors else {}
    result |= {"system": system, "prefill": prefill} if chats else {}
    result |= {"trace": str(trace)} if trace else {}
    show(result, as_json, _print_texts)


def _write(asked: tuple[Any, ...], items: list[Any] | None, seed: int, options: dict[str, Any]) -> list[str]:
    """The continuations under some interventions of what is asked: a model, its tokenizer, and prompts."""
    import torch

    import fgsteer as fg

    torch.manual_seed(seed)
    texts: list[str] = fg.generate(*asked, steering=None if items is None else [items] * len(asked[2]), **options)
    return texts


def _write_traced(
    path: Path, asked: tuple[Any, ...], items: list[Any], sae: Any, features: Any, seed: int, options: dict[str, Any]
) -> list[list[str]]:
    """The same texts, unsteered and steered, whose trace is written to a file."""
    import fgsteer as fg

    model, tokenizer, prompts = asked
    found = fg.trace(model, tokenizer, prompts, items, sae=sae, features=features, seed=seed, **options)
    found.write(path)
    return [[t.completion for t in found.texts if t.source == source] for source in ("unsteered", "steered")]


def _traced_features(
    trace: Path | None, features: str, sae: str | None, sae_id: str | None, model: str, strengths: int
) -> tuple[Any, list[int] | None]:
    """The SAE and the features of a trace, None where they are not named. Raises DataError."""
    if trace is None:
        if features:
            raise DataError("--trace-features without --trace", "both", "add --trace trace.html, or leave it out")
        return None, None
    if strengths > 1:
        raise DataError(
            f"--trace with {strengths} strengths", "one strength, which is traced", "pass one number after -c"
        )
    from fgsteer.models.shipped import find_shipped

    numbers = whole_numbers(features, "--trace-features") or None
    if sae is None and sae_id is None and find_shipped(model) is None:
        if numbers:
            raise DataError("--trace-features without --sae", "the SAE whose features they are", "add --sae")
        return None, None
    return load_sae(sae, sae_id, model), numbers


def _asks_for_chat(chat: bool | None, system: str | None, prefill: str | None) -> bool | None:
    """Whether the options ask for a chat; None where they leave it to the model. Raises DataError."""
    messages = [name for name, text in (("--system", system), ("--prefill", prefill)) if text is not None]
    if chat is False and messages:
        raise DataError(
            f"{messages[0]} with --no-chat", f"{messages[0]} with --chat", "without a chat, write it into the prompt"
        )
    return True if messages else chat


def _conversations(prompts: list[str], system: str | None, prefill: str | None) -> list[list[dict[str, str]]]:
    """Each prompt as a user's message, after the system message and before the beginning of the answer, if any."""
    before = [] if system is None else [{"role": "system", "content": system}]
    after = [] if prefill is None else [{"role": "assistant", "content": prefill}]
    return [[*before, {"role": "user", "content": prompt}, *after] for prompt in prompts]


def _print_texts(result: dict[str, Any]) -> None:
    from rich.text import Text

    screen = console()
    chat, rows = "prefill" in result, result.get("strengths", [])
    if result.get("found"):
        say(f"Strength found: {describe_strength(result['found'])}")
    labels = ["steered"] if len(rows) == 1 else [f"-c {' -c '.join(f'{c:g}' for c in r['coefficients'])}" for r in rows]
    for number, prompt in enumerate(result["prompts"]):
        if chat:
            screen.print(Text.assemble(("user: ", "dim"), prompt))
        before = (result["prefill"] or "") if chat else prompt
        texts = [("unsteered", result["unsteered"]), *zip(labels, (row["texts"] for row in rows), strict=True)]
        for name, of_prompts in texts:
            screen.print(Text.assemble((f"{name}: ", "dim"), before, (of_prompts[number], "bold")))
