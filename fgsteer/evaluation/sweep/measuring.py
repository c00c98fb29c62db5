"""Measuring a sweep's cells: strengths by their cost, then effects, many to a forward pass.

Texts become tokens once, and the blocks below a steered layer are run once for all signs and strengths.

    survey = Survey(Meter(model, tokenizer, propensity, neutral), vectors, KeptCells(None, {}), matched=0.5, controls=4)
    survey.measure(12, SIGNS, [0.25, 0.5])
    survey.cells, survey.damage
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fgsteer.evaluation.metrics.propensity import Propensity, Shares
from fgsteer.evaluation.sweep.answers import SIGNS, Curve
from fgsteer.evaluation.sweep.kept import KeptCells
from fgsteer.evaluation.sweep.results import SweepCell
from fgsteer.interventions import Add, Intervention
from fgsteer.likelihood.calibration import CostMeter, solve_costs
from fgsteer.likelihood.passes import TextPasses
from fgsteer.models.hookpoints import blocks_of
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIRST_EVALUATIONS, NEXT_EVALUATIONS = 2.5, 1.7  # of a cost until it is met: the first of a vector, each further one

Step = tuple[int, int, float]  # layer, sign, and the cost that is asked for or the size of the coefficient


class Meter:
    """Measures effects and costs of interventions on one model and one set of texts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        propensity: What effects are changes of.
        neutral: The texts that costs are measured on.
        batch_tokens: Padded tokens of a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        propensity: Propensity,
        neutral: Sequence[str],
        batch_tokens: int | None = None,
    ) -> None:
        self.model, self.propensity = model, propensity
        self.costs = CostMeter(model, tokenizer, neutral, "target_ce_rise", batch_tokens)
        self.passes = propensity.passes(model, tokenizer, batch_tokens)
        self.entropy = self.costs.unsteered
        began = time.perf_counter()  # the first pass is slower than all others
        self._values, self.unit = propensity.values_of(self.passes, [None])
        self.seconds_per_token = (time.perf_counter() - began) / _tokens(self.passes)

    @property
    def base(self) -> Shares:
        """The units' shares in the unsteered model's propensity."""
        return self.propensity.shares(self._values[0])

    def changes(self, interventions: Sequence[Intervention]) -> list[Shares]:
        """The units' shares in each intervention's effect."""
        if not interventions:
            return []
        values = self.propensity.values_of(self.passes, interventions)[0]
        return [self.propensity.shares(value - self._values[0]) for value in values]

    def estimate(self, evaluations: Mapping[int, float], effects: Mapping[int, int]) -> float:
        """The seconds of so many passes over neutral texts and over the others, by layer."""
        neutral, others = _tokens(self.costs.passes), _tokens(self.passes)
        return self.seconds_per_token * sum(
            self._share_above(layer) * (evaluations.get(layer, 0.0) * neutral + effects.get(layer, 0) * others)
            for layer in {*evaluations, *effects}
        )

    def _share_above(self, layer: int) -> float:
        """The share of a pass that is run for each strength: the blocks above the layer, and the head."""
        head = self.model.get_output_embeddings()
        head_weights = 0 if head is None else sum(p.numel() for p in head.parameters())
        blocks = blocks_of(self.model)
        block_weights = sum(p.numel() for p in blocks.parameters())
        return (head_weights + block_weights * (1 - (layer + 1) / len(blocks))) / (head_weights + block_weights)


class _Part(NamedTuple):
    """A vector at one layer, by the names of its cells: a sign of the sweep's vector, or a random direction."""

    make: Callable[[float], Add]
    cells: dict[str, float]  # the cost that is asked for, or the size of the coefficient


class Survey:
    """The cells of a sweep, measured a layer at a time, and kept.

    Args:
        meter: What measures.
        vectors: A function from a layer to its vector.
        kept: What has been measured.
        matched: The cost at which random directions are measured.
        controls: The number of random directions of a layer.
        by_cost: Whether steps are costs, rather than sizes of coefficients.
    """

    def __init__(
        self,
        meter: Meter,
        vectors: Callable[[int], SteeringVector],
        kept: KeptCells,
        *,
        matched: float,
        controls: int,
        by_cost: bool = True,
    ) -> None:
        self.meter, self.vectors, self.kept = meter, vectors, kept
        self.matched, self.controls, self.by_cost = matched, controls, by_cost
        self.steps: set[Step] = set()
        self.controlled: set[int] = set()

    def measure(self, layer: int, signs: Sequence[int], steps: Iterable[float], *, controls: bool = False) -> None:
        """Measure steps of a layer and some signs, and its random directions, as far as they were not yet."""
        steps, vector = list(steps), self.vectors(layer)
        self.steps |= {(layer, sign, step) for sign in signs for step in steps}
        parts = [
            _Part(_scaled(vector, float(sign)), {_name(layer, sign, step): step for step in steps}) for sign in signs
        ]
        self._measure([self._missing_of(part) for part in parts], self.by_cost)
        if controls and self.controls:
            self.controlled.add(layer)
            random = [
                _Part(random_like(vector, number).add, {_random_name(layer, number, self.matched): self.matched})
                for number in range(self.controls)
            ]
            self._measure([self._missing_of(part) for part in random], True)

    def _missing_of(self, part: _Part) -> _Part:
        return _Part(part.make, {name: step for name, step in part.cells.items() if self.kept.get(name) is None})

    def _measure(self, parts: Sequence[_Part], by_cost: bool) -> None:
        """Measure the cells of parts, and keep them."""
        parts = [part for part in parts if part.cells]
        if not parts:
            return
        if by_cost:
            known = [self._known(part) for part in parts]
            curves = solve_costs(
                self.meter.costs,
                [list(part.cells.values()) for part in parts],
                [part.make for part in parts],
                known=known,
            )
            met = [[(c, curve.cost(c)) for c in curve.coefficients] for curve in curves]
        else:
            sizes = [list(part.cells.values()) for part in parts]
            costs = iter(self.meter.costs([p.make(c) for p, row in zip(parts, sizes, strict=True) for c in row]))
            met = [[(c, next(costs)) for c in row] for row in sizes]
        named = [
            (name, part.make, strength, cost)
            for part, row in zip(parts, met, strict=True)
            for name, (strength, cost) in zip(part.cells, row, strict=True)
        ]
        reached = [(name, make, c, cost) for name, make, c, cost in named if math.isfinite(c) and math.isfinite(cost)]
        changes = self.meter.changes([make(c) for _, make, c, _ in reached])
        cells: dict[str, dict[str, Any]] = {name: {"strength": None} for name, *_ in named}
        for (name, _, strength, cost), change in zip(reached, changes, strict=True):
            if np.isfinite(change).all():
                cells[name] = {"strength": strength, "cost": cost, "shares": change.tolist()}
        self.kept.put(cells)

    def _known(self, part: _Part) -> list[tuple[float, float]]:
        """Strengths of the part's other cells, and what they cost: they narrow the search."""
        prefix = next(iter(part.cells)).rpartition("/")[0]
        steps = {step for layer, sign, step in self.steps if _name(layer, sign, step).startswith(f"{prefix}/")}
        cells = [self.kept.get(f"{prefix}/{step!r}") for step in sorted(steps)]
        return [(cell["strength"], cell["cost"]) for cell in cells if cell and cell["strength"] is not None]

    @property
    def cells(self) -> dict[SweepCell, Shares]:
        """What was measured, by layer, sign and step, with the units' shares in each effect."""
        shares: dict[SweepCell, Shares] = {}
        for layer, sign, step in sorted(self.steps, key=lambda one: (one[0], SIGNS.index(one[1]), one[2])):
            cell = self.kept.get(_name(layer, sign, step))
            if cell and cell["strength"] is not None:
                share = np.array(cell["shares"])
                effect = self.meter.propensity.interval(share)
                target = step if self.by_cost else None
                shares[SweepCell(layer, sign, sign * cell["strength"], target, cell["cost"], effect)] = share
        return shares

    @property
    def damage(self) -> dict[int, Shares]:
        """By layer, the mean change under random directions of the matched cost."""
        means = {}
        for layer in sorted(self.controlled):
            cells = [self.kept.get(_random_name(layer, number, self.matched)) for number in range(self.controls)]
            if shares := [cell["shares"] for cell in cells if cell and cell["strength"] is not None]:
                means[layer] = np.mean(shares, axis=0)
        return means


def curves_of(shares: Mapping[SweepCell, Shares]) -> list[Curve]:
    """The cells by layer and sign, along the grid."""
    rows: dict[tuple[int, int], list[SweepCell]] = {}
    for cell in shares:
        rows.setdefault((cell.layer, cell.sign), []).append(cell)
    return [
        Curve(
            layer,
            sign,
            tuple(cell.coefficient for cell in row),
            tuple(cell.cost if cell.target is None else cell.target for cell in row),
            tuple(cell.cost for cell in row),
            sign * np.stack([shares[cell] for cell in row]),
        )
        for (layer, sign), row in rows.items()
    ]


def _tokens(passes: TextPasses) -> int:
    """The tokens of a pass over all texts, with padding."""
    return sum(batch.tokens for batch in passes.batches)


def _name(layer: int, sign: int, step: float) -> str:
    return f"{layer}/{sign:+d}/{step!r}"


def _random_name(layer: int, number: int, step: float) -> str:
    return f"{layer}/random {number}/{step!r}"


def _scaled(vector: SteeringVector, unit: float) -> Callable[[float], Add]:
    return lambda factor: vector.add(factor * unit)


def random_like(vector: SteeringVector, number: int) -> SteeringVector:
    """The ``number``-th random direction at a vector's hookpoint, of its norm (of norm 1 for a zero vector)."""
    generator = torch.Generator().manual_seed(number)
    direction = torch.randn(vector.d_model, generator=generator)
    return SteeringVector(direction / direction.norm() * (vector.norm or 1.0), vector.hookpoint)
