"""Calibration: the strength at which steering costs neutral text a given number of nats per token.

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
from fgsteer.interventions.kinds import Intervention
from fgsteer.likelihood.scoring import Scored, cross_entropies, kl_divergences
from fgsteer.steering.ranges import activation_dtype, change_bound, max_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOUBLINGS = 40  # of a strength, before a target counts as out of reach
CE_RISE = 0.5  # nats per token, the default target

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
    """The strength at which steering costs the texts a target, so that vectors can be compared at equal cost.

    The cost is ``CE(steered) − CE(unsteered)``, or the mean ``KL(unsteered‖steered)``, in nats per token. On text that
    the model itself wrote the two are equal in expectation; on other text the rise can be negative, the KL cannot. The
    strength is found by doubling and bisection. The rule is that of SAE-TS (arXiv 2411.02193).

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        make: A function from a strength to an intervention, such as ``vector.add``.
        texts: Texts, or pairs (prompt, completion), of which the completion counts. Scopes hold there as in
            ``generate``.
        target_ce_rise: The rise in cross-entropy; 0.5 nats per token when no target is given.
        target_kl: The KL divergence, in place of ``target_ce_rise``.
        start: The strength that is tried first.
        tolerance: The relative error of the cost that is accepted.
        progress: As in ``collect``; a function is called with the number of strengths that are found.

    Returns:
        The coefficient c ≥ 0 at which ``make(c)`` costs the target.

    Raises:
        SteeringError: Both targets are given, the cost at c = 0 is above the target already, or no coefficient reaches
            it.
    """
    name, target, costs = _cost(model, tokenizer, texts, target_ce_rise, target_kl, 16384)
    at_zero = costs([make(0.0)])[0]
    if at_zero >= target:
        raise SteeringError(
            f"a {name} of {at_zero:.3f} nats",
            f"a cost below the target at strength 0, {target} nats",
            "the function should give an intervention that does nothing at strength 0, as vector.add does",
        )
    coefficient = _solve(costs, [target], [make], start, tolerance, activation_dtype(model), progress)[0][0]
    if math.isnan(coefficient):
        raise SteeringError(
            f"a {name} below {target} nats at every coefficient tried",
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
    start: float = 1.0,
    tolerance: float = 0.02,
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
        activations overflow.

    Raises:
        SteeringError: ``start`` or ``tolerance`` is not above 0, both targets are given, or one is not a finite number
            above 0.
    """
    _, target, costs = _cost(model, tokenizer, texts, target_ce_rise, target_kl, batch_tokens)
    return [
        coefficients[0]
        for coefficients in _solve(costs, [target], makes, start, tolerance, activation_dtype(model), progress)
    ]


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
    costs = _cost(model, tokenizer, texts, target_ce_rises[0], None, batch_tokens)[2]
    return _solve(costs, target_ce_rises, makes, start, tolerance, activation_dtype(model), progress)


def _cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Scored],
    ce_rise: float | None,
    kl: float | None,
    batch_tokens: int | None,
) -> tuple[str, float, Costs]:
    """What is counted, its target, and the function that counts it for many interventions. Raises SteeringError."""
    if ce_rise is not None and kl is not None:
        raise SteeringError(
            "both",
            f"either target_ce_rise = {ce_rise} or target_kl = {kl}",
            "leave out one of them",
        )
    name, target = ("target_kl", kl) if kl is not None else ("target_ce_rise", CE_RISE if ce_rise is None else ce_rise)
    _check_target(name, target)
    if kl is not None:
        return "KL", target, lambda items: kl_divergences(model, tokenizer, texts, items, batch_tokens=batch_tokens)
    base = cross_entropies(model, tokenizer, texts, [None])[0]

    def rises(items: Sequence[Intervention]) -> list[float]:
        return [value - base for value in cross_entropies(model, tokenizer, texts, items, batch_tokens=batch_tokens)]

    return "rise", target, rises


def _check_target(name: str, target: float) -> None:
    check_number(name, target)
    if not 0 < target < math.inf:
        raise SteeringError(
            f"{name} = {target}", "a finite number of nats per token, above 0", f"the usual {name} is 0.5"
        )


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
            raise SteeringError(f"{name} = {value}", "a finite number above 0", f"leave {name} out for the default")
    searches = [[_Search(target, float(start)) for target in targets] for _ in makes]
    with reporting(progress, "calibrating strengths", len(makes) * len(targets)) as report:
        while open_searches := [
            (n, search) for n, group in enumerate(searches) if (search := next((s for s in group if s.open), None))
        ]:
            items = [makes[n](search.guess) for n, search in open_searches]
            for (_, search), item in zip(open_searches, items, strict=True):
                if search.low[0] > 0 and not change_bound(item.update()) <= max_change(dtype, item.d_model):
                    search.result = math.nan  # doubled out of what the model's dtype holds
            pairs = zip(open_searches, items, strict=True)
            tried = [(n, search, item) for (n, search), item in pairs if search.result is None]
            values = costs([item for _, _, item in tried]) if tried else []
            for (n, search, _), value in zip(tried, values, strict=True):
                search.turns += 1
                guess = search.guess
                for other in searches[n]:
                    other.learn(guess, value, tolerance)
            report(sum(not search.open for group in searches for search in group))
    return [[s.guess if s.result is None else s.result for s in group] for group in searches]


class _Search:
    """Bracketing and bisection for one coefficient; between bisections it follows a power law through the bracket.

    It asks for the cost of ``guess``, and learns from the costs of other searches for the same intervention.
    """

    def __init__(self, target: float, start: float) -> None:
        self.target, self.guess = target, start
        self.low, self.high = (0.0, 0.0), (math.inf, math.inf)  # (coefficient, cost)
        self.result: float | None = None
        self.turns = self.doublings = 0

    @property
    def open(self) -> bool:
        """Whether it has a guess whose cost it needs."""
        return self.result is None and self.turns < 2 * DOUBLINGS

    def learn(self, at: float, cost: float, tolerance: float) -> None:
        """Take the cost at a coefficient; end with a coefficient, or set the next guess."""
        if self.result is not None or not self.low[0] < at < self.high[0]:
            return
        if abs(cost - self.target) <= tolerance * self.target:
            self.result = at
        elif cost < self.target:
            self.low = (at, cost)
        else:  # nan and inf too: far past the target
            self.high = (at, cost)
        (a, cost_a), (b, cost_b) = self.low, self.high
        if self.result is None and b == math.inf:
            self.doublings += 1
            self.result = math.nan if self.doublings >= DOUBLINGS else None
            self.guess = 2 * a
        elif self.result is None:
            self.guess = (a + b) / 2
            if self.turns % 3 and cost_a > 0 and math.isfinite(cost_b):
                power = math.log(self.target / cost_a) / math.log(cost_b / cost_a)
                self.guess = min(max(a * (b / a) ** power, a + 0.05 * (b - a)), b - 0.05 * (b - a))
            if (b - a) <= 1e-9 * b:  # the cost jumps over the target
                self.result = self.guess
