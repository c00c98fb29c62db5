"""Steering target atoms: the features that differ between the two sides both in amplitude and in frequency.

vec = sta(stats, sae); with steer(model, vec.add(1.0)): ...
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fgsteer.errors import SelectionError, SelectionWarning
from fgsteer.errors.checks import checked, warn
from fgsteer.methods.denoising import reconstruction_error
from fgsteer.methods.projection import decode_weights, feature_vector
from fgsteer.methods.scores import SCORES
from fgsteer.methods.selection import feature_contrast, signed_min_max, top_mask
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector

Mode = Literal["act_and_freq", "act", "freq"]
Atoms = Literal["signed", "positive"]

FEWEST_EXAMPLES = 80  # a side, about; below it frequencies are too coarse to select by


@checked
def sta(
    stats: ContrastStatistics,
    sae: SAE,
    *,
    p: float = 0.35,
    mode: Mode = "act_and_freq",
    atoms: Atoms = "signed",
    keep_error: bool = False,
    norm_match: bool = True,
    compat: bool = False,
) -> SteeringVector:
    """Steering target atoms: ``v = Σⱼ Δaⱼ W_dec[j]`` over the chosen features (arXiv 2505.20322).

    ``Δa = mean z̄⁺ − mean z̄⁻`` and ``Δf = Σ1[z̄⁺>0] − Σ1[z̄⁻>0]``, both normalised by signed min–max. A feature is a
    candidate where the two agree in sign; chosen are candidates in the top ``k = int(p·d_sae)`` by frequency and by
    amplitude. For sides of unequal size, counts are scaled to the larger side, so that they compare.

    Args:
        stats: Statistics collected with ``sae=``.
        sae: The SAE that they were collected with.
        p: The share of the SAE's features that each ranking keeps.
        mode: Whether a feature must be in the top by both rankings ("act_and_freq"), by amplitude ("act"), or by
            frequency ("freq").
        atoms: "signed" keeps features of both signs, "positive" only those with Δa > 0 and Δf > 0, the paper's formula.
        keep_error: Whether what the SAE does not reconstruct, ``ε = v_CAA − Σⱼ Δaⱼ W_dec[j]`` over all features, is
            added to v, so that v is CAA less the features that are not chosen.
        norm_match: Whether v is scaled to the norm of the ``caa`` vector.
        compat: Whether to do as the paper's code does: thresholds are the k-th largest values (0-based) of the scores,
            ties and zeros pass, so that with fewer than k + 1 scoring features the filters switch off, and counts are
            raw.

    Returns:
        The vector, with Δa as the weights of its features.

    Raises:
        SelectionError: ``p`` is no share, ``mode`` or ``atoms`` is unknown, or no feature is chosen.
        PairingError: The statistics are of another SAE, or ``keep_error`` is asked for of an SAE that normalises its
            input.

    Warns:
        SelectionWarning: There are fewer than about 80 examples a side.
    """
    _check_arguments(p, mode, atoms, sae, compat)
    contrast = feature_contrast(stats, sae)
    amplitude = SCORES["amplitude"](contrast)
    frequency = contrast.positive.fired - contrast.negative.fired if compat else SCORES["frequency"](contrast)
    examples = (contrast.positive.count, contrast.negative.count)
    if min(examples) < FEWEST_EXAMPLES and mode != "act":
        warn(
            f"STA selects by {examples[0]} and {examples[1]} examples; its frequencies are coarse below about "
            f"{FEWEST_EXAMPLES} a side.",
            SelectionWarning,
        )
    choose = _choose_as_published_code if compat else _choose
    chosen = choose(amplitude, frequency, int(p * sae.d_sae), mode)
    if atoms == "positive":
        chosen &= (amplitude > 0) & ((frequency > 0) if mode != "act" else True)
    weights = torch.where(chosen, amplitude, 0.0)
    if not bool(weights.any()):
        raise SelectionError("none", "at least one feature that passes STA's filters", "Raise p or add contrast data")
    direction = decode_weights(weights, sae, reconstruction_error(stats, sae, contrast) if keep_error else None)
    if norm_match:
        direction = direction * (stats.at("residual", sae.hookpoint)[1].difference.norm() / direction.norm())
    settings = {
        "p": p,
        "mode": mode,
        "atoms": atoms,
        "keep_error": keep_error,
        "norm_match": norm_match,
        "compat": compat,
    }
    return feature_vector("sta", direction, weights, sae, settings, stats)


def _check_arguments(p: float, mode: str, atoms: str, sae: SAE, compat: bool) -> None:
    """Raise SelectionError for arguments that STA does not have."""
    if not 0 < p <= 1 or (compat and int(p * sae.d_sae) >= sae.d_sae):
        raise SelectionError(f"p={p}", "a share above 0 and at most 1, or below 1 with compat=True")
    for name, value, known in (("mode", mode, Mode), ("atoms", atoms, Atoms)):
        if value not in get_args(known):
            raise SelectionError(f"{name}={value!r}", f"one of {', '.join(get_args(known))}")


def _choose(amplitude: Tensor, frequency: Tensor, k: int, mode: str) -> Tensor:
    """Mask the candidates in the exact top k (at least one) of each ranking that the mode uses."""
    k = max(1, k)
    if mode == "act":
        return top_mask(amplitude.abs(), k)
    scaled_frequency, scaled_amplitude = signed_min_max(frequency), signed_min_max(amplitude)
    candidates = scaled_frequency * scaled_amplitude > 0
    chosen = top_mask(torch.where(candidates, scaled_frequency.abs(), 0.0), k)
    if mode == "act_and_freq":
        chosen &= top_mask(torch.where(candidates, amplitude.abs(), 0.0), k)
    return chosen


def _choose_as_published_code(amplitude: Tensor, frequency: Tensor, k: int, mode: str) -> Tensor:
    """Mask by the thresholds of the paper's code, ties and zeros included."""
    scaled_frequency, scaled_amplitude = signed_min_max(frequency), signed_min_max(amplitude)
    agreeing = torch.where(scaled_frequency * scaled_amplitude > 0, scaled_frequency, 0.0)
    by_frequency = agreeing.abs() >= agreeing.abs().sort(descending=True).values[k]
    by_amplitude = amplitude.abs() >= amplitude.abs().sort(descending=True).values[k]
    return {"act_and_freq": by_frequency & by_amplitude, "act": by_amplitude, "freq": by_frequency}[mode]
