"""Attention sinks among the tokens that are read: a few huge activations, which decide every mean.

sinks = AttentionSinks()
sinks.add(activations, hookpoint)        (tokens, width), batch after batch
sinks.warn()
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import FgsteerWarning
from fgsteer.errors.checks import warn
from fgsteer.errors.wording import count
from fgsteer.models.hookpoints import Hookpoint

MASSIVE = 10.0  # times the median norm


@dataclass(eq=False)
class AttentionSinks:
    """Counts tokens that were read and whose activations are many times as large as those of others.

    A few of them, often the first tokens of texts without BOS, decide every mean.
    """

    batches: dict[Hookpoint, list[Tensor]] = field(default_factory=dict)
    """Of each batch the number of tokens, how many are massive, the largest norm and the median norm."""

    def add(self, values: Float[Tensor, "tokens width"], hookpoint: Hookpoint) -> None:
        """Count the tokens of a batch whose norm is more than MASSIVE times the median, without waiting for a GPU."""
        norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.promote_types(values.dtype, torch.float32))
        if len(norms):
            median = norms.median()
            massive = (norms > MASSIVE * median).sum()
            counts = torch.stack([torch.full_like(median, len(norms)), massive.to(median), norms.max(), median])
            self.batches.setdefault(hookpoint, []).append(counts)

    def warn(self) -> None:
        """Warn FgsteerWarning where there were any, of the hookpoint with the most."""
        found = {hookpoint: torch.stack(counts).double().cpu() for hookpoint, counts in self.batches.items()}
        hookpoint = max(found, key=lambda at: float(found[at][:, 1].sum()), default=None)
        if hookpoint is None or not bool(found[hookpoint][:, 1].any()):
            return
        tokens, massive = (int(total) for total in found[hookpoint][:, :2].sum(0))
        _, _, largest, median = found[hookpoint][found[hookpoint][:, 2].argmax()].tolist()
        warn(
            f"{count(massive, 'token')} of the {tokens:,} that were read have activations of more than "
            f"{MASSIVE:g} times the median norm (up to {largest:,.0f} against {median:,.0f} at {hookpoint}). Such "
            "attention sinks, often the first tokens of texts without BOS, outweigh all others in a mean. Pass "
            "prepend_bos=True, which puts BOS in their place, or read other tokens.",
            FgsteerWarning,
        )
