"""How near vectors of few texts come to the vector of all of them, measured by resampling and by a closed form.

print(sample_curve(stats, [5, 10, 20, 40]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import ContrastStatistics, Pooled
from fgsteer.statistics.sample_size import expected_cosine
from fgsteer.vector import SteeringVector

SIZES = (5, 10, 20, 40, 80, 160, 320)  # that the protocol asks for
RESAMPLES = 20
ENDS = (0.05, 0.95)  # quantiles of the resamples that a row shows


@dataclass(frozen=True, repr=False)
class SamplePoint(OneLineRepr):
    """Vectors of n texts a side beside the vector of all.

    Args:
        samples: The number n of pairs, or of texts a side.
        cosine: The mean over resamples of the cosine to the vector of all texts at hand.
        low: The 5 % quantile of these cosines.
        high: The 95 % quantile.
        expected: The same cosine by the closed form ``expected_cosine(stats, n, to="full")``.
        population: The cosine to expect to the vector of all texts there could be.
    """

    samples: int
    cosine: float
    low: float
    high: float
    expected: float
    population: float

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {
            "texts a side": self.samples,
            "cosine": self.cosine,
            "5 %": self.low,
            "95 %": self.high,
            "expected": self.expected,
            "to all there could be": self.population,
        }


@checked
def resampled_vectors(
    stats: ContrastStatistics,
    samples: int,
    *,
    resamples: int = RESAMPLES,
    hookpoint: Hookpoint | str | int | None = None,
    seed: int = 0,
) -> list[SteeringVector]:
    """Differences of means of n texts a side, which are drawn without replacement from those at hand.

    Where all texts are pairs, pairs are drawn; else each side by itself.

    Args:
        stats: Statistics that were collected with ``keep_pooled=True``.
        samples: The number n of pairs, or of texts a side.
        resamples: How many vectors.
        hookpoint: Where, if the statistics hold several hookpoints.
        seed: The seed of the draws.

    Raises:
        DataError: The examples were not kept, or there are fewer than n.
        PairingError: The statistics do not hold this hookpoint.
    """
    at, pooled = _pooled(stats, hookpoint)
    sides = (pooled.positive.double(), pooled.negative.double())
    check_range("samples", samples, 1, min(map(len, sides)), whole=True)
    check_range("resamples", resamples, 1, MAX_COUNT, whole=True)
    generator = torch.Generator().manual_seed(seed)
    about = provenance("caa", {"samples": int(samples), "seed": int(seed)}, stats)
    vectors = []
    for _ in range(resamples):
        positive, negative = _draw(pooled, int(samples), generator)
        difference = sides[0][positive].mean(0) - sides[1][negative].mean(0)
        vectors.append(SteeringVector(difference.float(), at, provenance=about))
    return vectors


@checked
def sample_curve(
    stats: ContrastStatistics,
    sizes: Sequence[int] = SIZES,
    *,
    resamples: int = RESAMPLES,
    hookpoint: Hookpoint | str | int | None = None,
    seed: int = 0,
) -> Table[SamplePoint]:
    """The cosine of vectors of n texts to the vector of all, for several n (arXiv 2505.03189).

    Args:
        stats: Statistics that were collected with ``keep_pooled=True``.
        sizes: The numbers n of pairs, or of texts a side; those above what is at hand are left out.
        resamples: How many times n texts are drawn.
        hookpoint: As in ``resampled_vectors``.
        seed: The seed of the draws.

    Raises:
        DataError: The examples were not kept, or no size is as small as what is at hand.
        SelectionError: The sides' means differ by no more than chance makes them differ.
    """
    at, pooled = _pooled(stats, hookpoint)
    most = min(len(pooled.positive), len(pooled.negative))
    fitting = [size for size in sizes if size <= most]
    if not fitting:
        raise DataError(f"sizes {list(sizes)} for {most} texts a side", f"at least one of at most {most}")
    whole = stats.at("residual", at)[1].difference.cpu()
    points: Table[SamplePoint] = Table()
    for size in fitting:
        vectors = resampled_vectors(stats, size, resamples=resamples, hookpoint=at, seed=seed)
        rows = torch.stack([vector.direction.double() for vector in vectors])
        cosines = torch.nn.functional.cosine_similarity(rows, whole[None], dim=1)
        low, high = (float(torch.quantile(cosines, end)) for end in ENDS)
        full = expected_cosine(stats, size, hookpoint=at, to="full")
        points.append(
            SamplePoint(int(size), float(cosines.mean()), low, high, full, expected_cosine(stats, size, hookpoint=at))
        )
    return points


def _pooled(stats: ContrastStatistics, hookpoint: Hookpoint | str | int | None) -> tuple[Hookpoint, Pooled]:
    """The examples at a hookpoint. Raises DataError where they were not kept."""
    at, _ = stats.at("residual", hookpoint)
    if at not in stats.pooled:
        raise DataError(
            f"statistics without the single examples at {at}",
            "the pooled activations of each text, which are drawn from",
            "collect with keep_pooled=True",
        )
    return at, stats.pooled[at]


def _draw(
    pooled: Pooled, samples: int, generator: torch.Generator
) -> tuple[Int[Tensor, " samples"], Int[Tensor, " samples"]]:
    """The rows of either side that one resample takes."""
    positives, negatives = len(pooled.positive), len(pooled.negative)
    positive = torch.randperm(positives, generator=generator)[:samples]
    if pooled.pairs == positives == negatives:
        return positive, positive
    return positive, torch.randperm(negatives, generator=generator)[:samples]
