"""Choosing features: filters that zero weights, and exact top-k.

Weights are (d_sae,) float64 vectors on the CPU; every function returns a new one.
Ties go to the lower feature id, so that a selection is reproducible.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.density import FeatureDensity
from fgsteer.errors import SelectionError


def top_mask(values: Float[Tensor, " n"], k: int) -> Bool[Tensor, " n"]:
    """Mask of the k largest values that are > 0 (fewer when fewer are)."""
    order = torch.sort(values, descending=True, stable=True).indices[: max(0, k)]
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order] = True
    return mask & (values > 0)


def keep_extremes(weights: Float[Tensor, " n"], n_positive: int, n_negative: int) -> Float[Tensor, " n"]:
    """The ``n_positive`` largest and ``n_negative`` most negative weights; zero elsewhere (FGAA step 4)."""
    if n_positive < 0 or n_negative < 0 or n_positive + n_negative == 0:
        raise SelectionError(f"n_positive = {n_positive}, n_negative = {n_negative}", "two counts ≥ 0, one of them > 0")
    return torch.where(top_mask(weights, n_positive) | top_mask(-weights, n_negative), weights, 0.0)


def filter_density(weights: Float[Tensor, " n"], density: FeatureDensity, max_density: float) -> Float[Tensor, " n"]:
    """Zero where a feature fires on more than ``max_density`` of generic tokens (FGAA step 2)."""
    return torch.where(density.density > max_density, 0.0, weights)


def filter_bos(weights: Float[Tensor, " n"], density: FeatureDensity, share: float = 0.99) -> Float[Tensor, " n"]:
    """Zero where a feature peaks on position 0 in at least ``share`` of its documents (FGAA step 3)."""
    return torch.where(density.bos_features(share), 0.0, weights)


def signed_min_max(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``sign(x)(|x| − min|x|)/(max|x| − min|x|)``; all zero when the range is 0 (STA step 3)."""
    size = x.abs()
    low, high = size.min(), size.max()
    if high == low:
        return torch.zeros_like(x)
    return x.sign() * (size - low) / (high - low)
