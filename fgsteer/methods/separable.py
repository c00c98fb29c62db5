"""Weights that move the mean of the negative side past that of the positive side: SAE-SSV's objective, solved."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors.checks import check_flags, check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.methods.projection import Projection, decode_weights, feature_vector
from fgsteer.methods.scores import f_statistic
from fgsteer.methods.selection import feature_contrast, top_mask
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector

STEPS, RATE = 100, 0.01  # of the paper's gradient descent


@checked
def sae_ssv(
    stats: ContrastStatistics,
    sae: SAE,
    *,
    n_features: int = 128,
    l1: float = 0.01,
    compat: bool = False,
    normalize: bool = Projection.normalize,
) -> SteeringVector:
    """SAE-SSV (arXiv 2505.16188): ``v = soft(2(z̄⁺ − z̄⁻), λ)`` on the features that separate the two sides best.

    It is the minimum of ``E‖z + v − z̄⁺‖² − ½E‖z + v − z̄⁻‖² + λ‖v‖₁`` over examples z of the negative side, with
    ``soft(x, λ) = sign(x)·max(|x| − λ, 0)``. The paper takes 100 steps of gradient descent towards it, which cover
    63 % of the way, and adds a language-model term by finite differences, which is left out here. Features are those
    with the largest F statistic; the paper then shortens the list by linear probes. It reads the last token of each
    text (``collect(tokens="last")``).

    Args:
        stats: Statistics collected with ``sae=``.
        sae: The SAE that they were collected with.
        n_features: How many features may have a weight.
        l1: λ, in units of feature activation.
        compat: Whether to stop where the paper's 100 steps do, which start at ``(z̄⁺ − z̄⁻)/‖z̄⁺ − z̄⁻‖``.
        normalize: Whether the result is scaled to norm 1.

    Returns:
        The vector, with v as the weights of its features.

    Raises:
        SelectionError: The sides do not differ in any feature by more than λ/2.
        PairingError: The statistics are of another SAE.
        DataError: A number is out of range.
    """
    check_range("n_features", n_features, 1, MAX_COUNT, whole=True)
    check_range("l1", l1, 0, 1e6)
    check_flags(compat=compat)
    contrast = feature_contrast(stats, sae)
    chosen = top_mask(f_statistic(contrast).abs(), n_features)
    difference = torch.where(chosen, contrast.difference, 0.0)
    weights = _descend(difference, l1) if compat else soft_threshold(2 * difference, l1)
    direction = Projection(normalize=normalize).scaled(decode_weights(weights, sae))
    settings = {"n_features": n_features, "l1": l1, "compat": compat, "normalize": normalize, "projection": "decoder"}
    return feature_vector("sae_ssv", direction, weights, sae, settings, stats)


def soft_threshold(x: Float[Tensor, " n"], limit: float) -> Float[Tensor, " n"]:
    """Return ``sign(x)·max(|x| − limit, 0)``."""
    return x.sign() * (x.abs() - limit).clamp(min=0)


def _descend(difference: Float[Tensor, " n"], l1: float) -> Float[Tensor, " n"]:
    """Where the paper's steps get: the gradient at v is ``v − 2(z̄⁺ − z̄⁻) + λ·sign(v)``."""
    v: Tensor = difference / difference.norm().clamp(min=torch.finfo(difference.dtype).tiny)
    for _ in range(STEPS):
        v = v - RATE * (v - 2 * difference + l1 * v.sign())
    return v
