"""A sweep as one HTML page that stands alone: its answers, the numbers, the pictures, and how to repeat it.

write_page(sweep(model, tokenizer, "wedding"), "sweep.html")
"""

from __future__ import annotations

from pathlib import Path

from fgsteer.display.pages import standalone_page
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.page_parts import STYLE, card_markup, escaped, facts_markup, figure_markup, table_markup
from fgsteer.evaluation.sweep.plots import TITLES, pictures
from fgsteer.evaluation.sweep.results import Sweep
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.version import library_version


def write_page(sweep: Sweep, path: str | Path, command: str = "") -> None:
    """Write the page of a sweep.

    Args:
        sweep: The sweep.
        path: The file, such as sweep.html.
        command: How the sweep was started.

    Raises:
        DataError: The sweep has no cells.
        FormatError: The file cannot be written.
    """
    page = sweep_page(sweep, command)
    with atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def sweep_page(sweep: Sweep, command: str = "") -> str:
    """The whole page. Raises DataError for a sweep without cells."""
    figures = [
        card_markup("", figure_markup(picture, f"p{number}-"), wide=False)
        for number, picture in enumerate(pictures(sweep))
    ]
    sections = [
        card_markup("Best layers", _best(sweep)),
        *figures,
        card_markup("Every layer and strength", _cells(sweep)),
        card_markup("Random directions", _damage(sweep)),
        card_markup("How it was measured", _measured(sweep)),
        card_markup("How to repeat it", f"<pre>{escaped(command, lines=True)}</pre>" if command else ""),
    ]
    answers = "".join(f"<p>{escaped(answer)}</p>" for answer in sweep.answers)
    return standalone_page(f"Where to steer: {sweep.contrast}", answers, "\n".join(filter(None, sections)), STYLE)


def _best(sweep: Sweep) -> str:
    heads = ("direction", "layer", "coefficient", "size of the change", f"push, {sweep.unit}", "level with layers")
    rows = [
        (
            TITLES[best.sign],
            best.layer,
            f"{best.coefficient:.3g}",
            f"{abs(best.coefficient) * sweep.norms[best.layer]:.3g}",
            _interval(best.push),
            ", ".join(map(str, best.level_with)),
        )
        for best in sweep.best
    ]
    return table_markup("Best layers", heads, rows) if rows else "<p>No layer reaches the cost.</p>"


def _cells(sweep: Sweep) -> str:
    heads = ("layer", "direction", "coefficient", "cost, nats a token", f"effect, {sweep.unit}")
    rows = [
        (cell.layer, TITLES[cell.sign], f"{cell.coefficient:.3g}", f"{cell.cost:.3f}", _interval(cell.effect))
        for cell in sweep.cells
    ]
    return table_markup("Every layer and strength", heads, rows)


def _damage(sweep: Sweep) -> str:
    heads = ("layer", f"effect, {sweep.unit}")
    rows = [(layer, _interval(value)) for layer, value in sweep.damage.items()]
    return table_markup("Random directions", heads, rows) if rows else ""


def _measured(sweep: Sweep) -> str:
    shown = facts_markup(
        {
            "fgsteer": library_version(),
            "model": sweep.model,
            "vectors": f"{sweep.method} on {sweep.contrast}",
            "effects on": f"{sweep.measured_on}: {', '.join(f'{n} {what}' for what, n in sweep.texts.items())}",
            "unsteered propensity": f"{_interval(sweep.propensity)} {sweep.unit}",
            "unsteered cross-entropy of neutral text": f"{sweep.cross_entropy:.3f} nats a token",
            "compared at": f"{sweep.matched:g} nats a token",
        }
    )
    notes = "".join(f"<li>{escaped(note)}</li>" for note in sweep.notes)
    return shown + (f"<h3>Notes</h3><ul>{notes}</ul>" if notes else "")


def _interval(value: Interval) -> str:
    middle, low, high = (f"{number:.3f}".replace("-", "−") for number in value)
    return f"{middle} [{low}, {high}]"
