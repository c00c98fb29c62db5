"""Pictures of a sweep: push by layer and cost, and how it fades as strength grows.

for name, caption, figure in pictures(sweep(model, tokenizer, "wedding")): save(figure, f"{name}.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fgsteer.errors import DataError
from fgsteer.evaluation.runs.plots import (
    BLUE,
    LINE,
    ORANGE,
    PAPER,
    QUIET,
    WIDTH,
    Picture,
    drawing_style,
    plain_number,
    save_each,
    shared_panels,
)
from fgsteer.evaluation.sweep.answers import SIGNS
from fgsteer.evaluation.sweep.sweep import Sweep, SweepCell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {1: "towards (+)", -1: "away (−)"}


def pictures(sweep: Sweep) -> list[Picture]:
    """The map and the curves. Raises DataError for a sweep without cells."""
    grid = "cost asked for, in nats a token" if _by_cost(sweep) else "coefficient"
    caption = f"Push in {sweep.unit}, by layer and {grid}. The frame is the best layer at {sweep.matched:g} nats."
    curves = f"Push in {sweep.unit} against measured cost, with 95 % intervals. ● towards the behavior, □ away from it."
    return [
        Picture("sweep-map", caption, push_map(sweep)),
        Picture("sweep-fading", curves, fading_curves(sweep)),
    ]


def save_pictures(sweep: Sweep, folder: str | Path) -> list[Path]:
    """Every picture, as PNG and SVG; the paths written. Raises DataError for a sweep without cells."""
    return save_each(pictures(sweep), folder)


@drawing_style()
def push_map(sweep: Sweep) -> Figure:
    """Push by layer and step of the grid, in numbers on grey, a panel a sign; empty where a step is not reached.

    Raises DataError for a sweep without cells.
    """
    from matplotlib.figure import Figure

    _check(sweep)
    layers, steps = list(sweep.hookpoints), list(sweep.steps)
    width = max(WIDTH, 0.6 + 0.28 * len(steps) * len(SIGNS))
    figure = Figure(figsize=(width, 0.9 + 0.2 * len(layers)), layout="constrained")
    top = max(cell.push for cell in sweep.cells)
    for axis, sign in zip(figure.subplots(1, len(SIGNS), sharey=True), SIGNS, strict=True):
        cells = {(cell.layer, cell.step): cell.push for cell in sweep.cells if cell.sign == sign}
        grid = [[cells.get((layer, step), float("nan")) for step in steps] for layer in layers]
        axis.pcolormesh(grid, cmap="Greys", vmin=0, vmax=top if top > 0 else 1, edgecolors=PAPER, linewidth=0.5)
        for (layer, step), push in cells.items():
            color = "#000000" if push < 0.6 * top else "#fdfdfd"
            place = (steps.index(step) + 0.5, layers.index(layer) + 0.5)
            axis.text(*place, _brief(push), ha="center", va="center_baseline", color=color)
        _frame_best(axis, sweep, sign, layers, steps)
        axis.set_title(TITLES[sign])
        axis.set_xticks([n + 0.5 for n in range(len(steps))], [_brief(step) for step in steps])
        axis.set_yticks([n + 0.5 for n in range(len(layers))], [str(layer) for layer in layers])
        axis.tick_params(length=0)
    figure.supxlabel("cost, nats a token" if _by_cost(sweep) else "coefficient")
    figure.supylabel("layer")
    return figure


def _frame_best(axis: Axes, sweep: Sweep, sign: int, layers: Sequence[int], steps: Sequence[float]) -> None:
    """Frame the best layer at the matched cost, where that is a step of the grid."""
    from matplotlib.patches import Rectangle

    for best in sweep.best:
        if best.sign == sign and _by_cost(sweep) and sweep.matched in steps:
            corner = (steps.index(sweep.matched), layers.index(best.layer))
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.6))


@drawing_style()
def fading_curves(sweep: Sweep) -> Figure:
    """Push against measured cost, a panel a layer, from no steering at (0, 0); bands are 95 % intervals.

    Raises DataError for a sweep without cells.
    """
    _check(sweep)
    layers = sorted({cell.layer for cell in sweep.cells})
    figure, panels = shared_panels([f"layer {layer}" for layer in layers], str)
    for layer, (_, axis) in zip(layers, panels, strict=True):
        axis.axhline(0, color=LINE, lw=0.7, zorder=0)
        axis.axvline(sweep.matched, color=QUIET, lw=0.7, ls=":", zorder=0)
        for sign, color, style in ((1, BLUE, "o-"), (-1, ORANGE, "s--")):
            row = [cell for cell in sweep.cells if (cell.layer, cell.sign) == (layer, sign)]
            costs = [0.0, *(cell.cost for cell in row)]
            axis.plot(costs, [0.0, *(cell.push for cell in row)], style, color=color, mfc=color if sign > 0 else PAPER)
            low, high = zip((0.0, 0.0), *map(_ends, row), strict=True)
            axis.fill_between(costs, low, high, color=color, alpha=0.15, lw=0)
    figure.supxlabel("cost, nats a token")
    figure.supylabel(f"push, {sweep.unit}")
    return figure


def _ends(cell: SweepCell) -> tuple[float, float]:
    low, high = sorted((cell.sign * cell.effect.low, cell.sign * cell.effect.high))
    return low, high


def _check(sweep: Sweep) -> None:
    if not sweep.cells:
        raise DataError("a sweep without cells", "a layer and sign that steering moves", "see its notes")


def _by_cost(sweep: Sweep) -> bool:
    return all(cell.target is not None for cell in sweep.cells)


def _brief(value: float) -> str:
    """A number in two digits or so: .05, 1.2, 12."""
    return plain_number(value, 2 if abs(value) < 0.995 else 1 if abs(value) < 9.95 else 0)
