"""The kernel: the one update that every intervention becomes, and how it is applied to activations.

apply(h, vec.add(8.0).update()) is h + 8·v, in a new tensor
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.saes.selected import SelectedFeatures


@dataclass(frozen=True, eq=False)
class Update:
    """A rank-k update for R rows: ``h += Σⱼ clip(constⱼ − λⱼ·read(h)ⱼ, loⱼ, hiⱼ) wⱼ`` (R = 1 serves every row).

    What is read is ``read · h``, or the activations of features of ``sae``, of h or of the activations at ``source``,
    or a number of each row's prompt, which the caller has; without any, the update is constant.

    Args:
        write: The vectors w that are written, (R, k, d_model).
        const: The constant part α + λμ of each strength, (R, k).
        lam: The weight λ of what is read, (R, k).
        read: The vectors that h is projected on, (R, k, d_model).
        sae: The SAE whose feature activations are read.
        features: Ids of the k features, where ``sae`` has more than those.
        of_prompt: Whether what is read is a number of the prompt.
        lo: The least that each strength may be, (R, k); None where none is bounded from below.
        hi: The most that each strength may be, (R, k); None where none is bounded from above.
        plane: A vector that is added once for each unit of the norm of what is read, (R, d_model).
        relative: The rows whose change is multiplied by the norm of h, (R,).
        keep_norm: The rows whose result is scaled to the norm of h, (R,).
        fixed: The change itself, multiplied out, where nothing is read.
        encoder: What reads the k features, where ``sae`` has more than those.
        weights: ``−λ·read``, multiplied out, where h is projected: the strengths are ``const + weights · h``.
    """

    write: Float[Tensor, "rows k d_model"]
    const: Float[Tensor, "rows k"]
    lam: Float[Tensor, "rows k"]
    read: Float[Tensor, "rows k d_model"] | None = None
    sae: SAE | None = None
    features: tuple[int, ...] = ()
    of_prompt: bool = False
    lo: Float[Tensor, "rows k"] | None = None
    hi: Float[Tensor, "rows k"] | None = None
    plane: Float[Tensor, "rows d_model"] | None = None
    relative: Bool[Tensor, " rows"] | None = None
    keep_norm: Bool[Tensor, " rows"] | None = None
    fixed: Float[Tensor, "rows 1 d_model"] | None = None
    encoder: SelectedFeatures | None = None
    weights: Float[Tensor, "rows k d_model"] | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> Update:
        """The same update for activations of a dtype on a device, each row repeated in place (beams, samples).

        What reads stays in float32, in float64 for activations of float64; what reads nothing is multiplied out.
        """
        wide = torch.promote_types(dtype, torch.float32)

        def moved(part: Tensor) -> Tensor:
            part = part.to(device, part.dtype if part.dtype == torch.bool else wide)
            return part if repeats == 1 or len(self.write) == 1 else part.repeat_interleave(repeats, 0)

        tensors: dict[str, Any] = {
            f.name: moved(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        sae = None if self.sae is None else self.sae.to(device, wide)
        encoder = None if sae is None or not self.features else SelectedFeatures(sae, self.features)
        ready = replace(self, sae=sae, encoder=encoder, **tensors)
        if ready.read is not None and ready.plane is None:
            return replace(ready, weights=-ready.lam[..., None] * ready.read)
        if ready.reads or ready.relative is not None:
            return ready
        fixed = ready.strengths(None)[:, None] @ ready.write
        return replace(ready, fixed=fixed.to(dtype) if self.keep_norm is None else fixed)

    @property
    def source(self) -> Hookpoint | None:
        """Where it reads, if that is elsewhere than where it writes, as a transcoder does."""
        return None if self.sae is None else self.sae.reads

    @property
    def reads(self) -> bool:
        """Whether the change depends on the activation's direction, or on the prompt."""
        return self.read is not None or self.sae is not None or self.of_prompt

    def strengths(self, values: Tensor | None) -> Tensor:
        """What each w is multiplied by, given what is read, (…, k); (R, k) where nothing is."""
        if values is None:
            return self._bounded(self.const)
        return self._bounded(torch.addcmul(self.const[:, None], self.lam[:, None], values, value=-1))

    def amounts(
        self, h: Float[Tensor, "batch tokens d_model"], source: Tensor | None = None, prompt: Tensor | None = None
    ) -> Tensor:
        """The strengths at each token of h, (batch, tokens, k); (R, k) where nothing is read. As ``change`` has them.

        What a row is ``relative`` to, the norm of h, is not in them.
        """
        return self.strengths(self._values(h.to(self.write.dtype), source, prompt))

    def _bounded(self, amounts: Tensor) -> Tensor:
        """Amounts (R, k) or (batch, tokens, k) within the bounds."""
        for bound, limit in ((self.lo, torch.maximum), (self.hi, torch.minimum)):
            if bound is not None:
                amounts = limit(amounts, bound[:, None] if amounts.ndim == 3 and len(bound) > 1 else bound)
        return amounts

    def change(
        self, h: Float[Tensor, "batch tokens d_model"], source: Tensor | None = None, prompt: Tensor | None = None
    ) -> Tensor:
        """The change of h, (batch, tokens, d_model) or broadcastable to it, in the dtype of ``write``.

        ``source`` holds the activations at ``self.source``, where that is elsewhere, and ``prompt`` (batch, 1) what was
        read of prompts, where that counts. Raises SteeringError without.
        """
        if self.fixed is not None:
            return self.fixed
        if self.source is not None and source is None:
            raise SteeringError(f"activations without those at {self.source}", "both", "pass source= to apply")
        if self.of_prompt and prompt is None:
            raise SteeringError("activations without what was read of their prompts", "both", "pass prompt= to apply")
        wide = h.to(self.write.dtype)
        values: Tensor | None = None
        if self.weights is not None:
            change = _times(self._bounded(_linear(wide, self.weights, self.const)), self.write)
        elif (values := self._values(wide, source, prompt)) is None:
            change = self.strengths(None)[:, None] @ self.write
        else:
            change = _times(self.strengths(values), self.write)
            if self.plane is not None:
                change = change + values.norm(dim=-1, keepdim=True) * self.plane[:, None]
        if self.sae is not None and self.sae.input_norm != "none":
            change = change * self.sae.input_scale(wide)
        if self.relative is not None:
            change = change * torch.where(self.relative[:, None, None], wide.norm(dim=-1, keepdim=True), 1.0)
        return change

    def _values(
        self, wide: Float[Tensor, "batch tokens d_model"], source: Tensor | None, prompt: Tensor | None
    ) -> Tensor | None:
        """What is read, of activations in ``write``'s dtype or of prompts, (batch, tokens, k); None for nothing."""
        if self.of_prompt:
            assert prompt is not None
            return prompt.to(self.write)[..., None]
        wide = wide if source is None else source.to(self.write.dtype)
        if self.encoder is not None:
            return self.encoder.read(wide)
        if self.sae is not None:
            return self.sae.encode_selected(wide, self.features) if self.features else self.sae.encode(wide)
        return None if self.read is None else _times(wide, self.read.mT)


def _linear(
    x: Float[Tensor, "batch tokens d_model"], weights: Float[Tensor, "rows k d_model"], const: Float[Tensor, "rows k"]
) -> Float[Tensor, "batch tokens k"]:
    """``const + weights · x``, with one matrix for all rows, or with one for each row."""
    if len(weights) == 1:
        return torch.nn.functional.linear(x, weights[0], const[0])
    return torch.baddbmm(const[:, None], x, weights.mT)


def _times(x: Float[Tensor, "batch tokens n"], matrices: Float[Tensor, "rows n m"]) -> Float[Tensor, "batch tokens m"]:
    """The product of x with one matrix for all rows, or with one for each row."""
    return x @ (matrices[0] if len(matrices) == 1 else matrices)


def apply(
    h: Float[Tensor, "batch tokens d_model"],
    update: Update,
    where: Tensor | None = None,
    source: Tensor | None = None,
    prompt: Tensor | None = None,
) -> Tensor:
    """Add the update's change, cast to h's dtype, to ``h``: a new tensor, as h is not written to.

    A mask ``where (batch, tokens)`` limits the change; elsewhere h comes back bit for bit. ``source`` holds what an
    update reads that reads elsewhere than at h, and ``prompt`` (batch, 1) what one reads that reads prompts.
    """
    change = update.change(h, source, prompt)
    moved = h + (change if change.dtype == h.dtype else change.to(h.dtype))
    if update.keep_norm is not None:
        moved = torch.where(update.keep_norm[:, None, None], _with_norm_of(h, change), moved)
    return moved if where is None else torch.where(where[..., None], moved, h)


def _with_norm_of(h: Float[Tensor, "batch tokens d_model"], change: Tensor) -> Float[Tensor, "batch tokens d_model"]:
    """``(h + change)·‖h‖/‖h + change‖`` in h's dtype; where the sum is zero, so is this."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    moved = wide + change
    norm = moved.norm(dim=-1, keepdim=True)
    ratio = wide.norm(dim=-1, keepdim=True) / torch.where(norm > 0, norm, 1.0)
    restored: Tensor = (moved * ratio).to(h.dtype)
    return restored
