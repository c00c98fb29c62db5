"""Directions that the benchmark compares methods with: those that no one would steer with, and variants of methods."""

from __future__ import annotations

from typing import Any

import torch

from fgsteer.effects.approximator import EffectApproximator
from fgsteer.methods.sae_methods import fgaa
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector


def random_direction(hookpoint: Hookpoint, d_model: int, seed: int) -> SteeringVector:
    """Draw a direction (d_model,) of independent standard normal values."""
    return SteeringVector(torch.randn(d_model, generator=torch.Generator().manual_seed(seed)), hookpoint)


def minus_bias(sae: SAE, effects: EffectApproximator) -> SteeringVector:
    """Return ``−M b`` (d_model,): the part of a projection through effects that does not depend on the features."""
    return SteeringVector(-(effects.M @ effects.b).float(), sae.hookpoint)


def fgaa_with_error(stats: ContrastStatistics, sae: SAE, **settings: Any) -> SteeringVector:
    """Return ``fgaa`` with what the SAE does not reconstruct; ``settings`` are its other keywords."""
    return fgaa(stats, sae, keep_error=True, **settings)
