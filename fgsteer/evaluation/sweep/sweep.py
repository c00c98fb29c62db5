"""The sweep over layers, strengths and signs, which generates nothing.

It tells where steering works best, how it fades as strength grows, and whether the negative sign is stronger. The
effect of a vector is measured on log-probabilities of texts that show the behavior and of texts that do not, its cost
on the cross-entropy of neutral texts. Strengths are those that cost the same everywhere, so that layers and signs are
compared at equal cost (the questions are those of arXiv 2507.11771).

    print(*sweep(model, tokenizer, load_contrast("wedding")).answers, sep="\\n")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fgsteer.activations.token_rules import TokenRule
from fgsteer.data.contrast_files import as_contrast
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.data.shipped import load_neutral
from fgsteer.display.progress import Progress, Report, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_number, checked
from fgsteer.evaluation.metrics.propensity import Propensity, Shares
from fgsteer.evaluation.sweep.answers import (
    SIGNS,
    Curve,
    best_layer,
    fade,
    sign_differences,
)
from fgsteer.evaluation.sweep.results import Sweep, SweepCell
from fgsteer.interventions import Add, Intervention
from fgsteer.likelihood.calibration import CE_RISE, calibrate_grid
from fgsteer.likelihood.scoring import cross_entropies
from fgsteer.methods import spec
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.pairing import model_identity
from fgsteer.statistics.collecting import collect
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CE_RISES = (0.05, 0.1, 0.25, 0.5, 1.0)
OFF_TARGET_SHARE = 0.1  # a cost that differs from the one asked for by more than this share of it is noted

UNHELD = "there are no held-out texts: effects are measured on the contrast set itself, which flatters the vector"

Contrasts = ContrastSet | str | Path | Sequence[ContrastPair]
Step = tuple[int, int, float, float | None]  # layer, sign, signed coefficient, target cost or None


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
    """Measure effect and cost of ``h + c·v`` at every layer, strength and sign, without generating anything.

    Propensity is ``mean⁺ − mean⁻`` of the two sides' log-probabilities a token, and an effect is its change from
    c = 0, in nats. Where all pairs have a prompt and two answers of equally many tokens, as letters are,
    log-probabilities are sums: the difference of ``answer_probabilities``. Cost is the rise of the mean cross-entropy
    of neutral texts, in nats a token. Intervals (95 %, Student's t) are over the texts that effects are measured on,
    with pairs and the pairs of one prompt kept together; the neutral texts and the vectors are taken as they are.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        contrast: The contrast set that vectors are built from.
        vectors: One vector for each layer, or the name of a method that needs no SAE, such as "caa", which builds
            them. Vectors are not scaled: c = 1 adds v.
        layers: The layers whose resid_post is steered; by default all.
        ce_rises: Rising costs in nats a token, at which strengths are set for each layer and sign; by default 0.05,
            0.1, 0.25, 0.5 and 1.
        coefficients: Rising strengths of at least 0 in place of costs, tried with both signs.
        matched: The cost at which layers and signs are compared; by default 0.5, or less where the grid ends before.
            Between coefficients it is interpolated.
        held_out: The contrast set that effects are measured on; by default the held-out part of ``contrast``, or,
            with a note, ``contrast`` itself.
        neutral: Texts that cost is measured on; by default the shipped ones.
        controls: Number of random directions for each layer. They show what any change of that cost does to the two
            sides, which is no effect of the vector and would pass for a stronger sign.
        tokens: Which tokens the vectors are built from, as in ``collect``.
        batch_tokens: Padded tokens of a batch.
        progress: As in ``collect``; a function is called with (steps done, steps in all).

    Returns:
        What was measured, and its answers.

    Raises:
        DataError: The grid does not rise, a side has fewer than two texts, or two vectors have one layer.
        HookpointError: A layer does not exist.

    Raises what ``collect`` and the methods raise besides.
    """
    contrast_set = as_contrast(contrast)
    grid, matched = _grid(ce_rises, coefficients, matched)
    by_cost = coefficients is None
    held = contrast_set.held_out if held_out is None else as_contrast(held_out)
    propensity = Propensity(contrast_set if held is None else held)
    meter = _Meter(model, tokenizer, propensity, load_neutral()[0] if neutral is None else neutral, batch_tokens)
    with reporting(progress, "sweeping") as report:
        by_layer = _vectors(model, tokenizer, contrast_set, vectors, layers, tokens)
        tick = _Ticker(report, len(by_layer) + by_cost + (controls > 0))
        if by_cost:
            steps = _calibrated(meter, by_layer, grid)
            tick()
        else:
            steps = [(layer, sign, sign * size, None) for layer in by_layer for sign in SIGNS for size in grid]
        unsteered = meter.measure([])
        shares: dict[SweepCell, Shares] = {}
        for layer, vector in by_layer.items():
            mine = [step for step in steps if step[0] == layer]
            measured = meter.measure([vector.add(coefficient) for _, _, coefficient, _ in mine])
            for step, share, cost in zip(mine, measured.changes, measured.costs, strict=True):
                if math.isfinite(cost) and np.isfinite(share).all():
                    shares[SweepCell(*step, cost, propensity.interval(share))] = share
            tick()
        damage = _damage(meter, by_layer, matched, controls, tick) if controls > 0 else {}
    curves = _curves(shares)
    notes = [] if held is not None else [UNHELD]
    interval = propensity.interval
    return Sweep(
        contrast=contrast_set.name,
        method=", ".join(dict.fromkeys(str(v.provenance.get("method", "bare")) for v in by_layer.values())),
        model=model_identity(model),
        hookpoints={layer: str(vector.hookpoint) for layer, vector in by_layer.items()},
        norms={layer: vector.norm for layer, vector in by_layer.items()},
        measured_on=propensity.contrast.name,
        texts=propensity.numbers,
        unit=unsteered.unit,
        propensity=interval(unsteered.base),
        cross_entropy=unsteered.entropy,
        matched=matched,
        cells=tuple(shares),
        damage={layer: interval(share) for layer, share in damage.items()},
        best=tuple(best for sign in SIGNS if (best := best_layer(curves, sign, matched, interval)) is not None),
        fades=tuple(fade(curve, interval) for curve in curves),
        signs=sign_differences(curves, matched, interval, damage),
        notes=(*notes, *_missing(shares, by_layer, grid, curves, matched)),
    )


class _Measured(NamedTuple):
    """The unsteered model's shares and cross-entropy, their changes by intervention, and the shares' unit."""

    base: Shares
    entropy: float
    changes: list[Shares]
    costs: list[float]
    unit: str


@dataclass(frozen=True, eq=False)
class _Meter:
    """Measures effect and cost of interventions on one model and one set of texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    propensity: Propensity
    neutral: Sequence[str]
    batch_tokens: int | None

    def measure(self, interventions: Sequence[Intervention]) -> _Measured:
        """Effects and costs against the unsteered model, which is run in the same passes."""
        entries = [None, *interventions]
        values, unit = self.propensity.values(self.model, self.tokenizer, entries, self.batch_tokens)
        base, *raised = cross_entropies(
            self.model, self.tokenizer, self.neutral, entries, batch_tokens=self.batch_tokens
        )
        changes = [self.propensity.shares(value - values[0]) for value in values[1:]]
        return _Measured(self.propensity.shares(values[0]), base, changes, [value - base for value in raised], unit)

    def calibrate(self, makes: Sequence[Callable[[float], Intervention]], rises: Sequence[float]) -> list[list[float]]:
        """The coefficients of each that cost the ``rises``; nan where none does."""
        return calibrate_grid(
            self.model, self.tokenizer, makes, self.neutral, target_ce_rises=rises, batch_tokens=self.batch_tokens
        )


class _Ticker:
    """Counts steps, and reports each."""

    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def __call__(self) -> None:
        self.done += 1
        self.report(self.done, self.total)


def _grid(
    ce_rises: Sequence[float] | None, coefficients: Sequence[float] | None, matched: float | None
) -> tuple[tuple[float, ...], float]:
    """The rising grid, and the cost to compare at. Raises DataError."""
    if ce_rises is not None and coefficients is not None:
        raise DataError("both", "either ce_rises or coefficients", "leave out ce_rises= or coefficients=")
    given = coefficients if coefficients is not None else CE_RISES if ce_rises is None else ce_rises
    for value in (*given, *([] if matched is None else [matched])):
        check_number("a cost or coefficient", value)
    grid = tuple(float(value) for value in given)
    rising = bool(grid) and list(grid) == sorted(set(grid)) and math.isfinite(grid[-1])
    if not rising or not (grid[0] > 0 or (grid[0] == 0 and coefficients is not None)):
        listed = ", ".join(f"{value:g}" for value in grid) or "nothing"
        least = "above 0" if coefficients is None else "of at least 0"
        raise DataError(f"a grid of {listed}", f"rising numbers {least}", "sort them, each one once")
    dearest = math.inf if coefficients is not None else grid[-1]
    matched = min(CE_RISE, dearest) if matched is None else float(matched)
    if not 0 < matched <= dearest or math.isinf(matched):
        most = f", at most {dearest:g}, the last of ce_rises" if dearest < math.inf else ""
        raise DataError(f"matched = {matched:g}", f"a cost above 0{most}")
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
            raise DataError(
                f"vectors at {listed} and layers {layers}",
                "vectors without layers, one for each layer",
                "leave out layers=: a vector has its own layer",
            )
        return dict(sorted(by_layer.items()))
    method = spec(vectors, "sweep")
    places = sorted(set(map(Hookpoint, range(len(blocks_of(model))) if layers is None else layers)))
    if not places:
        raise DataError("no layers", "at least one layer", "pass layers=[...], or leave it out for all layers")
    stats = collect(model, tokenizer, contrast, hookpoints=places, tokens=tokens, keep_pooled=method.pooled)
    return {at.layer: method.build(stats=stats, hookpoint=at) for at in places}


def _calibrated(meter: _Meter, vectors: Mapping[int, SteeringVector], rises: Sequence[float]) -> list[Step]:
    """The steps at which each layer and sign costs the rises, as far as it can."""
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
    """By layer, the mean change under random directions of the same cost."""
    random = [random_like(vector, number) for vector in vectors.values() for number in range(controls)]
    found = zip(random, meter.calibrate([vector.add for vector in random], [cost]), strict=True)
    reached = [vector.add(coefficient) for vector, (coefficient,) in found if not math.isnan(coefficient)]
    changes: dict[int, list[Shares]] = {}
    for entry, share in zip(reached, meter.measure(reached).changes, strict=True):
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
    """Notes on steps of the grid that are missing, or whose cost is not as asked for."""
    there = {(cell.layer, cell.sign, cell.step) for cell in cells}
    compared = {(curve.layer, curve.sign) for curve in curves if curve.at(matched) is not None}
    for layer in layers:
        for sign in SIGNS:
            lacking = [f"{step:g}" for step in grid if (layer, sign, step) not in there]
            if lacking:
                yield f"layer {layer} ({sign:+d}) does not reach {', '.join(lacking)}, or is not finite there"
            if (layer, sign) not in compared:
                yield f"layer {layer} ({sign:+d}) does not reach {matched:g} nats and is not compared"
    for cell in cells:
        if cell.target is not None and abs(cell.cost - cell.target) > OFF_TARGET_SHARE * cell.target:
            yield (
                f"layer {cell.layer} ({cell.sign:+d}) costs {cell.cost:.3g} nats, not the {cell.target:g} that were "
                "asked for"
            )
