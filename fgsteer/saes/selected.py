"""The activations of some features of a TopK SAE, whose features compete, without encoding all of them each time.

reader = SelectedFeatures(sae, [3, 17])
acts = reader.read(h)                      equal to sae.encode(h)[..., [3, 17]]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.saes.sae import SAE

FREQUENT, QUICK = 512, 64  # rivals that are looked at, and those that are looked at before, at least
LEARNT_FROM = (16, 64)  # tokens: as few are enough, and no more are looked at
LEARNT_AGAIN = (64, 256, 1024)  # tokens that had to be encoded whole, after which rivals are chosen anew
PRIOR = 64  # tokens that densities count for beside those
MARGIN = 1e-3  # of the largest pre-activation: far above what products of other shapes round differently


class SelectedFeatures:
    """Reads some features of a TopK SAE at each token.

    A feature is inactive where k others are larger, all of them above 0, or where it is below 0 itself. To find k of
    those it is mostly enough to look at some rivals: those that fire most often, and those that were above the features
    of interest where the others were not enough. Of a token that comes alone a few are looked at before that are nearly
    always above the features of interest, which the first tokens tell. Only where that leaves it open are tokens
    encoded whole. Where an activation is only compared with a threshold, a token whose own pre-activations are below it
    needs no others. This saves time where tokens come one by one, on a CPU; elsewhere every token is encoded whole.

    Args:
        sae: The SAE, on the device and in the dtype of what is read.
        features: Ids of the n features.
        floors: Thresholds of the n features, ≥ 0: where all activations of a token are below them, 0 is given.
    """

    def __init__(self, sae: SAE, features: Sequence[int], floors: Sequence[float] | None = None) -> None:
        self.sae, self.count = sae, len(features)
        self.columns = torch.tensor(list(features), device=sae.W_enc.device)
        self.on_cpu = sae.W_enc.device.type == "cpu"
        has_floors = self.on_cpu and any(floors or ())
        self.floors = torch.tensor(floors, dtype=torch.float32, device="cpu") if has_floors else None
        self.own = sae if self.floors is None else _part(sae, self.columns)
        self.shut: Tensor | None = None  # what was returned last where no feature is active
        self.quick: SAE | None = None  # the SAE of the features with a few rivals
        self.rivals: SAE | None = None  # the SAE of the features with many
        self.seen = self.encoded = 0  # first tokens, and those that were encoded whole
        # at how many of them each was above those of interest
        self.first, self.above = torch.zeros(2, sae.d_sae, dtype=torch.float32, device="cpu")
        if sae.k is not None and self.on_cpu and sae.density is not None:
            self.above = PRIOR * sae.density.density.to(self.above)
            self.rivals = self._with_rivals(self.above, FREQUENT)

    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n"]:
        """Return the activations of the features, (..., n): where none is active, the last zeros again if no_grad."""
        if not self.on_cpu or self.sae.k is None or torch.compiler.is_compiling() or x.requires_grad:
            return self.sae.encode(x).index_select(-1, self.columns)
        tokens, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], self.count)
        left = self._left(tokens)
        if not left:
            if self.shut is None or self.shut.shape != shape or torch.is_grad_enabled():
                self.shut = self.sae.W_enc.new_zeros(shape)
            return self.shut
        acts = self._whole(tokens if len(left) == len(tokens) else tokens[left])
        found = acts.new_zeros(shape)
        found.view(-1, self.count)[left] = acts
        return found

    def _left(self, tokens: Float[Tensor, "tokens d_model"]) -> list[int]:
        """The tokens that must be encoded whole, as nothing less tells that none of the features is active there."""
        left = list(range(len(tokens)))
        if self.floors is not None:
            is_below = (self.own.pre_activations(tokens) < self.floors).all(-1).tolist()  # nan is not
            left = [token for token in left if not is_below[token]]
        if left and self.seen < LEARNT_FROM[0]:
            self._learn(tokens[left][-LEARNT_FROM[1] :])
        for part in (self.quick if len(tokens) == 1 else None, self.rivals):
            if part is not None and left:
                is_open = self._are_open(part, tokens if len(left) == len(tokens) else tokens[left])
                left = [token for token, stays in zip(left, is_open, strict=True) if stays]
        return left

    def _are_open(self, part: SAE, tokens: Float[Tensor, "tokens d_model"]) -> list[bool]:
        """Whether the rivals of a part leave open that a feature is active, as they do where something is not finite.

        Numbers are faster to compare than tensors.
        """
        assert self.sae.k is not None
        pre = part.pre_activations(tokens)
        if pre.numel() < FREQUENT and len(tokens) == 1:
            values = pre.flatten().tolist()
            if not math.isfinite(sum(values)):
                return [True]
            ranked = [sorted(values, reverse=True)]
            own = [max(values[: self.count])]
        else:
            ranked, own = pre.topk(self.sae.k).values.tolist(), pre[:, : self.count].amax(1).tolist()
        rounding = max(MARGIN, 2 * torch.finfo(pre.dtype).eps)
        is_open = []
        for others, highest in zip(ranked, own, strict=True):
            margin = rounding * abs(others[0])
            is_shut = highest < -margin or others[self.sae.k - 1] > max(highest, 0.0) + margin  # never where nan is
            is_open.append(not is_shut)
        return is_open

    def _whole(self, tokens: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens n"]:
        """Encode every feature, and take those that are asked for. What rivals left open tells which to look at."""
        pre = self.sae.pre_activations(tokens)
        if self.encoded < LEARNT_AGAIN[-1]:
            before, self.encoded = self.encoded, self.encoded + len(tokens)
            self.above = self.above + self._times_above(pre)  # not in place, which inference mode would not allow later
            if any(before < number <= self.encoded for number in LEARNT_AGAIN):
                self.rivals = self._with_rivals(self.above, FREQUENT)
        return self.sae.activate(pre).index_select(-1, self.columns)

    def _learn(self, tokens: Float[Tensor, "tokens d_model"]) -> None:
        """Count which features are above those of interest at the first tokens, in order to look at those first."""
        assert self.sae.k is not None
        self.first = self.first + self._times_above(self.sae.pre_activations(tokens))
        self.seen += len(tokens)
        if self.seen >= LEARNT_FROM[0]:
            self.quick = self._with_rivals(self.first, max(QUICK, 2 * self.sae.k))

    def _times_above(self, pre: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, " d_sae"]:
        """At how many of the tokens each feature was above all of those of interest, and above 0."""
        return (pre > pre[:, self.columns].amax(1, keepdim=True).clamp(min=0)).sum(0, dtype=torch.float32)

    def _with_rivals(self, score: Float[Tensor, " d_sae"], rivals: int) -> SAE | None:
        """The features with the others of the largest scores, where they are many beside k and few beside all."""
        assert self.sae.k is not None
        if 2 * self.sae.k > rivals or 4 * (rivals + self.count) >= self.sae.d_sae:
            return None
        score = score.clone()
        score[self.columns] = -1
        return _part(self.sae, torch.cat([self.columns, score.topk(rivals).indices]))


def _part(sae: SAE, features: Tensor) -> SAE:
    """The SAE of some features alone, whose pre-activations are theirs; it decodes nothing."""
    return replace(
        sae,
        W_enc=sae.W_enc.T[features].T,  # a feature after the other in memory
        W_dec=sae.W_dec[:1].expand(len(features), -1),  # of the shape that an SAE has, and not read
        b_enc=sae.b_enc[features],
        activation="relu",
        density=None,
        labels={},
        fingerprint="",
    )
