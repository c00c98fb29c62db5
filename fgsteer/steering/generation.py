"""Texts that a steered model writes.

generate(model, tokenizer, ["I think", "The sea"], steering=[vec.add(8.0), None], max_new_tokens=32)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.chat import Text, check_text
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked, describe_value
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.models.properties import check_window, context_window, input_device
from fgsteer.steering.entries import Steering, is_per_prompt
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-20, 1e20  # what float32 logits can be divided by
# the numbers among the options of generate: the least and the most that each may be, and whether it is a whole number
_OPTION_RANGES: dict[str, tuple[float, float, bool]] = {
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
    """Generate continuations of prompts, steered.

    BOS stands before a prompt once, also where its text brings it.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, or a processor that has one.
        prompts: A text, or a list of texts or of conversations, of which the assistant's last message is continued.
        steering: What ``steer`` takes: one intervention, or a ``CacheSteering``; a list of them, which compose on every
            prompt; or, where the list holds None or lists, one entry per prompt.
        per_row: Whether a list has one entry per prompt; needed for a list of as many interventions as prompts.
        **options: What ``model.generate`` takes, such as ``max_new_tokens``. Code of a repository (``custom_generate``)
            runs with ``trust_remote_code=True`` alone.

    Returns:
        The continuations, without the prompts, in their order; with ``num_return_sequences=n``, the n continuations of
        a prompt stand together.

    Raises:
        ArgumentError: The model, the tokenizer or an option is of another type.
        DataError: A prompt is no text and no conversation, is empty without a BOS, or exceeds the model's window; or
            an option is out of its range.
        SteeringError: There are other numbers of entries than prompts, or a ``CacheSteering`` meets a prompt of one
            token or a cache that is static, quantised, recurrent or switched off.
    """
    texts = parse_prompts(prompts)
    _, ids = generate_ids(model, tokenizer, texts, steering=steering, per_row=per_row, **options)
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True)) if texts else []


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    steering: Steering = None,
    per_row: bool | None = None,
    **options: Any,
) -> tuple[list[list[int]], Int[Tensor, "rows new_tokens"]]:
    """The token ids of prompts that ``parse_prompts`` has checked, and of what ``generate`` writes after each."""
    check_options(options)
    if not prompts:
        return [], torch.empty(0, 0, dtype=torch.long, device="cpu")
    per_row = is_per_prompt(steering, len(prompts), per_row)
    inputs = prompt_inputs(model, tokenizer, prompts, options.get("max_new_tokens"))
    if tokenizer.pad_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
    with steer(model, steering, per_row=per_row):
        output = model.generate(**inputs, **options)
    ids: Tensor = output if isinstance(output, Tensor) else output.sequences
    read, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    return [row[real].tolist() for row, real in zip(read, mask, strict=True)], ids[:, read.shape[1] :]


@contextmanager
def seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """A block whose random numbers begin at a seed; the caller's are left as they are."""
    check_range("seed", seed, -MAX_COUNT, MAX_COUNT, whole=True)
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def check_options(options: dict[str, Any]) -> None:
    """Raises ArgumentError, DataError for an option of ``generate`` that is out of range, or runs code unasked."""
    for name, (least, most, whole) in _OPTION_RANGES.items():
        if options.get(name) is not None:
            check_range(name, options[name], least, most, whole=whole)
    if options.get("do_sample") and options.get("temperature") is not None:
        check_range("temperature", options["temperature"], LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        options["temperature"] = float(options["temperature"])  # transformers refuses 1
    source = options.get("custom_generate")
    if isinstance(source, str) and options.get("trust_remote_code") is not True:  # transformers would ask on stdin
        raise DataError(
            f"custom_generate={source!r:.100}, which would run code from there",
            "a function of your own as custom_generate",
            "read that code, and pass trust_remote_code=True if you trust it",
        )


def prompt_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], new_tokens: object = None
) -> dict[str, Int[Tensor, "prompts tokens"]]:
    """The prompts as ``model.generate`` takes them. Raises DataError for a prompt beyond the model's window."""
    ids, mask = encode_prompts(tokenizer, prompts)
    window = context_window(model)
    if window is not None and ids.shape[1] > window:
        number = int(mask.sum(1).argmax())
        raise DataError(
            f"prompt {number} with {int(mask[number].sum())} tokens",
            f"prompts of at most {window} tokens, the model's window",
            "shorten it, or drop its beginning yourself",
        )
    if isinstance(new_tokens, int):
        what = f"prompts of up to {ids.shape[1]} tokens and {new_tokens} new ones: texts"
        check_window(model, ids.shape[1] + new_tokens, what)
    device = input_device(model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def parse_prompts(prompts: str | Sequence[Text]) -> list[Text]:
    """The prompts as a list, all of them strings or all conversations. Raises DataError."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise DataError(f"{describe_value(prompts)}", "prompts that are a text, or a list of texts or of conversations")
    texts = [check_text(prompt, f"prompt {number}", empty=True) for number, prompt in enumerate(prompts)]
    if len({isinstance(prompt, str) for prompt in texts}) > 1:
        raise DataError(
            "both texts and conversations",
            "prompts of one kind",
            "call generate once for each kind",
        )
    return texts
