"""A ranking of features for a contrast set, by the name of what ranks them.

rank_features(model, tokenizer, sae, "sea", by="max_auc")[:1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fgsteer.activations.token_rules import TokenRule
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.display.progress import Progress
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import SelectionError
from fgsteer.errors.checks import checked
from fgsteer.methods.scores import SCORES
from fgsteer.methods.selection import feature_contrast, score_features
from fgsteer.saes.sae import SAE
from fgsteer.selection.confidence import confidence_change
from fgsteer.selection.effects import causal_effect
from fgsteer.selection.names import RANKINGS
from fgsteer.selection.pooled import halves_of, max_activations
from fgsteer.selection.ranking import FeatureRanking
from fgsteer.selection.separation import calibrated_f1, max_auc
from fgsteer.statistics.collecting import collect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CANDIDATES = 64  # the first features by max_auc, among which confidence_change chooses


@checked
def rank_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    contrast: Contrastable,
    *,
    by: str = "max_auc",
    effects: EffectApproximator | None = None,
    tokens: TokenRule = "all",
    batch_tokens: int | None = None,
    progress: Progress = None,
    **settings: Any,
) -> FeatureRanking:
    """Rank the features of an SAE for a contrast set.

    | by | what ranks | needs, besides the texts |
    |---|---|---|
    | ``max_auc`` | AUROC of the largest activation in a text | |
    | ``calibrated_f1`` | F1 at a rare base rate, at the best threshold | 50 positive texts, or ``min_support=`` |
    | ``causal_effect`` | how far steering with a feature moves the one that is best by ``max_auc`` | ``effects`` |
    | ``confidence_change`` | how much a feature changes the certainty of the next token | a pass a feature |
    | a name in ``SCORES`` | a score of the moments of mean activations | |

    ``confidence_change`` knows nothing of the texts, so that it ranks the 64 features that are first by ``max_auc``.
    Texts that choose and texts that report are those of ``max_activations``.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are ranked.
        contrast: A contrast set, a shipped name, a path, or what ``collect`` takes.
        by: What ranks them.
        effects: The effects measured on this SAE, for "causal_effect".
        tokens: Which tokens are read, as in ``collect``.
        batch_tokens: As in ``collect``.
        progress: As in ``collect``.
        **settings: What the function of that name takes besides, such as ``base_rate=``.

    Returns:
        The ranking.

    Raises:
        SelectionError: The name is unknown, effects are missing, or no feature fires.
        DataError: A side has too few texts to be halved.
        PairingError: The SAE or the effects do not fit.
    """
    if by not in RANKINGS:
        raise SelectionError(f"by={by!r:.60}", f"one of {', '.join(RANKINGS)}")
    if by == "causal_effect" and effects is None:
        raise SelectionError("by='causal_effect' without effects", "the effects of this SAE", "pass effects=")
    if settings and by in ("causal_effect", *SCORES):
        raise SelectionError(f"{', '.join(settings)} with by={by!r}", f"no settings, which {by} does not take")
    given = as_contrast(contrast)
    reading: dict[str, Any] = {"tokens": tokens, "batch_tokens": batch_tokens, "progress": progress}
    if by in SCORES:
        return _by_score(model, tokenizer, sae, given, by, reading)
    activations = max_activations(model, tokenizer, sae, given, **reading)
    if by == "calibrated_f1":
        return calibrated_f1(activations, **settings)
    if by == "max_auc":
        return max_auc(activations, **settings)
    first = max_auc(activations, permutations=0)
    if by == "causal_effect":
        assert effects is not None
        return causal_effect(sae, effects, first[:1])
    return confidence_change(model, tokenizer, sae, first[:CANDIDATES], progress=progress, **settings)


def _by_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    contrast: ContrastSet,
    by: str,
    reading: dict[str, Any],
) -> FeatureRanking:
    """Rank by a score of moments of the part that chooses; the other part has the score anew."""
    contrasts = [
        feature_contrast(collect(model, tokenizer, part, sae=sae, **reading), sae) for part in halves_of(contrast)
    ]
    scores, held_out = (score_features(one, by) for one in contrasts)
    fires = (contrasts[0].positive.fired + contrasts[0].negative.fired) > 0
    settings = {"contrast": contrast.name, "sha256": contrast.sha256, "tokens": reading["tokens"]}
    return FeatureRanking.of(by, scores, sae, candidates=fires, held_out=held_out, settings=settings)
