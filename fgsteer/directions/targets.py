"""What a model itself writes with a direction removed and added: the replies that directions are trained on.

targets = write_targets(model, tokenizer, refused, answered, direction)
logits = reply_logits(model, targets.ablated, ablate_everywhere(model, direction))
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import default_batch_tokens
from fgsteer.activations.tokens import pad
from fgsteer.data.chat import Text
from fgsteer.directions.prompts import prompt_passes
from fgsteer.directions.removal import ablate_everywhere
from fgsteer.likelihood.lower_blocks import has_plain_blocks
from fgsteer.models.hookpoints import uncompiled
from fgsteer.models.properties import check_window, eos_ids, input_device, virtual_tokens
from fgsteer.steering.entries import Steering
from fgsteer.steering.hooks import steer
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reply:
    """The token ids of a prompt, and those of a reply to it, at least one."""

    prompt: list[int]
    reply: list[int]


@dataclass(frozen=True)
class Targets:
    """The replies that a direction is trained on.

    Args:
        ablated: To refused requests, with the direction ablated.
        added: To answered requests, with the direction added, up to and with the first full stop.
        retained: To answered requests, unsteered.
    """

    ablated: list[Reply]
    added: list[Reply]
    retained: list[Reply]


@torch.no_grad()
def write_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refused: Sequence[Text],
    answered: Sequence[Text],
    direction: SteeringVector,
    reply_tokens: int,
) -> Targets:
    """The replies that the model writes greedily, of so many tokens at most; those that are retained of one fewer.

    Raises DataError for requests that are none, or do not fit the model's window with their replies.
    """
    sides = [_prompt_ids(model, tokenizer, prompts) for prompts in (refused, answered)]
    added = write_replies(model, tokenizer, sides[1], [direction.add(1.0, bos=True)], reply_tokens)
    return Targets(
        write_replies(model, tokenizer, sides[0], ablate_everywhere(model, direction), reply_tokens),
        [Reply(one.prompt, first_sentence(tokenizer, one.reply)) for one in added],
        write_replies(model, tokenizer, sides[1], None, max(1, reply_tokens - 1)),
    )


def _prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[list[int]]:
    """The token ids of prompts, in their order."""
    rows = [row for batch in prompt_passes(model, tokenizer, prompts).batches for row in batch.rows]
    return [list(row.ids) for row in sorted(rows, key=lambda row: row.index)]


def write_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    steering: Steering,
    tokens: int,
) -> list[Reply]:
    """Greedy replies to prompts, each up to and with its end-of-text token where it has one."""
    longest = max(map(len, prompts)) + tokens
    check_window(model, longest, "a request and its reply: texts")
    size = max(1, default_batch_tokens(input_device(model)) // longest)
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    ends, written = eos_ids(model), []
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        ids, mask = (part.to(input_device(model)) for part in pad(chunk, pad_id, side="left"))
        with steer(model, steering):
            output: Any = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                pad_token_id=pad_id,
            )
        for prompt, row in zip(chunk, output[:, ids.shape[1] :].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in ends), len(row) - 1)
            written.append(Reply(prompt, row[: end + 1]))
    return written


def first_sentence(tokenizer: PreTrainedTokenizerBase, reply: list[int]) -> list[int]:
    """A reply up to and with the token that has its first full stop; all of it where there is none."""
    for end in range(1, len(reply)):
        if "." in tokenizer.decode(reply[:end]):
            return reply[:end]
    return reply


def reply_logits(
    model: PreTrainedModel, replies: Sequence[Reply], steering: Steering = None
) -> list[Float[Tensor, "tokens vocabulary"]]:
    """The logits at the last token of each prompt and at every token of its reply: n + 1 rows for n tokens.

    Gradients reach the tensors of ``steering`` that require them.
    """
    rows = [[*one.prompt, *one.reply] for one in replies]
    ids, mask = (part.to(input_device(model)) for part in pad(rows, 0))
    spans = [slice(len(one.prompt) - 1, len(row)) for one, row in zip(replies, rows, strict=True)]
    first, options = 0, {}
    parameters = inspect.signature(uncompiled(model).forward).parameters
    if "logits_to_keep" in parameters and has_plain_blocks(model) and not virtual_tokens(model):
        first = min(span.start for span in spans)
        options["logits_to_keep"] = torch.arange(first, ids.shape[1], device=ids.device)
    with steer(model, steering):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    logits = logits[:, -(ids.shape[1] - first) :]  # without those of virtual tokens
    return [logits[n, span.start - first : span.stop - first] for n, span in enumerate(spans)]
