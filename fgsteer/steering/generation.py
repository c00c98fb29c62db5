"""Texts that a steered model writes.

generate(model, tokenizer, ["I think", "The sea"], steering=[vec.add(8.0), None], max_new_tokens=32)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.chat import Text, check_text
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import MAX_COUNT, check_range, checked, describe_value
from fgsteer.errors.wording import count
from fgsteer.interventions import Intervention
from fgsteer.models.properties import check_window, context_window, input_device
from fgsteer.steering.hooks import Steering, steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-20, 1e20  # that logits can be divided by in float32
# numbers among the options of generate: the least and the most that they may be, and whether they are whole
_NUMBERS: dict[str, tuple[float, float, bool]] = {
    "max_new_tokens": (1, MAX_COUNT, True),
    "min_new_tokens": (0, MAX_COUNT, True),
    "num_return_sequences": (1, MAX_COUNT, True),
    "num_beams": (1, MAX_COUNT, True),
    "top_k": (0, MAX_COUNT, True),
    "temperature": (0, HIGHEST_TEMPERATURE, False),
    "top_p": (0, 1, False),
}


@checked
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[Text],
    *,
    steering: Steering = None,
    per_row: bool | None = None,
    **options: Any,
) -> list[str]:
    """Continuations of the prompts, without the prompts, in their order.

    ``steering`` means what it means to ``steer``: one intervention, a list of them that compose on every
    prompt, or, where a list holds None or lists, one entry per prompt (an intervention, a list to
    compose, or None). ``per_row`` says outright which; a list of as many interventions as prompts
    could be either and needs it. Prompts are strings or conversations, of which the assistant's last message is
    continued; other keywords go to ``model.generate``, code of a repository (``custom_generate``) with
    ``trust_remote_code=True`` alone. With ``num_return_sequences = n`` the n
    continuations of a prompt stand together. BOS stands before a prompt once, also where its text brings it.
    Raises ArgumentError for a model or tokenizer of another type, DataError for prompts that are neither,
    empty ones without a BOS and ones beyond the model's window, and for a number among the options that is
    out of its range, SteeringError for another number of entries than prompts.
    """
    check_options(options)
    given = listed_prompts(prompts)
    if not given:
        return []
    per_row = by_prompt(steering, len(given), per_row)
    inputs = prompt_inputs(model, tokenizer, given, options.get("max_new_tokens"))
    if tokenizer.pad_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
    with steer(model, steering, per_row=per_row):
        output = model.generate(**inputs, **options)
    ids = output if isinstance(output, Tensor) else output.sequences
    return list(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def check_options(options: dict[str, Any]) -> None:
    """Raises ArgumentError, DataError for an option of ``generate`` that is out of range, or runs code unasked."""
    for name, (least, most, whole) in _NUMBERS.items():
        if options.get(name) is not None:
            check_range(name, options[name], least, most, whole=whole)
    if options.get("do_sample") and options.get("temperature") is not None:
        check_range("temperature", options["temperature"], LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        options["temperature"] = float(options["temperature"])  # transformers refuses 1
    source = options.get("custom_generate")
    if isinstance(source, str) and options.get("trust_remote_code") is not True:  # transformers would ask on stdin
        raise DataError(
            f"custom_generate {source!r:.100}, which would run code from there",
            "a function of your own",
            "read that code, and where you trust it pass trust_remote_code=True",
        )


def prompt_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], new_tokens: object = None
) -> dict[str, Int[Tensor, "prompts tokens"]]:
    """What ``model.generate`` takes, on the model's device. Raises DataError for a prompt beyond the window."""
    ids, mask = encode_prompts(tokenizer, prompts)
    window = context_window(model)
    if window is not None and ids.shape[1] > window:
        number = int(mask.sum(1).argmax())
        raise DataError(
            f"prompt {number} has {int(mask[number].sum())} tokens",
            f"at most {window}, the model's window",
            "shorten it, or drop its beginning yourself",
        )
    if isinstance(new_tokens, int):
        what = f"prompts of up to {ids.shape[1]} tokens and {new_tokens} new ones: texts"
        check_window(model, ids.shape[1] + new_tokens, what)
    device = input_device(model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def listed_prompts(prompts: str | Sequence[Text]) -> list[Text]:
    """The prompts, all of them strings or all conversations. Raises DataError."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise DataError(f"prompts is {describe_value(prompts)}", "a text, or a list of texts or of conversations")
    given = [check_text(prompt, f"prompt {number}", empty=True) for number, prompt in enumerate(prompts)]
    if len({isinstance(prompt, str) for prompt in given}) > 1:
        raise DataError("strings and chat messages among the prompts", "all of one kind")
    return given


def by_prompt(steering: Steering, prompts: int, per_row: bool | None) -> bool | None:
    """Whether a list of steering has an entry for each prompt; as ``steer`` reads it. Raises SteeringError."""
    if not isinstance(steering, list | tuple):
        return None
    flat = all(isinstance(entry, Intervention) for entry in steering)
    if per_row is None and flat and len(steering) == prompts > 1:
        raise SteeringError(
            f"a list of {len(steering)} interventions for {prompts} prompts",
            "a list that says whether every prompt gets all of them or one each",
            "pass per_row=False to apply all of them to every prompt, per_row=True for one a prompt",
        )
    by_row = not flat if per_row is None else per_row
    if by_row and len(steering) != prompts:
        raise SteeringError(
            f"{count(len(steering), 'steering entry')} for {count(prompts, 'prompt')}",
            "one entry per prompt",
            "wrap interventions that compose in a list of their own: [[a, b], None, …]",
        )
    return by_row
