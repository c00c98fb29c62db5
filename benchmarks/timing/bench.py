"""What every section is given, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from timing.clock import Clock
from timing.peers import Peers
from timing.subjects import Subject, load


@dataclass(frozen=True)
class Bench:
    """The clock, the models to time, and the peers at hand."""

    clock: Clock
    models: Sequence[str]
    dtype: torch.dtype = torch.float32
    quick: bool = False
    peers: Peers = field(default_factory=dict)

    def subjects(self, *wanted: str) -> Iterator[Subject]:
        """The models asked for; of those wanted, where some are named."""
        for name in self.models:
            if not wanted or name in wanted:
                yield load(name, self.clock.device, self.dtype, quick=self.quick)

    @property
    def on_cpu(self) -> bool:
        """Whether the largest cases would take minutes."""
        return self.clock.device.type == "cpu"


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, 0 where both are zero."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def unequal(a: Tensor, b: Tensor) -> float:
    """Share of token ids that differ, in the rows that both have."""
    rows = min(len(a), len(b))
    return float((a[:rows] != b[:rows]).double().mean())
