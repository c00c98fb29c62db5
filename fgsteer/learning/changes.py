"""What an instruction changes: activations of the same answer with it and without it, token by token.

found = answer_changes(model, tokenizer, [("Hello.", "Speak as a pirate. Hello.", "Ahoy!")], [Hookpoint(6)])
found.activations[Hookpoint(6)][0], found.changes[Hookpoint(6)][0]          each (tokens of the answer, d_model)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import batch_rows, record_batch, tokens_in_batch
from fgsteer.activations.tokens import TokenReader, TokenRow
from fgsteer.data.chat import Text
from fgsteer.errors import DataError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.properties import context_window, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[Text, Text]  # (prompt, answer)
AnswerActivations = dict[Hookpoint, list[Float[Tensor, "tokens d_model"]]]  # of each text, in its order


@dataclass(frozen=True, eq=False)
class AnswerChanges:
    """Activations of answers' tokens, and what an instruction would change them by.

    Args:
        activations: h, after the plain prompt, by hookpoint and text.
        changes: Δ, by hookpoint and text; empty where no instructed prompt is known.
    """

    activations: AnswerActivations
    changes: AnswerActivations


def answer_changes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[Text, Text | None, Text]],
    hookpoints: Sequence[Hookpoint],
    batch_tokens: int | None = None,
) -> AnswerChanges:
    """Record ``Δ_ℓ = h_ℓ(x′ y′) − h_ℓ(x y′)`` on the tokens of y′, and of several hookpoints what each adds to it.

    At the first hookpoint Δ is the change that has accumulated up to there. At each later one it is the local change,
    the accumulated change less that of the hookpoint before, so that all of them add up to the last one's.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        examples: (x, x′, y′): a prompt, the same with an instruction or None, and an answer.
        hookpoints: Where, from below upwards.
        batch_tokens: The tokens in a pass, with padding.

    Raises:
        DataError: An answer has no token, or others after one of its prompts than after the other.
    """
    ids, plain = answer_activations(model, tokenizer, [(x, y) for x, _, y in examples], hookpoints, batch_tokens)
    if any(instructed is None for _, instructed, _ in examples):
        return AnswerChanges(plain, {})
    pairs = [("" if instructed is None else instructed, y) for _, instructed, y in examples]
    instructed_ids, instructed_acts = answer_activations(model, tokenizer, pairs, hookpoints, batch_tokens)
    for number, (own, other) in enumerate(zip(ids, instructed_ids, strict=True)):
        if own != other:
            raise DataError(
                f"example {number}, whose answer has other tokens after the instructed prompt than after the plain one",
                "an answer of the same tokens, as activations are compared token by token",
                "end both prompts with the same character, and shorten texts that the model's window cuts",
            )
    accumulated = {
        at: [a.float() - b.float() for a, b in zip(instructed_acts[at], plain[at], strict=True)] for at in hookpoints
    }
    changes = {hookpoints[0]: accumulated[hookpoints[0]]}
    for below, at in pairwise(hookpoints):
        changes[at] = [a - b for a, b in zip(accumulated[at], accumulated[below], strict=True)]
    return AnswerChanges(plain, changes)


@torch.no_grad()
def answer_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    hookpoints: Sequence[Hookpoint],
    batch_tokens: int | None = None,
) -> tuple[list[list[int]], AnswerActivations]:
    """The ids of each answer's tokens, and their activations by hookpoint, on the CPU in the model's dtype.

    Inside a ``steer`` block the activations are the steered ones. Raises DataError for an answer without a token.
    """
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    with TokenReader(tokenizer, rule="answer", window=context_window(model), scored=True) as reader:
        chunks = list(reader.rows((prompt, answer, True) for prompt, answer in pairs))
    rows: list[TokenRow] = sorted((row for chunk in chunks for row in chunk), key=lambda row: len(row.ids))
    device = input_device(model)
    ids: list[list[int]] = [[] for _ in pairs]
    found: dict[Hookpoint, list[Tensor]] = {at: [torch.empty(0)] * len(pairs) for at in hookpoints}
    size = tokens_in_batch(batch_tokens, device)
    for batch in batch_rows(rows, batch_tokens=size, pad_id=pad_id, device=device):
        acts = record_batch(model, batch, hookpoints)
        for n, row in enumerate(batch.rows):
            ids[row.index] = [row.ids[i] for i in row.selected]
            for at in hookpoints:
                found[at][row.index] = acts[at][n, list(row.selected)].cpu()
    return ids, found
