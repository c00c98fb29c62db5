"""What an SAE does not reconstruct of a contrast, and CAA less what its features show to be noise.

vec = caa_denoised(stats, sae); with steer(model, vec.add(4.0)): ...
"""

from __future__ import annotations

import sys
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.methods.projection import feature_vector, sum_decoder_rows
from fgsteer.methods.scores import SCORES
from fgsteer.methods.selection import feature_contrast
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import Contrast, ContrastStatistics
from fgsteer.vector import SteeringVector

Shrinkage = Literal["soft", "hard"]


@checked
def caa_denoised(
    stats: ContrastStatistics, sae: SAE, *, shrinkage: Shrinkage = "soft", threshold: float = 1.0
) -> SteeringVector:
    """CAA less what the SAE's features show to be noise: ``v = v_CAA − Σⱼ (1 − sⱼ) Δfⱼ W_dec[j]``.

    ``Δf = z̄⁺ − z̄⁻`` is the mean feature difference, and t is Welch's (``SCORES["welch_t"]``), the difference by its
    standard error σⱼ. What the SAE does not reconstruct stays in v, and so do features that differ beyond their
    noise:

    - "soft": ``sⱼ = max(0, 1 − τ²/tⱼ²)``. With τ = 1 it is the positive-part James–Stein factor of one value (Efron &
      Morris 1973): the posterior mean of Δfⱼ under the prior N(0, Aⱼ), with its maximum-likelihood variance
      ``Aⱼ = max(0, Δfⱼ² − σⱼ²)``. It is also Breiman's non-negative garrote (1995).
    - "hard": ``sⱼ = 1`` where ``|tⱼ| ≥ τ``, and 0 elsewhere.

    Args:
        stats: Statistics collected with ``sae=``, of at least two texts a side.
        sae: The SAE that they were collected with.
        shrinkage: Whether features are shrunk ("soft"), or kept or removed whole ("hard").
        threshold: τ of at least 0, in standard errors; 0 gives CAA.

    Returns:
        The vector, in residual-stream units and not normalised, with ``sⱼ Δfⱼ`` as the weights of its features.

    Raises:
        SelectionError: ``shrinkage`` or ``threshold`` cannot be used, a side has fewer than two texts, or nothing is
            left.
        PairingError: The statistics are of another SAE, or the SAE normalises its input.
    """
    if shrinkage not in get_args(Shrinkage):
        raise SelectionError(f"shrinkage={shrinkage!r}", f"one of {', '.join(get_args(Shrinkage))}")
    check_range("threshold", threshold, 0, sys.float_info.max)
    contrast = feature_contrast(stats, sae)
    difference = contrast.difference
    t = SCORES["welch_t"](contrast).abs()
    kept = (1 - (threshold / t).square()).clamp(min=0) if shrinkage == "soft" else (t >= threshold).double()
    weights = torch.where(difference != 0, kept * difference, 0.0)  # t is 0 where the difference is
    direction = reconstruction_error(stats, sae, contrast) + sum_decoder_rows(weights, sae)
    if not direction.norm() > 0:
        raise SelectionError(
            "nothing that differs between the two sides",
            "positives and negatives whose mean activations differ",
            "Check that the contrast set's two sides hold different texts",
        )
    settings = {"shrinkage": shrinkage, "threshold": float(threshold)}
    return feature_vector("caa_denoised", direction, weights, sae, settings, stats)


def reconstruction_error(stats: ContrastStatistics, sae: SAE, contrast: Contrast) -> Float[Tensor, " d_model"]:
    """Return what the SAE does not reconstruct of a contrast: ``ε = v_CAA − Σⱼ Δfⱼ W_dec[j]`` (d_model,), in float64.

    It is the difference of the two sides' mean errors ``h − x̂``, exactly: features are averaged over the same tokens as
    the residual stream, the reconstruction is linear in them, and the decoder's bias cancels. For a transcoder it is
    what its features do not predict at the hookpoint where it writes.

    Args:
        stats: Statistics collected with ``sae=``.
        sae: The SAE that they were collected with.
        contrast: Its features' contrast, as ``feature_contrast`` returns it.

    Raises:
        PairingError: The SAE normalises its input, so that a feature's part of the reconstruction depends on every
            token's scale, of which statistics keep nothing.
    """
    if sae.input_norm != "none":
        raise PairingError(
            f"an SAE with input_norm={sae.input_norm!r}",
            "an SAE without input normalisation: what a normalising one reconstructs depends on the scale of every "
            "token, and statistics keep the features' means alone",
            "Use an SAE that does not normalise its input, or leave the reconstruction error out (keep_error=False)",
        )
    difference = stats.at("residual", sae.hookpoint)[1].difference
    return difference - sum_decoder_rows(contrast.difference, sae)
