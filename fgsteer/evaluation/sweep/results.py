"""What a sweep measured: cells by layer, sign and strength, and the answers that they give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.sweep.answers import BestLayer, Fade, SignDifference, in_words
from fgsteer.storage.version import library_version


@dataclass(frozen=True, repr=False)
class SweepCell(OneLineRepr):
    """What ``vector.add(coefficient)`` does at one layer, with one sign and strength.

    Args:
        layer: The layer.
        sign: +1 towards the behavior, −1 away from it.
        coefficient: The coefficient, with the sign.
        target: The cost that was asked for, in nats a token; None where coefficients were.
        cost: The measured rise of neutral text's cross-entropy, in nats a token.
        effect: The change of propensity, with its interval.
    """

    layer: int
    sign: int
    coefficient: float
    target: float | None
    cost: float
    effect: Interval

    @property
    def push(self) -> float:
        """The effect in the direction that was asked for."""
        return self.sign * self.effect.mean

    @property
    def step(self) -> float:
        """The cell's place along the grid: the cost that was asked for, or the size of the coefficient."""
        return abs(self.coefficient) if self.target is None else self.target


@dataclass(frozen=True, repr=False)
class Sweep(OneLineRepr):
    """What ``sweep`` measured, and its answers.

    Args:
        contrast: Name of the contrast set.
        method: The method that built the vectors.
        model: Which model it was.
        hookpoints: Where each layer was steered.
        norms: Norm of each layer's vector.
        measured_on: Name of the contrast set that effects are measured on.
        texts: Numbers of its positives, its negatives, and the pairs among them.
        unit: The unit of effects.
        propensity: Propensity of the unsteered model.
        cross_entropy: Cross-entropy of neutral texts under the unsteered model, in nats a token.
        matched: The cost in nats a token at which ``best`` and ``signs`` compare.
        cells: What was measured, by layer, sign and strength.
        damage: By layer, the mean effect of random directions of the matched cost: what steering does whichever way
            it goes.
        best: The best layer of each sign.
        fades: How each layer and sign fades.
        signs: Which sign is stronger, by layer, then on average.
        notes: What is missing, or weaker than it looks.
    """

    contrast: str
    method: str
    model: Mapping[str, Any]
    hookpoints: Mapping[int, str]
    norms: Mapping[int, float]
    measured_on: str
    texts: Mapping[str, int]
    unit: str
    propensity: Interval
    cross_entropy: float
    matched: float
    cells: tuple[SweepCell, ...]
    damage: Mapping[int, Interval]
    best: tuple[BestLayer, ...]
    fades: tuple[Fade, ...]
    signs: tuple[SignDifference, ...]
    notes: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, str, str]:
        """Where it works best, how it fades, and which sign is stronger, in words."""
        return in_words(self.best, self.fades, self.signs, self.matched, self.unit)

    @property
    def steps(self) -> tuple[float, ...]:
        """The rising grid: costs that were asked for, or sizes of coefficients."""
        return tuple(sorted({cell.step for cell in self.cells}))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; what is not finite is null."""
        return {"fgsteer": "sweep", "version": library_version(), **_plain(self), "answers": list(self.answers)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
