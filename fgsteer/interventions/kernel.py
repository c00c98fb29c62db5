"""The kernel: the one update that every intervention becomes, and how it is applied to activations.

apply(h, vec.add(8.0).update()) is h + 8·v, in a new tensor
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.saes.sae import SAE


@dataclass(frozen=True, eq=False)
class Update:
    """A rank-k update for R rows: ``h += Σⱼ (constⱼ − λⱼ·read(h)ⱼ) wⱼ`` (R = 1 serves every row).

    What is read is ``read · h``, or the activations of features of ``sae``; without either, the update is constant.

    Args:
        write: The vectors w that are written, (R, k, d_model).
        const: The constant part α + λμ of each strength, (R, k).
        lam: The weight λ of what is read, (R, k).
        read: The vectors that h is projected on, (R, k, d_model).
        sae: The SAE whose feature activations are read.
        features: Ids of the k features, where ``sae`` has more than those.
        fixed: The change itself, multiplied out, where nothing is read.
    """

    write: Float[Tensor, "rows k d_model"]
    const: Float[Tensor, "rows k"]
    lam: Float[Tensor, "rows k"]
    read: Float[Tensor, "rows k d_model"] | None = None
    sae: SAE | None = None
    features: tuple[int, ...] = ()
    fixed: Float[Tensor, "rows 1 d_model"] | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> Update:
        """The same update for activations of a dtype on a device, each row repeated in place (beams, samples).

        What reads stays in float32; what reads nothing is multiplied out.
        """

        def moved(part: Tensor) -> Tensor:
            part = part.to(device, torch.float32)
            return part if repeats == 1 or len(self.write) == 1 else part.repeat_interleave(repeats, 0)

        write, const, lam = moved(self.write), moved(self.const), moved(self.lam)
        if self.sae is None and self.read is None:
            return Update(write, const, lam, fixed=(const[:, None] @ write).to(dtype))
        read = None if self.read is None else moved(self.read)
        sae = None if self.sae is None else self.sae.to(device, torch.float32)
        return Update(write, const, lam, read, sae, self.features)

    def change(self, h: Float[Tensor, "batch tokens d_model"]) -> Tensor:
        """The change of h, (batch, tokens, d_model) or broadcastable to it; float32 until prepared."""
        if self.fixed is not None:
            return self.fixed
        if self.read is None and self.sae is None:
            return self.const[:, None] @ self.write
        wide = h.float()
        if self.sae is None:
            assert self.read is not None
            values = _times(wide, self.read.mT)
        elif self.features:
            values = self.sae.encode_selected(wide, self.features)
        else:
            values = self.sae.encode(wide)
        change = _times(torch.addcmul(self.const[:, None], self.lam[:, None], values, value=-1), self.write)
        return change if self.sae is None or self.sae.input_norm == "none" else change * self.sae.input_scale(wide)


def _times(x: Float[Tensor, "batch tokens n"], matrices: Float[Tensor, "rows n m"]) -> Float[Tensor, "batch tokens m"]:
    """The product of x with one matrix for all rows, or with one for each row."""
    return x @ (matrices[0] if len(matrices) == 1 else matrices)


def apply(h: Float[Tensor, "batch tokens d_model"], update: Update, where: Tensor | None = None) -> Tensor:
    """Add the update's change, cast to h's dtype, to ``h``: a new tensor, as h is not written to.

    A mask ``where (batch, tokens)`` limits the change; elsewhere h comes back bit for bit.
    """
    change = update.change(h)
    if change.dtype != h.dtype:
        change = change.to(h.dtype)
    if where is None:
        return h + change
    return torch.where(where[..., None], h + change, h)
