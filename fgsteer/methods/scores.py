"""Selection scores: how strongly each feature separates the two sides, computed from moments alone.

A score is (d_sae,) float64: positive where a feature belongs to the positive side,
negative where it belongs to the negative side, and 0 where it does not tell them apart. A feature
that never fires scores 0. Below, ``d = mean⁺ − mean⁻`` and ``SSW = M2⁺ + M2⁻``, over the
n⁺ and n⁻ examples, N together. Swapping the sides negates every score.

    SCORES["welch_t"](contrast)      fgaa(stats, sae, score="welch_t")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import SelectionError
from fgsteer.statistics.contrast import Contrast


def mean_difference(contrast: Contrast) -> Float[Tensor, " n"]:
    """Mean difference ``d = mean⁺ − mean⁻``: FGAA's v_diff (arXiv 2501.09929), STA's amplitude (arXiv 2505.20322)."""
    return contrast.difference


def frequency(contrast: Contrast) -> Float[Tensor, " n"]:
    """Difference in how often a feature fires: ``max(n⁺, n⁻)·(fired⁺/n⁺ − fired⁻/n⁻)``.

    It is STA's Δf, scaled to the larger side (arXiv 2505.20322).
    """
    positive, negative = contrast.positive, contrast.negative
    # integers up to one division, so that equal shares score exactly 0 and ties stay ties
    return (positive.fired * negative.count - negative.fired * positive.count) / min(positive.count, negative.count)


def welch_t(contrast: Contrast) -> Float[Tensor, " n"]:
    """Welch's ``t = d / √(s⁺²/n⁺ + s⁻²/n⁻)``, where s² are the unbiased variances.

    Where neither side varies it is ±inf if the sides differ and 0 if they do not.
    Raises SelectionError for fewer than two examples a side.
    """
    positive, negative = contrast.positive, contrast.negative
    _check_count("welch_t", contrast, min(positive.count, negative.count) >= 2, "at least two examples a side")
    error = (positive.variance / positive.count + negative.variance / negative.count).sqrt()
    return _ratio(contrast.difference, error)


def f_statistic(contrast: Contrast) -> Float[Tensor, " n"]:
    """The F statistic of a one-way ANOVA, with a sign: ``F = sign(d)·(n⁺n⁻/N)·d² / (SSW/(N − 2))``.

    It ranks features as ``pearson`` does, and as ``welch_t`` does where the sides are of equal size.
    Where the sides do not vary it is ±inf if they differ and 0 if they do not.
    Raises SelectionError for fewer than three examples.
    """
    n = _total(contrast)
    _check_count("f_statistic", contrast, n >= 3, "at least three examples")
    difference = contrast.difference
    between = difference * difference.abs() * (contrast.positive.count * contrast.negative.count / n)
    return _ratio(between, _within(contrast) / (n - 2))


def pearson(contrast: Contrast) -> Float[Tensor, " n"]:
    """Correlation of a feature with the side: ``r = β/√(β² + SSW/N)``, ``β = d·√(n⁺n⁻)/N`` (CorrSteer).

    This is the point-biserial form over the examples' mean activations; CorrSteer
    (arXiv 2508.12535) pools generated tokens by their maximum. It is ±1 where the sides
    differ and do not vary, and 0 for a constant feature.
    """
    n = _total(contrast)
    slope = contrast.difference * ((contrast.positive.count * contrast.negative.count) ** 0.5 / n)
    return _ratio(slope, torch.hypot(slope, (_within(contrast) / n).sqrt()))


def mutual_information(contrast: Contrast) -> Float[Tensor, " n"]:
    """Mutual information ``H(fired) + H(side) − H(fired, side)`` in nats, signed by ``fired⁺/n⁺ − fired⁻/n⁻``.

    It is computed from the 2 × 2 table of how many examples of each side fired the feature at all,
    and is at most ln 2 in size.
    """
    positive, negative = contrast.positive, contrast.negative
    n, up, down = _total(contrast), positive.fired, negative.fired
    sides = torch.tensor([positive.count, negative.count], dtype=up.dtype, device=up.device)
    cells = torch.stack([up, positive.count - up, down, negative.count - down])
    fired = torch.stack([up + down, n - up - down])
    information = _entropy(fired, n) + _entropy(sides, n) - _entropy(cells, n)
    return information.clamp(min=0) * frequency(contrast).sign()  # rounding may leave it just below 0


SCORES: dict[str, Callable[[Contrast], Tensor]] = {
    "mean_difference": mean_difference,
    "amplitude": mean_difference,  # STA's name for it
    "frequency": frequency,
    "welch_t": welch_t,
    "f_statistic": f_statistic,
    "pearson": pearson,
    "mutual_information": mutual_information,
}


def _total(contrast: Contrast) -> int:
    return contrast.positive.count + contrast.negative.count


def _within(contrast: Contrast) -> Tensor:
    """Return SSW, the sum of squared deviations from the sides' own means."""
    return contrast.positive.m2 + contrast.negative.m2


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; the result is ±inf over 0, and 0 where both are 0."""
    return torch.where(numerator == 0, 0.0, numerator / denominator)


def _entropy(counts: Tensor, total: int) -> Tensor:
    """Compute the entropy in nats over the first dimension of counts that sum to total."""
    share = counts / total
    return -torch.xlogy(share, share).sum(0)


def _check_count(score: str, contrast: Contrast, enough: bool, expected: str) -> None:
    """Raise SelectionError for a score of too few examples."""
    if not enough:
        raise SelectionError(
            f"{contrast.positive.count} positive and {contrast.negative.count} negative examples",
            f"{expected} for the score {score}",
            "Add contrast data, or choose another score such as mean_difference",
        )
