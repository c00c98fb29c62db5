"""Tables of a run: what each method scores on the half that chose nothing, with intervals, against a baseline.

Every method stands at its best setting, which was chosen on "tune", or at the setting matched to one CE rise.

    for row in average_table(run): print(row.method, row.bcs, row.difference)
    for row in concept_table(run, matched=0.5): print(row.setting, row.bcs)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from fgsteer.errors import DataError
from fgsteer.evaluation.metrics.intervals import COMPLETE, Interval, mean_interval, paired_differences, wilson
from fgsteer.evaluation.metrics.own_text import least_kl
from fgsteer.evaluation.runs.records import Run, Setting, Unit, mean
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.methods import spec
from fgsteer.vector import MeasuredRun

BASELINE, UNSTEERED = "caa", "unsteered"
MEASURES = ("behavior", "coherence", "bcs")


class ConceptRow(NamedTuple):
    """A method on one concept, on the half "report".

    ``difference`` is its BCS less the baseline's, None for the baseline and where there is no baseline.
    """

    setting: Setting
    behavior: Interval
    coherence: Interval
    bcs: Interval
    difference: Interval | None


class AverageRow(NamedTuple):
    """A method's averages over concepts, on the half "report".

    ``difference`` is its BCS less the baseline's, None for the baseline and where there is no baseline. ``won`` and
    ``lost`` count the concepts above and below the baseline (a level one is neither), ``clearly_won`` and
    ``clearly_lost`` those of them whose interval excludes 0.
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
    own_text: OwnTextCost | None = None


class OwnTextCost(NamedTuple):
    """What a method's own texts cost, in nats a text, averages over concepts on the half "report".

    ``least`` is what its behavior costs at the least (``least_kl``), from the means of the unsteered texts and its own;
    None in a run without unsteered texts. ``distinct`` is the share of different 3-grams.
    """

    kl: Interval
    least: float | None
    distinct: Interval


def over_prompts(strata: Sequence[Mapping[Unit, float]]) -> Interval:
    """``mean_interval`` of concepts' values by (prompt, seed), over prompts. Raises DataError for fewer than two."""
    return mean_interval(strata, attrgetter("prompt"))


def concept_table(run: Run, matched: float | None = None, baseline: str = BASELINE) -> list[ConceptRow]:
    """Every concept and method at its best setting, or at the setting matched to one CE rise.

    Args:
        run: The run.
        matched: A cost in nats, one of ``run.targets``; None for the best settings.
        baseline: The method that the others are compared with.

    Returns:
        Rows by concept, then method, with values of the half "report".

    Raises:
        DataError: Records are missing.
        PairingError: Two methods were measured on other prompts or seeds.
    """
    best = best_settings(run, matched)
    rows = []
    for concept, method in ((c, m) for c in run.concepts for m in run.methods if (c, m) in best):
        setting = best[concept, method]
        against = None if method == baseline else best.get((concept, baseline))
        behavior, coherence, bcs = (over_prompts([run.values(setting, measure=m)]) for m in MEASURES)
        difference = None if against is None else over_prompts([_bcs_differences(run, setting, against)])
        rows.append(ConceptRow(setting, behavior, coherence, bcs, difference))
    return rows


def average_table(run: Run, matched: float | None = None, baseline: str = BASELINE) -> list[AverageRow]:
    """Every method's averages over the run's concepts; arguments and errors as in ``concept_table``.

    Raises DataError for a method that lacks a concept, too.
    """
    best = best_settings(run, matched)
    measured = {method for _, method in best}
    rows = []
    for method in (m for m in run.methods if m in measured):
        settings = _setting_of_each_concept(run, best, method)
        behavior, coherence, bcs = (over_prompts([run.values(s, measure=m) for s in settings]) for m in MEASURES)
        against = method != baseline and baseline in measured
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
                own_text=_own_text_cost(run, settings) if run.has_kl else None,
            )
        )
    return rows


def _own_text_cost(run: Run, settings: Sequence[Setting]) -> OwnTextCost:
    """What the own texts of one setting of each concept cost."""
    kl, distinct = (over_prompts([run.values(s, measure=m) for s in settings]) for m in ("kl", "distinct"))
    least = [_least(run, setting) for setting in settings]
    known = [nats for nats in least if nats is not None]
    return OwnTextCost(kl, mean(known) if len(known) == len(least) else None, distinct)


def _least(run: Run, setting: Setting) -> float | None:
    """What the behavior of a setting's texts costs at the least; None without unsteered texts."""
    rate, behavior = base_rate(run, setting.concept), run.mean(setting, measure="behavior")
    if rate is None:
        return None
    return 0.0 if rate.mean <= behavior <= rate.high and not rate.mean else least_kl(rate.mean or rate.high, behavior)


def base_rate(run: Run, concept: str) -> Interval | None:
    """The mean behavior of a concept's unsteered texts, on the half "report"; None without any.

    Where none of them shows any, the upper end of Wilson's interval over prompts stands for it: what is never seen in
    few texts need not be impossible.
    """
    settings = [s for s in run.settings if s[:2] == (concept, UNSTEERED) and s.matched is None]
    if not settings:
        return None
    behavior = over_prompts([run.values(settings[0], measure="behavior")])
    return behavior if behavior.mean else wilson(0.0, behavior.clusters)


def compare(run: Run, method: str, baseline: str = BASELINE, matched: float | None = None) -> Interval:
    """Average over concepts of one method's BCS less another's, paired by prompt and seed.

    Errors as in ``average_table``.
    """
    return over_prompts(_differences(run, best_settings(run, matched), method, baseline))


def _differences(
    run: Run, best: Mapping[tuple[str, str], Setting], method: str, baseline: str
) -> list[dict[Unit, float]]:
    pairs = zip(_setting_of_each_concept(run, best, method), _setting_of_each_concept(run, best, baseline), strict=True)
    return [_bcs_differences(run, of, to) for of, to in pairs]


def _bcs_differences(run: Run, of: Setting, to: Setting) -> dict[Unit, float]:
    return paired_differences(run.values(of), run.values(to), of.describe())


def _setting_of_each_concept(run: Run, best: Mapping[tuple[str, str], Setting], method: str) -> list[Setting]:
    """A method's setting for every concept of the run."""
    missing = [concept for concept in run.concepts if (concept, method) not in best]
    if missing:
        raise DataError(f"{method} without {', '.join(missing)}", "the method on every concept of the run", COMPLETE)
    return [best[concept, method] for concept in run.concepts]


def best_sae_method(run: Run) -> str | None:
    """The method through an SAE of the highest mean BCS over concepts on "tune"; None without one.

    Raises DataError for a method that fgsteer bench does not have.
    """
    best = best_settings(run)
    measured = {method for _, method in best}
    methods = [m for m in run.methods if spec(m).needs in ("sae", "effects") and m in measured]
    means = {m: mean([run.mean(s, "tune") for s in _setting_of_each_concept(run, best, m)]) for m in methods}
    return max(means, key=lambda m: means[m], default=None)


class Point(NamedTuple):
    """A point of a curve: a coefficient, and means over concepts of what was measured there."""

    coefficient: float
    behavior: float
    coherence: float
    bcs: float
    kl: float | None = None


def curve(run: Run, method: str, layer: int | None = None, half: str = "report") -> list[Point]:
    """Means over concepts along a method's grid of coefficients, at one layer or at each concept's best layer.

    Concepts may have grids of their own, of equal length: their n-th coefficients share a point.

    Raises:
        DataError: A concept lacks the method or the layer, or grids have unequal lengths.
    """
    grids = []
    for best in _setting_of_each_concept(run, best_settings(run), method):
        where = (best.concept, method, best.layer if layer is None else layer)
        grid = [s for s in run.settings if s[:3] == where and s.matched is None]
        grids.append(sorted(grid, key=lambda s: s.coefficient))
    lengths = sorted({len(grid) for grid in grids})
    if len(lengths) != 1 or lengths == [0]:
        numbers = " and ".join(map(str, lengths))
        raise DataError(f"{method} with {numbers} of them", "as many coefficients for every concept", COMPLETE)
    return [point_of(run, same, half) for same in zip(*grids, strict=True)]


def point_of(run: MeasuredRun, settings: Sequence[Setting], half: str = "report") -> Point:
    """Means over settings, one of each concept. Raises DataError for a setting without records in the half."""
    coefficient = mean([setting.coefficient for setting in settings])
    measures = [*MEASURES, *(["kl"] if getattr(run, "has_kl", False) else [])]
    return Point(coefficient, *(mean([run.mean(setting, half, m) for setting in settings]) for m in measures))
