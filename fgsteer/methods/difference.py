"""Vectors from residual means: contrastive activation addition and affine concept editing.

vec = caa(stats); with steer(model, vec.add(4.0)): ...
vec = ace(stats); with steer(model, vec.affine(1.0)): ...
"""

from __future__ import annotations

from typing import Any

from fgsteer.errors import SelectionError
from fgsteer.hookpoints import Hookpoint
from fgsteer.methods.provenance import provenance
from fgsteer.statistics import ContrastStatistics
from fgsteer.vector import SteeringVector


def caa(stats: ContrastStatistics, *, hookpoint: Hookpoint | str | None = None) -> SteeringVector:
    """Contrastive activation addition: ``v = mean(h⁺) − mean(h⁻)`` (arXiv 2312.06681).

    ``hookpoint`` picks one where statistics hold several. ``direction`` (d_model,) is in
    residual-stream units and not normalised. Raises PairingError for a hookpoint that
    was not collected, SelectionError when the means are equal.
    """
    return _difference(stats, hookpoint, "caa", with_reference=False)


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
