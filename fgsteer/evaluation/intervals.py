"""Bootstrap intervals of means and of paired differences, over units that are (prompt, seed).

A stratum is one concept's {unit: value}. An average over concepts is a mean of stratum means:
the concepts stay, the units are drawn again within each. Strata of the same units take the same
draws, for a prompt and its random numbers move every concept together, and draws of their own
would give intervals that are too narrow.

    bootstrap([paired_differences(fgaa[c], caa[c]) for c in concepts])     # mean, low, high
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from fgsteer.errors import DataError, PairingError

DRAWS = 10_000
COMPLETE = "let the run finish, or leave out what is incomplete with run.only(...)"
Key = TypeVar("Key", bound=Hashable)


class Interval(NamedTuple):
    """A mean and the two ends of its interval, in the values' units."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def bootstrap(
    strata: Sequence[Mapping[Any, float]], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Mean over strata of each one's mean, with its percentile interval.

    ``m = Σ_s mean_u x_su / S``; each draw takes as many units of a stratum as it has, with
    replacement, and the interval runs from the ``(1 − level)/2`` quantile of the drawn m to the
    ``(1 + level)/2`` (Efron 1979). Units are sortable keys. The same arguments give the same interval.
    Raises DataError for no stratum, one of fewer than two units, or values that are not finite.
    """
    groups: dict[tuple[Any, ...], Float[np.ndarray, " n"]] = {}
    for stratum in strata:
        units = tuple(sorted(stratum))
        values = np.array([stratum[unit] for unit in units], dtype=np.float64)
        if len(units) < 2 or not np.isfinite(values).all():
            raise DataError(
                f"{len(units)} values of {units[:1]} …",
                "at least two, all finite",
                "an interval needs several prompts or seeds in each half",
            )
        groups[units] = groups.get(units, 0.0) + values / len(strata)
    if not groups:
        raise DataError("no values to take an interval of", "at least one concept")
    drawn = np.zeros(draws)
    for number, units in enumerate(sorted(groups)):
        drawn += _shares(len(units), draws, seed, number) @ groups[units]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sum(values.mean() for values in groups.values())), float(low), float(high))


def paired_differences(of: Mapping[Key, float], to: Mapping[Key, float], what: str = "two methods") -> dict[Key, float]:
    """``of − to``, unit by unit. Raises PairingError, naming one, for units that only one side has."""
    alone = of.keys() ^ to.keys()
    if alone:
        raise PairingError(
            f"{what}: {len(alone)} of {len(of.keys() | to.keys())} (prompt, seed) units on one side only, "
            f"such as {min(alone, key=str)}",
            "the same prompts and seeds on both",
            COMPLETE,
        )
    return {unit: of[unit] - to[unit] for unit in of}


def draw(n: int, draws: int = DRAWS, seed: int = 0, number: int = 0) -> Int[np.ndarray, "draws n"]:
    """Which units each draw takes: indices below n, those of the ``number``-th set of units."""
    return np.random.default_rng([seed, number]).integers(0, n, (draws, n))


@lru_cache(maxsize=4)
def _shares(n: int, draws: int, seed: int, number: int) -> Float[np.ndarray, "draws n"]:
    """The share of each draw that falls on each unit, so that a drawn mean is a product with the values."""
    flat = draw(n, draws, seed, number) + n * np.arange(draws)[:, None]
    counts: Float[np.ndarray, "draws n"] = np.bincount(flat.ravel(), minlength=draws * n).reshape(draws, n) / n
    return counts
