"""From feature weights to a vector: through the decoder's rows, or through an effect approximator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import SelectionError
from fgsteer.errors.checks import check_flags
from fgsteer.methods.provenance import provenance
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector

ROWS_AT_ONCE = 4096  # of a decoder, in float64: bounds memory, not results


def decode_weights(
    weights: Float[Tensor, " d_sae"], sae: SAE, error: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, " d_model"]:
    """Sum decoder rows: ``Σⱼ wⱼ W_dec[j] + ε`` (d_model,), in float64, without the decoder's bias.

    ``error`` is ε, what the SAE does not reconstruct, or None for none.

    Raises:
        SelectionError: No weight is left, or the sum is zero.
    """
    _check_weights(weights)
    direction = sum_decoder_rows(weights, sae)
    if error is not None:
        direction = direction + error
    if not direction.norm() > 0:
        raise SelectionError(
            "decoder rows that cancel to zero", "decoder rows whose sum is not zero", "Choose other features or weights"
        )
    return direction


def sum_decoder_rows(weights: Float[Tensor, " d_sae"], sae: SAE) -> Float[Tensor, " d_model"]:
    """Return ``Σⱼ wⱼ W_dec[j]`` (d_model,), in float64, from the rows of features whose weight is not 0."""
    total = torch.zeros(sae.W_dec.shape[1], dtype=torch.float64)
    chosen = weights.nonzero()[:, 0]
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        features = chosen[start : start + ROWS_AT_ONCE]
        rows = sae.W_dec[features.to(sae.W_dec.device)].to("cpu", torch.float64)
        total += weights[features].double() @ rows
    return total


def _check_weights(weights: Tensor) -> None:
    if not bool(weights.any()):
        raise SelectionError(
            "none", "at least one feature with a weight other than 0", "Loosen the filters or add contrast data"
        )


@dataclass(frozen=True)
class Projection:
    """How feature weights t become a direction: the keywords that ``fgaa`` and ``sae_ts`` share, with their defaults.

    Through effects ``p = M t/‖M t‖ − λ_b M b/‖M b‖`` (arXiv 2411.02193), mixed with ``u = Σⱼ tⱼ W_dec[j] + ε`` to
    ``(1 − β)·p/‖p‖ + β·u/‖u‖``; without effects u. ε is what the SAE does not reconstruct, where that is kept.

    Args:
        bias_weight: λ_b.
        mu: How much off-target effects weigh; infinity leaves them alone (``EffectApproximator.project``).
        unit_effects: Whether features count by t alone, however strong their effects are.
        decoder_weight: β, a share from 0 to below 1.
        normalize: Whether the direction is scaled to norm 1.
    """

    bias_weight: float = 1.0
    mu: float = math.inf
    unit_effects: bool = False
    decoder_weight: float = 0.0
    normalize: bool = True

    def direction(
        self,
        weights: Float[Tensor, " d_sae"],
        sae: SAE,
        effects: EffectApproximator | None,
        error: Float[Tensor, " d_model"] | None = None,
    ) -> tuple[Float[Tensor, " d_model"], dict[str, Any]]:
        """Project weights to a direction (d_model,), and tell the settings that made it.

        ``error`` is ε, which is added to the decoder's direction.

        Raises:
            SelectionError: No weight is left, the direction is zero, ``decoder_weight`` is no share below 1, or an
                error is to be added where the decoder has no share.
            PairingError: The effects were measured on another SAE.
        """
        check_flags(unit_effects=self.unit_effects)
        if not 0 <= self.decoder_weight < 1:
            raise SelectionError(
                f"decoder_weight={self.decoder_weight}",
                "a share from 0 to below 1",
                "Leave the effects out to project through the decoder alone",
            )
        if effects is None:
            direction, settings = decode_weights(weights, sae, error), {"projection": "decoder"}
        else:
            direction, settings = self._through_effects(weights, sae, effects, error)
        return self.scaled(direction), {**settings, "normalize": self.normalize}

    def _through_effects(
        self, weights: Tensor, sae: SAE, effects: EffectApproximator, error: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        _check_weights(weights)
        if error is not None and self.decoder_weight == 0:
            raise SelectionError(
                "keep_error=True through effects with decoder_weight=0",
                "a share of the decoder's direction, to which the reconstruction error is added",
                "Pass decoder_weight=0.5, or leave out the effects or keep_error",
            )
        projected = effects.check(sae).project(
            weights.float(), bias_weight=self.bias_weight, mu=self.mu, unit_effects=self.unit_effects
        )
        direction = projected.double()
        if self.decoder_weight > 0:
            decoded = decode_weights(weights, sae, error)
            share = self.decoder_weight * decoded / decoded.norm()
            direction = (1 - self.decoder_weight) * direction / direction.norm() + share
        return direction, {
            "projection": "effects",
            "bias_weight": self.bias_weight,
            "mu": None if self.mu == math.inf else self.mu,  # JSON has no infinity
            "unit_effects": self.unit_effects,
            "decoder_weight": self.decoder_weight,
        }

    def scaled(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """Scale a direction to norm 1 where ``normalize`` asks for it."""
        return direction / direction.norm() if self.normalize else direction


def feature_vector(
    method: str,
    direction: Float[Tensor, " d_model"],
    weights: Float[Tensor, " d_sae"],
    sae: SAE,
    settings: Mapping[str, Any],
    stats: ContrastStatistics | None = None,
) -> SteeringVector:
    """Make the vector of a direction that came from feature weights; it remembers both and the settings."""
    features = {int(j): float(weights[j]) for j in weights.nonzero()[:, 0]}
    return SteeringVector(
        direction.float(),
        sae.hookpoint,
        features=features,
        provenance=provenance(method, settings, stats, sae, features),
    )
