"""From feature weights to a direction: through decoder rows, or through an effect approximator."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import SelectionError
from fgsteer.errors.checks import check_flags
from fgsteer.saes.sae import SAE


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
    unit_effects: bool = False,
    decoder_weight: float = 0.0,
) -> tuple[Float[Tensor, " d_model"], dict[str, Any]]:
    """The direction of feature weights, and the settings that made it: the projection's name, and those of effects.

    Through effects: ``(1 − β)·p/‖p‖ + β·u/‖u‖`` with p of ``EffectApproximator.project``, u of
    ``decode_weights`` and β = ``decoder_weight``; p itself at β = 0.
    """
    check_flags(unit_effects=unit_effects)
    if not 0 <= decoder_weight < 1:
        raise SelectionError(f"decoder_weight = {decoder_weight}", "a share in [0, 1); without effects it is 1")
    if effects is None:
        return decode_weights(weights, sae), {"projection": "decoder"}
    if not bool(weights.any()):
        raise SelectionError("no feature with a weight", "at least one", "loosen the filters or add data")
    through = effects.check(sae)
    direction = through.project(weights.float(), bias_weight=bias_weight, mu=mu, unit_effects=unit_effects).double()
    if decoder_weight > 0:
        decoded = decode_weights(weights, sae)
        share = decoder_weight * decoded / decoded.norm()
        direction = (1 - decoder_weight) * direction / direction.norm() + share
    told = {"bias_weight": bias_weight, "mu": None if mu == math.inf else mu, "unit_effects": unit_effects}
    return direction, {"projection": "effects", **told, "decoder_weight": decoder_weight}
