"""One object of every kind that is saved."""

from __future__ import annotations

import torch

import fgsteer as fg
from fgsteer.statistics.contrast import Contrast
from fgsteer.statistics.moments import Moments


def things(n, width):
    """One thing of every kind that is saved, full of the number n."""
    at = fg.Hookpoint(1)
    full = torch.full((width,), float(n))
    moments = Moments(2, full.double(), full.double(), full.double())
    tokens = torch.full((width // 10, 1, 3), n, dtype=torch.int32)
    slots = torch.zeros(width // 10, 1, dtype=torch.int32)
    return {
        "vector": fg.SteeringVector(full, at),
        "statistics": fg.ContrastStatistics({at: Contrast(moments, moments)}),
        "density": fg.FeatureDensity(full.double(), full.double(), full.double(), n, "x"),
        "examples": fg.FeatureExamples(torch.arange(width // 10), tokens, tokens.float(), slots, "x"),
        "transfer": fg.TransferMap(full[None], full[:1], full[:1], at, at),
        "effects": fg.EffectApproximator(full[None], full, at, "x"),
    }
