"""Drift: where a conversation goes on a vector's axis, turn by turn.

measure_drift(model, tokenizer, vec, vec.add(4.0)).steered.mean          units of the residual stream, a turn
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Message, Text
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval
from fgsteer.models.chat import is_chat_model
from fgsteer.models.properties import context_window
from fgsteer.steering.entries import Entry
from fgsteer.steering.generation import generate
from fgsteer.steering.hooks import steer
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPLY_TOKENS = 32
CONVERSATIONS = (
    (
        "What can you tell me about rivers?",
        "Which one is the longest?",
        "And how do people use them?",
        "Thanks.",
    ),
    ("I want to learn how to cook rice.", "How much water do I need?", "What goes well with it?", "Sum it up for me."),
    ("What should I see in a town?", "I like old houses.", "What if it rains?", "How do I get home at night?"),
)


@dataclass(frozen=True, repr=False)
class Drift(OneLineRepr):
    """Where conversations go on a vector's axis.

    Args:
        turns: The mean projection of each turn's reply on the unit vector, by conversation, with steering, in units of
            the residual stream; None for an empty reply.
        plain_turns: The same in conversations without steering.
        steered: The slope of the projection by turn, with its interval over conversations.
        unsteered: The same without steering.
    """

    turns: tuple[tuple[float | None, ...], ...]
    plain_turns: tuple[tuple[float | None, ...], ...]
    steered: Interval
    unsteered: Interval


@checked
@torch.no_grad()
def measure_drift(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    steering: Entry,
    *,
    conversations: Sequence[Sequence[str]] = CONVERSATIONS,
    max_new_tokens: int = REPLY_TOKENS,
) -> Drift:
    """Whether replies move along a vector's axis over the turns of a conversation, with and without steering.

    The model replies to each user's turn greedily, and reads its own replies when it goes on. A turn is the mean of
    ``v̂·h`` over the reply's tokens at the vector's hookpoint, steering included (the projection of arXiv 2601.10387).
    The drift is the least-squares slope by turn: 0 where a strength stays what it is.

    Args:
        model: A chat model.
        tokenizer: Its tokenizer.
        vector: The vector whose axis is read.
        steering: An intervention, or a list of them that compose.
        conversations: The user's turns of at least two conversations, each of at least two turns.
        max_new_tokens: The most tokens of a reply.

    Raises:
        SteeringError: The model does not chat, or the vector has norm 0.
        DataError: There are fewer conversations or turns, or a conversation is beyond the model's window.
    """
    check_range("max_new_tokens", max_new_tokens, 1, MAX_COUNT, whole=True)
    if not is_chat_model(model, tokenizer):
        raise SteeringError("a model that does not chat", "a chat model, whose turns can drift", "leave drift out")
    if not vector.norm:
        raise SteeringError("a vector of norm 0", "a vector with a direction to project on")
    if len(conversations) < 2 or any(isinstance(turns, str) or len(turns) < 2 for turns in conversations):
        raise DataError("other conversations", "at least two lists of at least two texts of a user")
    turns = [_projections(model, tokenizer, vector, entry, conversations, max_new_tokens) for entry in (steering, None)]
    return Drift(turns[0], turns[1], *(_slopes(rows) for rows in turns))


def _projections(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    steering: Entry,
    conversations: Sequence[Sequence[str]],
    max_new_tokens: int,
) -> tuple[tuple[float | None, ...], ...]:
    """The mean projection of each reply, by conversation and turn; conversations go on together."""
    chats: list[list[Message]] = [[] for _ in conversations]
    rows: list[list[float | None]] = [[] for _ in conversations]
    for turn in range(max(map(len, conversations))):
        open_ones = [number for number, texts in enumerate(conversations) if turn < len(texts)]
        for number in open_ones:
            chats[number].append({"role": "user", "content": conversations[number][turn]})
        asked: list[Text] = [list(chats[number]) for number in open_ones]
        items = [steering] * len(asked)
        replies = generate(
            model, tokenizer, asked, steering=items, per_row=True, do_sample=False, max_new_tokens=max_new_tokens
        )
        values = mean_projections(model, tokenizer, vector, steering, list(zip(asked, replies, strict=True)))
        for number, reply, value in zip(open_ones, replies, values.tolist(), strict=True):
            chats[number].append({"role": "assistant", "content": reply})
            rows[number].append(None if math.isnan(value) else value)
    return tuple(map(tuple, rows))


@torch.no_grad()
def mean_projections(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    steering: Entry,
    texts: Sequence[tuple[Text, Text]],
) -> Float[Tensor, " texts"]:
    """The mean of ``v̂·h`` over the tokens of each completion after its prompt, steered; nan for an empty one."""
    unit = vector.direction.detach().float() / vector.norm
    found = torch.full((len(texts),), math.nan, dtype=torch.float64)
    triples = ((prompt, completion, True) for prompt, completion in texts)
    reader = TokenReader(tokenizer, rule="answer", window=context_window(model), skip_empty=True)
    at = vector.hookpoint
    with reader, steer(model, steering, per_row=False):
        for batch in batch_texts(model, reader, triples):
            h = record_batch(model, batch, [at])[at]
            along = (h.float() @ unit.to(h.device)).cpu().double()
            for row, values, selected in zip(batch.rows, along, batch.selected.cpu(), strict=True):
                found[row.index] = values[selected].mean()
    return found


def _slopes(rows: Sequence[Sequence[float | None]]) -> Interval:
    """The least-squares slope by turn with its interval over conversations; turns without a value are left out."""
    slopes = {}
    for number, row in enumerate(rows):
        points = [(float(turn), value) for turn, value in enumerate(row) if value is not None]
        if len(points) < 2:
            raise DataError("empty replies", "at least two replies of each conversation", "use a smaller strength")
        turns, values = (torch.tensor(part, dtype=torch.float64) for part in zip(*points, strict=True))
        centred = turns - turns.mean()
        slopes[number] = float(centred @ values / centred.square().sum())
    return mean_interval([slopes], lambda number: number)
