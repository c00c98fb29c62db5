"""How much a feature changes the certainty of the model's next token: Δ token confidence.

confidence_change(model, tokenizer, sae)[:10]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.display.progress import Progress
from fgsteer.errors import SelectionError
from fgsteer.errors.checks import checked, is_whole_number
from fgsteer.features.output_scores import AmplifiedFeatures
from fgsteer.saes.sae import SAE
from fgsteer.selection.ranking import FeatureRanking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
@torch.no_grad()
def confidence_change(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    features: Iterable[int] | None = None,
    *,
    prompt: str = "From my experience,",
    coefficient: float = 10.0,
    k: int = 1,
    batch_size: int = 64,
    progress: Progress = None,
) -> FeatureRanking:
    """Rank features by how much they change the certainty of the next token: ``|C_k(steered) − C_k(unsteered)|``.

    ``C_k = −(1/k)·Σ log p`` over the k likeliest tokens after the prompt, while ``h ← h + c·a·W_dec[j]`` at its last
    token, as in ``output_scores`` (arXiv 2510.03659). The paper's prompt and strength are not known: these are
    those of ``output_scores``. It costs one forward pass for each feature, with many to a batch. The absolute value
    rewards features that make the model certain of anything at all, so that the first ones need a look at what they
    say.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are ranked.
        features: The ids of some features, such as the first of another ranking; by default all of them.
        prompt: The prompt.
        coefficient: The c of the equation; 0 changes nothing.
        k: The number of likeliest tokens.
        batch_size: The features in a forward pass.
        progress: As in ``collect``; a function is called with the number of features done.

    Returns:
        The ranking, in nats; nothing is held out, as no texts are read.

    Raises:
        DataError: The prompt has no token, or no feature fires on its last one.
        SelectionError: A feature is unknown, or k is not from 1 to the size of the vocabulary.
        PairingError: The SAE does not fit the model.
    """
    vocabulary = len(model.get_output_embeddings().weight)
    if not is_whole_number(k) or not 1 <= k <= vocabulary:
        raise SelectionError(
            f"k = {k}", f"a whole number from 1 to {vocabulary}, the vocabulary's size", "leave it out"
        )
    amplified = AmplifiedFeatures(model, tokenizer, sae, prompt, coefficient)
    before = confidence(amplified.unsteered(), k).cpu()
    scores = torch.full((sae.d_sae,), torch.nan, dtype=torch.float64)
    for part, logits in amplified.logits(features, batch_size, progress):
        scores[part] = (confidence(logits, k).cpu() - before).abs()
    settings = {"prompt": prompt, "coefficient": coefficient, "k": k}
    return FeatureRanking.of("confidence_change", scores, sae, settings=settings)


def confidence(logits: Float[Tensor, "rows vocabulary"], k: int) -> Float[Tensor, " rows"]:
    """``C_k = −(1/k)·Σ log p`` of the k likeliest tokens of each row, in float64: 0 where the first is certain."""
    return -logits.double().log_softmax(-1).topk(k, -1).values.mean(-1)
