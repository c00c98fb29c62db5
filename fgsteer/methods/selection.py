"""Choosing features: a score ranks them, filters take some out, and the mean difference weights those that are left.

Scores and weights are (d_sae,) float64 vectors on the CPU; every function returns a new
one. Of equal scores the lower feature id comes first, so that a selection is reproducible.

    weights, settings = select_features(contrast, sae, score="welch_t", n_positive=8)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import PairingError, SelectionError, SelectionWarning
from fgsteer.errors.checks import check_range, checked, is_number, warn
from fgsteer.errors.wording import a, count
from fgsteer.methods.scores import SCORES
from fgsteer.saes.density import FeatureDensity
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import Contrast, ContrastStatistics

FeatureIds = Mapping[int, float] | Iterable[int] | int
PAPER_MAX_DENSITY = 0.01  # share of tokens; FGAA (arXiv 2501.09929)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which features are chosen: the keywords that ``select_features`` and ``fgaa`` share, with their defaults.

    Args:
        score: A name in ``SCORES`` or a tensor (d_sae,), by which features are ranked.
        n_positive: How many of the largest scores are chosen.
        n_negative: How many of the most negative scores are chosen.
        density: How often each feature fires on ordinary tokens; None takes the SAE's own.
        max_density: The share of tokens above which a feature is left out; None takes the one that was tuned for the
            SAE, else the 0.01 of FGAA; infinity switches the filter off.
        bos_share: The share of documents with their peak on position 0 from which a feature is left out; None switches
            the filter off.
    """

    score: str | Tensor = "mean_difference"
    n_positive: int = 64
    n_negative: int = 0
    density: FeatureDensity | None = None
    max_density: float | None = None
    bos_share: float | None = 0.99

    def choose(self, contrast: Contrast, sae: SAE) -> tuple[Float[Tensor, " d_sae"], dict[str, Any]]:
        """Choose features; ``select_features`` says how."""
        for name in ("max_density", "bos_share"):
            if (limit := getattr(self, name)) is not None:
                check_range(name, limit, 0, math.inf)
        score_name = self.score if isinstance(self.score, str) else "given"
        scores, difference = score_features(contrast, self.score), contrast.difference
        scores = torch.where(scores.sign() == difference.sign(), scores, 0.0)
        density = sae.density if self.density is None else self.density.check(sae)
        max_density = bos_share = None
        removed: dict[str, list[int]] = {}
        if density is None:
            warn(
                "This SAE has no density, so the density and BOS filters are off. Measure it with fgsteer density.",
                SelectionWarning,
            )
        else:
            max_density, bos_share = self._max_density(density), self.bos_share
            scores, removed = self._filter(scores, density, max_density)
        weights = torch.where(self._keep_extremes(scores) != 0, difference, 0.0)
        if not bool(weights.any()):
            raise SelectionError(
                f"none by the score {score_name} (of the strongest, the density filter removed "
                f"{removed.get('density', [])})",
                "at least one feature whose score agrees in sign with its mean difference",
                f"Raise max_density (now {max_density}) or add contrast data",
            )
        return weights, {
            "score": score_name,
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "max_density": None if max_density == math.inf else max_density,  # JSON has no infinity
            "bos_share": bos_share,
            "removed": removed,
        }

    def _max_density(self, density: FeatureDensity) -> float:
        tuned = PAPER_MAX_DENSITY if density.max_density is None else density.max_density
        return tuned if self.max_density is None else self.max_density

    def _keep_extremes(self, scores: Tensor) -> Tensor:
        return keep_extremes(scores, self.n_positive, self.n_negative)

    def _filter(
        self, scores: Tensor, density: FeatureDensity, max_density: float
    ) -> tuple[Tensor, dict[str, list[int]]]:
        """Set filtered scores to zero, and list which features each filter removed that would have been chosen."""
        strongest = self._keep_extremes(scores)
        scores = filter_density(scores, density, max_density)
        removed = {"density": _removed(strongest, scores)}
        if self.bos_share is not None:
            strongest = self._keep_extremes(scores)
            scores = filter_bos(scores, density, self.bos_share)
            removed["bos"] = _removed(strongest, scores)
        return scores, removed


@checked
def select_features(
    contrast: Contrast,
    sae: SAE,
    *,
    score: str | Tensor = Selection.score,
    n_positive: int = Selection.n_positive,
    n_negative: int = Selection.n_negative,
    density: FeatureDensity | None = Selection.density,
    max_density: float | None = Selection.max_density,
    bos_share: float | None = Selection.bos_share,
) -> tuple[Float[Tensor, " d_sae"], dict[str, Any]]:
    """Choose the features that separate the two sides, and weight them by their mean difference.

    Features that fire too often or peak on position 0 are left out; of the others the ``n_positive`` largest and
    ``n_negative`` most negative scores are chosen. The mean difference ``z̄⁺ − z̄⁻`` gives weight and sign: a feature
    whose score disagrees with it in sign, or is 0, is no candidate (FGAA, arXiv 2501.09929, steps 2 to 4).

    Args:
        contrast: Moments of the features on the two sides: ``stats.at("feature")[1]``.
        sae: The SAE of these features.
        score: A name in ``SCORES`` or a tensor (d_sae,), by which features are ranked.
        n_positive: How many of the largest scores are chosen.
        n_negative: How many of the most negative scores are chosen.
        density: How often each feature fires on ordinary tokens; None takes the SAE's own.
        max_density: The share of tokens above which a feature is left out; None takes the one that was tuned for the
            SAE, else the 0.01 of FGAA; infinity switches the filter off.
        bos_share: The share of documents with their peak on position 0 from which a feature is left out; None switches
            the filter off.

    Returns:
        Weights (d_sae,) in activation units, zero for features that are not chosen, and the settings that chose them.

    Raises:
        SelectionError: The score is unknown, or no feature is left.
        PairingError: The density was measured on another SAE.

    Warns:
        SelectionWarning: No density is known, so both filters are off.
    """
    return Selection(score, n_positive, n_negative, density, max_density, bos_share).choose(contrast, sae)


def feature_contrast(stats: ContrastStatistics, sae: SAE) -> Contrast:
    """Return the moments of an SAE's features. Raises PairingError for statistics of another SAE."""
    collected_with = stats.reading.get("sae")
    if collected_with and collected_with.get("sha256") != sae.sha256:
        raise PairingError(
            f"statistics of SAE {collected_with.get('sha256', '')[:12]} ({collected_with.get('source')})",
            f"statistics of SAE {sae.sha256[:12]} ({sae.source})",
            "Collect again with this SAE",
        )
    _, contrast = stats.at("feature", sae.hookpoint)
    if len(contrast.difference) != sae.d_sae:
        raise PairingError(
            f"statistics of {count(len(contrast.difference), 'feature')}",
            f"statistics of {count(sae.d_sae, 'feature')}, as many as this SAE has",
            "Collect again with this SAE",
        )
    return contrast


def score_features(contrast: Contrast, score: str | Tensor) -> Float[Tensor, " d_sae"]:
    """Return the score (d_sae,) of a name, or the given one, in float64. Raises SelectionError."""
    if isinstance(score, str):
        if score not in SCORES:
            raise SelectionError(f"score={score!r}", f"one of {', '.join(SCORES)}, or a tensor (d_sae,)")
        return SCORES[score](contrast)
    width = len(contrast.difference)
    if not isinstance(score, Tensor) or score.shape != (width,) or bool(score.isnan().any()):
        shape = f"a tensor of shape {tuple(score.shape)}" if isinstance(score, Tensor) else a(type(score).__name__)
        raise SelectionError(
            f"{shape}{' with nan' if isinstance(score, Tensor) and score.shape == (width,) else ''}",
            f"the name of a score, or a tensor of shape ({width},) without nan",
            "Give 0 to features that are not to be chosen",
        )
    return score.detach().to("cpu", torch.float64)


def _removed(before: Tensor, after: Tensor) -> list[int]:
    """List the features with a score before a filter and none after it."""
    return [int(j) for j in ((before != 0) & (after == 0)).nonzero()[:, 0]]


def top_mask(values: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Mask the k largest values that are above 0 (fewer where fewer are)."""
    order = torch.sort(values, descending=True, stable=True).indices[: max(0, k)]
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order] = True
    return mask & (values > 0)


def keep_extremes(scores: Float[Tensor, " n"], n_positive: int, n_negative: int) -> Float[Tensor, " n"]:
    """Keep the ``n_positive`` largest and ``n_negative`` most negative scores; others become 0 (FGAA step 4)."""
    if n_positive < 0 or n_negative < 0 or n_positive + n_negative == 0:
        raise SelectionError(
            f"n_positive={n_positive} and n_negative={n_negative}", "two counts of at least 0, one of them above 0"
        )
    return torch.where(top_mask(scores, n_positive) | top_mask(-scores, n_negative), scores, 0.0)


def filter_density(scores: Float[Tensor, " n"], density: FeatureDensity, max_density: float) -> Float[Tensor, " n"]:
    """Set scores to zero where a feature fires on more than ``max_density`` of ordinary tokens (FGAA step 2)."""
    return torch.where(density.density > max_density, 0.0, scores)


def filter_bos(scores: Float[Tensor, " n"], density: FeatureDensity, share: float) -> Float[Tensor, " n"]:
    """Set scores to zero where a feature peaks on position 0 in at least ``share`` of its documents (FGAA step 3)."""
    return torch.where(density.bos_features(share), 0.0, scores)


def signed_min_max(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Scale to ``sign(x)(|x| − min|x|)/(max|x| − min|x|)``; all zero where the range is 0 (STA step 3)."""
    size = x.abs()
    low, high = size.min(), size.max()
    if high == low:
        return torch.zeros_like(x)
    return x.sign() * (size - low) / (high - low)


def feature_weights(features: FeatureIds, sae: SAE) -> Float[Tensor, " d_sae"]:
    """Return weights (d_sae,) of {id: weight}, of several ids (weight 1 each), or of one id.

    Raises:
        SelectionError: There is no id, an id is no integer, comes twice or is out of range, or a weight is no
            finite number.
    """
    plain = _as_python(features)
    if isinstance(plain, Mapping):
        pairs = list(plain.items())
    else:
        pairs = [(j, 1.0) for j in (plain if isinstance(plain, Iterable) else [plain])]
    if not pairs:
        raise SelectionError("none", "at least one feature id")
    weights = torch.zeros(sae.d_sae, dtype=torch.float64)
    seen = set()
    for key, value in pairs:
        feature, weight = feature_id(key, sae), _as_python(value)
        if not is_number(weight) or not math.isfinite(weight):
            raise SelectionError(f"{weight!r:.60}", f"a finite number as the weight of feature {feature}")
        if feature in seen:
            raise SelectionError(f"feature {feature} twice", "each feature id once")
        seen.add(feature)
        weights[feature] = float(weight)
    return weights


def feature_id(value: object, sae: SAE) -> int:
    """Return the value as a feature id of this SAE. Raises SelectionError unless it is an integer in range."""
    feature = _as_python(value)
    if isinstance(feature, bool) or not isinstance(feature, int):
        raise SelectionError(f"{feature!r} ({type(feature).__name__})", "an integer as a feature id")
    if not 0 <= feature < sae.d_sae:
        raise SelectionError(f"feature {feature}", f"an id from 0 to {sae.d_sae - 1}, the last feature of this SAE")
    return feature


def _as_python(value: Any) -> Any:
    """Return numbers and arrays of torch and numpy as plain Python, and anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
