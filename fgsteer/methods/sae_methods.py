"""Vectors through an SAE: each method composes feature weights and a projection.

| weights come from            | decoder rows      | effect approximator |
|------------------------------|-------------------|---------------------|
| statistics of a contrast     | ``sta``, ``fgaa`` | ``fgaa``            |
| feature ids that you name    | ``from_features`` | ``sae_ts``          |
"""

from __future__ import annotations

from torch import Tensor

from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors.checks import checked
from fgsteer.methods.denoising import reconstruction_error
from fgsteer.methods.projection import Projection, decode_weights, feature_vector
from fgsteer.methods.selection import FeatureIds, Selection, feature_contrast, feature_weights
from fgsteer.saes.density import FeatureDensity
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector


@checked
def fgaa(
    stats: ContrastStatistics,
    sae: SAE,
    effects: EffectApproximator | None = None,
    *,
    score: str | Tensor = Selection.score,
    n_positive: int = Selection.n_positive,
    n_negative: int = Selection.n_negative,
    density: FeatureDensity | None = Selection.density,
    max_density: float | None = Selection.max_density,
    bos_share: float | None = Selection.bos_share,
    keep_error: bool = False,
    bias_weight: float = 0.0,
    mu: float = 0.1,
    unit_effects: bool = True,
    decoder_weight: float = 0.5,
    normalize: bool = Projection.normalize,
) -> SteeringVector:
    """Feature guided activation additions: ``v = M t/‖M t‖ − λ_b M b/‖M b‖`` (arXiv 2501.09929).

    The target t (d_sae,) is the mean feature difference ``z̄⁺ − z̄⁻`` of the features that ``select_features`` chooses,
    and zero elsewhere. M and b are the measured effects; without them ``u = Σⱼ tⱼ W_dec[j]``, and the provenance says
    ``projection: decoder``. The paper tunes the numbers of features per task, and its projection has ``bias_weight=1``,
    infinite ``mu``, and neither ``unit_effects`` nor ``decoder_weight``; the defaults are what did better on two models
    (docs/benchmarks.md).

    Args:
        stats: Statistics collected with ``sae=``.
        sae: The SAE that they were collected with.
        effects: The effects measured on this SAE, or None.
        score: A name in ``SCORES`` or a tensor (d_sae,), by which features are ranked.
        n_positive: How many of the largest scores are chosen.
        n_negative: How many of the most negative scores are chosen.
        density: How often each feature fires on ordinary tokens; None takes the SAE's own.
        max_density: The share of tokens above which a feature is left out; None takes the one that was tuned for the
            SAE, else the paper's 0.01; infinity switches the filter off.
        bos_share: The share of documents with their peak on position 0 from which a feature is left out; None switches
            the filter off.
        keep_error: Whether what the SAE does not reconstruct, ``ε = v_CAA − Σⱼ (z̄⁺ − z̄⁻)ⱼ W_dec[j]``, is added to u, so
            that u is CAA less the features that are not chosen. With effects it needs ``decoder_weight``.
        bias_weight: λ_b. This and the next three matter only with ``effects``.
        mu: How much effects on other features weigh, in mean eigenvalues of ``M Mᵀ``; infinity leaves them alone
            (``EffectApproximator.project``).
        unit_effects: Whether features count by t alone, however strong their effects are.
        decoder_weight: β from 0 to below 1, which mixes in the decoder's direction: ``(1 − β)·v/‖v‖ + β·u/‖u‖``.
        normalize: Whether the result is scaled to norm 1; the paper leaves it as it is.

    Returns:
        The vector, with t as the weights of its features.

    Raises:
        SelectionError: The score is unknown, the filters leave no feature, or ``keep_error`` is asked for with effects
            but without ``decoder_weight``.
        PairingError: The statistics, the density or the effects are of another SAE, or ``keep_error`` is asked for of
            an SAE that normalises its input.

    Warns:
        SelectionWarning: No density is known, so the filters by density and position are off.
    """
    selection = Selection(score, n_positive, n_negative, density, max_density, bos_share)
    projection = Projection(bias_weight, mu, unit_effects, decoder_weight, normalize)
    contrast = feature_contrast(stats, sae)
    weights, selected_by = selection.choose(contrast, sae)
    error = reconstruction_error(stats, sae, contrast) if keep_error else None
    direction, projected_by = projection.direction(weights, sae, effects, error)
    settings = {**selected_by, "keep_error": keep_error, **projected_by}
    return feature_vector("fgaa", direction, weights, sae, settings, stats)


@checked
def from_features(sae: SAE, features: FeatureIds, *, normalize: bool = Projection.normalize) -> SteeringVector:
    """Sum the decoder rows of features that you name: ``v = Σⱼ wⱼ W_dec[j]``.

    Args:
        sae: The SAE of the features.
        features: {id: weight}, several ids (each with weight 1), or one id.
        normalize: Whether the result is scaled to norm 1.

    Returns:
        The vector, at the SAE's hookpoint.

    Raises:
        SelectionError: An id is no integer, comes twice or is out of range, a weight is no finite number, or the rows
            cancel.
    """
    weights = feature_weights(features, sae)
    direction = Projection(normalize=normalize).scaled(decode_weights(weights, sae))
    settings = {"normalize": normalize, "projection": "decoder"}
    return feature_vector("from_features", direction, weights, sae, settings)


@checked
def sae_ts(
    sae: SAE,
    features: FeatureIds,
    effects: EffectApproximator,
    *,
    bias_weight: float = Projection.bias_weight,
    mu: float = Projection.mu,
    unit_effects: bool = Projection.unit_effects,
    decoder_weight: float = Projection.decoder_weight,
    normalize: bool = Projection.normalize,
) -> SteeringVector:
    """SAE-targeted steering: ``v = M t/‖M t‖ − λ_b M b/‖M b‖`` for features that you name (arXiv 2411.02193).

    Args:
        sae: The SAE of the features.
        features: The target t: {id: weight}, several ids (each with weight 1), or one id.
        effects: The effects M and b measured on this SAE.
        bias_weight: λ_b.
        mu: How much effects on other features weigh, in mean eigenvalues of ``M Mᵀ``; infinity leaves them alone
            (``EffectApproximator.project``).
        unit_effects: Whether features count by t alone, however strong their effects are.
        decoder_weight: β from 0 to below 1, which mixes in the decoder's direction ``u = Σⱼ tⱼ W_dec[j]``:
            ``(1 − β)·v/‖v‖ + β·u/‖u‖``.
        normalize: Whether the result is scaled to norm 1.

    Returns:
        The vector, with t as the weights of its features.

    Raises:
        SelectionError: A feature id or weight cannot be used, or no effect moves the features.
        PairingError: The effects were measured on another SAE.
    """
    weights = feature_weights(features, sae)
    projection = Projection(bias_weight, mu, unit_effects, decoder_weight, normalize)
    direction, projected_by = projection.direction(weights, sae, effects)
    return feature_vector("sae_ts", direction, weights, sae, projected_by)
