"""The share of inputs that a vector moves the wrong way.

wrong_way(model, tokenizer, vec.add(8.0), fg.load_contrast("love"))       0.05 [0.02, 0.12]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.data.contrast_files import as_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.evaluation.metrics.intervals import Interval, wilson
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.steering.entries import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
def wrong_way(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Entry,
    contrast: ContrastSet | str | Path,
    *,
    batch_tokens: int | None = None,
) -> Interval:
    """The share of inputs that steering moves away from the behavior: anti-steered ones (arXiv 2407.12404).

    Of a pair, ``log p(y⁺) − log p(y⁻)`` falls. A text without a partner is compared with the other side's mean: one
    with the behavior becomes less probable than the texts without it on average, or one without more probable than
    those with it. Log-probabilities are a token's, or an answer's where all answers have equally many tokens. They are
    measured on the held-out part of the contrast set, where it has one.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        steering: An intervention, or a list of them that compose.
        contrast: Texts with and without the behavior; from the held-out ones no vector should have been built.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The share with Wilson's interval (95 %). An input that nothing moves counts as not moved the wrong way.

    Raises:
        DataError: The set has a single member of a kind, or a log-probability is not finite.
    """
    loaded = as_contrast(contrast)
    propensity = Propensity(loaded.held_out or loaded)
    values, _ = propensity.values(model, tokenizer, [None, steering], batch_tokens)
    moved = moves(values[1] - values[0], propensity.positives, propensity.pairs)
    if not moved.isfinite().all():
        raise DataError("log-probabilities that are not finite", "a strength at which the model still has any")
    return wilson(float((moved < 0).sum()), len(moved))


def moves(change: Float[Tensor, " texts"], positives: int, pairs: int) -> Float[Tensor, " inputs"]:
    """How far each input moves towards the behavior: pairs, then single positives, then single negatives."""
    positive, negative = change[:positives], change[positives:]
    return torch.cat(
        [
            positive[:pairs] - negative[:pairs],
            positive[pairs:] - negative.mean(),
            positive.mean() - negative[pairs:],
        ]
    )
