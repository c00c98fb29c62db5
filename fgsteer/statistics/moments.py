"""Contrast statistics: one streaming pass that yields all that every method needs.

An example contributes the mean over its selected tokens, of the residual stream and of
the SAE's feature activations (encoded first, then averaged). Kept are count, mean and
M2 of these per side, and how many examples fired each feature: O(d_model + d_sae)
memory, whatever the number of texts. Statistics of disjoint data add up. On request the
examples' mean activations are kept as well, for what moments cannot tell (``diagnose``).

    stats = collect(model, tokenizer, pairs, sae=sae)
    stats.save("stats.safetensors"); both = stats + other
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError
from fgsteer.errors.reprs import OneLineRepr


@dataclass(frozen=True, eq=False, repr=False)
class Moments(OneLineRepr):
    """Count, mean (n,), sum of squared deviations M2 (n,) and firing count (n,) of examples, in float64.

    Adding two merges them exactly (Chan, Golub & LeVeque 1979).
    """

    count: int
    mean: Float[Tensor, " n"]
    m2: Float[Tensor, " n"]
    fired: Float[Tensor, " n"]

    @classmethod
    def of(cls, examples: Float[Tensor, "count n"]) -> Moments:
        """Moments of the rows of (count, n)."""
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
        """Moments of no example."""
        zero = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zero, zero, zero)

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise PairingError(f"moments of widths {len(self.mean)} and {len(other.mean)}", "equal widths")
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
        """Unbiased variance (n,); nan for fewer than two examples."""
        return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)

    def cpu(self) -> Moments:
        """The same moments on the CPU."""
        return Moments(self.count, self.mean.cpu(), self.m2.cpu(), self.fired.cpu())
