"""Small tables of results, as HTML in a notebook and as aligned text in a terminal; every text is escape_text.

table_html(["feature", "label"], [[12, "wedding"]])
print(Table(rows))                                   rows that have ``cells()``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Protocol, TypeVar, runtime_checkable

from fgsteer.errors.escaping import escape_text

LEAST_SHARE = 0.0001  # that is shown as a number
MOST_ROWS = 50  # rows that a table shows; how many there are besides is said below it
_STYLE = "padding:.15em .7em;vertical-align:top;white-space:normal;border-bottom:1px solid rgba(128,128,128,.35)"


class Share(float):
    """A number from 0 to 1 that is shown in per cent."""


Cell = str | int | float | None  # None, and the empty text, where nothing is known


@runtime_checkable  # where annotations are checked at run time
class Row(Protocol):
    """What a table can show: a value that names its cells."""

    def cells(self) -> Mapping[str, Cell]:
        """The cells of its row, by heading."""


R = TypeVar("R", bound=Row)


class Table(list[R]):
    """A list of rows that shows as a table: in a notebook by itself, in a terminal when it is printed.

    Columns in which no row has a value are left out.
    """

    def __str__(self) -> str:
        headings, rows = self._columns()
        if not rows:
            return "[]"
        lines = [headings, *([" ".join(_shown(cell).split("\n")) for cell in row] for row in rows)]
        widths = [max(len(line[n]) for line in lines) for n in range(len(headings))]
        right = [_is_numeric(column) for column in zip(*rows, strict=True)]
        text = "\n".join(
            "  ".join(
                cell.rjust(width) if numeric else cell.ljust(width)
                for cell, width, numeric in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in lines
        )
        more = len(self) - len(rows)
        return f"{text}\nand {more:,} more" if more else text

    def _repr_html_(self) -> str:
        headings, rows = self._columns()
        more = len(self) - len(rows)
        return table_html(headings, rows, f"and {more:,} more" if more else "") if rows else "<p>No rows.</p>"

    def _columns(self) -> tuple[list[str], list[list[Cell]]]:
        """Headings and cells of the first rows."""
        rows = [row.cells() for row in self[:MOST_ROWS]]
        headings = [name for name in (rows[0] if rows else ()) if any(row[name] not in (None, "") for row in rows)]
        return headings, [[row[name] for name in headings] for row in rows]


def table_html(headings: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> str:
    """An HTML table of cells, with a note below it.

    It has no colors of its own, so that it is readable on a light and on a dark page.
    """
    right = [_is_numeric(column) for column in zip(*rows, strict=True)] or [False] * len(headings)
    styles = [f"text-align:{'right' if numeric else 'left'};{_STYLE}" for numeric in right]

    def line(cells: Iterable[str], tag: str) -> str:
        styled = zip(cells, styles, strict=True)
        return "".join(f'<{tag} style="{style}">{html_text(cell)}</{tag}>' for cell, style in styled)

    head = f"<thead><tr>{line(headings, 'th')}</tr></thead>" if any(headings) else ""
    body = "".join(f"<tr>{line(map(_shown, row), 'td')}</tr>" for row in rows)
    below = f'<p style="opacity:.75">{html_text(note)}</p>' if note else ""
    return f'<table style="border-collapse:collapse;margin:.5em 0">{head}<tbody>{body}</tbody></table>{below}'


def facts_html(title: str, facts: Mapping[str, Cell]) -> str:
    """A title and a table of named facts; those that are not known are left out."""
    known = [[name, _shown(value)] for name, value in facts.items() if value not in (None, "")]
    return f"{title_html(title)}{table_html(['', ''], known)}"


def title_html(title: str) -> str:
    """A line that stands above a table."""
    return f"<p><b>{html_text(title)}</b></p>"


def html_text(text: str) -> str:
    """A text from anywhere as HTML that shows it, and does nothing."""
    return escape(escape_text(text, keep="\n")).replace("\n", "<br>")


def _is_numeric(column: Iterable[Cell]) -> bool:
    return all(isinstance(cell, int | float | None) for cell in column)


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Share):
        return f"{float(cell):.2%}" if not 0 < cell < LEAST_SHARE else f"<{LEAST_SHARE:.2%}"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return escape_text(cell, keep="\n") if isinstance(cell, str) else f"{cell}"
