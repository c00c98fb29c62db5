"""Choosing features: a score decides which, filters take some out, the mean difference weights them.

Scores and weights are (d_sae,) float64 vectors on the CPU; every function returns a new
one. Ties go to the lower feature id, so that a selection is reproducible.

    weights, how = select_features(contrast, sae, score="welch_t", n_positive=8)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import SelectionError, SelectionWarning
from fgsteer.errors.checks import check_range, checked, is_number, warn
from fgsteer.methods.scores import SCORES
from fgsteer.saes.density import FeatureDensity
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import Contrast

FeatureIds = Mapping[int, float] | Iterable[int] | int


@checked
def select_features(
    contrast: Contrast,
    sae: SAE,
    *,
    score: str | Tensor = "mean_difference",
    n_positive: int = 16,
    n_negative: int = 0,
    density: FeatureDensity | None = None,
    max_density: float | None = None,
    bos_share: float | None = 0.99,
) -> tuple[Float[Tensor, " d_sae"], dict[str, Any]]:
    """Weights (d_sae,) of the best features, zero elsewhere, and the settings that chose them.

    ``score`` names one of ``SCORES`` or is a tensor (d_sae,), and decides which features:
    those whose density exceeds ``max_density`` or that peak on position 0 in ``bos_share``
    of their documents are out, then the ``n_positive`` largest and ``n_negative`` most
    negative scores are in. The mean difference gives weight and sign: a feature whose score
    disagrees with it in sign, or is 0, is no candidate.

    ``density`` defaults to the SAE's; ``max_density`` to the one tuned for it, else the 0.01
    of FGAA (arXiv 2501.09929, steps 2–4). Raises SelectionError for an unknown score or when
    nothing is left, PairingError for the density of another SAE. Warns SelectionWarning when
    no density is known and the filters are off.
    """
    for limit, value in (("max_density", max_density), ("bos_share", bos_share)):
        if value is not None:
            check_range(limit, value, 0, math.inf)
    name = score if isinstance(score, str) else "given"
    scores, difference = score_features(contrast, score), contrast.difference
    scores = torch.where(scores.sign() == difference.sign(), scores, 0.0)
    density = density.check(sae) if density is not None else sae.density
    removed: dict[str, list[int]] = {}
    if density is None:
        max_density = bos_share = None
        warn(
            "this SAE has no density, so the density and BOS filters are off; measure it with fgsteer density",
            SelectionWarning,
        )
    else:
        if max_density is None:
            max_density = density.max_density if density.max_density is not None else 0.01
        best = keep_extremes(scores, n_positive, n_negative)
        scores = filter_density(scores, density, max_density)
        removed["density"] = _lost(best, scores)
        if bos_share is not None:
            best = keep_extremes(scores, n_positive, n_negative)
            scores = filter_bos(scores, density, bos_share)
            removed["bos"] = _lost(best, scores)
    weights = torch.where(keep_extremes(scores, n_positive, n_negative) != 0, difference, 0.0)
    if not bool(weights.any()):
        raise SelectionError(
            f"no feature left by {name} (of the strongest, density removed {removed.get('density', [])})",
            "at least one whose score agrees in sign with its mean difference",
            f"raise max_density (now {max_density}) or add contrast data",
        )
    return weights, {
        "score": name,
        "n_positive": n_positive,
        "n_negative": n_negative,
        "max_density": None if max_density == math.inf else max_density,
        "bos_share": bos_share,
        "removed": removed,
    }


def score_features(contrast: Contrast, score: str | Tensor) -> Float[Tensor, " d_sae"]:
    """The score (d_sae,) of that name, or the given one, in float64. Raises SelectionError."""
    if isinstance(score, str):
        if score not in SCORES:
            raise SelectionError(f"score {score!r}", f"one of {', '.join(SCORES)}, or a tensor (d_sae,)")
        return SCORES[score](contrast)
    width = len(contrast.difference)
    if not isinstance(score, Tensor) or score.shape != (width,) or bool(score.isnan().any()):
        got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise SelectionError(
            f"a score of {got}", f"a name, or a tensor ({width},) without nan", "give 0 to features not to be chosen"
        )
    return score.detach().to("cpu", torch.float64)


def _lost(before: Tensor, after: Tensor) -> list[int]:
    """Features with a score before a filter and none after it."""
    return [int(j) for j in ((before != 0) & (after == 0)).nonzero()[:, 0]]


def top_mask(values: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Mask of the k largest values that are > 0 (fewer when fewer are)."""
    order = torch.sort(values, descending=True, stable=True).indices[: max(0, k)]
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order] = True
    return mask & (values > 0)


def keep_extremes(scores: Float[Tensor, " n"], n_positive: int, n_negative: int) -> Float[Tensor, " n"]:
    """The ``n_positive`` largest and ``n_negative`` most negative scores; zero elsewhere (FGAA step 4)."""
    if n_positive < 0 or n_negative < 0 or n_positive + n_negative == 0:
        raise SelectionError(f"n_positive = {n_positive}, n_negative = {n_negative}", "two counts ≥ 0, one of them > 0")
    return torch.where(top_mask(scores, n_positive) | top_mask(-scores, n_negative), scores, 0.0)


def filter_density(scores: Float[Tensor, " n"], density: FeatureDensity, max_density: float) -> Float[Tensor, " n"]:
    """Zero where a feature fires on more than ``max_density`` of generic tokens (FGAA step 2)."""
    return torch.where(density.density > max_density, 0.0, scores)


def filter_bos(scores: Float[Tensor, " n"], density: FeatureDensity, share: float = 0.99) -> Float[Tensor, " n"]:
    """Zero where a feature peaks on position 0 in at least ``share`` of its documents (FGAA step 3)."""
    return torch.where(density.bos_features(share), 0.0, scores)


def signed_min_max(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``sign(x)(|x| − min|x|)/(max|x| − min|x|)``; all zero when the range is 0 (STA step 3)."""
    size = x.abs()
    low, high = size.min(), size.max()
    if high == low:
        return torch.zeros_like(x)
    return x.sign() * (size - low) / (high - low)


def feature_weights(features: FeatureIds, sae: SAE) -> Float[Tensor, " d_sae"]:
    """Weights (d_sae,) of {id: weight}, of several ids (weight 1 each), or of one id.

    Raises SelectionError for no id, an id that is no integer, repeated or out of range,
    and a weight that is no finite number.
    """
    plain = _plain(features)
    if isinstance(plain, Mapping):
        given = list(plain.items())
    else:
        given = [(j, 1.0) for j in (plain if isinstance(plain, Iterable) else [plain])]
    if not given:
        raise SelectionError("no feature", "at least one id")
    weights = torch.zeros(sae.d_sae, dtype=torch.float64)
    seen = set()
    for key, value in given:
        feature, weight = feature_id(key, sae), _plain(value)
        if not is_number(weight) or not math.isfinite(weight):
            raise SelectionError(f"weight {weight!r:.60} of feature {feature}", "a finite number")
        if feature in seen:
            raise SelectionError(f"feature {feature} twice", "each id once")
        seen.add(feature)
        weights[feature] = float(weight)
    return weights


def feature_id(value: object, sae: SAE) -> int:
    """The value as a feature id of this SAE. Raises SelectionError unless an integer in range."""
    feature = _plain(value)
    if isinstance(feature, bool) or not isinstance(feature, int):
        raise SelectionError(f"feature id {feature!r} ({type(feature).__name__})", "an integer")
    if not 0 <= feature < sae.d_sae:
        raise SelectionError(f"feature {feature}", f"an id from 0 to {sae.d_sae - 1}, this SAE's last")
    return feature


def _plain(value: Any) -> Any:
    """Numbers and arrays of torch and numpy as plain Python; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
