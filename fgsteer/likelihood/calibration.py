"""Calibration: the strength at which steering costs neutral text a given number of nats per token.

c = calibrate(model, tokenizer, vec.add, texts, target_ce_rise=0.5)
c = calibrate(model, tokenizer, vec.add, texts, target_kl=0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import SteeringError
from fgsteer.errors.checks import check_number, checked
from fgsteer.interventions.base import Intervention
from fgsteer.likelihood.cost_curves import MAX_ROUNDS, POWER, CostCurve
from fgsteer.likelihood.passes import TextPasses
from fgsteer.likelihood.scoring import Scored, mean_cross_entropies, mean_kl_divergences, scored_pairs
from fgsteer.steering.entries import interventions_of
from fgsteer.steering.ranges import activation_dtype, change_bound, max_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 0.02  # the relative error of a cost that is accepted
CE_RISE = 0.5  # nats per token, the default target
DOSE = 0.65  # of a change that costs that much, in units of the norm of activations: a first guess


@checked
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[float], Intervention],
    texts: Sequence[Scored],
    *,
    target_ce_rise: float | None = None,
    target_kl: float | None = None,
    start: float | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress = None,
) -> float:
    """The strength at which steering costs the texts a target, so that vectors can be compared at equal cost.

    The cost is ``CE(steered) − CE(unsteered)``, or the mean ``KL(unsteered‖steered)``, in nats per token. On text that
    the model itself wrote the two are equal in expectation; on other text the rise can be negative, the KL cannot. The
    strength is found by interpolation between measured strengths. The rule is that of SAE-TS (arXiv 2411.02193).

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        make: A function from a strength to an intervention, such as ``vector.add``.
        texts: Texts, or pairs (prompt, completion), of which the completion counts. Scopes hold there as in
            ``generate``.
        target_ce_rise: The rise in cross-entropy; 0.5 nats per token when no target is given.
        target_kl: The KL divergence, in place of ``target_ce_rise``.
        start: The strength that is tried first; by default a guess from the size of the activations, or 1.
        tolerance: The relative error of the cost that is accepted.
        progress: As in ``collect``; a function is called with the number of strengths that are found.

    Returns:
        The coefficient c ≥ 0 at which ``make(c)`` costs the target.

    Raises:
        SteeringError: Both targets are given, the cost at c = 0 is above the target already, or no coefficient reaches
            it.
    """
    name, target = _target(target_ce_rise, target_kl)
    costs = CostMeter(model, tokenizer, texts, name, 16384)
    nothing = make(0.0)
    at_zero = 0.0 if _changes_nothing(nothing) else costs([nothing])[0]
    if at_zero >= target:
        raise SteeringError(
            f"a {costs.noun} of {at_zero:.3f} nats",
            f"a cost below the target at strength 0, {target} nats",
            "the function should give an intervention that does nothing at strength 0, as vector.add does",
        )
    coefficient = solve_costs(costs, [[target]], [make], start, tolerance, progress)[0].coefficients[0]
    if math.isnan(coefficient):
        raise SteeringError(
            f"a {costs.noun} below {target} nats at every coefficient tried",
            "a vector that changes what the model says",
            "check that its scope covers tokens of the texts, or pass a smaller target",
        )
    return coefficient


@checked
def calibrate_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    makes: Sequence[Callable[[float], Intervention]],
    texts: Sequence[Scored],
    *,
    target_ce_rise: float | None = None,
    target_kl: float | None = None,
    start: float | None = None,
    tolerance: float = TOLERANCE,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> list[float]:
    """The strength of ``calibrate`` for each of many interventions, with many to a forward pass.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        makes: Functions from a strength to an intervention, such as ``vector.add``.
        texts: As in ``calibrate``.
        target_ce_rise: As in ``calibrate``.
        target_kl: As in ``calibrate``.
        start: As in ``calibrate``.
        tolerance: As in ``calibrate``.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.
        progress: As in ``calibrate``.

    Returns:
        One coefficient for each function; nan where the target is not reached after forty doublings, or before
        activations overflow, and where it is passed even after forty halvings.

    Raises:
        SteeringError: ``start`` or ``tolerance`` is not above 0, both targets are given, or one is not a finite number
            above 0.
    """
    name, target = _target(target_ce_rise, target_kl)
    costs = CostMeter(model, tokenizer, texts, name, batch_tokens)
    curves = solve_costs(costs, [[target]] * len(makes), makes, start, tolerance, progress)
    return [curve.coefficients[0] for curve in curves]


@checked
def calibrate_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    makes: Sequence[Callable[[float], Intervention]],
    texts: Sequence[Scored],
    *,
    target_ce_rises: Sequence[float],
    start: float | None = None,
    tolerance: float = TOLERANCE,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> list[list[float]]:
    """The strengths of ``calibrate_many`` for each intervention and each of several rises in cross-entropy.

    What is measured for one target narrows the search for the others, so that a grid costs little more than its largest
    target.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        makes: Functions from a strength to an intervention, such as ``vector.add``.
        texts: As in ``calibrate``.
        target_ce_rises: The rises, in nats per token.
        start: As in ``calibrate``.
        tolerance: As in ``calibrate``.
        batch_tokens: As in ``calibrate_many``.
        progress: As in ``calibrate``.

    Returns:
        For each function the coefficient of each rise; nan where it is not reached.

    Raises:
        SteeringError: As in ``calibrate_many``.
    """
    for target in target_ce_rises:
        _check_target("target_ce_rise", target)
    if not target_ce_rises:
        raise SteeringError("none", "at least one rise in target_ce_rises", "pass target_ce_rises=[0.5]")
    costs = CostMeter(model, tokenizer, texts, "target_ce_rise", batch_tokens)
    targets = [target_ce_rises] * len(makes)
    curves = solve_costs(costs, targets, makes, start, tolerance, progress)
    return [curve.coefficients for curve in curves]


def _target(ce_rise: float | None, kl: float | None) -> tuple[str, float]:
    """The name of the target and its value. Raises SteeringError."""
    if ce_rise is not None and kl is not None:
        raise SteeringError(
            "both",
            f"either target_ce_rise = {ce_rise} or target_kl = {kl}",
            "leave out one of them",
        )
    name, target = ("target_kl", kl) if kl is not None else ("target_ce_rise", CE_RISE if ce_rise is None else ce_rise)
    _check_target(name, target)
    return name, target


def _check_target(name: str, target: float) -> None:
    check_number(name, target)
    if not 0 < target < math.inf:
        raise SteeringError(
            f"{name} = {target}", "a finite number of nats per token, above 0", f"the usual {name} is 0.5"
        )


class CostMeter:
    """Counts the cost of interventions on the same texts, whose lower blocks are run once for all calls.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: As in ``calibrate``.
        name: "target_kl" or "target_ce_rise": what is counted.
        batch_tokens: The tokens in a forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Scored],
        name: str,
        batch_tokens: int | None,
    ) -> None:
        self.texts, self.kl = texts, name == "target_kl"
        self.noun, self.dtype = "KL" if self.kl else "rise", activation_dtype(model)
        pairs = scored_pairs(texts, [])
        self.passes = TextPasses(model, tokenizer, pairs, batch_tokens=batch_tokens, keep=True)
        self._unsteered: float | None = None

    def __call__(self, items: Sequence[Intervention]) -> list[float]:
        """The cost of each intervention, in nats per token. Raises what ``cross_entropies`` does."""
        scored_pairs(self.texts, items)
        if self.kl:
            return mean_kl_divergences(self.passes, items)
        first = [None] if self._unsteered is None else []
        values = mean_cross_entropies(self.passes, len(self.texts), [*first, *items])
        if self._unsteered is None:
            self._unsteered, *values = values
        return [value - self._unsteered for value in values]

    @property
    def unsteered(self) -> float:
        """The cross-entropy of the texts under the unsteered model, in nats per token."""
        if self._unsteered is None:
            self._unsteered = mean_cross_entropies(self.passes, len(self.texts), [None])[0]
        return self._unsteered

    def guess(self, item: Intervention, target: float) -> float:
        """A multiple of an intervention that may cost the target, from the size of activations; 1 where not known.

        Raises SteeringError for what is no intervention.
        """
        interventions_of(item)  # raises for anything else
        update, at = item.update(), item.hookpoint
        if update.read is not None or update.sae is not None or at.site in ("z", "mlp_in"):
            return 1.0
        size = float((update.const.detach()[:, None].float() @ update.write.detach().float()).norm())
        norm = self.passes.stream_norm(at.layer)
        if not norm or not 0 < size < math.inf:
            return 1.0
        return norm / size * DOSE * math.pow(target / CE_RISE, 1 / POWER)


def _changes_nothing(item: Intervention) -> bool:
    """Whether an intervention adds zero, whatever it is added to. Raises SteeringError for what is none."""
    interventions_of(item)  # raises for anything else
    update = item.update()
    return update.read is None and update.sae is None and not bool(update.const.any())


@runtime_checkable  # where annotations are checked at run time
class Costs(Protocol):
    """What measures the cost of interventions in a model whose activations have a dtype."""

    dtype: torch.dtype

    def __call__(self, items: Sequence[Intervention], /) -> list[float]:
        """The cost of each intervention."""

    def guess(self, item: Intervention, target: float, /) -> float:
        """A multiple of an intervention that may cost the target."""


def solve_costs(
    costs: Costs,
    targets: Sequence[Sequence[float]],
    makes: Sequence[Callable[[float], Intervention]],
    start: float | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress = None,
    known: Sequence[Sequence[tuple[float, float]]] = (),
    rounds: int = MAX_ROUNDS,
) -> list[CostCurve]:
    """Measure each intervention until its targets are met, as far as they can be.

    Args:
        costs: What measures.
        targets: For each intervention the costs to be met.
        makes: Functions from a strength to an intervention.
        start: As in ``calibrate``.
        tolerance: As in ``calibrate``.
        progress: As in ``calibrate``.
        known: For each intervention the strengths whose cost is known, and the costs; none by default.
        rounds: How often strengths are measured, at most.
    """
    for name, value in (("start", start), ("tolerance", tolerance)):
        if value is not None and not 0 < value < math.inf:
            raise SteeringError(f"{name} = {value}", "a finite number above 0", f"leave {name} out for the default")
    curves = []
    for number, make in enumerate(makes):
        middle = math.prod(targets[number]) ** (1 / len(targets[number]))
        first = costs.guess(make(1.0), middle) if start is None else float(start)
        curves.append(CostCurve(targets[number], first, tolerance, rounds))
        for strength, cost in known[number] if known else ():
            curves[-1].learn(strength, cost)
    with reporting(progress, "calibrating strengths", sum(map(len, targets))) as report:
        while any(curve.open for curve in curves):
            asked = [(curve, make, c) for curve, make in zip(curves, makes, strict=True) for c in curve.guesses()]
            tried = []
            for curve, make, c in asked:
                item = make(c)
                if curve.points and not change_bound(item.update()) <= max_change(costs.dtype, item.d_model):
                    curve.end_at(c)  # beyond what the model's dtype holds
                else:
                    tried.append((curve, c, item))
            values = costs([item for _, _, item in tried]) if tried else []
            for (curve, c, _), value in zip(tried, values, strict=True):
                curve.learn(c, value)
            report(sum(curve.solved for curve in curves))
    return curves
