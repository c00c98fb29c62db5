"""Pearson's r of many columns with one, in a stream, and the largest |r| that as many columns have by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.statistics.moments import Moments

GRID = 20_001  # points at which the density of r is added up
REACH = 14.0  # standard deviations of r beyond which it is 0 in float64


@dataclass(eq=False)
class Correlation:
    """Pearson's ``r = Σ(x − x̄)(y − ȳ)/√(Σ(x − x̄)²·Σ(y − ȳ)²)`` of columns x with y, from batches, in float64.

    Batches are merged as in ``Moments``, so that the result does not depend on how a stream is cut.
    """

    x: Moments
    y: Moments
    products: Float[Tensor, " columns"]

    @classmethod
    def empty(cls, columns: int) -> Correlation:
        """Of no rows."""
        return cls(Moments.empty(columns), Moments.empty(1), torch.zeros(columns, dtype=torch.float64))

    def add(self, x: Float[Tensor, "rows columns"], y: Float[Tensor, " rows"]) -> None:
        """Take up rows of x and their values of y."""
        rows, values = x.cpu().double(), y.cpu().double()[:, None]
        new = Moments.of(rows), Moments.of(values)
        inside = ((rows - new[0].mean) * (values - new[1].mean)).sum(0)
        if self.x.count:
            weight = self.x.count * new[0].count / (self.x.count + new[0].count)
            inside = inside + weight * (new[0].mean - self.x.mean) * (new[1].mean - self.y.mean)
        self.products = self.products + inside
        self.x, self.y = self.x + new[0], self.y + new[1]

    def r(self) -> Float[Tensor, " columns"]:
        """The correlation of each column; nan where it or y does not vary."""
        size = (self.x.m2 * self.y.m2).sqrt()
        # rounding leaves a constant column a variance of some 1e-32 of its square
        varies = self.x.m2 > 1e-24 * self.x.count * self.x.mean.square()
        varies &= bool(self.y.m2 > 1e-24 * self.y.count * self.y.mean.square())
        return torch.where(varies & (size > 0), (self.products / size).clamp(-1, 1), torch.nan)


@checked
def largest_chance_correlation(samples: int, columns: int, quantile: float = 0.5) -> float:
    """The largest |r| that unrelated columns have with a variable by chance, or rather a quantile of it.

    For independent columns ``P(max |r| ≤ x) = P(|r| ≤ x)^columns``, where r of n normal samples has the density
    ``(1 − r²)^((n − 4)/2)`` up to a factor. Columns that go together make it smaller, and heavy tails, as features have
    that fire on few samples, larger.

    Args:
        samples: n, the number of samples, at least 3.
        columns: The number of columns that are compared.
        quantile: Which quantile; 0.5 is the median.

    Returns:
        The correlation.
    """
    check_range("samples", samples, 3, MAX_COUNT, whole=True)
    check_range("columns", columns, 1, MAX_COUNT, whole=True)
    check_range("quantile", quantile, 1e-9, 1 - 1e-9)
    tail = -math.expm1(math.log(quantile) / columns)  # the probability that a column is beyond
    # with r = sin θ the density of θ is cos(θ)^(n − 3)
    top = min(math.pi / 2, REACH / math.sqrt(samples))
    theta = torch.linspace(0, top, GRID, dtype=torch.float64)
    density = torch.cos(theta) ** (samples - 3)
    steps = (density[1:] + density[:-1]) / 2
    beyond = torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])
    beyond = beyond / beyond[0]
    place = int((beyond > tail).sum()) - 1  # the last point with more than that beyond it
    low, high = float(beyond[place]), float(beyond[place + 1])
    share = (low - tail) / (low - high)
    return math.sin(float(theta[place]) + share * float(theta[1]))
