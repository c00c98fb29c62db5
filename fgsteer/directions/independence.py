"""Representational independence: whether ablating one direction changes how activations align with another.

found = representational_independence(model, tokenizer, v, w, prompts)
print(found.total)          0 where neither depends on the other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fgsteer.activations.tokens import pad
from fgsteer.data.chat import Text
from fgsteer.directions.prompts import prompt_passes
from fgsteer.directions.removal import ablate_everywhere
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.hookpoints import Hookpoint, blocks_of, resolve
from fgsteer.models.properties import input_device
from fgsteer.steering.entries import Steering
from fgsteer.steering.hooks import steer
from fgsteer.steering.splicing import splice_modules
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEPTH = 0.9  # of the blocks that are compared, from the first on, as in the paper's code


@dataclass(frozen=True, eq=False, repr=False)
class Independence(OneLineRepr):
    """How far the ablation of one direction moves the cosine of activations with another, squared, by block.

    Args:
        first: ``(cos(h, v | w ablated) − cos(h, v))²`` at the input of each block, the mean over prompts.
        second: ``(cos(h, w | v ablated) − cos(h, w))²`` likewise.
    """

    first: Float[Tensor, " blocks"]
    second: Float[Tensor, " blocks"]

    @property
    def total(self) -> float:
        """The mean over blocks of both together: 0 for independent directions, at most 8."""
        return float((self.first + self.second).mean())


@checked
@torch.no_grad()
def representational_independence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    v: SteeringVector,
    w: SteeringVector,
    prompts: Sequence[Text],
    *,
    depth: float = DEPTH,
    batch_tokens: int | None = None,
) -> Independence:
    """Measure how far ablating each of two directions changes what the other reads (RepInd, arXiv 2502.17420).

    Orthogonal directions need not be independent: later blocks may compute one from the other. The cosines are those of
    the last token of each prompt at the input of the first ``⌊depth·L⌋`` blocks.

    Args:
        model: A Hugging Face causal language model, of a family whose sublayers' outputs are known.
        tokenizer: Its tokenizer.
        v: A direction.
        w: Another.
        prompts: Requests: texts, which a chat model gets as a user's messages, or conversations.
        depth: The share of blocks that are compared, from the first on.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The changes of both, by block.

    Raises:
        DataError: There is no prompt, or the depth leaves no block.
        SteeringError: A direction is zero.
        HookpointError: The blocks of the model add something else than their sublayers' outputs.
    """
    total, number = torch.zeros(2, compared_blocks(model, depth), dtype=torch.float64), 0
    for batch in prompt_passes(model, tokenizer, prompts, batch_tokens=batch_tokens).batches:
        rows = [list(row.ids) for row in batch.rows]
        total += changes(model, rows, v, w, depth).double().cpu().sum(2)
        number += len(rows)
    return Independence(*(total / number))


def compared_blocks(model: PreTrainedModel, depth: float) -> int:
    """How many blocks are compared. Raises DataError for a depth that leaves none."""
    blocks = len(blocks_of(model))
    check_range("depth", depth, 1 / blocks, 1)
    return int(depth * blocks)


def changes(
    model: PreTrainedModel, prompts: Sequence[list[int]], v: SteeringVector, w: SteeringVector, depth: float = DEPTH
) -> Float[Tensor, "2 blocks prompts"]:
    """The squared changes of cosines with v under ablation of w, and with w under ablation of v.

    Gradients reach v and w where these require them.
    """
    blocks = compared_blocks(model, depth)
    plain, without_v, without_w = (
        _last_states(model, prompts, blocks, None if one is None else ablate_everywhere(model, one))
        for one in (None, v, w)
    )
    pairs = [(plain, without_w, v), (plain, without_v, w)]
    return torch.stack([(_cosines(after, one) - _cosines(before, one)).square() for before, after, one in pairs])


def _cosines(
    states: Float[Tensor, "blocks prompts d_model"], vector: SteeringVector
) -> Float[Tensor, "blocks prompts"]:
    return cosine_similarity(states, vector.direction.to(states), dim=-1)


def _last_states(
    model: PreTrainedModel, prompts: Sequence[list[int]], blocks: int, steering: Steering
) -> Float[Tensor, "blocks prompts d_model"]:
    """The steered activations at the inputs of the first blocks, at each prompt's last token, float32 or wider."""
    ids, mask = (part.to(input_device(model)) for part in pad(prompts, 0))
    last, width = torch.tensor([len(row) - 1 for row in prompts]), ids.shape[1]
    states: dict[int, Tensor] = {}

    def keep(layer: int, h: Tensor) -> Tensor:
        states[layer] = h[:, -width:][torch.arange(len(last)), last.to(h.device)]  # without virtual tokens
        return h

    inputs = [(*resolve(model, Hookpoint(layer, "resid_pre")), partial(keep, layer)) for layer in range(blocks)]
    with steer(model, steering), splice_modules(inputs):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    wide = torch.promote_types(states[0].dtype, torch.float32)
    return torch.stack([states[layer].to(states[0].device, wide) for layer in range(blocks)])
