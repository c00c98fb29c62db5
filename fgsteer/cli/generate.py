"""``fgsteer generate``: continue prompts, unsteered and steered."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, interventions, load_model, load_vectors
from fgsteer.cli.options import (
    SEEDS,
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
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    vector: VectorOption = None,
    coefficient: CoefficientOption = None,
    operation: OperationOption = "add",
    scope: ScopeOption = "all",
    model: ModelOption = "default",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Tokens to generate.")] = 48,
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
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))

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
