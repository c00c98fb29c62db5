"""Vectors from the residual stream alone: contrastive activation addition, affine concept editing, PCA.

vec = caa(stats); with steer(model, vec.add(4.0)): ...
vec = ace(stats); with steer(model, vec.affine(1.0)): ...
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import checked
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import Contrast, ContrastStatistics, Pooled
from fgsteer.vector import SteeringVector


@checked
def caa(stats: ContrastStatistics, *, hookpoint: Hookpoint | str | int | None = None) -> SteeringVector:
    """Contrastive activation addition: ``v = mean(h⁺) − mean(h⁻)`` (arXiv 2312.06681).

    Args:
        stats: Statistics of the residual stream.
        hookpoint: Which hookpoint, where the statistics hold several.

    Returns:
        The vector (d_model,), in residual-stream units and not normalised.

    Raises:
        PairingError: The statistics do not hold this hookpoint.
        SelectionError: The two means are equal.
    """
    return _difference(stats, hookpoint, "caa", with_reference=False)


@checked
def ace(stats: ContrastStatistics, *, hookpoint: Hookpoint | str | int | None = None) -> SteeringVector:
    """Affine concept editing: ``r = mean(h⁺) − mean(h⁻)`` with reference ``r⁻ = mean(h⁻)`` (arXiv 2411.09003).

    Apply the vector with ``.affine(alpha)``: 0 puts activations at the negative mean, 1 at the positive mean.

    Args:
        stats: Statistics of the residual stream.
        hookpoint: Which hookpoint, where the statistics hold several.

    Returns:
        The vector (d_model,) with its reference (d_model,), in residual-stream units.

    Raises:
        PairingError: The statistics do not hold this hookpoint.
        SelectionError: The two means are equal.
    """
    return _difference(stats, hookpoint, "ace", with_reference=True)


def _difference(
    stats: ContrastStatistics, hookpoint: Hookpoint | str | int | None, method: str, *, with_reference: bool
) -> SteeringVector:
    at, contrast = stats.at("residual", hookpoint)
    if not contrast.difference.norm() > 0:
        raise SelectionError(
            "the same mean on both sides",
            "positives and negatives whose mean activations differ",
            "Check that the contrast set's two sides hold different texts",
        )
    return SteeringVector(
        contrast.difference.float(),
        at,
        reference=contrast.negative.mean.float() if with_reference else None,
        provenance=provenance(method, {}, stats),
    )


@checked
def pca(stats: ContrastStatistics, *, hookpoint: Hookpoint | str | int | None = None) -> SteeringVector:
    """First principal component of the contrast, pointing from negatives to positives (arXiv 2310.01405).

    For pairs it is the top right singular vector of the differences ``h̄ᵢ⁺ − h̄ᵢ⁻``, whose mean is not removed;
    otherwise that of all examples less the midpoint of the two means.

    Args:
        stats: Statistics of the residual stream, collected with ``keep_pooled=True``.
        hookpoint: Which hookpoint, where the statistics hold several.

    Returns:
        The vector (d_model,), of norm 1.

    Raises:
        PairingError: The statistics do not hold this hookpoint, or no pooled activations there.
        SelectionError: All examples are equal.
    """
    at, contrast = stats.at("residual", hookpoint)
    if at not in stats.pooled:
        raise PairingError(
            f"statistics without pooled activations at {at}",
            "statistics that keep the examples' mean activations",
            "Use collect(keep_pooled=True)",
        )
    examples = stats.pooled[at]
    rows, of_pairs = _rows(examples, contrast)
    if not rows.abs().max() > 0:
        raise SelectionError(
            "examples that are all equal",
            "examples whose activations differ",
            "Check that the contrast set's two sides hold different texts",
        )
    direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    if direction @ contrast.difference < 0:
        direction = -direction
    settings = {"of": "pair differences" if of_pairs else "examples about the midpoint"}
    return SteeringVector(direction.float(), at, provenance=provenance("pca", settings, stats))


def _rows(examples: Pooled, contrast: Contrast) -> tuple[Float[Tensor, "n d_model"], bool]:
    """Return the differences of the pairs, or the examples about the midpoint, and whether all examples are pairs."""
    if 0 < examples.pairs == len(examples.positive) == len(examples.negative):
        return (examples.positive - examples.negative).double(), True
    midpoint = (contrast.positive.mean + contrast.negative.mean) / 2
    return torch.cat([examples.positive, examples.negative]).double() - midpoint, False
