"""``fgsteer generate``: continue prompts, unsteered and steered."""

from __future__ import annotations

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
from fgsteer.cli.values import finite, seed_in_range
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT


@app.command(short_help="Continue prompts, without and with steering.")
def generate(
    prompts: Annotated[list[str], typer.Argument(help="The texts to continue.")],
    vector: VectorOption = None,
    coefficient: CoefficientOption = None,
    operation: OperationOption = "add",
    scope: ScopeOption = "all",
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
        bool, typer.Option("--chat", help="Take each prompt as a user's message, which the chat model answers.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="The system message of each chat. It implies --chat.")
    ] = None,
    prefill: Annotated[
        str | None, typer.Option("--prefill", help="The text with which each answer of a chat begins.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts, without and with steering, and show both."""
    import torch

    import fgsteer as fg
    from fgsteer.steering.generation import check_options, parse_prompts

    steering = interventions(load_vectors(vector, coefficient, operation, model, revision), operation, scope)
    conversations = _conversations(prompts, system, prefill) if chat or system is not None else prompts
    if prefill is not None and conversations is prompts:
        raise DataError(
            "--prefill without --chat",
            "--prefill with --chat",
            "without a chat, write the text at the end of the prompt",
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    options |= {"temperature": temperature} if temperature > 0 else {}
    check_options(options)
    parse_prompts(conversations)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))

    def run(entries: Any) -> list[str]:
        torch.manual_seed(seed)
        texts: list[str] = fg.generate(language_model, tokenizer, conversations, steering=entries, **options)
        return texts

    result: dict[str, Any] = {"prompts": prompts, "unsteered": run(None)}
    if steering:
        result["steered"] = run([steering] * len(prompts))
    if conversations is not prompts:
        result |= {"system": system, "prefill": prefill}
    show(result, as_json, _print_texts)


def _conversations(prompts: list[str], system: str | None, prefill: str | None) -> list[list[dict[str, str]]]:
    """Each prompt as a user's message, after the system message and before the beginning of the answer, if any."""
    before = [] if system is None else [{"role": "system", "content": system}]
    after = [] if prefill is None else [{"role": "assistant", "content": prefill}]
    return [[*before, {"role": "user", "content": prompt}, *after] for prompt in prompts]


def _print_texts(result: dict[str, Any]) -> None:
    from rich.text import Text

    screen = console()
    chat = "prefill" in result
    for number, prompt in enumerate(result["prompts"]):
        if chat:
            screen.print(Text.assemble(("user: ", "dim"), prompt))
        before = (result["prefill"] or "") if chat else prompt
        for name in ("unsteered", "steered"):
            if name in result:
                screen.print(Text.assemble((f"{name}: ", "dim"), before, (result[name][number], "bold")))
