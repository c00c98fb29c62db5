"""How many texts a vector needs: how near the difference of means of n texts a side is to that of all texts.

expected_cosine(stats, 20)          0.93, without building a vector or running a model
samples_for(stats, 0.95)            29 texts a side
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import ContrastStatistics

Target = Literal["population", "full"]


@dataclass(frozen=True)
class _Noise:
    """Squared norms of a difference of means, and of what one example adds to it by chance.

    Args:
        difference: ``‖Δ‖²`` of the examples at hand.
        traces: ``tr Σ`` of each independent part: of the pairs' differences, or of the two sides.
        counts: The number of examples of each part.
    """

    difference: float
    traces: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def one(self) -> float:
        """``tr Σ`` of one example a side."""
        return math.fsum(self.traces)

    @property
    def signal(self) -> float:
        """``‖μ‖² = ‖Δ‖² − tr Σ / N``, which is unbiased. Raises SelectionError where it is not above 0."""
        by_chance = math.fsum(trace / count for trace, count in zip(self.traces, self.counts, strict=True))
        if not self.difference > by_chance:
            raise SelectionError(
                f"sides of {' and '.join(map(str, self.counts))} examples, whose means differ by "
                f"{math.sqrt(self.difference):.3g} where chance alone makes {math.sqrt(by_chance):.3g}",
                "two sides whose means differ by more than chance",
                "collect statistics of more texts, or at another hookpoint",
            )
        return self.difference - by_chance


@checked
def expected_cosine(
    stats: ContrastStatistics,
    samples: int,
    *,
    hookpoint: Hookpoint | str | int | None = None,
    to: Target = "population",
) -> float:
    """The cosine to expect between the vector of n texts a side and that of all texts there could be.

    ``cos ≈ (1 + tr Σ / (n ‖μ‖²))^{−1/2}``, where Σ is the covariance of ``h⁺ − h⁻``, and ``‖μ‖² = ‖Δ‖² − tr Σ / N``.
    Both are estimated without bias. It takes the noise for perpendicular to μ, which holds where it has many
    directions. Where returns diminish is therefore a property of the data, not a number of texts that holds for all
    (arXiv 2505.03189).

    Where all texts are pairs and ``keep_pooled`` kept them, Σ is that of the pairs' differences; else it is
    ``Σ⁺ + Σ⁻``, which is larger than that where the texts of a pair resemble each other.

    Args:
        stats: Statistics of the residual stream.
        samples: The number n of pairs, or of texts on each side.
        hookpoint: Where, if the statistics hold several hookpoints.
        to: "population", or "full" for the cosine to the vector of just the texts at hand, of which the n are drawn
            without replacement: ``(1 + tr Σ (1/n − 1/N) / ‖Δ‖²)^{−1/2}``.

    Raises:
        DataError: n is below 1, above the number of texts for ``to="full"``, or a side has a single text.
        SelectionError: The means differ by no more than chance makes them differ.
        PairingError: The statistics do not hold this hookpoint.
    """
    noise = _noise(stats, hookpoint)
    check_range("samples", samples, 1, MAX_COUNT if to == "population" else min(noise.counts), whole=True)
    if to == "population":
        return 1 / math.sqrt(1 + noise.one / (samples * noise.signal))
    if to != "full":
        raise DataError(f"to = {to!r:.40}", "'population' or 'full'")
    if not noise.difference > 0:
        raise SelectionError("the same mean on both sides", "sides whose means differ", "check the contrast set")
    left = zip(noise.traces, noise.counts, strict=True)
    return 1 / math.sqrt(1 + math.fsum(t * (1 / samples - 1 / count) for t, count in left) / noise.difference)


@checked
def samples_for(stats: ContrastStatistics, cosine: float, *, hookpoint: Hookpoint | str | int | None = None) -> int:
    """The number of texts a side whose vector has an expected cosine to that of all texts there could be.

    ``n = tr Σ / ‖μ‖² · cos² / (1 − cos²)``, rounded up: ``expected_cosine`` solved for n.

    Args:
        stats: Statistics of the residual stream.
        cosine: The cosine, above 0 and below 1.
        hookpoint: As in ``expected_cosine``.

    Raises:
        DataError: The cosine is not between 0 and 1, or a side has a single text.
        SelectionError: The means differ by no more than chance makes them differ.
        PairingError: The statistics do not hold this hookpoint.
    """
    check_range("cosine", cosine, 0, 1)
    if not 0 < cosine < 1:
        raise DataError(f"cosine = {cosine}", "a number above 0 and below 1", "no finite number of texts reaches 1")
    noise = _noise(stats, hookpoint)
    return max(1, math.ceil(noise.one / noise.signal * cosine**2 / (1 - cosine**2) - 1e-9))  # rounding of whole numbers


def _noise(stats: ContrastStatistics, hookpoint: Hookpoint | str | int | None) -> _Noise:
    """What ``expected_cosine`` needs of statistics. Raises DataError for a side of one text."""
    at, contrast = stats.at("residual", hookpoint)
    sides = (contrast.positive, contrast.negative)
    if min(side.count for side in sides) < 2:
        raise DataError(
            f"sides of {sides[0].count} and {sides[1].count} texts", "at least two on each", "one text has no spread"
        )
    difference = contrast.difference
    pooled = stats.pooled.get(at)
    if pooled is not None and pooled.pairs == len(pooled.positive) == len(pooled.negative):
        rows = pooled.positive.double() - pooled.negative.double() - difference.cpu()
        trace = float(rows.square().sum()) / (len(rows) - 1)
        return _Noise(float(difference.square().sum()), (trace,), (len(rows),))
    traces = tuple(float(side.variance.sum()) for side in sides)
    return _Noise(float(difference.square().sum()), traces, tuple(side.count for side in sides))
