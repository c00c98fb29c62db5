"""The sweep over layers, strengths and signs, which generates nothing.

It tells where steering works best, how it fades as strength grows, and whether the negative sign is stronger. The
effect of a vector is measured on log-probabilities of texts that show the behavior and of texts that do not, its cost
on the cross-entropy of neutral texts. Strengths are those that cost the same everywhere, so that layers and signs are
compared at equal cost (the questions are those of arXiv 2507.11771). Of a model of many layers some are measured first,
then those around the best.

    print(*sweep(model, tokenizer, load_contrast("wedding")).answers, sep="\\n")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.activations.token_rules import TokenRule
from fgsteer.data.contrast_files import as_contrast
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.data.shipped import load_neutral
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_number, checked
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.evaluation.sweep.answers import (
    SIGNS,
    Curve,
    best_layer,
    fade,
    sign_differences,
)
from fgsteer.evaluation.sweep.kept import KeptCells
from fgsteer.evaluation.sweep.layers import thinned
from fgsteer.evaluation.sweep.measuring import Meter, Step, Survey, curves_of
from fgsteer.evaluation.sweep.results import Sweep, SweepCell
from fgsteer.evaluation.sweep.routes import FullRoute, ThinnedRoute
from fgsteer.likelihood.calibration import CE_RISE
from fgsteer.methods import spec
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.pairing import model_identity
from fgsteer.statistics.collecting import collect
from fgsteer.storage.json_files import text_sha256
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CE_RISES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
OFF_TARGET_SHARE = 0.1  # a cost that differs from the one asked for by more than this share of it is noted

UNHELD = "there are no held-out texts: effects are measured on the contrast set itself, which flatters the vector"

Contrasts = ContrastSet | str | Path | Sequence[ContrastPair]


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
    full: bool = False,
    work: str | Path | None = None,
    fresh: bool = False,
    announce: Callable[[float], None] | None = None,
    progress: Progress = None,
) -> Sweep:
    """Measure effect and cost of ``h + c·v`` at every layer, strength and sign, without generating anything.

    Propensity is ``mean⁺ − mean⁻`` of the two sides' log-probabilities a token, and an effect is its change from
    c = 0, in nats. Where all pairs have a prompt and two answers of equally many tokens, as letters are,
    log-probabilities are sums: the difference of ``answer_probabilities``. Cost is the rise of the mean cross-entropy
    of neutral texts, in nats a token. Intervals (95 %, Student's t) are over the texts that effects are measured on,
    with pairs and the pairs of one prompt kept together; the neutral texts and the vectors are taken as they are.

    Of a model of more than ten layers, where neither layers nor vectors are given, some layers are measured at the
    matched cost first, then those around the best one of each sign, and these two at all costs and with random
    directions. ``notes`` say which. ``full`` measures every layer at every cost.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        contrast: The contrast set that vectors are built from.
        vectors: One vector for each layer, or the name of a method that needs no SAE, such as "caa", which builds
            them. Vectors are not scaled: c = 1 adds v.
        layers: The layers whose resid_post is steered, each at all costs; by default all of few, some of many.
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
        full: Whether every layer is measured at every cost, however many they are.
        work: A folder that keeps what is measured. A call that was killed goes on from there, to the same result.
        fresh: Whether the folder ``work`` is started over.
        announce: A function that is called before the first layer, with the seconds that all will take by an estimate.
        progress: As in ``collect``; a function is called with (steps done, steps in all).

    Returns:
        What was measured, and its answers.

    Raises:
        DataError: The grid does not rise, a side has fewer than two texts, or two vectors have one layer.
        HookpointError: A layer does not exist.
        PairingError: The folder ``work`` holds a sweep of something else; the error says what differs.

    Raises what ``collect`` and the methods raise besides.
    """
    contrast_set = as_contrast(contrast)
    grid, matched = _grid(ce_rises, coefficients, matched)
    held = contrast_set.held_out if held_out is None else as_contrast(held_out)
    propensity = Propensity(contrast_set if held is None else held)
    texts = list(load_neutral()[0] if neutral is None else neutral)
    with reporting(progress, "sweeping") as report:
        candidates, vector_of, made_of = _vectors(model, tokenizer, contrast_set, vectors, layers, tokens)
        thin = not full and layers is None and isinstance(vectors, str) and thinned(len(candidates)) != candidates
        plan: dict[str, Any] = {}
        if work is not None:
            plan = {
                "run": "sweep",
                **run_fingerprint(model, tokenizer),
                "vectors": made_of,
                "texts": {"neutral": text_sha256(texts), "measured on": propensity.contrast.sha256},
                "coefficients" if coefficients is not None else "ce_rises": list(grid),
                "matched": matched,
                "controls": controls,
            }
        kept = KeptCells(work, plan, fresh=fresh)
        meter = Meter(model, tokenizer, propensity, texts, batch_tokens)
        survey = Survey(meter, vector_of, kept, matched=matched, controls=controls, by_cost=coefficients is None)
        route = ThinnedRoute(survey, len(candidates), grid) if thin else FullRoute(survey, candidates, grid)
        if announce is not None:
            announce(route.seconds)
        route.run(report)
    shares = survey.cells
    curves = curves_of(shares)
    visited = {layer: vector_of(layer) for layer in sorted({layer for layer, _, _ in survey.steps})}
    notes = [] if held is not None else [UNHELD]
    interval = propensity.interval
    damage = survey.damage
    return Sweep(
        contrast=contrast_set.name,
        method=", ".join(dict.fromkeys(str(v.provenance.get("method", "bare")) for v in visited.values())),
        model=model_identity(model),
        hookpoints={layer: str(vector.hookpoint) for layer, vector in visited.items()},
        norms={layer: vector.norm for layer, vector in visited.items()},
        measured_on=propensity.contrast.name,
        texts=propensity.numbers,
        unit=meter.unit,
        propensity=interval(meter.base),
        cross_entropy=meter.entropy,
        matched=matched,
        cells=tuple(shares),
        damage={layer: interval(share) for layer, share in damage.items()},
        best=tuple(best for sign in SIGNS if (best := best_layer(curves, sign, matched, interval)) is not None),
        fades=tuple(fade(curve, interval) for curve in curves if curve.layer in route.in_full),
        signs=sign_differences(curves, matched, interval, damage),
        notes=(*notes, *route.notes, *_missing(shares, sorted(survey.steps, key=_in_order), curves, matched)),
    )


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
) -> tuple[list[int], Callable[[int], SteeringVector], Any]:
    """The layers, a function from each to its vector, and what vectors are made of, as plain JSON.

    Vectors are those given, or built by a method's name from one pass over the contrast.
    """
    if not isinstance(vectors, str):
        by_layer = {vector.hookpoint.layer: vector for vector in vectors}
        if layers is not None or not by_layer or len(by_layer) < len(vectors):
            listed = ", ".join(str(vector.hookpoint) for vector in vectors) or "none"
            raise DataError(
                f"vectors at {listed} and layers {layers}",
                "vectors without layers, one for each layer",
                "leave out layers=: a vector has its own layer",
            )
        return (
            sorted(by_layer),
            by_layer.__getitem__,
            {str(v.hookpoint): text_sha256(v.direction.tolist()) for v in vectors},
        )
    method = spec(vectors, "sweep")
    places = sorted(set(map(Hookpoint, range(len(blocks_of(model))) if layers is None else layers)))
    if not places:
        raise DataError("no layers", "at least one layer", "pass layers=[...], or leave it out for all layers")
    stats = collect(model, tokenizer, contrast, hookpoints=places, tokens=tokens, keep_pooled=method.pooled)
    made_of = {"method": vectors, "contrast": contrast.sha256, "tokens": tokens, "layers": [at.layer for at in places]}
    build = cache(lambda layer: method.build(stats=stats, hookpoint=Hookpoint(layer)))
    return [at.layer for at in places], build, made_of


def _in_order(step: Step) -> tuple[int, int, float]:
    return step[0], SIGNS.index(step[1]), step[2]


def _missing(
    cells: Collection[SweepCell], asked: Sequence[Step], curves: Sequence[Curve], matched: float
) -> Iterator[str]:
    """Notes on steps that were asked for and are missing, or whose cost is not as asked for."""
    there = {(cell.layer, cell.sign, cell.step) for cell in cells}
    compared = {(curve.layer, curve.sign) for curve in curves if curve.at(matched) is not None}
    for layer, sign in dict.fromkeys((layer, sign) for layer, sign, _ in asked):
        lacking = [f"{step[2]:g}" for step in asked if step[:2] == (layer, sign) and step not in there]
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
