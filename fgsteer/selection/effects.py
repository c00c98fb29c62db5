"""What steering with a feature does to features that stand for a behavior: predicted by SAE-TS's effects, or measured.

causal_effect(sae, effects, {1938: 1.0})[:5]           features that raise feature 1938 most when steered with
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.shipped import load_neutral
from fgsteer.display.progress import Progress, reporting
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.effects.rollouts import Sampling, rollout_features
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.adding import Add
from fgsteer.methods.selection import FeatureIds, feature_id, feature_weights
from fgsteer.models.pairing import check_pairing
from fgsteer.saes.sae import SAE
from fgsteer.selection.ranking import FeatureRanking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
def causal_effect(sae: SAE, effects: EffectApproximator, target: FeatureIds) -> FeatureRanking:
    """Rank features by how much a unit step along their decoder row moves a target: ``(W_dec[j]/‖W_dec[j]‖)·M t``.

    M are the measured effects of SAE-TS (arXiv 2411.02193), and t the target: what a vector does to the features that
    a behavior shows in is what counts, and not which of them it is made of. A decoder row of 0 is not compared.

    Args:
        sae: The SAE whose features are ranked.
        effects: The effects measured on it.
        target: t: {id: weight}, several ids (each with weight 1), or one id, such as ``max_auc(activations)[:1]``.

    Returns:
        The ranking, in units of feature activation for a unit step.

    Raises:
        SelectionError: A feature id or weight cannot be used.
        PairingError: The effects were measured on another SAE.
    """
    weights = feature_weights(target, sae)
    M = effects.check(sae).M.double().cpu()
    rows = sae.W_dec.double().cpu()
    norms = rows.norm(dim=1)
    return FeatureRanking.of(
        "causal_effect",
        rows @ (M @ weights) / norms.clamp(min=torch.finfo(torch.float64).tiny),
        sae,
        candidates=norms > 0,
        settings={"target": {str(int(j)): float(weights[j]) for j in weights.nonzero()[:, 0]}},
    )


@checked
@torch.no_grad()
def measured_effect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    features: Iterable[int],
    target: FeatureIds,
    *,
    strength: float,
    prompts: Sequence[str] | None = None,
    rollouts: int = 2,
    sampling: Sampling | None = None,
    rows: int = 64,
    progress: Progress = None,
) -> FeatureRanking:
    """Rank features by the rise of a target in text that the model writes while it is steered with each.

    ``t · (z̄(steered with j) − z̄(unsteered))``: mean activations over new tokens, read by the unsteered model. Steered
    and unsteered texts are drawn with the same random numbers, as in SAE-TS (arXiv 2411.02193). With an even number of
    rollouts the second half of them is held out.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are ranked.
        features: The ids that are compared, such as the first twenty of another ranking.
        target: t, as in ``causal_effect``.
        strength: The norm of what is added, in units of the residual stream, the same for every feature;
            ``calibrate`` finds one by its cost.
        prompts: The prompts that are continued; by default the shipped neutral ones.
        rollouts: The continuations of every prompt.
        sampling: How continuations are drawn; by default as in SAE-TS.
        rows: The sequences in a forward pass.
        progress: As in ``collect``; a function is called with the number of features done, over all rollouts.

    Returns:
        The ranking, in units of feature activation.

    Raises:
        SelectionError: A feature id or weight cannot be used, or a decoder row is 0.
        DataError: There is no prompt, or a number is out of range.
        PairingError: The SAE does not fit the model.
    """
    check_pairing(model, sae.hookpoint, sae.d_model, sae.model_name, "SAE")
    check_range("strength", strength, 1e-9, 1e9)
    check_range("rollouts", rollouts, 1, MAX_COUNT, whole=True)
    check_range("rows", rows, 1, MAX_COUNT, whole=True)
    weights = feature_weights(target, sae)
    ids = [feature_id(j, sae) for j in features]
    given = load_neutral()[1] if prompts is None else list(prompts)
    if not given:
        raise DataError("no prompts", "at least one prompt to continue")
    encoded = encode_prompts(tokenizer, given, prepend_bos=sae.prepend_bos)
    drawn = Sampling() if sampling is None else sampling
    entries = [None, *(_step(sae, j, strength) for j in ids)]
    at_once = max(1, rows // len(given))
    moved = torch.zeros(rollouts, sae.d_sae, dtype=torch.float64)
    with reporting(progress, "steering with features", rollouts * len(ids)) as report:
        for number in range(rollouts):
            base: Float[Tensor, ""] = torch.zeros((), dtype=torch.float64)
            for start in range(0, len(entries), at_once):
                part = entries[start : start + at_once]
                acts = rollout_features(model, encoded, sae, part, drawn, number).cpu().double() @ weights
                if start == 0:
                    base, acts = acts[0], acts[1:]
                chosen = ids[max(0, start - 1) : start - 1 + len(part)]
                moved[number, chosen] = acts - base
                report(number * len(ids) + start - 1 + len(part))
    compared = torch.zeros(sae.d_sae, dtype=torch.bool)
    compared[ids] = True
    chooses = rollouts // 2 if rollouts % 2 == 0 else rollouts
    return FeatureRanking.of(
        "measured_effect",
        moved[:chooses].mean(0),
        sae,
        candidates=compared,
        held_out=moved[chooses:].mean(0) if chooses < rollouts else None,
        settings={
            "target": {str(int(j)): float(weights[j]) for j in weights.nonzero()[:, 0]},
            "strength": strength,
            "rollouts": rollouts,
            "seed": drawn.seed,
        },
    )


def _step(sae: SAE, feature: int, strength: float) -> Add:
    """The addition of a feature's decoder row at a norm."""
    row = sae.direction(feature).float()
    return Add(direction=row / row.norm().clamp(min=1e-30), coefficient=strength, hookpoint=sae.hookpoint, bos=True)
