"""Strength made comparable: the coefficient that costs neutral text a given number of nats.

c = calibrate(model, tokenizer, vec.add, texts, target_ce_rise=0.5)
c = calibrate(model, tokenizer, vec.add, texts, target_kl=0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fgsteer.errors import SteeringError
from fgsteer.interventions import Intervention
from fgsteer.scoring import cross_entropies, kl_divergences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOUBLINGS = 40
CE_RISE = 0.5

Costs = Callable[[Sequence[Intervention]], list[float]]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[float], Intervention],
    texts: Sequence[str],
    *,
    target_ce_rise: float | None = None,
    target_kl: float | None = None,
    start: float = 1.0,
    tolerance: float = 0.02,
) -> float:
    """The coefficient c ≥ 0 at which steering by ``make(c)`` costs the texts the target, in nats per token.

    One of ``CE(steered) − CE(unsteered) = target_ce_rise``, 0.5 when no target is given (the strength
    rule of SAE-TS, arXiv 2411.02193), and mean ``KL(unsteered‖steered) = target_kl``. On text that
    the model itself wrote the two are equal in expectation; on other text the rise can be negative, the
    KL cannot. Found by doubling from ``start`` and bisection, within ``tolerance`` of the target
    (relative). Raises SteeringError for both targets, when the cost at c = 0 is above the target
    already, or no coefficient reaches it.
    """
    name, target, costs = _cost(model, tokenizer, texts, target_ce_rise, target_kl, 16384)
    at_zero = costs([make(0.0)])[0]
    if at_zero >= target:
        raise SteeringError(f"a {name} of {at_zero:.3f} nats at coefficient 0", f"less than the target {target}")
    found = _solve(costs, target, [make], start, tolerance)[0]
    if math.isnan(found):
        raise SteeringError(f"a {name} below {target} nats at every coefficient tried", "a vector that moves the model")
    return found


def calibrate_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    makes: Sequence[Callable[[float], Intervention]],
    texts: Sequence[str],
    *,
    target_ce_rise: float | None = None,
    target_kl: float | None = None,
    start: float = 1.0,
    tolerance: float = 0.02,
    batch_tokens: int = 16384,
) -> list[float]:
    """The coefficient of ``calibrate`` for each of many interventions, many to a forward pass.

    Each is doubled from ``start`` until its cost reaches the target, then the bracket is narrowed; nan where
    the target is not reached after forty doublings. Raises SteeringError for ``start`` ≤ 0, for both
    targets, or for one that is no finite number > 0.
    """
    _, target, costs = _cost(model, tokenizer, texts, target_ce_rise, target_kl, batch_tokens)
    return _solve(costs, target, makes, start, tolerance)


def _cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ce_rise: float | None,
    kl: float | None,
    batch_tokens: int,
) -> tuple[str, float, Costs]:
    """(what is counted, its target, the function that counts it for many interventions). Raises SteeringError."""
    if ce_rise is not None and kl is not None:
        raise SteeringError(f"target_ce_rise = {ce_rise} and target_kl = {kl}", "one of them")
    name, target = ("target_kl", kl) if kl is not None else ("target_ce_rise", CE_RISE if ce_rise is None else ce_rise)
    if not 0 < target < math.inf:
        raise SteeringError(f"{name} = {target}", "nats a token, finite and > 0")
    if kl is not None:
        return "KL", target, lambda given: kl_divergences(model, tokenizer, texts, given, batch_tokens=batch_tokens)
    base = cross_entropies(model, tokenizer, texts, [None])[0]

    def rises(given: Sequence[Intervention]) -> list[float]:
        return [value - base for value in cross_entropies(model, tokenizer, texts, given, batch_tokens=batch_tokens)]

    return "rise", target, rises


def _solve(
    costs: Costs, target: float, makes: Sequence[Callable[[float], Intervention]], start: float, tolerance: float
) -> list[float]:
    """The coefficients at which each intervention costs the target; nan where none does."""
    if not start > 0:
        raise SteeringError(f"start = {start}", "a coefficient > 0 to double from")
    searches = [_Search(target, float(start)) for _ in makes]
    for turn in range(2 * DOUBLINGS):
        running = [search for search in searches if search.found is None]
        if not running:
            break
        given = [make(search.guess) for make, search in zip(makes, searches, strict=True) if search.found is None]
        for search, value in zip(running, costs(given), strict=True):
            search.tell(value, tolerance, turn)
    return [search.guess if search.found is None else search.found for search in searches]


class _Search:
    """Bracketing and bisection for one coefficient; between bisections it follows a power law through the bracket."""

    def __init__(self, target: float, start: float) -> None:
        self.target, self.guess = target, start
        self.low, self.high = (0.0, 0.0), (math.inf, math.inf)  # (coefficient, cost)
        self.found: float | None = None

    def tell(self, cost: float, tolerance: float, turn: int) -> None:
        """Take the cost at ``guess``; settle, or set the next guess."""
        if abs(cost - self.target) <= tolerance * self.target:
            self.found = self.guess
        elif cost < self.target:
            self.low = (self.guess, cost)
        else:  # nan and inf too: far past the target
            self.high = (self.guess, cost)
        (a, cost_a), (b, cost_b) = self.low, self.high
        if self.found is None and b == math.inf:
            self.found = math.nan if turn + 1 >= DOUBLINGS else None
            self.guess = 2 * a
        elif self.found is None:
            self.guess = (a + b) / 2
            if turn % 3 and cost_a > 0 and math.isfinite(cost_b):
                power = math.log(self.target / cost_a) / math.log(cost_b / cost_a)
                self.guess = min(max(a * (b / a) ** power, a + 0.05 * (b - a)), b - 0.05 * (b - a))
            if (b - a) <= 1e-9 * b:  # the cost jumps over the target
                self.found = self.guess
