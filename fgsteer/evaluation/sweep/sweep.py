"""Layer × coefficient × sign without generation: where steering works best, how it fades, whether negative is stronger.

What a vector does is read from log-probabilities of texts that show the behavior and texts that
do not, what it costs from the cross-entropy of neutral texts. Strengths are those that cost the same
everywhere, so that layers and signs are compared at equal cost (questions of arXiv 2507.11771).

    print(*sweep(model, tokenizer, load_contrast("wedding")).answers, sep="\\n")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fgsteer.activations.tokens import TokenRule
from fgsteer.data.contrasts import ContrastPair, ContrastSet, as_contrast, load_neutral
from fgsteer.display.progress import Progress, Report, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_number, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.metrics.propensity import Propensity, Shares
from fgsteer.evaluation.sweep.answers import (
    SIGNS,
    BestLayer,
    Curve,
    Fade,
    SignDifference,
    best_layer,
    fade,
    in_words,
    sign_differences,
)
from fgsteer.interventions import Add, Intervention
from fgsteer.likelihood.calibration import CE_RISE, calibrate_grid
from fgsteer.likelihood.scoring import cross_entropies
from fgsteer.methods import spec
from fgsteer.methods.provenance import library_version
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.pairing import model_identity
from fgsteer.statistics.collecting import collect
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CE_RISES = (0.05, 0.1, 0.25, 0.5, 1.0)
OFF_TARGET = 0.1  # a calibrated cost further than this from the one asked for, relative, is noted

Contrasts = ContrastSet | str | Path | Sequence[ContrastPair]
Step = tuple[int, int, float, float | None]  # layer, sign, coefficient that bears it, rise asked for


@dataclass(frozen=True, repr=False)
class SweepCell(OneLineRepr):
    """One layer, sign and strength: ``vector.add(coefficient)``, which bears the sign.

    ``effect`` is the change of propensity, ``cost`` the measured rise of neutral text's cross-entropy in nats a
    token, ``target`` the rise that was asked for, None for coefficients that were given.
    """

    layer: int
    sign: int
    coefficient: float
    target: float | None
    cost: float
    effect: Interval

    @property
    def push(self) -> float:
        """The effect in the direction asked for."""
        return self.sign * self.effect.mean

    @property
    def step(self) -> float:
        """The cell's place along the grid: the rise asked for, or the size of the coefficient."""
        return abs(self.coefficient) if self.target is None else self.target


@dataclass(frozen=True, repr=False)
class Sweep(OneLineRepr):
    """What ``sweep`` measured, and its answers.

    ``unit`` is that of effects; ``texts`` are numbers of positives, negatives, and pairs among them, ``measured_on``
    which they are. ``propensity`` and ``cross_entropy`` are the unsteered model's. ``matched`` is the cost at
    which ``best`` and ``signs`` compare, and ``damage`` by layer the mean effect of random directions of that cost:
    what steering does whichever way it goes. ``notes`` say what is missing or weaker than it looks.
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
        """Where it works best, how it fades, which sign is stronger, in words."""
        return in_words(self.best, self.fades, self.signs, self.matched, self.unit)

    @property
    def steps(self) -> tuple[float, ...]:
        """The grid: costs asked for, or sizes of coefficients, rising."""
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


@checked
def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrasts,
    *,
    vectors: str | Sequence[SteeringVector] = "caa",
    layers: Sequence[int] | None = None,
    ce_rises: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    matched: float | None = None,
    held_out: Contrasts | None = None,
    neutral: Sequence[str] | None = None,
    controls: int = 4,
    tokens: TokenRule = "all",
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> Sweep:
    """Effect and cost of ``h + c·v`` at every layer, strength and sign, and what they answer; nothing is generated.

    Propensity is ``mean⁺ − mean⁻`` of the two sides' log-probabilities a token, and an effect is its change from
    c = 0, in nats. Of pairs that all have a prompt and two answers of equally many tokens, as letters are,
    log-probabilities are sums: the difference of ``answer_probabilities``. Cost is the rise of the mean
    cross-entropy of ``neutral`` texts, in nats a token.

    ``vectors`` are one a layer, or the name of a method that needs no SAE, such as caa, to build them from the
    contrast, reading ``tokens``, at resid_post of ``layers`` (all); they are not scaled: c = 1 adds v. Strengths are
    those at which each layer and sign costs ``ce_rises`` (rising; by default .05, .1, .25, .5, 1), or
    ``coefficients`` ≥ 0, tried with both signs.
    ``matched`` is the cost at which layers and signs are compared: .5, or less where the grid ends before; between
    given coefficients it is interpolated. ``controls`` random directions a layer (0: none) show what any change of
    that cost does to the two sides, which is no effect of the vector and would pass for a stronger sign.

    Effects are measured on ``held_out``, else the contrast's held-out part, else, with a note, on the contrast
    itself. Intervals (95 %, Student's t) are over these texts, pairs and the pairs of one prompt kept together;
    the neutral texts and the vectors are taken as they are. ``progress`` as in ``collect``; a
    function gets (steps done, steps in all).

    Raises DataError for a grid that is not rising, fewer than two texts a side, or two vectors at a layer;
    HookpointError for a layer that does not exist; what ``collect`` and the methods raise.
    """
    given = as_contrast(contrast)
    grid, matched = _grid(ce_rises, coefficients, matched)
    by_cost = coefficients is None
    held = given.held_out if held_out is None else as_contrast(held_out)
    propensity = Propensity(given if held is None else held)
    meter = _Meter(model, tokenizer, propensity, load_neutral()[0] if neutral is None else neutral, batch_tokens)
    with reporting(progress, "sweeping") as report:
        by_layer = _vectors(model, tokenizer, given, vectors, layers, tokens)
        tick = _Ticker(report, len(by_layer) + by_cost + (controls > 0))
        if by_cost:
            steps = _calibrated(meter, by_layer, grid)
            tick()
        else:
            steps = [(layer, sign, sign * size, None) for layer in by_layer for sign in SIGNS for size in grid]
        shares: dict[SweepCell, Shares] = {}
        for layer, vector in by_layer.items():
            mine = [step for step in steps if step[0] == layer]
            read = meter.read([vector.add(coefficient) for _, _, coefficient, _ in mine])
            for step, share, cost in zip(mine, read.changes, read.costs, strict=True):
                if math.isfinite(cost) and np.isfinite(share).all():
                    shares[SweepCell(*step, cost, propensity.interval(share))] = share
            tick()
        damage = _damage(meter, by_layer, matched, controls, tick) if controls > 0 else {}
    curves = _curves(shares)
    notes = [] if held is not None else ["no held-out texts: effects are measured on the set itself, which flatters"]
    interval = propensity.interval
    return Sweep(
        contrast=given.name,
        method=", ".join(dict.fromkeys(str(v.provenance.get("method", "bare")) for v in by_layer.values())),
        model=model_identity(model),
        hookpoints={layer: str(vector.hookpoint) for layer, vector in by_layer.items()},
        norms={layer: vector.norm for layer, vector in by_layer.items()},
        measured_on=propensity.contrast.name,
        texts=propensity.numbers,
        unit=read.unit,
        propensity=interval(read.base),
        cross_entropy=read.entropy,
        matched=matched,
        cells=tuple(shares),
        damage={layer: interval(share) for layer, share in damage.items()},
        best=tuple(best for sign in SIGNS if (best := best_layer(curves, sign, matched, interval)) is not None),
        fades=tuple(fade(curve, interval) for curve in curves),
        signs=sign_differences(curves, matched, interval, damage),
        notes=(*notes, *_missing(shares, by_layer, grid, curves, matched)),
    )


class _Read(NamedTuple):
    """The unsteered model's shares and cross-entropy, their changes by intervention, and the shares' unit."""

    base: Shares
    entropy: float
    changes: list[Shares]
    costs: list[float]
    unit: str


@dataclass(frozen=True, eq=False)
class _Meter:
    """Reads effect and cost of interventions on one model and set of texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    propensity: Propensity
    neutral: Sequence[str]
    batch_tokens: int | None

    def read(self, interventions: Sequence[Intervention]) -> _Read:
        """Effects and costs against the unsteered model, which runs in the same passes."""
        entries = [None, *interventions]
        values, unit = self.propensity.values(self.model, self.tokenizer, entries, self.batch_tokens)
        base, *raised = cross_entropies(
            self.model, self.tokenizer, self.neutral, entries, batch_tokens=self.batch_tokens
        )
        changes = [self.propensity.shares(value - values[0]) for value in values[1:]]
        return _Read(self.propensity.shares(values[0]), base, changes, [value - base for value in raised], unit)

    def calibrate(self, makes: Sequence[Callable[[float], Intervention]], rises: Sequence[float]) -> list[list[float]]:
        """The coefficients of each that cost the ``rises``; nan where none does."""
        return calibrate_grid(
            self.model, self.tokenizer, makes, self.neutral, target_ce_rises=rises, batch_tokens=self.batch_tokens
        )


class _Ticker:
    """Counts steps, and tells of each."""

    def __init__(self, tell: Report, total: int) -> None:
        self.tell, self.total, self.done = tell, total, 0

    def __call__(self) -> None:
        self.done += 1
        self.tell(self.done, self.total)


def _grid(
    ce_rises: Sequence[float] | None, coefficients: Sequence[float] | None, matched: float | None
) -> tuple[tuple[float, ...], float]:
    """The rising grid, and the cost to compare at. Raises DataError."""
    if ce_rises is not None and coefficients is not None:
        raise DataError("ce_rises and coefficients", "one of them")
    given = coefficients if coefficients is not None else CE_RISES if ce_rises is None else ce_rises
    for value in (*given, *([] if matched is None else [matched])):
        check_number("a cost or coefficient", value)
    grid = tuple(float(value) for value in given)
    rising = bool(grid) and list(grid) == sorted(set(grid)) and math.isfinite(grid[-1])
    if not rising or not (grid[0] > 0 or (grid[0] == 0 and coefficients is not None)):
        raise DataError(f"a grid of {', '.join(f'{v:g}' for v in grid) or 'nothing'}", "rising numbers > 0")
    dearest = math.inf if coefficients is not None else grid[-1]
    matched = min(CE_RISE, dearest) if matched is None else float(matched)
    if not 0 < matched <= dearest or math.isinf(matched):
        raise DataError(f"matched = {matched:g}", f"a cost > 0{f', at most {dearest:g}' if dearest < math.inf else ''}")
    return grid, matched


def _vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: ContrastSet,
    vectors: str | Sequence[SteeringVector],
    layers: Sequence[int] | None,
    tokens: TokenRule,
) -> dict[int, SteeringVector]:
    """Vectors by layer: those given, or built by a method's name from one pass over the contrast."""
    if not isinstance(vectors, str):
        by_layer = {vector.hookpoint.layer: vector for vector in vectors}
        if layers is not None or not by_layer or len(by_layer) < len(vectors):
            listed = ", ".join(str(vector.hookpoint) for vector in vectors) or "none"
            raise DataError(f"vectors at {listed}, layers {layers}", "vectors alone, one a layer")
        return dict(sorted(by_layer.items()))
    method = spec(vectors, "sweep")
    places = sorted(set(map(Hookpoint, range(len(blocks_of(model))) if layers is None else layers)))
    if not places:
        raise DataError("no layers", "at least one")
    stats = collect(model, tokenizer, contrast, hookpoints=places, tokens=tokens, keep_pooled=method.pooled)
    return {at.layer: method.build(stats=stats, hookpoint=at) for at in places}


def _calibrated(meter: _Meter, vectors: Mapping[int, SteeringVector], rises: Sequence[float]) -> list[Step]:
    """Steps at which every layer and sign costs the rises, where one does."""
    places = [(layer, sign) for layer in sorted(vectors) for sign in SIGNS]
    found = meter.calibrate([_scaled(vectors[layer], float(sign)) for layer, sign in places], rises)
    return [
        (layer, sign, sign * size, rise)
        for (layer, sign), sizes in zip(places, found, strict=True)
        for rise, size in zip(rises, sizes, strict=True)
        if not math.isnan(size)
    ]


def _scaled(vector: SteeringVector, unit: float) -> Callable[[float], Add]:
    return lambda factor: vector.add(factor * unit)


def random_like(vector: SteeringVector, number: int) -> SteeringVector:
    """The ``number``-th random direction at a vector's hookpoint, of its norm (of norm 1 for a zero vector)."""
    generator = torch.Generator().manual_seed(number)
    direction = torch.randn(vector.d_model, generator=generator)
    return SteeringVector(direction / direction.norm() * (vector.norm or 1.0), vector.hookpoint)


def _damage(
    meter: _Meter, vectors: Mapping[int, SteeringVector], cost: float, controls: int, tick: Callable[[], None]
) -> dict[int, Shares]:
    """By layer, the mean change under random directions that cost as much."""
    random = [random_like(vector, number) for vector in vectors.values() for number in range(controls)]
    found = zip(random, meter.calibrate([vector.add for vector in random], [cost]), strict=True)
    reached = [vector.add(coefficient) for vector, (coefficient,) in found if not math.isnan(coefficient)]
    changes: dict[int, list[Shares]] = {}
    for entry, share in zip(reached, meter.read(reached).changes, strict=True):
        changes.setdefault(entry.hookpoint.layer, []).append(share)
    tick()
    means = {layer: np.mean(found, axis=0) for layer, found in changes.items()}
    return {layer: share for layer, share in means.items() if np.isfinite(share).all()}


def _curves(shares: Mapping[SweepCell, Shares]) -> list[Curve]:
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


def _missing(
    cells: Collection[SweepCell],
    layers: Iterable[int],
    grid: Sequence[float],
    curves: Sequence[Curve],
    matched: float,
) -> Iterator[str]:
    """What the grid asked for and is not there, or is not as asked."""
    there = {(cell.layer, cell.sign, cell.step) for cell in cells}
    compared = {(curve.layer, curve.sign) for curve in curves if curve.at(matched) is not None}
    for layer in layers:
        for sign in SIGNS:
            lacking = [f"{step:g}" for step in grid if (layer, sign, step) not in there]
            if lacking:
                yield f"layer {layer} ({sign:+d}): {', '.join(lacking)} not reached, or not finite"
            if (layer, sign) not in compared:
                yield f"layer {layer} ({sign:+d}) does not reach {matched:g} nats and is not compared"
    for cell in cells:
        if cell.target is not None and abs(cell.cost - cell.target) > OFF_TARGET * cell.target:
            yield f"layer {cell.layer} ({cell.sign:+d}): {cell.cost:.3g} nats, not the {cell.target:g} asked for"
