"""A mask of features that is learned: which of them a vector needs to make a model write the winning answers.

learned_mask(model, tokenizer, sae, "sea", features=64).top(10)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.adding import Add
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.learning.examples import Trainable, preference_set
from fgsteer.learning.response_passes import ResponsePasses, device_at
from fgsteer.methods.selection import feature_contrast, feature_id
from fgsteer.models.gradients import frozen, through_model
from fgsteer.models.pairing import check_pairing
from fgsteer.saes.sae import SAE
from fgsteer.selection.pooled import halves_of
from fgsteer.selection.ranking import FeatureRanking
from fgsteer.statistics.collecting import collect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOTTEST, COLDEST = 1e-2, 1e-7  # temperatures of the mask


@checked
@through_model
def learned_mask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    data: Trainable,
    *,
    features: int | Sequence[int] = 64,
    strength: float = 1.0,
    sparsity: float = 0.01,
    epochs: int = 10,
    batch: int = 6,
    lr: float = 1e-3,
    temperatures: tuple[float, float] = (HOTTEST, COLDEST),
    scope: Scope = "all",
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> FeatureRanking:
    """Learn which features a vector of mean differences needs, and rank them by what was learned.

    With candidates j, their mean differences ``d_j = z̄⁺ − z̄⁻`` and one number ``m_j`` each, from 0 on,
    ``h' = h + s·Σⱼ σ(m_j/T)·d_j·W_dec[j]``, the loss is the cross-entropy of the winning answers, by token, and
    ``λ·mean σ(m_j/T)``. T falls geometrically from the first temperature to the last, until every feature is in or out.
    The temperatures are published; what the mask is trained on, λ, s and the rate are not: these are fgsteer's.

    Examples are halved as in ``max_activations``: one half is learned from, and the ranking's settings hold the loss on
    the other one with no vector, with the vector of all candidates, and with that of the mask.

    Args:
        model: A Hugging Face causal language model, which stays as it is.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are ranked.
        data: As in ``train``: a contrast set, whose positive texts win, or preferences.
        features: The candidates: so many of the largest difference, or these ids.
        strength: s.
        sparsity: λ, in nats a token.
        epochs: How often every example is read.
        batch: Examples in a step of Adam.
        lr: The rate of Adam.
        temperatures: The first and the last T.
        scope: The tokens that are steered, as ``vector.add`` takes it.
        seed: The seed of the order of examples.
        batch_tokens: The tokens in a pass, with padding.
        progress: As in ``collect``; a function is called with the steps that are done.

    Returns:
        The ranking of the candidates by m; those in the mask have m > 0, and stand first. ``settings["mask"]`` lists
        them.

    Raises:
        SelectionError: No feature differs between the sides, or an id cannot be used.
        DataError: There are too few examples, a number is out of range, a text has no token, or a loss is not finite.
        PairingError: The SAE does not fit the model.
    """
    check_pairing(model, sae.hookpoint, sae.d_model, sae.model_name, "SAE")
    first, last = _check_numbers(strength, sparsity, epochs, batch, lr, temperatures, seed)
    contrast = preference_set(data)
    chooses, reports = halves_of(contrast)
    stats = collect(model, tokenizer, chooses, sae=sae, tokens="answer", batch_tokens=batch_tokens, progress=False)
    difference = feature_contrast(stats, sae).difference
    ids = _candidates(features, difference, sae)
    device = device_at(model, sae.hookpoint)
    writes = strength * (difference[ids, None] * sae.W_dec[ids].double().cpu()).to(device, torch.float32)
    winners = [*chooses.side(True), *reports.side(True)]
    passes = ResponsePasses(model, tokenizer, sae.hookpoint, winners, batch_tokens)
    learner = _MaskLearner(passes, writes, sae, parse_scope(scope), sparsity)
    learns = list(range(chooses.count(True)))
    steps = epochs * -(-len(learns) // batch)
    m = torch.zeros(len(ids), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([m], lr=lr)
    order = _order(learns, epochs, batch, seed)
    losses = []
    with frozen(model), reporting(progress, "learning a mask", steps) as report:
        for step, rows in enumerate(order):
            temperature = first * (last / first) ** (step / max(1, steps - 1))
            optimizer.zero_grad()
            losses.append(learner.backward(m, temperature, rows))
            if not math.isfinite(losses[-1]):
                raise DataError(f"a loss of {losses[-1]} at step {step}", "a finite loss", "lower lr or strength")
            optimizer.step()
            report(step + 1)
    learned = m.detach().cpu().double()
    scores = torch.full((sae.d_sae,), torch.nan, dtype=torch.float64)
    scores[ids] = learned
    held_out = range(len(learns), len(winners))
    masks = {"none": torch.zeros(len(ids)), "all": torch.ones(len(ids)), "mask": (learned > 0).float()}
    settings = {
        "contrast": contrast.name,
        "sha256": contrast.sha256,
        "mask": [j for j, value in zip(ids, learned.tolist(), strict=True) if value > 0],
        "held_out_loss": {name: learner.loss(mask.to(device), held_out) for name, mask in masks.items()},
        "losses": losses,
        **{"strength": strength, "sparsity": sparsity, "epochs": epochs, "batch": batch, "lr": lr, "seed": seed},
        "temperatures": [first, last],
    }
    return FeatureRanking.of("learned_mask", scores, sae, settings=settings)


class _MaskLearner:
    """The loss of winning answers under a masked vector."""

    def __init__(
        self, passes: ResponsePasses, writes: Float[Tensor, "n d_model"], sae: SAE, scope: Scope, sparsity: float
    ) -> None:
        self.passes, self.writes, self.sae, self.scope, self.sparsity = passes, writes, sae, scope, sparsity

    def backward(self, m: Float[Tensor, " n"], temperature: float, rows: Sequence[int]) -> float:
        """The loss of a batch, whose gradient is left on m."""
        tokens = sum(map(self.passes.answer_tokens, rows))
        gates = (m / temperature).sigmoid()
        penalty = self.sparsity * gates.mean()
        penalty.backward()  # type: ignore[no-untyped-call]
        total = float(penalty.detach())
        for part in self.passes.split(rows, lambda row: [row]):
            loss = -self._log_probabilities((m / temperature).sigmoid(), part).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def loss(self, gates: Float[Tensor, " n"], rows: Sequence[int]) -> float:
        """The cross-entropy of rows, by token, in nats."""
        parts = self.passes.split(rows, lambda row: [row])
        total = sum(float(self._log_probabilities(gates, part).sum()) for part in parts)
        return -total / sum(map(self.passes.answer_tokens, rows))

    def _log_probabilities(self, gates: Tensor, rows: Sequence[int]) -> Float[Tensor, " rows"]:
        add = Add(direction=gates @ self.writes, coefficient=1.0, hookpoint=self.sae.hookpoint, scope=self.scope)
        return self.passes.log_probabilities(rows, [add] * len(rows))


def _check_numbers(
    strength: float,
    sparsity: float,
    epochs: int,
    batch: int,
    lr: float,
    temperatures: tuple[float, float],
    seed: int,
) -> tuple[float, float]:
    """The temperatures. Raises DataError and ArgumentError for a number out of range."""
    check_range("strength", strength, -1e6, 1e6)
    check_range("sparsity", sparsity, 0, 1e6)
    check_range("lr", lr, 1e-9, 1e6)
    for name, value in (("epochs", epochs), ("batch", batch)):
        check_range(name, value, 1, MAX_COUNT, whole=True)
    check_range("seed", seed, 0, 2**63 - 1, whole=True)
    if not isinstance(temperatures, list | tuple) or len(temperatures) != 2:
        raise DataError(f"temperatures = {temperatures!r:.60}", "two numbers, the first and the last")
    for temperature in temperatures:
        check_range("temperatures", temperature, 1e-9, 1e6)
    return float(temperatures[0]), float(temperatures[1])


def _candidates(features: int | Sequence[int], difference: Float[Tensor, " d_sae"], sae: SAE) -> list[int]:
    """The ids among which the mask chooses. Raises SelectionError where none differs, or one cannot be used."""
    if isinstance(features, Sequence):
        ids = [feature_id(j, sae) for j in features]
        if not ids or len(set(ids)) < len(ids):
            raise SelectionError(f"features={features!r:.60}", "ids, each of them once")
        return ids
    check_range("features", features, 1, MAX_COUNT, whole=True)
    order = torch.sort(difference.abs(), descending=True, stable=True).indices[:features]
    ids = [int(j) for j in order if difference[j] != 0]
    if not ids:
        raise SelectionError("no feature that differs between the sides", "at least one", "check the texts")
    return ids


def _order(rows: Sequence[int], epochs: int, batch: int, seed: int) -> Iterator[list[int]]:
    """The batches of all epochs, each epoch in an order of its own."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = [rows[int(n)] for n in torch.randperm(len(rows), generator=random)]
        yield from (order[start : start + batch] for start in range(0, len(order), batch))
