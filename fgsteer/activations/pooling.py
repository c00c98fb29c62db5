"""From the activations of tokens to one mean a text: encoded first, then averaged.

index = PoolingIndex.from_mask(mask)                      which text reads which token
pool(acts[mask], index)                                   (texts, d_model)
pool_features(sae, acts[mask], index)                     (texts, d_sae)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgsteer.saes.sae import SAE

ENCODE_ELEMENTS = 1 << 24  # feature activations held at once: bounds memory, not results


@dataclass(frozen=True, eq=False)
class PoolingIndex:
    """Which of the recorded activations (n, width) each text averages.

    For all i, text ``owner[i]`` averages row ``source[i]`` of the activations, or row i where ``source`` is None.
    Every text averages one row at least; several texts may share a row.
    """

    texts: int
    owner: Int[Tensor, " reads"]
    source: Int[Tensor, " reads"] | None = None

    @classmethod
    def from_mask(cls, selected: Bool[Tensor, "batch tokens"]) -> PoolingIndex:
        """Return the index for ``activations[selected]``, where each text averages its own row of the mask."""
        return cls(len(selected), selected.nonzero()[:, 0])

    def mean(self, total: Float[Tensor, "texts width"]) -> Float[Tensor, "texts width"]:
        """Divide each text's total by the number of activations that it averages."""
        return total / torch.bincount(self.owner, minlength=self.texts).to(total)[:, None]


def pool(values: Float[Tensor, "n width"], index: PoolingIndex) -> Float[Tensor, "texts width"]:
    """Average, for each text, the activations (n, width) that it reads, in float32."""
    rows = values.float() if index.source is None else values.float()[index.source.to(values.device)]
    total = torch.zeros(index.texts, values.shape[1], device=values.device)
    return index.mean(total.index_add_(0, index.owner.to(values.device), rows))


def pool_features(sae: SAE, values: Float[Tensor, "n d_model"], index: PoolingIndex) -> Float[Tensor, "texts d_sae"]:
    """Average, for each text, ``sae.encode`` of the activations that it reads; each of the n is encoded once."""
    owner = index.owner.to(values.device)
    source = None if index.source is None else index.source.to(values.device)
    total = torch.zeros(index.texts, sae.d_sae, dtype=sae.W_enc.dtype, device=values.device)
    step = max(1, ENCODE_ELEMENTS // sae.d_sae)
    for start in range(0, len(values), step):
        acts = sae.encode(values[start : start + step])
        if source is None:
            total.index_add_(0, owner[start : start + step], acts)
        else:
            encoded_now = (source >= start) & (source < start + step)
            total.index_add_(0, owner[encoded_now], acts[source[encoded_now] - start])
    return index.mean(total)


def row_groups(selected: Tensor, width: int) -> Iterator[slice]:
    """Yield slices of batch rows whose tokens' encodings, ``width`` features each, stay under ENCODE_ELEMENTS."""
    per_row = max(1, selected.shape[1] * width)
    step = max(1, ENCODE_ELEMENTS // per_row)
    for start in range(0, selected.shape[0], step):
        yield slice(start, start + step)
