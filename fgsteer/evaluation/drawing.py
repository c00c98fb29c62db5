"""What all pictures share: their style, their layouts, and how they are written.

Pictures are 3.4 inches wide, read in grey, explain their own marks in a legend, and come out the same every time.
pyplot and its global state are not used.

    with drawing_style(): figure, panels = panel_grid(["caa", "fgaa"], method_name)
    save(figure, "picture.png")
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fgsteer.display.pages import LIGHT, visible
from fgsteer.errors import DataError
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.targets import make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH_INCHES = 3.4  # a column of a paper, or a phone
COLUMNS = 3
TITLE_CHARACTERS, LABEL_CHARACTERS = 17, 22  # what fits above a panel, and beside a row
DARK_SHARE = 0.6  # cells of a map above this share of the scale have light numbers
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
    "legend.frameon": False,
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
    """Draw with matplotlib's defaults and this module's style, whatever the user has set; theirs come back."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a "png" or "svg" file, the same every time."""
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with drawing_style():
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as its name's ending says, the same bytes every time.

    Args:
        figure: The figure.
        path: A file whose name ends with .png or .svg.

    Raises:
        DataError: The name has another ending.
        FormatError: The file cannot be written.
    """
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise DataError(f"a picture named {path}", "a name that ends with .png or .svg")
    with atomic_write(path) as temporary:
        temporary.write_bytes(rendered(figure, kind))


def save_each(pictures: Iterable[Picture], folder: str | Path) -> list[Path]:
    """Write pictures as PNG and SVG named after them, to a folder that is made where it is not there.

    Returns the paths written. Raises FormatError where one cannot be written.
    """
    make_folder(folder)
    paths = []
    for name, _, figure in pictures:
        for kind in ("png", "svg"):
            paths.append(Path(folder) / f"{name}.{kind}")
            save(figure, paths[-1])
    return paths


def panel_grid(names: Sequence[str], title: Callable[[str], str]) -> tuple[Figure, list[tuple[str, Axes]]]:
    """A figure with a small panel for each name, with its title above it. Raises DataError without names."""
    from matplotlib.figure import Figure

    if not names:
        raise DataError("no method with several coefficients", "a run with a grid of coefficients")
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(WIDTH_INCHES, 0.8 + 1.15 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for name, axis in zip(names, axes, strict=False):
        axis.set_title(shortened(title(name), TITLE_CHARACTERS))
    return figure, list(zip(names, axes, strict=False))


def interval_rows(rows: Sequence[tuple[str, Interval]]) -> tuple[Figure, Axes]:
    """A figure with a named row for each interval, from below, with its mean at the right."""
    from matplotlib.figure import Figure

    labels = [wrapped(name) for name, _ in rows]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(WIDTH_INCHES, 0.85 + 0.19 * lines), layout="constrained")
    axis = figure.subplots()
    axis.set_yticks(range(len(rows)), labels)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    beside = axis.secondary_yaxis("right")
    beside.set_yticks(range(len(rows)), [plain_number(value.mean, 3) for _, value in rows])
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    return figure, axis


def draw_map(axis: Axes, values: Sequence[Sequence[float]], top: float, show: Callable[[float], str]) -> None:
    """Draw cells in grey from 0 to ``top`` with their numbers; a cell of nan stays empty."""
    axis.pcolormesh(values, cmap="Greys", vmin=0, vmax=top, edgecolors=PAPER, linewidth=0.5)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if not math.isnan(value):
                color = "#000000" if value < DARK_SHARE * top else "#fdfdfd"
                axis.text(column + 0.5, row + 0.5, show(value), ha="center", va="center_baseline", color=color)


def frame_cell(axis: Axes, row: int, column: int) -> None:
    """Frame a cell of a map."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.6))


def legend(figure: Figure, handles: Sequence[Any], columns: int | None = None) -> None:
    """Explain the marks of a figure above it; every handle has a label."""
    figure.legend(
        handles=list(handles),
        loc="outside upper center",
        ncols=columns or len(handles),
        handlelength=2.0,
        columnspacing=1.2,
        borderpad=0.2,
    )


def mark(label: str, style: str, **options: Any) -> Line2D:
    """A mark or line for a legend, drawn as ``axis.plot`` draws the same style, such as "o-"."""
    from matplotlib.lines import Line2D

    marker = style.rstrip("-:")
    line: Any = style[len(marker) :] or "none"
    return Line2D([], [], linestyle=line, marker=marker or "none", label=label, **options)


def frame_mark(label: str) -> Any:
    """The frame of a map's cell for a legend."""
    from matplotlib.patches import Patch

    return Patch(fill=False, edgecolor=ORANGE, linewidth=1.6, label=label)


def wrapped(text: str) -> str:
    """A row's label on two lines at most, in characters that move nothing; what is longer is cut off."""
    lines = textwrap.wrap(visible(text), LABEL_CHARACTERS) or [""]
    return (
        "\n".join(lines[:2]) if len(lines) <= 2 else f"{lines[0]}\n{shortened(' '.join(lines[1:]), LABEL_CHARACTERS)}"
    )


def shortened(text: str, length: int) -> str:
    """A text of at most ``length`` characters that move nothing."""
    text = visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def plain_number(value: float, digits: int = 2) -> str:
    """A number without the 0 before its point, with a true minus."""
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text
