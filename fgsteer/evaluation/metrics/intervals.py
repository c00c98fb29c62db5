"""Intervals of means and of paired differences over texts that come in clusters, such as those of one prompt.

A stratum is one concept's {unit: value}, and a unit is a text's (prompt, seed). An average over concepts is the mean
of the strata's means: the concepts stay as they are, and the prompts are what another sample would change. Texts of
one prompt resemble each other and move all concepts together, so prompts are what is counted.

    mean_interval([paired_differences(fgaa[c], caa[c]) for c in concepts], lambda unit: unit.prompt)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

from fgsteer.errors import DataError, PairingError
from fgsteer.errors.wording import count

LEVEL = 0.95  # coverage of intervals
COMPLETE = "let the run finish, or leave out what is incomplete with run.only(...)"
NEWTON_STEPS = 50
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
Key = TypeVar("Key", bound=Hashable)
Cells = dict[Hashable, list[float]]


@dataclass(frozen=True)
class Interval:
    """A mean and the two ends of its interval; it unpacks to these three.

    Args:
        mean: The mean, in the units of the values.
        low: The lower end of the interval.
        high: The upper end of the interval.
        clusters: Number of prompts, or of texts where each stands for itself.
        units: Number of texts.
        effective: How many independent texts would tell as much, ``units / (1 + (m − 1)·ICC)``.
    """

    mean: float
    low: float
    high: float
    clusters: int = 0
    units: int = 0
    effective: float = 0.0

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.low, self.high))

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def mean_interval(
    strata: Sequence[Mapping[Any, float]], cluster: Callable[[Any], Hashable], *, level: float = LEVEL
) -> Interval:
    """Mean over strata of each one's mean, with its cluster-robust t interval.

    With ``m_s`` the mean of the ``n_s`` units of stratum s, ``m = Σ_s m_s / S``. What cluster g adds to m is
    ``z_g = Σ_s Σ_{u in g} (x_su − m_s) / (n_s S)``, all strata together, and the interval is
    ``m ± t_{G−1} √(G/(G−1) Σ_g z_g²)`` (Liang & Zeger 1986, with G − 1 degrees of freedom: Cameron & Miller 2015,
    section VI). For clusters of one size this is the t interval of the G cluster means, which covers as it says
    for normal means however much a cluster's texts resemble each other (skewed scores of 8 prompts: 92 %).
    A percentile bootstrap of clusters is too narrow by ``√((G−1)/G)`` and for want of the t quantile: 87 % at
    G = 8. Strata without a common cluster are independent: their variances add, with Satterthwaite's degrees
    of freedom (1946).

    The effective number of units comes from the intraclass correlation of the analysis of variance, kept within
    [0, 1], and m, the mean size of a unit's cluster: ``N / (1 + (m − 1)·ICC)`` (Kish 1965).

    Args:
        strata: For each concept, {unit: value}.
        cluster: The cluster of a unit, such as its prompt.
        level: Coverage of the interval.

    Returns:
        The mean with its interval.

    Raises:
        DataError: There is no stratum, one has fewer than two clusters, or a value is not finite.
    """
    if not strata:
        raise DataError("no concepts", "values of at least one concept, to take an interval of")
    means: list[float] = []
    deviations: dict[Any, float] = {}
    blocks: list[set[Hashable]] = []
    for stratum in strata:
        clusters = {cluster(unit) for unit in stratum}
        if len(clusters) < 2 or not all(map(math.isfinite, stratum.values())):
            raise DataError(
                f"{count(len(stratum), 'value')} of {count(len(clusters), 'prompt')}, such as "
                f"{next(iter(stratum.items()), None)}",
                "finite values of at least two prompts",
                "measure more prompts: texts of one prompt do not tell how another one would do",
            )
        means.append(math.fsum(stratum.values()) / len(stratum))
        for unit, value in stratum.items():
            share = (value - means[-1]) / (len(stratum) * len(strata))
            deviations[unit] = deviations.get(unit, 0.0) + share
        joined = clusters.union(*(block for block in blocks if block & clusters))
        blocks = [*(block for block in blocks if not block & clusters), joined]
    cells: Cells = {}
    for unit, deviation in deviations.items():
        cells.setdefault(cluster(unit), []).append(deviation)
    mean = math.fsum(means) / len(means)
    half = _half_width(cells, blocks, level)
    return Interval(mean, mean - half, mean + half, len(cells), len(deviations), _effective(cells, len(blocks)))


def _half_width(cells: Cells, blocks: Sequence[set[Hashable]], level: float) -> float:
    """Half the width of the t interval of what units add to the mean, by cluster; blocks share no cluster."""
    variances = []
    for block in blocks:
        squares = math.fsum(math.fsum(cells[name]) ** 2 for name in block)
        variances.append((squares * len(block) / (len(block) - 1), len(block) - 1))
    total = math.fsum(variance for variance, _ in variances)
    if total == 0:
        return 0.0
    freedom = total**2 / math.fsum(variance**2 / degrees for variance, degrees in variances)
    return t_quantile(level, freedom) * math.sqrt(total)


def _effective(cells: Cells, blocks: int) -> float:
    """The effective number of units, from what they add to the mean, by cluster."""
    sizes = [len(cell) for cell in cells.values()]
    units = sum(sizes)
    size = math.fsum(n * n for n in sizes) / units
    if units == len(cells):
        return float(units)
    between = math.fsum(math.fsum(cell) ** 2 / len(cell) for cell in cells.values())
    within = math.fsum(deviation**2 for cell in cells.values() for deviation in cell) - between
    between /= len(cells) - blocks
    within = max(0.0, within) / (units - len(cells))
    usual = (units - size) / (len(cells) - 1)  # size of a cluster, for clusters of unequal sizes
    spread = between + (usual - 1) * within
    correlation = min(1.0, max(0.0, (between - within) / spread)) if spread > 0 else 0.0
    return units / (1 + (size - 1) * correlation)


def t_quantile(level: float, freedom: float) -> float:
    """The t for which Student's variable of ``freedom`` ν degrees of freedom is within ±t with probability ``level``.

    ``t = √ν tan θ`` where ``∫₀^θ cos^{ν−1}`` is the share ``level`` of ``∫₀^{π/2} cos^{ν−1}``; the integral is
    concave in θ, so that Newton's method from the normal quantile, which is smaller, rises to it.
    """
    logarithm = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    target = level * math.sqrt(math.pi) / 2 * math.exp(logarithm)
    angle = math.atan(NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(freedom))
    for _ in range(NEWTON_STEPS):
        integral = angle / 2 * float(_WEIGHTS @ np.cos((_NODES + 1) * angle / 2) ** (freedom - 1))
        step = (target - integral) / math.cos(angle) ** (freedom - 1)
        angle += step
        if abs(step) <= 1e-14 * angle:
            break
    return math.sqrt(freedom) * math.tan(angle)


def paired_differences(
    first: Mapping[Key, float], second: Mapping[Key, float], what: str = "two methods"
) -> dict[Key, float]:
    """Differences ``first − second``, unit by unit; ``what`` is being compared stands in the error.

    Raises PairingError for units that only one of them has.
    """
    unpaired = first.keys() ^ second.keys()
    if unpaired:
        raise PairingError(
            f"{what}, of which {len(unpaired)} of {len(first.keys() | second.keys())} (prompt, seed) units are on one "
            f"side only, such as {min(unpaired, key=str)}",
            "the same prompts and seeds for both methods",
            COMPLETE,
        )
    return {unit: first[unit] - second[unit] for unit in first}


def wilson(successes: float, trials: int, level: float = LEVEL) -> Interval:
    """A share with Wilson's score interval (1927); a success may count half."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = successes / trials
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * trials)) / trials) / (1 + z2 / trials)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), trials, trials, float(trials))
