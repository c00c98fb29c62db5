"""Vectors from the residual stream: contrastive activation addition, affine concept editing, a principal component.

vec = caa(stats); with steer(model, vec.add(4.0)): ...
vec = ace(stats); with steer(model, vec.affine(1.0)): ...
"""

from __future__ import annotations

from typing import Any

import torch

from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import checked
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector


@checked
def caa(stats: ContrastStatistics, *, hookpoint: Hookpoint | str | None = None) -> SteeringVector:
    """Contrastive activation addition: ``v = mean(h⁺) − mean(h⁻)`` (arXiv 2312.06681).

    ``hookpoint`` picks one where statistics hold several. ``direction`` (d_model,) is in
    residual-stream units and not normalised. Raises PairingError for a hookpoint that
    was not collected, SelectionError when the means are equal.
    """
    return _difference(stats, hookpoint, "caa", with_reference=False)


@checked
def ace(stats: ContrastStatistics, *, hookpoint: Hookpoint | str | None = None) -> SteeringVector:
    """Affine concept editing: ``r = mean(h⁺) − mean(h⁻)``, reference ``r⁻ = mean(h⁻)`` (arXiv 2411.09003).

    Apply with ``.affine(alpha)``: 0 is the negative mean, 1 the positive mean. Raises
    PairingError for a hookpoint that was not collected, SelectionError when the means are equal.
    """
    return _difference(stats, hookpoint, "ace", with_reference=True)


def _difference(
    stats: ContrastStatistics, hookpoint: Hookpoint | str | None, method: str, *, with_reference: bool
) -> SteeringVector:
    at, contrast = stats.at("residual", hookpoint)
    if not contrast.difference.norm() > 0:
        raise SelectionError("equal means of positives and negatives", "sides that differ", "check the contrast set")
    hyper: dict[str, Any] = {}
    return SteeringVector(
        contrast.difference.float(),
        at,
        reference=contrast.negative.mean.float() if with_reference else None,
        provenance=provenance(method, hyper, stats),
    )


@checked
def pca(stats: ContrastStatistics, *, hookpoint: Hookpoint | str | None = None) -> SteeringVector:
    """First principal component of the contrast, of norm 1, pointing from negatives to positives (arXiv 2310.01405).

    Of pairs: the top right singular vector of the differences ``h̄ᵢ⁺ − h̄ᵢ⁻``, whose mean is not removed. Otherwise
    of all examples less the midpoint of the two means. Needs ``collect(keep_pooled=True)``.
    Raises PairingError without the examples, SelectionError when they are all equal.
    """
    at, contrast = stats.at("residual", hookpoint)
    if at not in stats.pooled:
        raise PairingError(f"no examples kept at {at}", "statistics of collect(keep_pooled=True)")
    kept = stats.pooled[at]
    paired = 0 < kept.pairs == len(kept.positive) == len(kept.negative)
    if paired:
        rows = (kept.positive - kept.negative).double()
    else:
        midpoint = (contrast.positive.mean + contrast.negative.mean) / 2
        rows = torch.cat([kept.positive, kept.negative]).double() - midpoint
    if not rows.abs().max() > 0:
        raise SelectionError("examples that are all equal", "sides that differ", "check the contrast set")
    direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    if direction @ contrast.difference < 0:
        direction = -direction
    hyper = {"of": "pair differences" if paired else "examples about the midpoint"}
    return SteeringVector(direction.float(), at, provenance=provenance("pca", hyper, stats))
