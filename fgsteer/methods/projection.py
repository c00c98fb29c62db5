"""From feature weights to a direction: through decoder rows, or through an effect approximator."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.effects import EffectApproximator
from fgsteer.errors import SelectionError
from fgsteer.sae import SAE

Projection = Literal["decoder", "effects"]


def decode_weights(weights: Float[Tensor, " d_sae"], sae: SAE) -> Float[Tensor, " d_model"]:
    """``Σⱼ wⱼ W_dec[j]`` (d_model,), float64: no decoder bias, no reconstruction error.

    Raises SelectionError when no weight is left, or when the sum cancels.
    """
    kept = weights.nonzero()[:, 0]
    if not len(kept):
        raise SelectionError("no feature with a weight", "at least one", "loosen the filters or add data")
    rows = sae.W_dec[kept.to(sae.W_dec.device)].to("cpu", torch.float64)
    direction = weights[kept].double() @ rows
    if not direction.norm() > 0:
        raise SelectionError("decoder rows that cancel", "a direction of norm > 0")
    return direction


def project(
    weights: Float[Tensor, " d_sae"],
    sae: SAE,
    effects: EffectApproximator | None,
    bias_weight: float,
    mu: float = math.inf,
) -> tuple[Float[Tensor, " d_model"], Projection]:
    """The direction of feature weights, and which of the two projections made it."""
    if effects is None:
        return decode_weights(weights, sae), "decoder"
    if not bool(weights.any()):
        raise SelectionError("no feature with a weight", "at least one", "loosen the filters or add data")
    return effects.check(sae).project(weights.float(), bias_weight=bias_weight, mu=mu).double(), "effects"
