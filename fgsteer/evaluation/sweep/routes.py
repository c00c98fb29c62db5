"""In which order a sweep measures what: every layer at every step, or some layers first and more around the best.

route = ThinnedRoute(survey, layers=30, grid=(0.25, 0.5, 1.0))
route.run(report)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fgsteer.display.progress import Report
from fgsteer.evaluation.sweep.answers import SIGNS
from fgsteer.evaluation.sweep.layers import around, thinned
from fgsteer.evaluation.sweep.measuring import FIRST_EVALUATIONS, NEXT_EVALUATIONS, Survey, curves_of


class FullRoute:
    """Every layer at every step, with random directions.

    Args:
        survey: What measures.
        layers: The layers.
        grid: The steps: costs, or sizes of coefficients.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, survey: Survey, layers: Sequence[int], grid: Sequence[float]) -> None:
        self.survey, self.layers, self.grid = survey, list(layers), list(grid)
        self.in_full = set(layers)

    @property
    def seconds(self) -> float:
        """An estimate of how long it takes."""
        steps = {layer: len(SIGNS) for layer in self.layers}
        return _seconds(self.survey, steps, len(self.grid), self.layers)

    def run(self, report: Report) -> None:
        """Measure it all, and report each layer."""
        for done, layer in enumerate(self.layers, 1):
            self.survey.measure(layer, SIGNS, self.grid, controls=True)
            report(done, len(self.layers))


class ThinnedRoute:
    """Every few layers at the matched cost, then those around the best of each sign, then the two best at every step.

    Where steps are coefficients, each layer that is visited is measured at all of them.

    Args:
        survey: What measures.
        layers: The number of layers of the model.
        grid: The steps: costs, or sizes of coefficients.
    """

    def __init__(self, survey: Survey, layers: int, grid: Sequence[float]) -> None:
        self.survey, self.layers = survey, layers
        self.grid = sorted({*grid, survey.matched}) if survey.by_cost else list(grid)
        self.first = [survey.matched] if survey.by_cost else self.grid
        self.coarse = thinned(layers)
        self.rounds = math.ceil(math.log2(max(2, self.coarse[1] - self.coarse[0])))
        self.in_full: set[int] = set()

    @property
    def seconds(self) -> float:
        """An estimate of how long it takes, with the best layers in the middle."""
        middle = self.layers // 2
        steps = {layer: len(SIGNS) for layer in self.coarse}
        steps[middle] = steps.get(middle, 0) + 2 * len(SIGNS) * self.rounds
        first = _seconds(self.survey, steps, len(self.first), [])
        return first + _seconds(self.survey, {middle: 2 * len(SIGNS)}, len(self.grid) - len(self.first), [middle] * 2)

    def run(self, report: Report) -> None:
        """Measure it all, and report each step."""
        total, done = len(self.coarse) + self.rounds + 1, 0
        for layer in self.coarse:
            self.survey.measure(layer, SIGNS, self.first)
            report(done := done + 1, total)
        for _ in range(self.rounds):
            for sign in SIGNS:
                best = self._best(sign)
                visited = {at for at, of, _ in self.survey.steps if of == sign}
                for layer in [] if best is None else around(best, visited, self.layers):
                    self.survey.measure(layer, [sign], self.first)
            report(done := done + 1, total)
        self.in_full = {best for sign in SIGNS if (best := self._best(sign)) is not None}
        for layer in sorted(self.in_full):
            self.survey.measure(layer, SIGNS, self.grid, controls=True)
        report(total, total)

    def _best(self, sign: int) -> int | None:
        """The layer with the largest push of a sign at the matched cost; None where none reaches it."""
        curves = [curve for curve in curves_of(self.survey.cells) if curve.sign == sign]
        pushes = {c.layer: at[1].sum() for c in curves if (at := c.at(self.survey.matched)) is not None}
        return max(pushes, key=lambda layer: (pushes[layer], -layer), default=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was measured where."""
        visited = sorted({layer for layer, _, _ in self.survey.steps})
        more = (
            f"random directions, and costs other than {self.survey.matched:g},"
            if self.survey.by_cost
            else ("random directions")
        )
        return (
            f"{len(visited)} of {self.layers} layers were measured, every few of them and those around the best: "
            f"{', '.join(map(str, visited))}; {more} only at {', '.join(map(str, sorted(self.in_full))) or 'none'}. "
            "full=True (--full) measures everything",
        )


def _seconds(survey: Survey, vectors: dict[int, int], steps: int, controlled: Sequence[int]) -> float:
    """An estimate for so many vectors of each layer at so many steps, and the random directions of some layers."""
    per_vector = FIRST_EVALUATIONS + NEXT_EVALUATIONS * (steps - 1) if survey.by_cost else float(steps)
    evaluations = {layer: number * per_vector for layer, number in vectors.items()}
    effects = {layer: number * steps for layer, number in vectors.items()}
    for layer in controlled:
        evaluations[layer] = evaluations.get(layer, 0.0) + FIRST_EVALUATIONS * survey.controls
        effects[layer] = effects.get(layer, 0) + survey.controls
    return survey.meter.estimate(evaluations, effects)
