"""Activations of prompts, and statistics of two classes of them.

stats = prompt_statistics(model, tokenizer, refused, answered)
fg.caa(stats, hookpoint=12)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.recording import record
from fgsteer.data.chat import Text
from fgsteer.directions.prompts import as_requests
from fgsteer.directions.shift import last_states
from fgsteer.errors.checks import checked
from fgsteer.evaluation.metrics.gate_fit import ROWS, right_padded
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import start_token_finder
from fgsteer.statistics.contrast import Contrast, ContrastStatistics
from fgsteer.statistics.moments import Moments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
@torch.no_grad()
def prompt_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    positives: Sequence[Text],
    negatives: Sequence[Text],
    *,
    hookpoints: Iterable[Hookpoint | str | int] | None = None,
    batch_tokens: int | None = None,
) -> ContrastStatistics:
    """Statistics of two classes of prompts at their last token, where the reply begins.

    ``collect`` reads texts; this reads requests, up to where the model would answer.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        positives: Prompts of the one class: texts, which a chat model gets as a user's messages, or conversations.
        negatives: Prompts of the other.
        hookpoints: Where activations are read; by default at the output of every block.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The moments of both classes at each hookpoint, for ``caa``, ``adasteer`` and ``infer_aligner``.

    Raises:
        DataError: A class has no prompt, or one is longer than the model's window.
        HookpointError: The model lacks a hookpoint.
    """
    chosen = range(len(blocks_of(model))) if hookpoints is None else hookpoints
    places = [Hookpoint.parse(place) for place in chosen]
    first, second = (last_states(model, tokenizer, side, places, batch_tokens) for side in (positives, negatives))
    residual = {place: Contrast(Moments.of(first[place]), Moments.of(second[place])) for place in places}
    reading = {"model": model_identity(model), "sae": None, "tokens": "the prompt's last", "bos": False}
    data = ({"name": "prompts", "positives": len(positives), "negatives": len(negatives)},)
    return ContrastStatistics(residual, reading=reading, data=data)


def mean_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], places: Sequence[Hookpoint]
) -> dict[Hookpoint, Float[Tensor, "prompts d_model"]]:
    """The mean activation of each prompt's tokens without a start token, in float64 on the CPU."""
    asked, is_start = as_requests(model, tokenizer, prompts), start_token_finder(model)
    means: dict[Hookpoint, list[Tensor]] = {place: [] for place in places}
    for begin in range(0, len(asked), ROWS):
        ids, attention = right_padded(model, tokenizer, asked[begin : begin + ROWS])
        of_prompt = attention.bool() & ~((attention.cumsum(1) == 1) & is_start(ids))
        for place, h in record(model, ids, attention, places).items():
            mask = of_prompt.to(h.device)[..., None]
            total = torch.where(mask, h.double(), 0.0).sum(1)
            means[place].append((total / mask.sum(1)).cpu())
    return {place: torch.cat(rows) for place, rows in means.items()}
