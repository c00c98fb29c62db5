"""Tables of a run: what each method scores on the half that chose nothing, with intervals against a baseline.

Every method stands at its best setting (chosen on "tune"), or at the setting matched to one CE rise.

    for row in average_table(run): print(row.method, row.bcs, row.difference)
    for row in concept_table(run, matched=0.5): print(row.setting, row.bcs)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from fgsteer.errors import DataError
from fgsteer.evaluation.metrics.intervals import COMPLETE, Interval, mean_interval, paired_differences
from fgsteer.evaluation.runs.records import Run, Setting, Unit, mean
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.methods import spec

BASELINE = "caa"
MEASURES = ("behavior", "coherence", "bcs")


class ConceptRow(NamedTuple):
    """A method on one concept, on the report half.

    ``difference``: its BCS less the baseline's; None for the baseline, and where there is none.
    """

    setting: Setting
    behavior: Interval
    coherence: Interval
    bcs: Interval
    difference: Interval | None


class AverageRow(NamedTuple):
    """A method's averages over concepts, on the report half.

    ``difference``: its BCS less the baseline's; None for the baseline, and where there is none.
    ``won``, ``lost``: concepts above and below the baseline; level ones count as neither.
    ``clearly_won``, ``clearly_lost``: those of them whose interval excludes 0.
    """

    method: str
    behavior: Interval
    coherence: Interval
    bcs: Interval
    difference: Interval | None
    won: int
    lost: int
    clearly_won: int
    clearly_lost: int


def over_prompts(strata: Sequence[Mapping[Unit, float]]) -> Interval:
    """``mean_interval`` of concepts' values by (prompt, seed), over prompts. Raises DataError for fewer than two."""
    return mean_interval(strata, attrgetter("prompt"))


def concept_table(run: Run, matched: float | None = None, baseline: str = BASELINE) -> list[ConceptRow]:
    """Every concept and method at its best setting, or at the one ``matched`` to a CE rise (nats).

    Raises DataError for records that are missing, PairingError for prompts and seeds that the
    baseline lacks.
    """
    best = best_settings(run, matched)
    rows = []
    for concept, method in ((c, m) for c in run.concepts for m in run.methods if (c, m) in best):
        setting = best[concept, method]
        against = None if method == baseline else best.get((concept, baseline))
        behavior, coherence, bcs = (over_prompts([run.values(setting, measure=m)]) for m in MEASURES)
        difference = None if against is None else over_prompts([_less(run, setting, against)])
        rows.append(ConceptRow(setting, behavior, coherence, bcs, difference))
    return rows


def average_table(run: Run, matched: float | None = None, baseline: str = BASELINE) -> list[AverageRow]:
    """Every method's averages over the run's concepts; arguments and errors as in ``concept_table``.

    Raises DataError for a method that lacks a concept, too.
    """
    best = best_settings(run, matched)
    rows = []
    for method in (m for m in run.methods if any(m == found for _, found in best)):
        settings = _everywhere(run, best, method)
        behavior, coherence, bcs = (over_prompts([run.values(s, measure=m) for s in settings]) for m in MEASURES)
        against = method != baseline and any(baseline == found for _, found in best)
        differences = _differences(run, best, method, baseline) if against else []
        each = [over_prompts([values]) for values in differences]
        rows.append(
            AverageRow(
                method,
                behavior,
                coherence,
                bcs,
                over_prompts(differences) if against else None,
                won=sum(d.mean > 0 for d in each),
                lost=sum(d.mean < 0 for d in each),
                clearly_won=sum(d.low > 0 for d in each),
                clearly_lost=sum(d.high < 0 for d in each),
            )
        )
    return rows


def compare(run: Run, method: str, baseline: str = BASELINE, matched: float | None = None) -> Interval:
    """Average over concepts of one method's BCS less another's, paired by prompt and seed.

    Errors as in ``average_table``.
    """
    return over_prompts(_differences(run, best_settings(run, matched), method, baseline))


def _differences(
    run: Run, best: Mapping[tuple[str, str], Setting], method: str, baseline: str
) -> list[dict[Unit, float]]:
    pairs = zip(_everywhere(run, best, method), _everywhere(run, best, baseline), strict=True)
    return [_less(run, of, to) for of, to in pairs]


def _less(run: Run, of: Setting, to: Setting) -> dict[Unit, float]:
    return paired_differences(run.values(of), run.values(to), of.describe())


def _everywhere(run: Run, best: Mapping[tuple[str, str], Setting], method: str) -> list[Setting]:
    """A method's setting for every concept of the run."""
    missing = [concept for concept in run.concepts if (concept, method) not in best]
    if missing:
        raise DataError(f"{method} without {', '.join(missing)}", "every concept of the run", COMPLETE)
    return [best[concept, method] for concept in run.concepts]


def best_sae_method(run: Run) -> str | None:
    """The method through an SAE of the highest mean BCS over concepts on "tune"; None without one.

    Raises DataError for a method that fgsteer bench does not have.
    """
    best = best_settings(run)
    methods = [m for m in run.methods if spec(m).needs in ("sae", "effects") and any(m == found for _, found in best)]
    means = {m: mean([run.mean(s, "tune") for s in _everywhere(run, best, m)]) for m in methods}
    return max(means, key=lambda m: means[m], default=None)


class Point(NamedTuple):
    """A point of a curve: a coefficient, and means over concepts of what was measured there."""

    coefficient: float
    behavior: float
    coherence: float
    bcs: float


def curve(run: Run, method: str, layer: int | None = None, half: str = "report") -> list[Point]:
    """Means over concepts along a method's grid of coefficients, at one layer or at each concept's best.

    Concepts may have grids of their own, of equal length: their n-th coefficients share a point.
    Raises DataError for a concept without the method or layer, and for grids of unequal lengths.
    """
    grids = []
    for best in _everywhere(run, best_settings(run), method):
        where = (best.concept, method, best.layer if layer is None else layer)
        grid = [s for s in run.settings if s[:3] == where and s.matched is None]
        grids.append(sorted(grid, key=lambda s: s.coefficient))
    lengths = sorted({len(grid) for grid in grids})
    if len(lengths) != 1 or lengths == [0]:
        raise DataError(f"{method} with {lengths} coefficients", "as many for every concept", COMPLETE)
    return [
        Point(mean([s.coefficient for s in same]), *(mean([run.mean(s, half, m) for s in same]) for m in MEASURES))
        for same in zip(*grids, strict=True)
    ]
