"""Strength made comparable: the coefficient that costs neutral text a given number of nats.

c = calibrate(model, tokenizer, vec.add, texts, target_ce_rise=0.5)
c = calibrate(model, tokenizer, vec.add, texts, target_kl=0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import SteeringError
from fgsteer.errors.checks import check_number, checked
from fgsteer.interventions import Intervention
from fgsteer.likelihood.scoring import Scored, cross_entropies, kl_divergences
from fgsteer.steering.ranges import largest, model_dtype, reach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOUBLINGS = 40
CE_RISE = 0.5

Costs = Callable[[Sequence[Intervention]], list[float]]


@checked
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[float], Intervention],
    texts: Sequence[Scored],
    *,
    target_ce_rise: float | None = None,
    target_kl: float | None = None,
    start: float = 1.0,
    tolerance: float = 0.02,
    progress: Progress = None,
) -> float:
    """The coefficient c ≥ 0 at which steering by ``make(c)`` costs the texts the target, in nats per token.

    One of ``CE(steered) − CE(unsteered) = target_ce_rise``, 0.5 when no target is given (the strength
    rule of SAE-TS, arXiv 2411.02193), and mean ``KL(unsteered‖steered) = target_kl``. On text that
    the model itself wrote the two are equal in expectation; on other text the rise can be negative, the
    KL cannot. A text may be (prompt, completion), of which the completion counts; the intervention's scope holds
    there as in ``generate``. Found by doubling from ``start`` and bisection, within ``tolerance`` of the target
    (relative).
    ``progress`` as in ``collect``. Raises SteeringError for both targets, when the cost at c = 0 is above the target
    already, or no coefficient reaches it.
    """
    name, target, costs = _cost(model, tokenizer, texts, target_ce_rise, target_kl, 16384)
    at_zero = costs([make(0.0)])[0]
    if at_zero >= target:
        raise SteeringError(f"a {name} of {at_zero:.3f} nats at coefficient 0", f"less than the target {target}")
    found = _solve(costs, [target], [make], start, tolerance, model_dtype(model), progress)[0][0]
    if math.isnan(found):
        raise SteeringError(f"a {name} below {target} nats at every coefficient tried", "a vector that moves the model")
    return found


@checked
def calibrate_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    makes: Sequence[Callable[[float], Intervention]],
    texts: Sequence[Scored],
    *,
    target_ce_rise: float | None = None,
    target_kl: float | None = None,
    start: float = 1.0,
    tolerance: float = 0.02,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> list[float]:
    """The coefficient of ``calibrate`` for each of many interventions, many to a forward pass.

    Each is doubled from ``start`` until its cost reaches the target, then the bracket is narrowed; nan where
    the target is not reached after forty doublings, or before activations overflow.
    ``progress`` as in ``collect``. Raises SteeringError
    for ``start`` ≤ 0, for both targets, or for one that is no finite number > 0.
    """
    _, target, costs = _cost(model, tokenizer, texts, target_ce_rise, target_kl, batch_tokens)
    return [found[0] for found in _solve(costs, [target], makes, start, tolerance, model_dtype(model), progress)]


@checked
def calibrate_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    makes: Sequence[Callable[[float], Intervention]],
    texts: Sequence[Scored],
    *,
    target_ce_rises: Sequence[float],
    start: float = 1.0,
    tolerance: float = 0.02,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> list[list[float]]:
    """The coefficients of ``calibrate_many`` for each intervention and each of several CE rises.

    What is measured for one target narrows the brackets of the others, so that a grid costs little
    more than its largest target. Raises SteeringError as ``calibrate_many`` does.
    """
    for target in target_ce_rises:
        _check_target("target_ce_rise", target)
    if not target_ce_rises:
        raise SteeringError("no target_ce_rises", "at least one")
    costs = _cost(model, tokenizer, texts, target_ce_rises[0], None, batch_tokens)[2]
    return _solve(costs, target_ce_rises, makes, start, tolerance, model_dtype(model), progress)


def _cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Scored],
    ce_rise: float | None,
    kl: float | None,
    batch_tokens: int | None,
) -> tuple[str, float, Costs]:
    """(what is counted, its target, the function that counts it for many interventions). Raises SteeringError."""
    if ce_rise is not None and kl is not None:
        raise SteeringError(f"target_ce_rise = {ce_rise} and target_kl = {kl}", "one of them")
    name, target = ("target_kl", kl) if kl is not None else ("target_ce_rise", CE_RISE if ce_rise is None else ce_rise)
    _check_target(name, target)
    if kl is not None:
        return "KL", target, lambda given: kl_divergences(model, tokenizer, texts, given, batch_tokens=batch_tokens)
    base = cross_entropies(model, tokenizer, texts, [None])[0]

    def rises(given: Sequence[Intervention]) -> list[float]:
        return [value - base for value in cross_entropies(model, tokenizer, texts, given, batch_tokens=batch_tokens)]

    return "rise", target, rises


def _check_target(name: str, target: float) -> None:
    check_number(name, target)
    if not 0 < target < math.inf:
        raise SteeringError(f"{name} = {target}", "nats a token, finite and > 0")


def _solve(
    costs: Costs,
    targets: Sequence[float],
    makes: Sequence[Callable[[float], Intervention]],
    start: float,
    tolerance: float,
    dtype: torch.dtype,
    progress: Progress,
) -> list[list[float]]:
    """The coefficients at which each intervention costs each target; nan where none does."""
    for name, value in (("start", start), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise SteeringError(f"{name} = {value}", "finite and > 0")
    searches = [[_Search(target, float(start)) for target in targets] for _ in makes]
    with reporting(progress, "calibrating strengths", len(makes) * len(targets)) as report:
        while asked := [(n, s) for n, group in enumerate(searches) if (s := next((s for s in group if s.open), None))]:
            items = [makes[n](search.guess) for n, search in asked]
            for (_, search), item in zip(asked, items, strict=True):
                if search.low[0] > 0 and not reach(item.update()) <= largest(dtype, item.d_model):
                    search.found = math.nan  # doubled out of what the model's dtype holds
            tried = [(n, search, item) for (n, search), item in zip(asked, items, strict=True) if search.found is None]
            values = costs([item for _, _, item in tried]) if tried else []
            for (n, search, _), value in zip(tried, values, strict=True):
                search.turns += 1
                guess = search.guess
                for other in searches[n]:
                    other.tell(guess, value, tolerance)
            report(sum(not search.open for group in searches for search in group))
    return [[search.found if search.found is not None else search.guess for search in group] for group in searches]


class _Search:
    """Bracketing and bisection for one coefficient; between bisections it follows a power law through the bracket.

    It asks for ``guess``, and learns from what others of its intervention asked for.
    """

    def __init__(self, target: float, start: float) -> None:
        self.target, self.guess = target, start
        self.low, self.high = (0.0, 0.0), (math.inf, math.inf)  # (coefficient, cost)
        self.found: float | None = None
        self.turns = self.doublings = 0

    @property
    def open(self) -> bool:
        """Whether it has a guess to ask for."""
        return self.found is None and self.turns < 2 * DOUBLINGS

    def tell(self, at: float, cost: float, tolerance: float) -> None:
        """Take the cost at a coefficient; settle, or set the next guess."""
        if self.found is not None or not self.low[0] < at < self.high[0]:
            return
        if abs(cost - self.target) <= tolerance * self.target:
            self.found = at
        elif cost < self.target:
            self.low = (at, cost)
        else:  # nan and inf too: far past the target
            self.high = (at, cost)
        (a, cost_a), (b, cost_b) = self.low, self.high
        if self.found is None and b == math.inf:
            self.doublings += 1
            self.found = math.nan if self.doublings >= DOUBLINGS else None
            self.guess = 2 * a
        elif self.found is None:
            self.guess = (a + b) / 2
            if self.turns % 3 and cost_a > 0 and math.isfinite(cost_b):
                power = math.log(self.target / cost_a) / math.log(cost_b / cost_a)
                self.guess = min(max(a * (b / a) ** power, a + 0.05 * (b - a)), b - 0.05 * (b - a))
            if (b - a) <= 1e-9 * b:  # the cost jumps over the target
                self.found = self.guess
