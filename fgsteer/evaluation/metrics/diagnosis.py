"""How reliable a vector will be, from contrast statistics, before anything is steered.

Where differences point every way, or the two sides overlap along a vector, steering with it is
unreliable (arXiv 2505.22637). Both can be read at every layer from one pass over the data.

    stats = collect(model, tokenizer, pairs, hookpoints="blocks.2.hook_resid_post", keep_pooled=True)
    diagnose(stats).agreement
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import Contrast, ContrastStatistics, Pooled
from fgsteer.vector import SteeringVector


@dataclass(frozen=True, repr=False)
class Diagnosis(OneLineRepr):
    """What ``diagnose`` found; ``agreement`` and ``d_prime`` are nan where the examples were not kept.

    ``norm`` is that of the difference of the sides' means, in residual-stream units. ``pairs`` is how
    many pairs ``agreement`` is over, 0 if it is over single examples.
    """

    hookpoint: Hookpoint
    positives: int
    negatives: int
    pairs: int
    norm: float
    rms_agreement: float
    agreement: float
    d_prime: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; what is not finite is null."""
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in vars(self).items()}
        return {**plain, "hookpoint": str(self.hookpoint)}


@checked
def diagnose(
    stats: ContrastStatistics, vector: SteeringVector | None = None, *, hookpoint: Hookpoint | str | None = None
) -> Diagnosis:
    """Geometric predictors of how well v steers: by default the difference of means ``Δ = μ⁺ − μ⁻``, which is CAA's.

    From the moments: ``rms_agreement = v̂·Δ / √(‖Δ‖² + tr Σ⁺ + tr Σ⁻)``, the mean of the differences of any positive and
    any negative example along v over their root mean square norm; Σ divides by n.

    From the examples, where ``collect(..., keep_pooled=True)`` kept them: ``agreement``, the mean cosine
    to v of the pairs' differences ``hᵢ⁺ − hᵢ⁻``, or without pairs of every example's difference to the
    other side's mean, ``hᵢ⁺ − μ⁻`` and ``μ⁺ − hᵢ⁻`` (larger numbers: not to be compared with those
    of pairs), a difference of 0 counting 0; and ``d_prime = (μ⁺ − μ⁻) / √((σ⁺² + σ⁻²)/2)`` of the
    projections on v, σ² unbiased (arXiv 2505.22637).

    All flatter a vector built from the same examples, most where they are few: diagnose it on
    others (``vector``, at its hookpoint). Raises PairingError for a hookpoint that was not
    collected or a vector of another width, SelectionError for a direction of norm 0.
    """
    at, contrast = stats.at("residual", vector.hookpoint if vector is not None else hookpoint)
    difference = contrast.difference
    direction = difference if vector is None else vector.direction.detach().cpu().double()
    if direction.shape != difference.shape:
        raise PairingError(f"a vector of width {len(direction)}", f"{len(difference)}, that of the statistics at {at}")
    if not direction.norm() > 0:
        raise SelectionError("a direction of norm 0", "sides that differ", "check the contrast set")
    unit = direction / direction.norm()
    pooled = stats.pooled.get(at)
    return Diagnosis(
        at,
        contrast.positive.count,
        contrast.negative.count,
        0 if pooled is None else pooled.pairs,
        float(difference.norm()),
        _rms_agreement(contrast, unit),
        math.nan if pooled is None else _agreement(pooled, unit),
        math.nan if pooled is None else _d_prime(pooled, unit),
    )


def _rms_agreement(contrast: Contrast, unit: Float[Tensor, " d_model"]) -> float:
    spread = sum(float(side.m2.sum()) / side.count for side in (contrast.positive, contrast.negative))
    difference = contrast.difference
    return float(unit @ difference) / math.sqrt(float(difference.square().sum()) + spread)


def _agreement(pooled: Pooled, unit: Float[Tensor, " d_model"]) -> float:
    positive, negative = pooled.positive.double(), pooled.negative.double()
    if pooled.pairs:
        rows = positive[: pooled.pairs] - negative[: pooled.pairs]
    else:
        rows = torch.cat([positive - negative.mean(0), positive.mean(0) - negative])
    norms = rows.norm(dim=1)
    return float(torch.where(norms > 0, rows @ unit / norms, 0.0).mean())


def _d_prime(pooled: Pooled, unit: Float[Tensor, " d_model"]) -> float:
    positive, negative = pooled.positive.double() @ unit, pooled.negative.double() @ unit
    if min(len(positive), len(negative)) < 2:
        return math.nan
    return float((positive.mean() - negative.mean()) / ((positive.var() + negative.var()) / 2).sqrt())
