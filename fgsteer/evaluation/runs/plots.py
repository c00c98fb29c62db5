"""Pictures of a run, 3.4 inches wide: what each method buys, and what it costs the text.

They read in grey, and come out the same every time.
Each function takes a run and returns a Figure; pyplot and its global state are not used.

    save(frontier(load_run("bench.jsonl")), "frontier.png")
    save_all(load_run("bench.jsonl"), "plots/")         every picture, as PNG and SVG
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fgsteer.errors import DataError
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.runs.records import Run
from fgsteer.evaluation.runs.tables import (
    BASELINE,
    Point,
    average_table,
    best_sae_method,
    concept_table,
    curve,
)
from fgsteer.features.cards import LIGHT, visible
from fgsteer.methods import method_name
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.targets import make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.4  # inches: a column of a paper, or a phone
COLUMNS = 3
# distinct in grey, for the colour-blind, and on a light or dark page; the rest is LIGHT's, which a page may replace
BLUE, ORANGE, GREEN = "#2a7fb8", "#d55e00", "#009e73"
INK, QUIET, LINE, PAPER = LIGHT["text"], LIGHT["quiet"], LIGHT["line"], LIGHT["card"]
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.labelsize": 8,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "svg.hashsalt": "fgsteer",
}


class Picture(NamedTuple):
    """A figure, the name of its file, and what it shows."""

    name: str
    caption: str
    figure: Figure


@contextmanager
def drawing_style() -> Iterator[None]:
    """Matplotlib's defaults and this module's style, whatever the user has set; theirs come back."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure whole, as its name's ending says (.png, .svg), the same bytes every time."""
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise DataError(f"a picture named {path}", "an ending of .png or .svg")
    with atomic_write(path) as beside:
        beside.write_bytes(rendered(figure, kind))


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a "png" or "svg" file, the same every time."""
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with drawing_style():
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def save_all(run: Run, folder: str | Path) -> list[Path]:
    """Every picture of the run, as PNG and SVG; the paths written. Raises DataError for a run without records."""
    return save_each(pictures(run), folder)


def save_each(found: Iterable[Picture], folder: str | Path) -> list[Path]:
    """Pictures, as PNG and SVG named after them, in a folder that may be new; the paths written. Raises FormatError."""
    make_folder(folder)
    paths = []
    for name, _, figure in found:
        for kind in ("png", "svg"):
            paths.append(Path(folder) / f"{name}.{kind}")
            save(figure, paths[-1])
    return paths


def pictures(run: Run) -> list[Picture]:
    """The pictures that a run has the records for. Raises DataError for a run without records."""
    if not run.records:
        raise DataError("a run without records", "at least one", "start it first")
    found = []
    best, base = best_sae_method(run), method_name(BASELINE)
    dashed = f" Dashed: {base}." if BASELINE in run.methods else ""
    for matched in (None, *run.targets):
        suffix = "" if matched is None else f"-matched-{matched:g}"
        at = "at the best coefficient" if matched is None else f"at {matched:g} nats of CE rise"
        caption = f"Average BCS per method {at}, with 95 % intervals over prompts.{dashed}"
        found.append(Picture(f"methods{suffix}", caption, method_bars(run, matched)))
        if best and any(row.method == best and row.difference for row in average_table(run, matched)):
            caption = (
                f"BCS of {method_name(best)} less {base} {at}, with 95 % intervals over prompts; filled: 0 excluded."
            )
            found.append(Picture(f"concepts{suffix}", caption, concept_bars(run, best, matched)))
    if run.swept:
        caption = (
            f"Behavior against coherence along each method's coefficients (numbers), from unsteered (○).{dashed} "
            "Grey: lines of equal BCS, .2 to .8."
        )
        found.append(Picture("frontier", caption, frontier(run)))
        caption = "Behavior, coherence and BCS by coefficient. ▾ is the best coefficient of the tuning half."
        found.append(Picture("coefficients", caption, coefficient_curves(run)))
    for method in dict.fromkeys(m for m in (best, BASELINE) if m and len(run.layers(m)) > 1):
        caption = f"{method_name(method)}: BCS by layer and coefficient. The frame is the best of the tuning half."
        name = "layers-" + "".join(c if c.isalnum() else "_" for c in method)
        found.append(Picture(name, caption, layer_map(run, method)))
    return found


@drawing_style()
def frontier(run: Run) -> Figure:
    """Behavior against coherence along each method's coefficients, a panel a method, averages over concepts.

    Raises DataError where concepts have grids of unequal lengths.
    """
    start = curve(run, "unsteered") if "unsteered" in run.methods else []
    figure, panels = shared_panels(run.swept)
    base = sorted([*start, *curve(run, BASELINE)]) if BASELINE in run.swept else []
    for method, axis in panels:
        _equal_bcs(axis)
        axis.plot([p.coherence for p in base], [p.behavior for p in base], "s--", color=QUIET, mfc=PAPER, ms=2.5, lw=1)
        points = sorted([*start, *curve(run, method)])
        axis.plot([p.coherence for p in points], [p.behavior for p in points], "o-", color=BLUE)
        for point in start:
            axis.plot(point.coherence, point.behavior, "o", color=INK, mfc=PAPER, ms=4.5)
        best = max(points, key=lambda p: p.bcs)
        for point in {best, points[-1]} - set(start):
            _name(axis, point, f"{point.coefficient:.3g}")
        if base and axis is panels[0][1]:
            _name(axis, base[-1], method_name(BASELINE))
        axis.set(xlim=(0, 1.05), ylim=(0, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_xticklabels(["0", ".5", "1"])
        axis.set_yticklabels(["0", ".5", "1"])
    figure.supxlabel("coherence")
    figure.supylabel("behavior")
    return figure


def _name(axis: Axes, point: Point, text: str) -> None:
    """Write a text above a point, legible over lines."""
    from matplotlib.patheffects import withStroke

    ground = [withStroke(linewidth=2, foreground=PAPER)]
    place = (point.coherence, point.behavior)
    axis.annotate(text, place, (0, 3.5), textcoords="offset points", ha="center", path_effects=ground)


def _equal_bcs(axis: Axes) -> None:
    for level in (0.2, 0.4, 0.6, 0.8):
        xs = [level + (1.05 - level) * n / 40 for n in range(41)]
        axis.plot(xs, [level / x for x in xs], color=LINE, lw=0.7, zorder=0)


@drawing_style()
def coefficient_curves(run: Run) -> Figure:
    """Behavior, coherence and BCS by coefficient (steps of the grid), a panel a method, averages over concepts.

    Raises DataError where concepts have grids of unequal lengths.
    """
    figure, panels = shared_panels(run.swept)
    for method, axis in panels:
        points = curve(run, method)
        steps = range(len(points))
        for measure, style, color, width in (
            ("behavior", "^--", ORANGE, 1.0),
            ("coherence", "s:", GREEN, 1.2),
            ("bcs", "o-", INK, 1.5),
        ):
            values = [getattr(p, measure) for p in points]
            axis.plot(steps, values, style, color=color, lw=width, ms=3, label="BCS" if measure == "bcs" else measure)
        tuned = curve(run, method, half="tune")
        axis.plot(max(steps, key=lambda n: tuned[n].bcs), 1.06, "v", color=INK, ms=4, clip_on=False)
        shown = sorted({0, len(points) // 2, len(points) - 1})
        axis.set(ylim=(0, 1.1), yticks=(0, 0.5, 1), xticks=shown)
        axis.set_yticklabels(["0", ".5", "1"])
        axis.set_xticklabels([f"{points[n].coefficient:.3g}" for n in shown])
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, handlelength=2.4)
    figure.supxlabel("coefficient")
    return figure


def shared_panels(
    methods: Sequence[str], name: Callable[[str], str] = method_name
) -> tuple[Figure, list[tuple[str, Axes]]]:
    """A figure with a small panel for each method, titled by its name."""
    from matplotlib.figure import Figure

    if not methods:
        raise DataError("no method with several coefficients", "a grid of coefficients")
    rows = math.ceil(len(methods) / COLUMNS)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.15 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).ravel()
    for axis in axes[len(methods) :]:
        axis.set_axis_off()
    for method, axis in zip(methods, axes, strict=False):
        axis.set_title(_short(name(method), 17))
    return figure, list(zip(methods, axes, strict=False))


@drawing_style()
def layer_map(run: Run, method: str = BASELINE, measure: str = "bcs") -> Figure:
    """BCS (or behavior, coherence) of a method by layer and coefficient, averages over concepts, in numbers on grey.

    Raises DataError where a concept lacks a layer.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers = run.layers(method)
    grids = [curve(run, method, layer) for layer in layers]
    tuned = [curve(run, method, layer, half="tune") for layer in layers]
    values = [[getattr(point, measure) for point in grid] for grid in grids]
    figure = Figure(figsize=(max(WIDTH, 0.7 + 0.25 * len(values[0])), 0.7 + 0.22 * len(values)), layout="constrained")
    axis = figure.subplots()
    axis.pcolormesh(values, cmap="Greys", vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.5)
    for row, column in ((r, c) for r in range(len(values)) for c in range(len(values[r]))):
        value = values[row][column]
        color = "#000000" if value < 0.6 else "#fdfdfd"
        axis.text(column + 0.5, row + 0.5, plain_number(value), ha="center", va="center_baseline", color=color)
    cells = [(r, c) for r in range(len(tuned)) for c in range(len(tuned[r]))]
    row, column = max(cells, key=lambda at: getattr(tuned[at[0]][at[1]], measure))
    axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.6))
    axis.set_xticks([n + 0.5 for n in range(len(grids[0]))], [f"{p.coefficient:.3g}" for p in grids[0]])
    axis.set_yticks([n + 0.5 for n in range(len(grids))], [str(layer) for layer in layers])
    axis.set(xlabel="coefficient", ylabel="layer")
    return figure


@drawing_style()
def method_bars(run: Run, matched: float | None = None) -> Figure:
    """Average BCS of each method with its interval (arguments and errors as in ``average_table``)."""
    rows = sorted(average_table(run, matched), key=lambda row: row.bcs.mean)
    figure, axis = _rows([(method_name(row.method), row.bcs) for row in rows])
    for place, row in enumerate(rows):
        low, high = row.bcs.mean - row.bcs.low, row.bcs.high - row.bcs.mean
        axis.errorbar(
            row.bcs.mean, place, xerr=[[low], [high]], fmt="o", color=BLUE, ecolor=INK, elinewidth=1, capsize=2
        )
        if row.method == BASELINE:
            axis.axvline(row.bcs.mean, color=QUIET, lw=0.8, ls="--", zorder=0)
    axis.set(xlabel="BCS", xlim=(0, None))
    return figure


@drawing_style()
def concept_bars(run: Run, method: str, matched: float | None = None) -> Figure:
    """A method's BCS less the baseline's, a bar a concept and one for all, filled where the interval excludes 0.

    Raises DataError where the run lacks the method or the baseline.
    """
    averages = [row.difference for row in average_table(run, matched) if row.method == method and row.difference]
    rows = [
        (row.setting.concept, row.difference)
        for row in concept_table(run, matched)
        if row.setting.method == method and row.difference
    ]
    if not averages:
        raise DataError(f"no difference of {method} to {BASELINE}", "a run with both")
    rows = [("average", averages[0]), *sorted(rows, key=lambda row: row[1].mean)]
    figure, axis = _rows(rows)
    for place, (_, gain) in enumerate(rows):
        error = [[gain.mean - gain.low], [gain.high - gain.mean]]
        axis.barh(place, gain.mean, 0.7, color=BLUE if gain.clear else PAPER, edgecolor=BLUE, linewidth=1)
        axis.errorbar(gain.mean, place, xerr=error, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axis.axvline(0, color=QUIET, lw=0.8)
    axis.axhline(0.5, color=LINE, lw=0.8)
    axis.set(xlabel=f"BCS, {method_name(method)} less {method_name(BASELINE)}")
    return figure


def _rows(rows: Sequence[tuple[str, Interval]]) -> tuple[Figure, Axes]:
    """A figure with a named row for each interval and its mean at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.55 + 0.19 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.set_yticks(range(len(rows)), [_short(name, 20) for name, _ in rows])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    beside = axis.secondary_yaxis("right")
    beside.set_yticks(range(len(rows)), [plain_number(value.mean, 3) for _, value in rows])
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    return figure, axis


def _short(text: str, length: int) -> str:
    text = visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def plain_number(value: float, digits: int = 2) -> str:
    """A number without the 0 before its point, with a true minus."""
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
