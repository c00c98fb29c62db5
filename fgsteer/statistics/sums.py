"""What ``collect`` keeps of the texts that it has read: sums that add up over chunks and are stored in shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.moments import Key, Moments, key_name, load_moments, moment_tensors, parse_key


@dataclass
class Sums:
    """Moments of both sides in every space, and pooled activations where they are kept, in the order of the texts."""

    moments: dict[Key, Moments] = field(default_factory=dict)
    pooled: dict[Hookpoint, Tensor] = field(default_factory=dict)

    def add(self, key: Key, moments: Moments) -> None:
        """Merge moments into those of their key."""
        self.moments[key] = self.moments[key] + moments if key in self.moments else moments

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all of it as named tensors, to be stored in a shard."""
        tensors = {f"kept/{hookpoint}": rows for hookpoint, rows in self.pooled.items()}
        for key, moments in self.moments.items():
            tensors[f"{key_name(key)}/count"] = torch.tensor(moments.count)
            tensors |= moment_tensors(key_name(key), moments)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sums:
        """Return what ``to_tensors`` stored. Raises KeyError and ValueError for anything else."""
        sums = cls()
        for name, tensor in tensors.items():
            head, _, rest = name.partition("/")
            if head == "kept":
                sums.pooled[Hookpoint.parse(rest)] = tensor
            elif name.endswith("/count"):
                if tensor.numel() != 1:
                    raise ValueError(f"{name} has the shape {tuple(tensor.shape)}")
                key = name.removesuffix("/count")
                sums.moments[parse_key(key)] = load_moments(tensors, key, int(tensor))
        return sums


def join_sums(chunks: Iterable[Sums]) -> Sums:
    """Merge the sums of all chunks, in their order."""
    total = Sums()
    pooled: dict[Hookpoint, list[Tensor]] = {}
    for sums in chunks:
        for key, moments in sums.moments.items():
            total.add(key, moments)
        for hookpoint, rows in sums.pooled.items():
            pooled.setdefault(hookpoint, []).append(rows)
    total.pooled = {hookpoint: torch.cat(rows) for hookpoint, rows in pooled.items()}
    return total
