"""Attention sinks among the tokens that are read: a few huge activations, which decide every mean.

sinks = AttentionSinks()
sinks.add(activations, hookpoint)        (tokens, width), batch after batch
sinks.warn()
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import FgsteerWarning
from fgsteer.errors.checks import warn
from fgsteer.errors.wording import count
from fgsteer.models.hookpoints import Hookpoint

MASSIVE = 10.0  # times the median norm of a batch


@dataclass(eq=False)
class AttentionSinks:
    """Counts tokens that were read and whose activations are many times as large as those of others.

    A few of them, often the first tokens of texts without BOS, decide every mean.
    """

    tokens: int = 0
    massive: int = 0
    largest: tuple[float, float, Hookpoint | None] = (0.0, 0.0, None)  # norm, median norm, where

    def add(self, values: Float[Tensor, "tokens width"], hookpoint: Hookpoint) -> None:
        """Count the tokens of a batch whose norm is more than MASSIVE times the median."""
        norms = values.float().norm(dim=-1)
        if not len(norms):
            return
        median, largest = float(norms.median()), float(norms.max())
        self.tokens += len(norms)
        self.massive += int((norms > MASSIVE * median).sum())
        if largest > MASSIVE * median and largest > self.largest[0]:
            self.largest = (largest, median, hookpoint)

    def warn(self) -> None:
        """Warn FgsteerWarning where there were any."""
        largest, median, hookpoint = self.largest
        if not self.massive:
            return
        warn(
            f"{count(self.massive, 'token')} of the {self.tokens:,} that were read have activations of more than "
            f"{MASSIVE:g} times the median norm (up to {largest:,.0f} against {median:,.0f} at {hookpoint}). Such "
            "attention sinks, often the first tokens of texts without BOS, outweigh all others in a mean. Pass "
            "prepend_bos=True, which puts BOS in their place, or read other tokens.",
            FgsteerWarning,
        )
