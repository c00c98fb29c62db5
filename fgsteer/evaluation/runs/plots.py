"""Pictures of a run: what each method buys, and what it costs the text.

Each function takes a run and returns a matplotlib Figure.

    save(frontier(load_run("bench.jsonl")), "frontier.png")
    save_all(load_run("bench.jsonl"), "plots/")         every picture, as PNG and SVG
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.errors import DataError
from fgsteer.evaluation.drawing import (
    BLUE,
    GREEN,
    INK,
    LINE,
    ORANGE,
    PAPER,
    QUIET,
    WIDTH_INCHES,
    Picture,
    draw_map,
    drawing_style,
    frame_cell,
    frame_mark,
    interval_rows,
    legend,
    mark,
    panel_grid,
    plain_number,
    save_each,
)
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.metrics.own_text import least_kl
from fgsteer.evaluation.runs.records import Run, Setting, mean
from fgsteer.evaluation.runs.tables import (
    BASELINE,
    Point,
    average_table,
    base_rate,
    best_sae_method,
    concept_table,
    curve,
    point_of,
)
from fgsteer.methods import method_name
from fgsteer.vector import MeasuredRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOUND_STEPS = 100
EQUAL_BCS = (0.2, 0.4, 0.6, 0.8)
# (measure, label, line and marker, color, line width)
MEASURES = (
    ("behavior", "behavior", "^--", ORANGE, 1.0),
    ("coherence", "coherence", "s:", GREEN, 1.2),
    ("bcs", "BCS", "o-", INK, 1.5),
)
MOST_CLOSE_STEPS = 4  # up to which a panel has no room for a label between the first step and the last
INTERVAL = "mean and 95 % interval"


def save_all(run: Run, folder: str | Path) -> list[Path]:
    """Write every picture of a run, as PNG and SVG.

    Args:
        run: The run.
        folder: Where they are written; it may be new.

    Returns:
        The paths written.

    Raises:
        DataError: The run has no records.
        FormatError: A file cannot be written.
    """
    return save_each(pictures(run), folder)


def pictures(run: Run) -> list[Picture]:
    """The pictures that a run has the records for. Raises DataError for a run without records."""
    if not run.records:
        raise DataError("a run without records", "a run with records", "wait for its first batch, or start it")
    drawn: list[Picture] = []
    best, baseline = best_sae_method(run), method_name(BASELINE)
    for matched in (None, *run.targets):
        suffix = "" if matched is None else f"-matched-{matched:g}"
        at = "at the best coefficient" if matched is None else f"at {matched:g} {run.cost_unit}"
        caption = f"Average BCS of each method {at}, with 95 % intervals over prompts."
        drawn.append(Picture(f"methods{suffix}", caption, method_bars(run, matched)))
        if best and any(row.method == best and row.difference for row in average_table(run, matched)):
            caption = f"BCS of {method_name(best)} less that of {baseline} {at}, with 95 % intervals over prompts."
            drawn.append(Picture(f"concepts{suffix}", caption, concept_bars(run, best, matched)))
    if run.swept:
        caption = (
            "Behavior against coherence along each method's coefficients, averages over concepts. The coefficients of "
            "the highest BCS and of the last step are written beside their points."
        )
        drawn.append(Picture("frontier", caption, frontier(run)))
        if run.has_kl:
            caption = (
                "Behavior against KL on the steered model's own text along each method's coefficients, averages over "
                "concepts. No steering is left of the dashed line, drawn from the mean behavior of unsteered texts."
            )
            drawn.append(Picture("own-text", caption, own_text_curves(run)))
        caption = "Behavior, coherence and BCS by coefficient, averages over concepts."
        drawn.append(Picture("coefficients", caption, coefficient_curves(run)))
    for method in dict.fromkeys(m for m in (best, BASELINE) if m and len(run.layers(m)) > 1):
        name = "layers-" + "".join(c if c.isalnum() else "_" for c in method)
        drawn.append(Picture(name, f"{method_name(method)}: BCS by layer and coefficient.", layer_map(run, method)))
    return drawn


@drawing_style()
def frontier(run: Run) -> Figure:
    """Behavior against coherence along each method's coefficients, a panel a method, averages over concepts.

    Raises DataError where concepts have grids of unequal lengths.
    """
    start = curve(run, "unsteered") if "unsteered" in run.methods else []
    figure, panels = panel_grid(run.swept, method_name)
    baseline = sorted([*start, *curve(run, BASELINE)]) if BASELINE in run.swept else []
    dashed: dict[str, Any] = {"color": QUIET, "mfc": PAPER, "ms": 2.5, "lw": 1}
    circle: dict[str, Any] = {"color": INK, "mfc": PAPER, "ms": 4.5}
    for method, axis in panels:
        _draw_equal_bcs(axis)
        axis.plot([p.coherence for p in baseline], [p.behavior for p in baseline], "s--", **dashed)
        points = sorted([*start, *curve(run, method)])
        axis.plot([p.coherence for p in points], [p.behavior for p in points], "o-", color=BLUE)
        for point in start:
            axis.plot(point.coherence, point.behavior, "o", **circle)
        best = max(points, key=lambda p: p.bcs)
        for point in {best, points[-1]} - set(start):
            _write_above(axis, point, f"{point.coefficient:.3g}")
        axis.set(xlim=(0, 1.05), ylim=(0, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_xticklabels(["0", ".5", "1"])
        axis.set_yticklabels(["0", ".5", "1"])
    handles = [mark("the method, by coefficient", "o-", color=BLUE)]
    handles += [mark(method_name(BASELINE), "s--", **dashed)] if baseline else []
    handles += [mark("unsteered", "o", **circle)] if start else []
    handles.append(mark("equal BCS, .2 to .8", "-", color=LINE, lw=0.7))
    legend(figure, handles, columns=2)
    figure.supxlabel("coherence")
    figure.supylabel("behavior")
    return figure


@drawing_style()
def own_text_curves(run: Run) -> Figure:
    """Behavior against own-text KL along each method's coefficients, a panel a method, with the least that it costs.

    By convexity the curve of ``least_kl`` from the mean rate bounds the averages of concepts and prompts too. Raises
    DataError where concepts have grids of unequal lengths.
    """
    from matplotlib.ticker import NullFormatter

    figure, panels = panel_grid(run.swept, method_name)
    rates = [base_rate(run, concept) for concept in run.concepts]
    known = [rate.mean or rate.high for rate in rates if rate is not None]
    start = mean(known) if known and len(known) == len(rates) else None
    curves = {method: [(p.kl or 0.0, p.behavior) for p in curve(run, method)] for method in run.swept}
    costs = [kl for points in curves.values() for kl, _ in points if kl > 0]
    least, most = min(costs, default=0.1), max(costs, default=1.0)
    baseline = sorted(curves.get(BASELINE, []))
    dashed: dict[str, Any] = {"color": QUIET, "mfc": PAPER, "ms": 2.5, "lw": 1}
    for method, axis in panels:
        if start is not None:
            behaviors = [start + (1 - start) * n / BOUND_STEPS for n in range(BOUND_STEPS + 1)]
            axis.plot([least_kl(start, q) for q in behaviors], behaviors, "--", color=ORANGE, lw=1)
        axis.plot([x for x, _ in baseline], [y for _, y in baseline], "s--", **dashed)
        points = sorted(curves[method])
        axis.plot([x for x, _ in points], [y for _, y in points], "o-", color=BLUE)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda nats, _: plain_number(nats, max(0, -math.floor(math.log10(nats)))))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlim=(least / 10, 1.5 * most), ylim=(0, 1.05), yticks=(0, 0.5, 1))
        axis.set_yticklabels(["0", ".5", "1"])
    handles = [mark("the method, by coefficient", "o-", color=BLUE)]
    handles += [mark(method_name(BASELINE), "s--", **dashed)] if baseline else []
    handles += [] if start is None else [mark("least possible KL", "--", color=ORANGE, lw=1)]
    legend(figure, handles, columns=2)
    figure.supxlabel("KL on own text, nats a text")
    figure.supylabel("behavior")
    return figure


def _write_above(axis: Axes, point: Point, text: str) -> None:
    """Write a text above a point, legible over lines."""
    from matplotlib.patheffects import withStroke

    ground = [withStroke(linewidth=2, foreground=PAPER)]
    place = (point.coherence, point.behavior)
    axis.annotate(text, place, (0, 3.5), textcoords="offset points", ha="center", path_effects=ground)


def _draw_equal_bcs(axis: Axes) -> None:
    for level in EQUAL_BCS:
        xs = [level + (1.05 - level) * n / 40 for n in range(41)]
        axis.plot(xs, [level / x for x in xs], color=LINE, lw=0.7, zorder=0)


@drawing_style()
def coefficient_curves(run: Run) -> Figure:
    """Behavior, coherence and BCS by coefficient (steps of the grid), a panel a method, averages over concepts.

    Raises DataError where concepts have grids of unequal lengths.
    """
    figure, panels = panel_grid(run.swept, method_name)
    for method, axis in panels:
        tuned = curve(run, method, half="tune")
        _draw_measures(axis, curve(run, method), best=max(range(len(tuned)), key=lambda n: tuned[n].bcs))
    _measures_legend(figure)
    figure.supxlabel("coefficient")
    return figure


@drawing_style()
def setting_curves(run: MeasuredRun, settings: Sequence[Setting]) -> Figure:
    """Behavior, coherence and BCS of settings that differ in their coefficients, on the half "report".

    Args:
        run: The run.
        settings: Settings of one concept, method and layer, by rising coefficient.

    Raises:
        DataError: A setting has no records.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, 2.4), layout="constrained")
    best = max(range(len(settings)), key=lambda n: run.mean(settings[n], "tune"))
    axis = figure.subplots()
    _draw_measures(axis, [point_of(run, [setting]) for setting in settings], best)
    axis.set_xticks(range(len(settings)), [f"{setting.coefficient:.3g}" for setting in settings])
    _measures_legend(figure)
    axis.set_xlabel("coefficient")
    return figure


def _draw_measures(axis: Axes, points: Sequence[Point], best: int) -> None:
    """Draw what was measured at each step of a grid, with a mark above the step that tuning chose."""
    steps = range(len(points))
    for measure, _, style, color, width in MEASURES:
        axis.plot(steps, [getattr(p, measure) for p in points], style, color=color, lw=width, ms=3)
    axis.plot(best, 1.06, "v", color=INK, ms=4, clip_on=False)
    labelled = {0, len(points) - 1} | ({len(points) // 2} if len(points) > MOST_CLOSE_STEPS else set())
    axis.set(ylim=(0, 1.1), yticks=(0, 0.5, 1), xticks=sorted(labelled))
    axis.set_yticklabels(["0", ".5", "1"])
    axis.set_xticklabels([f"{points[n].coefficient:.3g}" for n in sorted(labelled)])


def _measures_legend(figure: Figure) -> None:
    handles = [mark(label, style, color=color, lw=width, ms=3) for _, label, style, color, width in MEASURES]
    legend(figure, [*handles, mark("best on the tuning half", "v", color=INK, ms=4)], columns=2)


@drawing_style()
def layer_map(run: Run, method: str = BASELINE, measure: str = "bcs") -> Figure:
    """BCS, behavior or coherence of a method by layer and coefficient, averages over concepts, in numbers on grey.

    Raises DataError where a concept lacks a layer.
    """
    from matplotlib.figure import Figure

    layers = run.layers(method)
    grids = [curve(run, method, layer) for layer in layers]
    tuned = [curve(run, method, layer, half="tune") for layer in layers]
    width = max(WIDTH_INCHES, 0.7 + 0.25 * len(grids[0]))
    figure = Figure(figsize=(width, 0.95 + 0.22 * len(grids)), layout="constrained")
    axis = figure.subplots()
    draw_map(axis, [[getattr(point, measure) for point in grid] for grid in grids], 1.0, plain_number)
    cells = [(row, column) for row in range(len(tuned)) for column in range(len(tuned[row]))]
    frame_cell(axis, *max(cells, key=lambda cell: getattr(tuned[cell[0]][cell[1]], measure)))
    axis.set_xticks([n + 0.5 for n in range(len(grids[0]))], [f"{p.coefficient:.3g}" for p in grids[0]])
    axis.set_yticks([n + 0.5 for n in range(len(grids))], [str(layer) for layer in layers])
    axis.set(xlabel="coefficient", ylabel="layer")
    legend(figure, [frame_mark("best on the tuning half")])
    return figure


@drawing_style()
def method_bars(run: Run, matched: float | None = None) -> Figure:
    """Average BCS of each method with its interval (arguments and errors as in ``average_table``)."""
    rows = sorted(average_table(run, matched), key=lambda row: row.bcs.mean)
    figure, axis = interval_rows([(method_name(row.method), row.bcs) for row in rows])
    handles = [mark(INTERVAL, "o-", color=BLUE)]
    for place, row in enumerate(rows):
        _draw_interval(axis, place, row.bcs, fmt="o", color=BLUE)
        if row.method == BASELINE:
            axis.axvline(row.bcs.mean, color=QUIET, lw=0.8, ls="--", zorder=0)
            handles.append(mark(method_name(BASELINE), "--", color=QUIET, lw=0.8))
    axis.set(xlabel="BCS", xlim=(0, None))
    legend(figure, handles)
    return figure


@drawing_style()
def concept_bars(run: Run, method: str, matched: float | None = None) -> Figure:
    """A method's BCS less the baseline's, a bar for each concept and one for their average.

    A bar is filled where its interval excludes 0. Raises DataError where the run lacks the method or the baseline.
    """
    from matplotlib.patches import Patch

    averages = [row.difference for row in average_table(run, matched) if row.method == method and row.difference]
    rows = [
        (row.setting.concept, row.difference)
        for row in concept_table(run, matched)
        if row.setting.method == method and row.difference
    ]
    if not averages:
        raise DataError(
            f"a run without a difference of {method} to {BASELINE}", f"a run with {BASELINE} and another method"
        )
    rows = [("average", averages[0]), *sorted(rows, key=lambda row: row[1].mean)]
    figure, axis = interval_rows(rows)
    for place, (_, difference) in enumerate(rows):
        fill = BLUE if difference.clear else PAPER
        axis.barh(place, difference.mean, 0.7, color=fill, edgecolor=BLUE, linewidth=1)
        _draw_interval(axis, place, difference, fmt="none")
    axis.axvline(0, color=QUIET, lw=0.8)
    axis.axhline(0.5, color=LINE, lw=0.8)
    axis.set(xlabel=f"BCS of {method_name(method)} less that of {method_name(BASELINE)}")
    clear = Patch(facecolor=BLUE, edgecolor=BLUE, label="95 % interval without 0")
    legend(figure, [clear, Patch(facecolor=PAPER, edgecolor=BLUE, label="with 0")])
    return figure


def _draw_interval(axis: Axes, place: float, value: Interval, **options: Any) -> None:
    ends = [[value.mean - value.low], [value.high - value.mean]]
    axis.errorbar(value.mean, place, xerr=ends, ecolor=INK, elinewidth=1, capsize=2, **options)
