"""Moments of examples, and how they are named and stored as tensors.

Kept are the count, the mean and the sum of squared deviations of the examples, and on how many of them each
value was positive: O(width) memory, whatever the number of examples. Statistics files and the shards of
``collect`` store moments in the same way, by ``moment_tensors`` and ``load_moments``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.hookpoints import Hookpoint

Space = Literal["residual", "feature"]
Key = tuple[Space, Hookpoint, bool]  # a space, a hookpoint, and whether the examples are positive
MAX_COUNT = 2**53  # a float64 holds every whole number below it


@dataclass(frozen=True, eq=False, repr=False)
class Moments(OneLineRepr):
    """Count, mean (n,), sum of squared deviations ``m2`` (n,) and firing count (n,) of examples, in float64.

    Adding two merges them exactly: ``M2 = M2ₐ + M2_b + δ² · nₐ n_b / (nₐ + n_b)`` with ``δ = mean_b − meanₐ``
    (Chan, Golub & LeVeque 1979).
    """

    count: int
    mean: Float[Tensor, " n"]
    m2: Float[Tensor, " n"]
    fired: Float[Tensor, " n"]

    @classmethod
    def of(cls, examples: Float[Tensor, "count n"]) -> Moments:
        """Compute the moments of the rows of ``examples (count, n)``."""
        wide = torch.float32 if examples.device.type == "mps" else torch.float64
        rows = examples.to(wide)
        mean = rows.mean(0)
        return cls(
            len(rows),
            mean.double(),
            (rows - mean).square().sum(0).double(),
            (rows > 0).sum(0).double(),
        )

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no example."""
        zero = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zero, zero, zero)

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise PairingError(
                f"moments of widths {len(self.mean)} and {len(other.mean)}",
                "moments of equal widths",
                "add moments that were taken at the same hookpoint of the same model",
            )
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta.square() * (self.count * other.count / count),
            self.fired + other.fired,
        )

    @property
    def variance(self) -> Float[Tensor, " n"]:
        """Unbiased variance (n,), ``M2 / (count − 1)``; nan for fewer than two examples."""
        return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)

    def cpu(self) -> Moments:
        """Return the same moments on the CPU."""
        return Moments(self.count, self.mean.cpu(), self.m2.cpu(), self.fired.cpu())


def key_name(key: Key) -> str:
    """Name the moments of a key in files, as in "residual/blocks.2.hook_resid_post/positive"."""
    space, hookpoint, positive = key
    return f"{space}/{hookpoint}/{'positive' if positive else 'negative'}"


def parse_key(name: str) -> Key:
    """Parse a name that ``key_name`` gave. Raises ValueError for any other."""
    space, hookpoint, side = name.split("/")
    if side not in ("positive", "negative"):
        raise ValueError(f"{name!r} names no side")
    if space == "residual":
        return "residual", Hookpoint.parse(hookpoint), side == "positive"
    if space == "feature":
        return "feature", Hookpoint.parse(hookpoint), side == "positive"
    raise ValueError(f"{name!r} names no space")


def moment_tensors(name: str, moments: Moments) -> dict[str, Tensor]:
    """Return the tensors of moments under their names in a file; the count is stored beside them."""
    return {f"{name}/mean": moments.mean, f"{name}/m2": moments.m2, f"{name}/fired": moments.fired}


def load_moments(tensors: Mapping[str, Tensor], name: str, count: int) -> Moments:
    """Return the moments that ``moment_tensors`` stored. Raises KeyError, or ValueError where they do not fit."""
    mean, m2, fired = (tensors[f"{name}/{part}"].double() for part in ("mean", "m2", "fired"))
    if not 1 <= count < MAX_COUNT or mean.ndim != 1 or not mean.shape == m2.shape == fired.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (mean, m2, fired))
        raise ValueError(f"{name} has the count {count} and the shapes {shapes}")
    return Moments(count, mean, m2, fired)
