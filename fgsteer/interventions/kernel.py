"""The kernel: the one update that every intervention becomes, and how it is applied to activations.

apply(h, vec.add(8.0).update()) is h + 8·v, in a new tensor
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        entrywise: The rows whose change is multiplied by h, entry by entry, (R,).
        keep_norm: The rows whose result is scaled to the norm of h, (R,).
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
    entrywise: Bool[Tensor, " rows"] | None = None
    keep_norm: Bool[Tensor, " rows"] | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> ReadyUpdate:
        """The update for activations of a dtype on a device, each row repeated in place (beams, samples).

        What reads stays in float32, in float64 for activations of float64; what reads nothing is multiplied out.
        """
        wide = torch.promote_types(dtype, torch.float32)
        alone = len(self.write) == 1

        def moved(name: str) -> Tensor | None:
            part: Tensor | None = getattr(self, name)
            if part is None:
                return None
            part = part.to(device, part.dtype if part.dtype == torch.bool else wide)
            return part if repeats == 1 or alone else part.repeat_interleave(repeats, 0)

        def by_token(name: str) -> Tensor | None:
            part = moved(name)
            return None if part is None else part[0] if alone else part[:, None]

        write, lam, read = moved("write"), by_token("lam"), moved("read")
        assert write is not None
        ready = ReadyUpdate(
            write=write[0] if alone else write,
            const=by_token("const"),  # type: ignore[arg-type]
            lam=lam,  # type: ignore[arg-type]
            source=self.source,
            of_prompt=self.of_prompt,
            lo=by_token("lo"),
            hi=by_token("hi"),
            plane=by_token("plane"),
            relative=None if self.relative is None else moved("relative")[:, None, None],  # type: ignore[index]
            entrywise=None if self.entrywise is None else moved("entrywise")[:, None, None],  # type: ignore[index]
            keep_norm=None if self.keep_norm is None else moved("keep_norm")[:, None, None],  # type: ignore[index]
        )
        if self.sae is not None:
            sae = self.sae.to(device, wide)
            return replace(ready, sae=sae, encoder=SelectedFeatures(sae, self.features) if self.features else None)
        if read is not None and self.plane is not None:
            return replace(ready, read=(read[0] if alone else read).mT)
        if read is not None:
            return replace(ready, weights=-ready.lam[:, None] * read[0] if alone else -(ready.lam.mT * read).mT)
        if self.of_prompt:
            return ready
        fixed = (ready.bounded(ready.const) @ ready.write).view(-1, 1, self.write.shape[-1])
        as_it_is = self.relative is None and self.entrywise is None and self.keep_norm is None
        return replace(ready, fixed=fixed.to(dtype) if as_it_is else fixed)

    @property
    def source(self) -> Hookpoint | None:
        """Where it reads, if that is elsewhere than where it writes, as a transcoder does."""
        return None if self.sae is None else self.sae.reads

    def change(
        self, h: Float[Tensor, "batch tokens d_model"], source: Tensor | None = None, prompt: Tensor | None = None
    ) -> Tensor:
        """The change of h: that of the update as it is prepared for h."""
        return self.prepare(h.device, h.dtype).change(h, source, prompt)


@dataclass(frozen=True, eq=False)
class ReadyUpdate:
    """An update in the shapes that products take: of one row without its dimension, of several as (R, 1, k).

    So that a token costs few and small operations, what is known before it comes is multiplied out.

    Args:
        write: The vectors w that are written, (k, d_model) or (R, k, d_model).
        const: The constant part of each strength, (k,) or (R, 1, k).
        lam: The weight of what is read, shaped as ``const``.
        source: Where it reads, if that is elsewhere than where it writes.
        of_prompt: Whether what is read is a number of the prompt.
        lo: The least that each strength may be, shaped as ``const``; None where none is bounded from below.
        hi: The most that each strength may be, shaped as ``const``; None where none is bounded from above.
        plane: What is added for each unit of the norm of what is read, (d_model,) or (R, 1, d_model).
        relative: The rows whose change is multiplied by the norm of h, (R, 1, 1).
        entrywise: The rows whose change is multiplied by h, entry by entry, (R, 1, 1).
        keep_norm: The rows whose result is scaled to the norm of h, (R, 1, 1).
        sae: The SAE whose feature activations are read.
        encoder: What reads its features, where it has more than those.
        read: The vectors that h is projected on, where the norm of that counts too, (d_model, k) or (R, d_model, k).
        weights: ``−λ·read``, where h is projected: the strengths are ``const + weights · h``. (k, d_model), as linear
            layers have it, or (R, d_model, k).
        fixed: The change itself, where nothing is read, (R, 1, d_model).
    """

    write: Tensor
    const: Tensor
    lam: Tensor
    source: Hookpoint | None = None
    of_prompt: bool = False
    lo: Tensor | None = None
    hi: Tensor | None = None
    plane: Tensor | None = None
    relative: Tensor | None = None
    entrywise: Tensor | None = None
    keep_norm: Tensor | None = None
    sae: SAE | None = None
    encoder: SelectedFeatures | None = None
    read: Tensor | None = None
    weights: Tensor | None = None
    fixed: Tensor | None = None

    def bounded(self, strengths: Tensor) -> Tensor:
        """Strengths within the bounds."""
        if self.lo is None and self.hi is None:
            return strengths
        if not torch.is_grad_enabled():
            return torch.clamp(strengths, self.lo, self.hi)
        for bound, limit in ((self.lo, torch.maximum), (self.hi, torch.minimum)):
            if bound is not None:  # at a bound half of the gradient is passed on, so that training can leave it
                strengths = limit(strengths, bound)
        return strengths

    def amounts(
        self, h: Float[Tensor, "batch tokens d_model"], source: Tensor | None = None, prompt: Tensor | None = None
    ) -> Tensor:
        """The strengths at each token of h, (batch, tokens, k) or broadcastable to it. As ``change`` has them.

        What a row is ``relative`` to, the norm of h, is not in them.
        """
        if self.weights is not None:
            return self.bounded(_linear(self._wide(h), self.weights, self.const))
        if self.fixed is not None or (self.read is None and self.sae is None and not self.of_prompt):
            return self.bounded(self.const)
        values = self._values(h, source, prompt)
        return self.bounded(torch.addcmul(self.const, self.lam, values, value=-1))

    def change(
        self, h: Float[Tensor, "batch tokens d_model"], source: Tensor | None = None, prompt: Tensor | None = None
    ) -> Tensor:
        """The change of h, (batch, tokens, d_model) or broadcastable to it, in the dtype of ``write`` or of h.

        ``source`` holds the activations at ``self.source``, where that is elsewhere, and ``prompt`` (batch, 1) what was
        read of prompts, where that counts. Raises SteeringError without.
        """
        if self.fixed is not None:
            change = self.fixed
        elif self.weights is not None:
            change = self._written(_linear(self._wide(h), self.weights, self.const))
        else:
            values = self._values(h, source, prompt)
            change = self._written(torch.addcmul(self.const, self.lam, values, value=-1))
            if self.plane is not None:
                change = change + values.norm(dim=-1, keepdim=True) * self.plane
            if self.sae is not None and self.sae.input_norm != "none":
                change = change * self.sae.input_scale(self._wide(h))
        if self.relative is not None:
            change = change * torch.where(self.relative, self._wide(h).norm(dim=-1, keepdim=True), 1.0)
        if self.entrywise is not None:
            wide = self._wide(h)
            change = change * torch.where(self.entrywise, wide, torch.ones_like(wide))
        return change

    def _wide(self, h: Tensor) -> Tensor:
        """Activations in the dtype that is computed in."""
        return h if h.dtype == self.write.dtype else h.to(self.write.dtype)

    def _written(self, strengths: Tensor) -> Tensor:
        """What is written with these strengths (…, k), within the bounds."""
        strengths = self.bounded(strengths)
        return strengths * self.write if self.write.shape[-2] == 1 else strengths @ self.write

    def _values(self, h: Tensor, source: Tensor | None, prompt: Tensor | None) -> Tensor:
        """What is read of activations or of prompts, (batch, tokens, k). Raises SteeringError where it is missing."""
        if self.of_prompt:
            if prompt is None:
                raise SteeringError(
                    "activations without what was read of their prompts", "both", "pass prompt= to apply"
                )
            return prompt.to(self.write)[..., None]
        if self.source is not None:
            if source is None:
                raise SteeringError(f"activations without those at {self.source}", "both", "pass source= to apply")
            h = source
        wide = self._wide(h)
        if self.sae is not None:
            return self.sae.encode(wide) if self.encoder is None else self.encoder.read(wide)
        assert self.read is not None
        return wide @ self.read


def _linear(x: Float[Tensor, "batch tokens d_model"], weights: Tensor, const: Tensor) -> Tensor:
    """``const + weights · x`` (batch, tokens, k), with one matrix for all rows, or with one for each row."""
    if weights.ndim == 2:
        return torch.nn.functional.linear(x, weights, const)
    return torch.baddbmm(const, x, weights)


def apply(
    h: Float[Tensor, "batch tokens d_model"],
    update: Update | ReadyUpdate,
    where: Tensor | None = None,
    source: Tensor | None = None,
    prompt: Tensor | None = None,
) -> Tensor:
    """Add the update's change, cast to h's dtype, to ``h``: a new tensor, as h is not written to.

    A mask ``where``, (batch, tokens) or (batch, tokens, 1), limits the change; elsewhere h comes back bit for bit.
    ``source`` holds what an update reads that reads elsewhere than at h, and ``prompt`` (batch, 1) what one reads that
    reads prompts.
    """
    ready = update.prepare(h.device, h.dtype) if isinstance(update, Update) else update
    change = ready.change(h, source, prompt)
    moved = h + (change if change.dtype == h.dtype else change.to(h.dtype))
    if ready.keep_norm is not None:
        moved = torch.where(ready.keep_norm, _with_norm_of(h, change), moved)
    if where is None:
        return moved
    return torch.where(where if where.ndim == 3 else where.unsqueeze(-1), moved, h)


def _with_norm_of(h: Float[Tensor, "batch tokens d_model"], change: Tensor) -> Float[Tensor, "batch tokens d_model"]:
    """``(h + change)·‖h‖/‖h + change‖`` in h's dtype; where the sum is zero, so is this."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    moved = wide + change
    norm = moved.norm(dim=-1, keepdim=True)
    ratio = wide.norm(dim=-1, keepdim=True) / torch.where(norm > 0, norm, 1.0)
    restored: Tensor = (moved * ratio).to(h.dtype)
    return restored
