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

RIVALS = 512  # features that are looked at first
MARGIN = 1e-3  # of the largest of them: far above what products of other shapes round differently


class SelectedFeatures:
    """Reads some features of a TopK SAE at each token.

    A feature is inactive where k others are larger, all of them above 0. To find k of those it is mostly enough to look
    at the features that fire most often, so only tokens at which that leaves it open are encoded whole. Where an
    activation is only compared with a threshold, a token whose own pre-activations are below it needs no others. This
    saves time where tokens come one by one, on a CPU; elsewhere every token is encoded whole.

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
        self.part: SAE | None = None
        if sae.density is None or sae.k is None or not self.on_cpu:
            return
        often = sae.density.density.clone()
        often[self.columns] = -1.0
        rivals = often.topk(min(RIVALS, sae.d_sae - self.count)).indices
        some = torch.cat([self.columns, rivals.to(self.columns)])
        if 2 * sae.k < len(rivals) and 4 * len(some) < sae.d_sae:
            self.part = _part(sae, some)

    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """Return the activations of the features, (..., n)."""
        if not self.on_cpu or torch.compiler.is_compiling() or x.requires_grad:
            return self._whole(x)
        if self.floors is None:
            return self._compete(x)
        is_below = (self.own.pre_activations(x) < self.floors).all(-1)  # nan is not
        found = x.new_zeros(*x.shape[:-1], self.count, dtype=self.sae.W_enc.dtype)
        if not bool(is_below.all()):
            found[~is_below] = self._compete(x[~is_below])
        return found

    def _compete(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """The activations, without encoding the tokens at which the rivals alone shut the features."""
        if self.part is None:
            return self._whole(x)
        assert self.sae.k is not None
        pre = self.part.pre_activations(x)
        highest, top = pre[..., : self.count].amax(-1), pre.topk(self.sae.k).values
        found = pre.new_zeros(*x.shape[:-1], self.count)
        if highest.numel() == 1:  # one token: numbers are compared sooner than tensors
            others = top.flatten().tolist()
            return found if others[-1] > max(float(highest), 0.0) + MARGIN * others[0] else self._whole(x)
        is_shut = top[..., -1] > torch.add(highest.clamp(min=0.0), top[..., 0], alpha=MARGIN)
        if not bool(is_shut.all()):  # nan is above and below nothing, so that where it is read all is encoded
            found[~is_shut] = self._whole(x[~is_shut])
        return found

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
