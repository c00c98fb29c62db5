"""Pictures of a sweep: push by layer and cost, and how it fades as strength grows.

for name, caption, figure in pictures(sweep(model, tokenizer, "wedding")): save(figure, f"{name}.png")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fgsteer.errors import DataError
from fgsteer.evaluation.drawing import (
    BLUE,
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
    legend,
    mark,
    panel_grid,
    plain_number,
    save_each,
)
from fgsteer.evaluation.sweep.answers import SIGNS
from fgsteer.evaluation.sweep.results import Sweep, SweepCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {1: "towards (+)", -1: "away (−)"}
CURVES = ((1, BLUE, "o-", BLUE), (-1, ORANGE, "s--", PAPER))  # (sign, color, line and marker, marker's fill)


def pictures(sweep: Sweep) -> list[Picture]:
    """The map and the curves. Raises DataError for a sweep without cells."""
    grid = "cost asked for, in nats a token" if _by_cost(sweep) else "coefficient"
    caption = f"Push in {sweep.unit}, by layer and {grid}."
    curves = f"Push in {sweep.unit} against measured cost, with 95 % intervals."
    return [
        Picture("sweep-map", caption, push_map(sweep)),
        Picture("sweep-fading", curves, fading_curves(sweep)),
    ]


def save_pictures(sweep: Sweep, folder: str | Path) -> list[Path]:
    """Write every picture, as PNG and SVG; returns the paths. Raises DataError for a sweep without cells."""
    return save_each(pictures(sweep), folder)


@drawing_style()
def push_map(sweep: Sweep) -> Figure:
    """Push by layer and step of the grid, in numbers on grey, a panel a sign; empty where a step is not reached.

    Raises DataError for a sweep without cells.
    """
    from matplotlib.figure import Figure

    _check(sweep)
    layers, steps = list(sweep.hookpoints), list(sweep.steps)
    width = max(WIDTH_INCHES, 0.6 + 0.28 * len(steps) * len(SIGNS))
    figure = Figure(figsize=(width, 1.15 + 0.2 * len(layers)), layout="constrained")
    top = max(cell.push for cell in sweep.cells)
    framed = False
    for axis, sign in zip(figure.subplots(1, len(SIGNS), sharey=True), SIGNS, strict=True):
        pushes = {(cell.layer, cell.step): cell.push for cell in sweep.cells if cell.sign == sign}
        values = [[pushes.get((layer, step), float("nan")) for step in steps] for layer in layers]
        draw_map(axis, values, top if top > 0 else 1, _in_two_digits)
        for row, column in _best_cells(sweep, sign):
            frame_cell(axis, row, column)
            framed = True
        axis.set_title(TITLES[sign])
        axis.set_xticks([n + 0.5 for n in range(len(steps))], [_in_two_digits(step) for step in steps])
        axis.set_yticks([n + 0.5 for n in range(len(layers))], [str(layer) for layer in layers])
        axis.tick_params(length=0)
    if framed:
        legend(figure, [frame_mark(f"best layer at {sweep.matched:g} nats")])
    figure.supxlabel("cost, nats a token" if _by_cost(sweep) else "coefficient")
    figure.supylabel("layer")
    return figure


def _best_cells(sweep: Sweep, sign: int) -> list[tuple[int, int]]:
    """Row and column of the best layer at the matched cost, where that is a step of the grid."""
    layers, steps = list(sweep.hookpoints), list(sweep.steps)
    if not _by_cost(sweep) or sweep.matched not in steps:
        return []
    return [(layers.index(best.layer), steps.index(sweep.matched)) for best in sweep.best if best.sign == sign]


@drawing_style()
def fading_curves(sweep: Sweep) -> Figure:
    """Push against measured cost, a panel a layer, from no steering at (0, 0); bands are 95 % intervals.

    Raises DataError for a sweep without cells.
    """
    _check(sweep)
    layers = sorted({cell.layer for cell in sweep.cells})
    figure, panels = panel_grid([f"layer {layer}" for layer in layers], str)
    for layer, (_, axis) in zip(layers, panels, strict=True):
        axis.axhline(0, color=LINE, lw=0.7, zorder=0)
        axis.axvline(sweep.matched, color=QUIET, lw=0.7, ls=":", zorder=0)
        for sign, color, style, fill in CURVES:
            row = [cell for cell in sweep.cells if (cell.layer, cell.sign) == (layer, sign)]
            costs = [0.0, *(cell.cost for cell in row)]
            axis.plot(costs, [0.0, *(cell.push for cell in row)], style, color=color, mfc=fill)
            low, high = zip((0.0, 0.0), *map(_ends, row), strict=True)
            axis.fill_between(costs, low, high, color=color, alpha=0.15, lw=0)
    handles = [mark(TITLES[sign], style, color=color, mfc=fill) for sign, color, style, fill in CURVES]
    legend(figure, [*handles, mark(f"{sweep.matched:g} nats", ":", color=QUIET, lw=0.7)])
    figure.supxlabel("cost, nats a token")
    figure.supylabel(f"push, {sweep.unit}")
    return figure


def _ends(cell: SweepCell) -> tuple[float, float]:
    low, high = sorted((cell.sign * cell.effect.low, cell.sign * cell.effect.high))
    return low, high


def _check(sweep: Sweep) -> None:
    if not sweep.cells:
        raise DataError(
            "a sweep without cells",
            "a sweep in which steering moved a layer",
            "read sweep.notes, which say what is missing",
        )


def _by_cost(sweep: Sweep) -> bool:
    return all(cell.target is not None for cell in sweep.cells)


def _in_two_digits(value: float) -> str:
    """A number in two digits or so: .05, 1.2, 12."""
    return plain_number(value, 2 if abs(value) < 0.995 else 1 if abs(value) < 9.95 else 0)
