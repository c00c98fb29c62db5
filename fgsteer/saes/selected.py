"""The activations of some features of a TopK SAE, whose features compete, without encoding all of them each time.

reader = SelectedFeatures(sae, [3, 17])
acts = reader.read(h)                      equal to sae.encode(h)[..., [3, 17]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.saes.sae import SAE

FREQUENT = 512  # features that fire most often
QUICK = 64  # features that were above those of interest most often, at least
LEARNT_FROM = (16, 64)  # tokens: as few are enough, and no more are looked at
MARGIN = 1e-3  # of the largest pre-activation: far above what products of other shapes round differently


class SelectedFeatures:
    """Reads some features of a TopK SAE at each token.

    A feature is inactive where k others are larger, all of them above 0, or where it is below 0 itself. To find k of
    those it is mostly enough to look at the features that fire most often, and of a token that comes alone first at a
    few that are nearly always above the features of interest, which the first tokens tell. Only where that leaves it
    open are tokens encoded whole. Where an activation is only compared with a threshold, a token whose own
    pre-activations are below it needs no others. This saves time where tokens come one by one, on a CPU; elsewhere
    every token is encoded whole.

    Args:
        sae: The SAE, on the device and in the dtype of what is read.
        features: Ids of the n features.
        floors: Thresholds of the n features, ≥ 0: where all activations of a token are below them, 0 is given.
    """

    def __init__(self, sae: SAE, features: Sequence[int], floors: Sequence[float] | None = None) -> None:
        self.sae, self.count = sae, len(features)
        self.columns = torch.tensor(list(features), device=sae.W_enc.device)
        self.on_cpu = sae.W_enc.device.type == "cpu"
        self.floors = torch.tensor(floors) if self.on_cpu and floors and any(floors) else None
        self.own = sae if self.floors is None else _part(sae, self.columns)
        self.parts: list[SAE] = []  # SAEs of the features with their rivals, the quickest first
        self.seen, self.above = 0, torch.zeros(sae.d_sae, dtype=torch.int64)
        if sae.k is not None and self.on_cpu and sae.density is not None:
            self._add_part(sae.density.density, FREQUENT)

    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """Return the activations of the features, (..., n)."""
        if not self.on_cpu or self.sae.k is None or torch.compiler.is_compiling() or x.requires_grad:
            return self._whole(x)
        if self.floors is None:
            return self._compete(x)
        is_below = (self.own.pre_activations(x) < self.floors).all(-1)  # nan is not
        found = x.new_zeros(*x.shape[:-1], self.count, dtype=self.sae.W_enc.dtype)
        if not bool(is_below.all()):
            found[~is_below] = self._compete(x[~is_below])
        return found

    def _compete(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """The activations, without encoding the tokens at which some rivals alone shut the features."""
        if self.seen < LEARNT_FROM[0]:
            self._learn(x.reshape(-1, x.shape[-1])[-LEARNT_FROM[1] :])
        return self._one(x) if x.numel() == x.shape[-1] else self._several(x)

    def _one(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """Of one token: numbers are compared sooner than tensors."""
        assert self.sae.k is not None
        for part in self.parts:
            pre = part.pre_activations(x)
            highest = float(pre[..., : self.count].amax())
            others = pre.topk(self.sae.k).values.flatten().tolist()
            margin = MARGIN * abs(others[0])
            if highest < -margin or others[-1] > max(highest, 0.0) + margin:
                return pre.new_zeros(*x.shape[:-1], self.count)
        return self._whole(x)

    def _several(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """Of several tokens, of which the quickest part would leave some open: it would cost more than it saves."""
        if not self.parts:
            return self._whole(x)
        assert self.sae.k is not None
        pre = self.parts[-1].pre_activations(x)
        highest, top = pre[..., : self.count].amax(-1), pre.topk(self.sae.k).values
        is_shut = top[..., -1] > torch.add(highest.clamp(min=0.0), top[..., 0], alpha=MARGIN)
        found = pre.new_zeros(*x.shape[:-1], self.count)
        if not bool(is_shut.all()):  # nan is above and below nothing, so that where it is read all is encoded
            found[~is_shut] = self._whole(x[~is_shut])
        return found

    def _learn(self, x: Float[Tensor, "tokens d_model"]) -> None:
        """Count which features are above those of interest; when enough tokens told, look at those first."""
        assert self.sae.k is not None
        pre = self.sae.pre_activations(x)
        self.above += (pre > pre[:, self.columns].amax(1, keepdim=True).clamp(min=0)).sum(0)
        self.seen += len(x)
        if self.seen >= LEARNT_FROM[0]:
            self._add_part(self.above, max(QUICK, 2 * self.sae.k))

    def _add_part(self, score: Tensor, rivals: int) -> None:
        """Look at the features of the largest scores first, where they are many beside k and few beside all."""
        assert self.sae.k is not None
        if 2 * self.sae.k > rivals or 4 * (rivals + self.count) >= self.sae.d_sae:
            return
        score = score.clone()
        score[self.columns] = -1
        self.parts.insert(0, _part(self.sae, torch.cat([self.columns, score.topk(rivals).indices.to(self.columns)])))

    def _whole(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """Encode every feature, and take those that are asked for."""
        return self.sae.encode(x).index_select(-1, self.columns)


def _part(sae: SAE, features: Tensor) -> SAE:
    """The SAE of some features alone, whose pre-activations are theirs."""
    return replace(
        sae,
        W_enc=sae.W_enc[:, features].contiguous(),
        W_dec=sae.W_dec[features],
        b_enc=sae.b_enc[features],
        activation="relu",
        density=None,
        labels={},
        fingerprint="",
    )
