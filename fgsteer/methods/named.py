"""The SAE methods by their papers' names: each composes a selection and a projection.

| weights come from            | decoder rows      | effect approximator |
|------------------------------|-------------------|---------------------|
| statistics of a contrast     | ``sta``           | ``fgaa``            |
| given feature ids            | ``from_features`` | ``sae_ts``          |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import PairingError, SelectionError, SelectionWarning
from fgsteer.errors.checks import checked, warn
from fgsteer.errors.wording import count
from fgsteer.methods.projection import decode_weights, project
from fgsteer.methods.provenance import provenance
from fgsteer.methods.scores import SCORES
from fgsteer.methods.selection import FeatureIds, feature_weights, select_features, signed_min_max, top_mask
from fgsteer.saes.density import FeatureDensity
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import Contrast, ContrastStatistics
from fgsteer.vector import SteeringVector

STA_PAIRS = 80  # below about this many examples a side, frequencies are too coarse to select by


def _feature_contrast(stats: ContrastStatistics, sae: SAE) -> Contrast:
    """The feature contrast, checked to be of this SAE. Raises PairingError."""
    read = stats.reading.get("sae")
    if read and read.get("sha256") != sae.sha256:
        raise PairingError(
            f"statistics of SAE {read.get('sha256', '')[:12]} ({read.get('source')})",
            f"of this SAE {sae.sha256[:12]} ({sae.source})",
            "collect again with this SAE",
        )
    _, contrast = stats.at("feature", sae.hookpoint)
    if len(contrast.difference) != sae.d_sae:
        raise PairingError(f"feature statistics of {count(len(contrast.difference), 'feature')}", f"{sae.d_sae}")
    return contrast


def _vector(
    method: str,
    direction: Tensor,
    weights: Float[Tensor, " d_sae"],
    sae: SAE,
    hyperparameters: Mapping[str, Any],
    stats: ContrastStatistics | None = None,
) -> SteeringVector:
    features = {int(j): float(weights[j]) for j in weights.nonzero()[:, 0]}
    return SteeringVector(
        direction.float(),
        sae.hookpoint,
        features=features,
        provenance=provenance(method, hyperparameters, stats, sae, features),
    )


@checked
def sta(
    stats: ContrastStatistics,
    sae: SAE,
    *,
    p: float = 0.35,
    mode: Literal["act_and_freq", "act", "freq"] = "act_and_freq",
    atoms: Literal["signed", "positive"] = "signed",
    norm_match: bool = True,
    compat: bool = False,
) -> SteeringVector:
    """Steering target atoms: ``v = Σ_kept Δaⱼ W_dec[j]``, scaled to CAA's norm (arXiv 2505.20322).

    ``Δa = mean z̄⁺ − mean z̄⁻``, ``Δf = Σ1[z̄⁺>0] − Σ1[z̄⁻>0]``, both normalised by signed
    min–max; a feature is a candidate where the two agree in sign. Kept are candidates in
    the top ``k = int(p·d_sae)`` by frequency and by amplitude (``mode`` picks one or both).
    ``atoms="positive"`` keeps only Δa > 0 and Δf > 0, the paper's formula. Counts are made
    comparable for sides of unequal size by scaling to the larger side.

    ``compat=True`` reproduces the reference code: thresholds are the k-th largest values
    (0-based) of |s| and |Δa| and ties and zeros pass, so with fewer than k + 1 scoring
    features its filters switch off; raw counts are used.

    Raises SelectionError for p outside (0, 1] or when nothing is kept, PairingError for
    statistics of another SAE. Warns SelectionWarning below about 80 examples a side.
    """
    if not 0 < p <= 1 or (compat and int(p * sae.d_sae) >= sae.d_sae):
        raise SelectionError(f"p = {p}", "a share in (0, 1], below 1 with compat=True")
    if mode not in ("act_and_freq", "act", "freq") or atoms not in ("signed", "positive"):
        raise SelectionError(
            f"mode {mode!r}, atoms {atoms!r}", "mode act_and_freq, act or freq, and atoms signed or positive"
        )
    contrast = _feature_contrast(stats, sae)
    amplitude = SCORES["amplitude"](contrast)
    frequency = contrast.positive.fired - contrast.negative.fired if compat else SCORES["frequency"](contrast)
    if min(contrast.positive.count, contrast.negative.count) < STA_PAIRS and mode != "act":
        counts = (contrast.positive.count, contrast.negative.count)
        warn(
            f"STA from {counts[0]} and {counts[1]} examples; frequencies are coarse below about {STA_PAIRS} a side",
            SelectionWarning,
        )
    k = int(p * sae.d_sae)
    kept = _sta_compat(amplitude, frequency, k, mode) if compat else _sta_strict(amplitude, frequency, max(1, k), mode)
    if atoms == "positive":
        kept &= (amplitude > 0) & ((frequency > 0) if mode != "act" else True)
    weights = torch.where(kept, amplitude, 0.0)
    if not bool(weights.any()):
        raise SelectionError("no feature passed STA's filters", "at least one", "raise p or add contrast data")
    direction = decode_weights(weights, sae)
    if norm_match:
        direction = direction * (stats.at("residual", sae.hookpoint)[1].difference.norm() / direction.norm())
    hyper = {"p": p, "mode": mode, "atoms": atoms, "norm_match": norm_match, "compat": compat}
    return _vector("sta", direction, weights, sae, hyper, stats)


def _sta_strict(amplitude: Tensor, frequency: Tensor, k: int, mode: str) -> Tensor:
    """Candidates in the exact top k of each ranking that the mode uses."""
    if mode == "act":
        return top_mask(amplitude.abs(), k)
    score, gain = signed_min_max(frequency), signed_min_max(amplitude)
    candidate = score * gain > 0
    kept = top_mask(torch.where(candidate, score.abs(), 0.0), k)
    if mode == "act_and_freq":
        kept &= top_mask(torch.where(candidate, amplitude.abs(), 0.0), k)
    return kept


def _sta_compat(amplitude: Tensor, frequency: Tensor, k: int, mode: str) -> Tensor:
    """The reference's thresholds, ties and zeros included."""
    score, gain = signed_min_max(frequency), signed_min_max(amplitude)
    score = torch.where(score * gain > 0, score, 0.0)
    by_frequency = score.abs() >= score.abs().sort(descending=True).values[k]
    by_amplitude = amplitude.abs() >= amplitude.abs().sort(descending=True).values[k]
    return {"act_and_freq": by_frequency & by_amplitude, "act": by_amplitude, "freq": by_frequency}[mode]


@checked
def fgaa(
    stats: ContrastStatistics,
    sae: SAE,
    effects: EffectApproximator | None = None,
    *,
    score: str | Tensor = "mean_difference",
    n_positive: int = 16,
    n_negative: int = 0,
    density: FeatureDensity | None = None,
    max_density: float | None = None,
    bos_share: float | None = 0.99,
    bias_weight: float = 1.0,
    mu: float = math.inf,
    unit_effects: bool = False,
    decoder_weight: float = 0.0,
    normalize: bool = True,
) -> SteeringVector:
    """Feature guided activation additions (arXiv 2501.09929).

    ``t``: mean feature difference, zeroed where a feature's token-level density exceeds
    ``max_density`` or where it peaks on position 0 in ``bos_share`` of its documents, then
    the ``n_positive`` largest and ``n_negative`` most negative entries. Through effects,
    ``v = M t/‖M t‖ − λ_b M b/‖M b‖`` with λ_b = ``bias_weight`` (a finite ``mu``
    weighs off-target effects, ``unit_effects`` lets features count by t alone:
    ``EffectApproximator.project``); without, ``u = Σ tⱼ W_dec[j]``, labelled ``projection: decoder``
    in the provenance. ``decoder_weight`` β in [0, 1) mixes the two, ``(1 − β)·v/‖v‖ + β·u/‖u‖``. ``normalize``
    scales the result to norm 1 (False leaves it, as in the paper). The defaults are the paper's.

    ``score`` ranks the features instead: a name in ``SCORES`` or a tensor (d_sae,). Chosen
    features keep their mean difference as weight, and those whose score has the other sign
    are no candidates.

    ``density`` defaults to the SAE's; ``max_density`` to the one tuned for it, else the
    paper's 0.01; ``math.inf`` and ``bos_share=None`` switch the filters off. n₁ and n₂ are
    tuned per task in the paper: 16 and 0 are this package's starting point.

    Raises SelectionError for an unknown score or when the filters leave nothing,
    PairingError for statistics, density or effects of another SAE. Warns SelectionWarning
    when no density is known.
    """
    weights, hyper = select_features(
        _feature_contrast(stats, sae),
        sae,
        score=score,
        n_positive=n_positive,
        n_negative=n_negative,
        density=density,
        max_density=max_density,
        bos_share=bos_share,
    )
    direction, how = project(weights, sae, effects, bias_weight, mu, unit_effects, decoder_weight)
    if normalize:
        direction = direction / direction.norm()
    return _vector("fgaa", direction, weights, sae, {**hyper, **how, "normalize": normalize}, stats)


@checked
def from_features(sae: SAE, features: FeatureIds, *, normalize: bool = True) -> SteeringVector:
    """``v = Σⱼ wⱼ W_dec[j]`` for features {id: weight}, ids, or one id; norm 1 unless ``normalize=False``.

    Raises SelectionError for ids that are no integers, repeated or out of range, weights
    that are no finite numbers, or directions that cancel.
    """
    weights = feature_weights(features, sae)
    direction = decode_weights(weights, sae)
    if normalize:
        direction = direction / direction.norm()
    return _vector("from_features", direction, weights, sae, {"normalize": normalize, "projection": "decoder"})


@checked
def sae_ts(
    sae: SAE,
    features: FeatureIds,
    effects: EffectApproximator,
    *,
    bias_weight: float = 1.0,
    mu: float = math.inf,
    unit_effects: bool = False,
    decoder_weight: float = 0.0,
    normalize: bool = True,
) -> SteeringVector:
    """SAE-targeted steering: ``v = M t/‖M t‖ − λ_b M b/‖M b‖``, scaled to norm 1 (arXiv 2411.02193).

    ``features`` give t as in ``from_features``. Raises SelectionError for unknown ids,
    PairingError for effects of another SAE. ``mu`` and ``unit_effects`` as in
    ``EffectApproximator.project``, ``decoder_weight`` as in ``fgaa``.
    """
    weights = feature_weights(features, sae)
    direction, how = project(weights, sae, effects, bias_weight, mu, unit_effects, decoder_weight)
    if normalize:
        direction = direction / direction.norm()
    return _vector("sae_ts", direction, weights, sae, {**how, "normalize": normalize})
