"""The cost of one intervention by its strength: which strengths to measure next, and where costs are met.

Between measured strengths, cost divided by strength is taken for a parabola, which is exact for a cost ``a·c + b·c²``
and for its sign where steering first makes texts likelier.

    curve = CostCurve([0.25, 0.5], start=8.0, tolerance=0.02)
    while curve.open:
        for c in curve.guesses(): curve.learn(c, cost(c))
    curve.coefficients
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

DOUBLINGS = 40  # of the first strength, or halvings, before a target counts as out of reach
MAX_ROUNDS = 2 * DOUBLINGS
GROWTH = 4.0  # of a strength from one measurement to the next, at most
POWER = 1.7  # with which cost grows, as far as one measurement tells
EDGE_SHARE = 0.02  # of a bracket, by which a guess keeps off its ends

Point = tuple[float, float]  # strength and cost


class CostCurve:
    """What is measured of one curve, and the strengths at which it meets its targets.

    Args:
        targets: The costs to be met, in any order.
        start: The strength to measure first.
        tolerance: The relative error of a cost that is accepted.
        most_rounds: The rounds of guesses after which the last ones are taken.
    """

    def __init__(self, targets: Sequence[float], start: float, tolerance: float, most_rounds: int = MAX_ROUNDS) -> None:
        self.targets, self.start, self.tolerance = tuple(targets), start, tolerance
        self.most_rounds = most_rounds
        self.points: list[Point] = []
        self.rounds = 0
        self._found: dict[float, float] = {}
        self._last: dict[float, float] = {}  # the guess of each target

    @property
    def open(self) -> bool:
        """Whether a target is not met yet."""
        return len(self._found) < len(set(self.targets)) and self.rounds < self.most_rounds

    @property
    def solved(self) -> int:
        """The number of targets that are met, or cannot be."""
        return len(self.targets) if not self.open else sum(target in self._found for target in self.targets)

    @property
    def coefficients(self) -> list[float]:
        """The strength of each target; nan where none costs as much."""
        return [self._found.get(target, self._last.get(target, math.nan)) for target in self.targets]

    def cost(self, strength: float) -> float:
        """The measured cost of a strength; nan of one that was not measured."""
        return dict(self.points).get(strength, math.nan)

    def guesses(self) -> list[float]:
        """The strengths to measure next."""
        if not self.open:
            return []
        if not self.points:
            return [self.start]
        self.rounds += 1
        waiting = sorted({target for target in self.targets if target not in self._found})
        if len(self.points) == 1:  # the outer targets are enough to tell the curve's shape
            waiting = [waiting[0], waiting[-1]]
        for target in waiting:
            self._last[target] = self._guess(target)
            if not self.start / 2**DOUBLINGS <= self._last[target] <= self.start * 2**DOUBLINGS:
                self._found[target] = math.nan
        return list(dict.fromkeys(self._last[t] for t in waiting if t not in self._found))

    def learn(self, strength: float, cost: float) -> None:
        """Take a measured cost, and note the targets that it meets."""
        self.points = sorted([*self.points, (strength, cost)])
        for target in self.targets:
            if target not in self._found and abs(cost - target) <= self.tolerance * target:
                self._found[target] = strength

    def end_at(self, strength: float) -> None:
        """Note that a strength is beyond what can be measured: targets that need as much are out of reach."""
        for target in self.targets:
            if target not in self._found and self._last.get(target, 0.0) >= strength:
                self._found[target] = math.nan

    def _guess(self, target: float) -> float:
        """The strength that may cost a target, by what is measured."""
        above = min((p for p in self.points if not p[1] < target), default=None)  # nan too: far past the target
        below = max((p for p in self.points if p[1] < target and (above is None or p < above)), default=None)
        if below is None or above is None:
            return self._beyond(target, below or above or (self.start, math.nan))
        low, high = below[0], above[0]
        if high - low <= 1e-9 * high:  # the cost jumps over the target
            self._found[target] = (low + high) / 2
            return self._found[target]
        if not math.isfinite(above[1]) or self.rounds % 4 == 0:
            return (low + high) / 2
        middle = math.sqrt(low * high)
        others = [p for p in self.points if p not in (below, above) and math.isfinite(p[1])]
        third = sorted(others, key=lambda p: abs(math.log(p[0] / middle)))[:1]
        guess = _root(_through([below, above, *third]), target, low, high)
        return min(max(guess, low + EDGE_SHARE * (high - low)), high - EDGE_SHARE * (high - low))

    def _beyond(self, target: float, end: Point) -> float:
        """A strength above all that were measured, or below, where no measured cost is on the target's other side."""
        strength, cost = end
        up = cost < target
        nearest = sorted((p for p in self.points if math.isfinite(p[1])), reverse=up)[:2]
        limit = strength * (GROWTH if up else 1 / GROWTH**2)
        if len(nearest) == 2:
            return _root(_through(nearest), target, min(strength, limit), max(strength, limit))
        if not (cost > 0 and math.isfinite(cost)):
            return 2 * strength if up else strength / 2
        guess = strength * math.pow(target / cost, 1 / POWER)
        return min(guess, limit) if up else max(guess, limit)


def _through(points: Sequence[Point]) -> Callable[[float], float]:
    """The curve through points of which cost divided by strength is a polynomial (Lagrange's)."""

    def cost(strength: float) -> float:
        total = 0.0
        for x, y in points:
            weight = y / x
            for other, _ in points:
                if other != x:
                    weight *= (strength - other) / (x - other)
            total += weight
        return strength * total

    return cost


def _root(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a curve crosses a target from below, by bisection; the nearer end where it does not."""
    if cost(high) < target:
        return high
    if cost(low) >= target:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return high
