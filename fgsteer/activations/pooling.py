"""From the activations of tokens to one mean a text: encoded first, then averaged.

reads = Reads.of(mask)                                    which text reads which token
pool(acts[mask], reads)                                   (texts, d_model)
pool_features(sae, acts[mask], reads)                     (texts, d_sae)
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
    """Which of the activations kept (n, width) each text reads: text ``owner[i]`` reads row ``source[i]``, for all i.

    Without ``source`` it reads row i. Every text reads one at least; several may read the same.
    """

    texts: int
    owner: Int[Tensor, " reads"]
    source: Int[Tensor, " reads"] | None = None

    @classmethod
    def from_mask(cls, selected: Bool[Tensor, "batch tokens"]) -> PoolingIndex:
        """Reads of ``activations[selected]``, where each text reads its own row of the mask."""
        return cls(len(selected), selected.nonzero()[:, 0])

    def mean(self, total: Float[Tensor, "texts width"]) -> Float[Tensor, "texts width"]:
        """Each text's total over the number of its reads."""
        return total / torch.bincount(self.owner, minlength=self.texts).to(total)[:, None]


def pool(values: Float[Tensor, "n width"], reads: PoolingIndex) -> Float[Tensor, "texts width"]:
    """Mean over what each text reads of activations (n, width), in float32."""
    rows = values.float() if reads.source is None else values.float()[reads.source.to(values.device)]
    total = torch.zeros(reads.texts, values.shape[1], device=values.device)
    return reads.mean(total.index_add_(0, reads.owner.to(values.device), rows))


def pool_features(sae: SAE, values: Float[Tensor, "n d_model"], reads: PoolingIndex) -> Float[Tensor, "texts d_sae"]:
    """Mean over what each text reads of ``sae.encode``, each of the activations (n, d_model) encoded once."""
    owner = reads.owner.to(values.device)
    source = None if reads.source is None else reads.source.to(values.device)
    total = torch.zeros(reads.texts, sae.d_sae, dtype=sae.W_enc.dtype, device=values.device)
    step = max(1, ENCODE_ELEMENTS // sae.d_sae)
    for start in range(0, len(values), step):
        acts = sae.encode(values[start : start + step])
        if source is None:
            total.index_add_(0, owner[start : start + step], acts)
        else:
            here = (source >= start) & (source < start + step)
            total.index_add_(0, owner[here], acts[source[here] - start])
    return reads.mean(total)


def row_groups(selected: Tensor, width: int) -> Iterator[slice]:
    """Slices of batch rows whose tokens' encodings, ``width`` features each, stay under ENCODE_ELEMENTS."""
    per_row = max(1, selected.shape[1] * width)
    step = max(1, ENCODE_ELEMENTS // per_row)
    for start in range(0, selected.shape[0], step):
        yield slice(start, start + step)
