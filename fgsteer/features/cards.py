"""Feature cards: what is known of some features, as one HTML page and in the terminal.

write_page("cards.html", "Features of love", describe_features(model, tokenizer, sae, vec))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.display.pages import SHADES, escape_html, standalone_page, visible
from fgsteer.storage.atomic import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

    from fgsteer.features.description import FeatureRow
    from fgsteer.saes.examples import Excerpt


def html_page(heading: str, rows: Sequence[FeatureRow], notes: Iterable[str] = ()) -> str:
    """An HTML page with a card for each feature, every text escaped.

    A token's background shows the activation on it, in five steps of the feature's largest shown.
    """
    above = "".join(f'<p class="quiet">{escape_html(note)}</p>' for note in notes)
    if any(row.excerpts for row in rows):
        steps = "".join(f'<span class="s{n}">{100 * n // SHADES} %</span>' for n in range(1, SHADES + 1))
        above += (
            f'<p class="quiet scale">Activation, up to this share of the feature\'s largest: <span>{steps}</span> '
            "The peak is underlined; hover over a token for its value.</p>"
        )
    return standalone_page(heading, above, "".join(map(_card, rows)) or "<p>No features.</p>")


def write_page(path: str | Path, heading: str, rows: Sequence[FeatureRow], notes: Iterable[str] = ()) -> None:
    """Write ``html_page`` to a file. Raises FormatError where it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(html_page(heading, rows, notes).encode("utf-8", "replace"))


def _card(row: FeatureRow) -> str:
    """The card of one feature."""
    facts = [
        ("weight", "" if row.weight is None else f"{row.weight:.4f}"),
        ("density", "" if row.density is None else f"{row.density:.3%} of tokens"),
        ("found", escape_html("; ".join(row.why))),
        ("raises", " ".join(f"<code>{escape_html(t)}</code>" for t in row.tokens)),
        ("lowers", " ".join(f"<code>{escape_html(t)}</code>" for t in row.lowered)),
        ("more", f'<a href="{escape(row.link)}">Neuronpedia</a>' if row.link else ""),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts if value)
    label = f"<p>{escape_html(row.label)}</p>" if row.label else ""
    largest = max((max(e.activations) for e in row.excerpts), default=0.0)
    excerpts = "".join(_excerpt(excerpt, largest) for excerpt in row.excerpts)
    return (
        f'<article id="f{row.id}"><h2>Feature {row.id}</h2>{label}<dl>{listed}</dl>'
        f"{f'<ol>{excerpts}</ol>' if excerpts else ''}</article>\n"
    )


def _excerpt(excerpt: Excerpt, largest: float) -> str:
    """One excerpt, its tokens shaded by their activation."""
    spans = []
    for first, end in _characters(excerpt.tokens):
        value = max(excerpt.activations[first:end])
        text = visible("".join(excerpt.tokens[first:end]))
        word = text.lstrip() or text
        shown = escape(word)
        if value > 0:
            shade = max(1, math.ceil(SHADES * value / largest))
            shown = f'<span class="s{shade}" title="{value:.2f}">{shown}</span>'
        if first <= excerpt.peak < end:
            shown = f"<mark>{shown}</mark>"
        spans.append(text[: len(text) - len(word)] + shown)
    return f"<li><b>{excerpt.activations[excerpt.peak]:.2f}</b><q>{''.join(spans)}</q></li>"


def _characters(tokens: Sequence[str]) -> Iterable[tuple[int, int]]:
    """The bounds of runs of tokens that share a character: an empty token goes with the one after it."""
    first = 0
    for n, text in enumerate(tokens):
        if text or n == len(tokens) - 1:
            yield first, n + 1
            first = n + 1


def print_features(result: dict[str, Any], console: Console) -> None:
    """Print the result of ``fgsteer features``: a table of features, then their excerpts."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(result["heading"]))
    if "raises" in result:
        console.print(Text(f"  raises  {' '.join(result['raises'])}\n  lowers  {' '.join(result['lowers'])}"))
    rows = result["features"]
    if not rows:
        console.print("  no features" + (": this method works on residual means" if "method" in result else ""))
        return
    weighted = any(row["weight"] is not None for row in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("feature", *(["weight"] if weighted else []), "density"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("tokens its weight pushes towards" if weighted else "tokens it raises")
    texts = [name for name in ("label", "why", "link") if any(row[name] for row in rows)]
    for name in texts:
        table.add_column({"why": "found because it"}.get(name, name), overflow="fold")
    for row in rows:
        numbers = [str(row["id"]), *([f"{row['weight']:.4f}"] if weighted else [])]
        share = "?" if row["density"] is None else f"{row['density']:.3%}"
        more = [row[name] if isinstance(row[name], str) else "; ".join(row[name]) for name in texts]
        table.add_row(*numbers, share, Text(" ".join(row["tokens"])), *map(Text, more))
    console.print(table)
    for row in rows:
        if row["excerpts"]:
            console.print(Text(f"\n{row['id']}  {row['label']}".rstrip(), style="bold"))
        for excerpt in row["excerpts"]:
            console.print(_line(excerpt, Text), soft_wrap=False, overflow="ellipsis", no_wrap=True)


def _line(excerpt: dict[str, Any], text: Any) -> Any:
    """One excerpt as a line of rich text, the peak in bold, as much before it as fits beside its number."""
    tokens, peak = [visible(t) for t in excerpt["tokens"]], excerpt["peak"]
    before = "".join(tokens[:peak])[-32:]
    return text.assemble(
        (f"{excerpt['activations'][peak]:8.2f}  ", "dim"),
        f"{before:>32}",
        (tokens[peak], "bold reverse"),
        "".join(tokens[peak + 1 :]),
    )
