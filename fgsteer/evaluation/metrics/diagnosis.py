"""How reliable a vector will be, from contrast statistics, before anything is steered.

Where differences point every way, or the two sides overlap along a vector, steering with it is unreliable (arXiv
2505.22637). Both can be measured at every layer in one pass over the data.

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
    """How reliable a vector will be; see ``diagnose`` for the formulas.

    Args:
        hookpoint: Where the activations were collected.
        positives: Number of positive examples.
        negatives: Number of negative examples.
        pairs: Number of pairs that ``agreement`` is over; 0 where it is over single texts.
        norm: Norm of the difference of the sides' means, in units of the residual stream.
        rms_agreement: Agreement of the differences along the vector, from the moments alone.
        agreement: Mean cosine of the differences to the vector; nan where the examples were not kept.
        d_prime: Separation of the sides along the vector, in standard deviations; nan likewise.
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
    """Geometric predictors of how well a vector v steers (arXiv 2505.22637).

    From the moments: ``rms_agreement = v̂·Δ / √(‖Δ‖² + tr Σ⁺ + tr Σ⁻)``, where ``Δ = μ⁺ − μ⁻``. It is the mean, over
    all pairs of a positive and a negative example, of their difference along v, divided by the root mean square norm
    of these differences; Σ divides by n.

    From the examples, where ``collect(..., keep_pooled=True)`` kept them: ``agreement`` is the mean cosine to v of the
    pairs' differences ``hᵢ⁺ − hᵢ⁻``. Without pairs it is that of every example's difference to the other side's mean,
    ``hᵢ⁺ − μ⁻`` and ``μ⁺ − hᵢ⁻``, which gives larger numbers: do not compare the two. A difference of 0 counts 0.
    ``d_prime = (μ⁺ − μ⁻) / √((σ⁺² + σ⁻²)/2)`` of the projections on v, where σ² is unbiased.

    All of these flatter a vector that was built from the same examples, most where they are few: diagnose a vector on
    other texts than those that it was built from.

    Args:
        stats: Statistics of a contrast set.
        vector: The vector, at its hookpoint; by default the difference of means Δ, which is CAA's vector.
        hookpoint: Where, without a vector; by default the one hookpoint of the statistics.

    Raises:
        PairingError: The hookpoint was not collected, or the vector has another width.
        SelectionError: The direction has norm 0.
    """
    at, contrast = stats.at("residual", vector.hookpoint if vector is not None else hookpoint)
    difference = contrast.difference
    direction = difference if vector is None else vector.direction.detach().cpu().double()
    if direction.shape != difference.shape:
        raise PairingError(
            f"a vector of width {len(direction)}",
            f"width {len(difference)}, that of the statistics at {at}",
            "collect statistics on the model that the vector was made for",
        )
    if not direction.norm() > 0:
        raise SelectionError(
            "a direction of norm 0", "two sides whose means differ", "check that the contrast set's sides differ"
        )
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
