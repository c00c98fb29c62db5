"""Candidate directions: differences of means at every layer, for each token between instruction and reply.

candidate_directions(model, tokenizer, refused, answered, positions=[-1, -2])      (positions, layers, d_model)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import record_batch
from fgsteer.data.chat import Text, apply_template
from fgsteer.directions.prompts import prompt_passes
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked, is_whole_number
from fgsteer.models.chat import is_chat_model
from fgsteer.models.hookpoints import Hookpoint, blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INSTRUCTION = "Hello"


def template_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The positions −P … −1 of what a chat template writes between an instruction and its reply; −1 without a chat."""
    if not is_chat_model(model, tokenizer):
        return [-1]
    text = apply_template(tokenizer, [{"role": "user", "content": _INSTRUCTION}], add_generation_prompt=True)
    after: Any = tokenizer(text.rpartition(_INSTRUCTION)[2], add_special_tokens=False)["input_ids"]
    return list(range(-len(after), 0)) or [-1]


@checked
@torch.no_grad()
def candidate_directions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refused: Sequence[Text],
    answered: Sequence[Text],
    *,
    positions: Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> Float[Tensor, "positions layers d_model"]:
    """The candidates ``r[p, ℓ] = mean_refused h − mean_answered h`` at resid_pre ℓ, position p (arXiv 2406.11717).

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        refused: Requests that the model refuses.
        answered: Requests that it answers.
        positions: Positions from the end of the prompt, −1 its last token; by default those of all tokens that the
            chat template writes after the instruction.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The differences in residual-stream units, float64, (positions, layers, d_model).

    Raises:
        DataError: A side has no prompt, a position is none, or a prompt has fewer tokens.
    """
    places = parse_positions(model, tokenizer, positions)
    means = [_means(model, tokenizer, side, places, batch_tokens) for side in (refused, answered)]
    return means[0] - means[1]


def parse_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, positions: Sequence[int] | None
) -> list[int]:
    """Positions, each below 0 and once. Raises DataError for others."""
    if positions is None:
        return template_positions(model, tokenizer)
    places = list(positions) if isinstance(positions, list | tuple | range) else []
    if not places or not all(is_whole_number(p) and p < 0 for p in places) or len(set(places)) < len(places):
        raise DataError(
            f"positions {positions!r:.60}", "a list of whole numbers below 0, each once", "−1 is the last token"
        )
    return [int(p) for p in places]


def _means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    positions: Sequence[int],
    batch_tokens: int | None,
) -> Float[Tensor, "positions layers d_model"]:
    places = [Hookpoint(layer, "resid_pre") for layer in range(len(blocks_of(model)))]
    total: Tensor | None = None
    for batch in prompt_passes(model, tokenizer, prompts, batch_tokens=batch_tokens).batches:
        for row in batch.rows:
            if len(row.ids) + min(positions) < 0:
                raise DataError(f"{row.where} of {len(row.ids)} tokens", f"at least {-min(positions)} tokens")
        acts = record_batch(model, batch, places)
        index = torch.tensor([[len(row.ids) + p for p in positions] for row in batch.rows])
        rows = torch.arange(len(batch.rows))[:, None]
        sums = [acts[place][rows, index.to(acts[place].device)].double().sum(0).cpu() for place in places]
        batch_sum = torch.stack(sums, 1)
        total = batch_sum if total is None else total + batch_sum
    assert total is not None
    return total / len(prompts)
