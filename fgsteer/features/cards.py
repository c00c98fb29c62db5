"""Feature cards: what is known of some features, in the terminal and as one HTML page.

The page stands alone: no script, no network, light or dark, for a screen of any width or paper.

    write_page("cards.html", "Features of love", describe_features(model, tokenizer, sae, vec))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.errors.escaping import escape_text
from fgsteer.storage.atomic import atomic_write

if TYPE_CHECKING:
    from rich.console import Console

    from fgsteer.features.description import FeatureRow
    from fgsteer.saes.examples import Excerpt

SHADES = 5  # steps of the colour scale above nothing
LIGHT = {
    "text": "#1b1b1b",
    "page": "#f6f5f2",
    "card": "#ffffff",
    "quiet": "#5c5c5c",
    "line": "#d9d6cf",
    "link": "#0b57a4",
}
LIGHT_SCALE = ("#fff3dc", "#ffe3b0", "#ffcf82", "#ffb957", "#ffa02e")
DARK = {
    "text": "#ececec",
    "page": "#141414",
    "card": "#1f1f1f",
    "quiet": "#a8a8a8",
    "line": "#3a3a3a",
    "link": "#8ec2ff",
}
DARK_SCALE = ("#352a18", "#4a371a", "#5f431a", "#754f18", "#8a5a13")

_STYLE = """
:root{color-scheme:light dark;%(light)s}
@media screen and (prefers-color-scheme:dark){:root{%(dark)s}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:80rem;background:var(--page);color:var(--text);
 font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:0 0 .25rem}h2{font-size:1.1rem;margin:0}p{margin:.25rem 0}
a{color:var(--link)}.quiet,dt{color:var(--quiet)}
main{display:grid;gap:1rem;align-items:start;grid-template-columns:repeat(auto-fill,minmax(min(100%%,34rem),1fr));margin-top:1rem}
article{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .75rem;margin:.5rem 0;font-size:.9rem}
dd{margin:0}dd code{background:var(--page);border-radius:.2rem;padding:0 .25rem;font-size:.85rem;white-space:pre-wrap}
ol{list-style:none;margin:.75rem 0 0;padding:0;font-size:.95rem}
li{display:grid;grid-template-columns:3.2rem 1fr;gap:.5rem;padding:.3rem 0;break-inside:avoid;
 border-top:1px solid var(--line)}
li>b{font-weight:400;font-size:.85rem;text-align:right;color:var(--quiet);font-variant-numeric:tabular-nums}
q{quotes:none;unicode-bidi:isolate}q span{border-radius:.15rem;white-space:pre-wrap}
mark{background:none;color:inherit}mark span{font-weight:600;text-decoration:underline;text-underline-offset:.15em}
.scale span{display:inline-block;padding:0 .4rem;color:var(--text)}.scale>span{white-space:nowrap;padding:0}
%(shades)s
@media print{html{font-size:9pt}body{padding:0;max-width:none;background:none}main{display:block}
 article{margin-bottom:.75rem}h2,dl{break-after:avoid}
 span{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def style() -> str:
    """The style sheet."""
    themes = {
        name: ";".join(f"--{key}:{value}" for key, value in [*plain.items(), *((f"s{n}", c) for n, c in shades)])
        for name, plain, shades in (
            ("light", LIGHT, enumerate(LIGHT_SCALE, 1)),
            ("dark", DARK, enumerate(DARK_SCALE, 1)),
        )
    }
    shades = "".join(f".s{n}{{background:var(--s{n})}}" for n in range(1, SHADES + 1))
    return _STYLE % {**themes, "shades": shades}


def html_page(heading: str, rows: Sequence[FeatureRow], notes: Iterable[str] = ()) -> str:
    """A whole HTML page: a card for each feature, every text escaped.

    A token's background shows the activation on it, in five steps of the feature's largest shown.
    """
    above = "".join(f'<p class="quiet">{_text(note)}</p>' for note in notes)
    if any(row.excerpts for row in rows):
        steps = "".join(f'<span class="s{n}">{100 * n // SHADES} %</span>' for n in range(1, SHADES + 1))
        above += (
            f'<p class="quiet scale">Activation, up to this share of the feature\'s largest: <span>{steps}</span> '
            "The peak is underlined; hover over a token for its value.</p>"
        )
    return whole_page(heading, above, "".join(map(_card, rows)) or "<p>No features.</p>")


def whole_page(heading: str, above: str, main: str, more_style: str = "") -> str:
    """An HTML page that stands alone, from an unescaped heading and markup to go under and below it."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(heading)}</title><style>{style()}{more_style}</style></head>\n"
        f"<body><header><h1>{_text(heading)}</h1>{above}</header>\n<main>{main}</main></body></html>\n"
    )


def write_page(path: str | Path, heading: str, rows: Sequence[FeatureRow], notes: Iterable[str] = ()) -> None:
    """Write ``html_page`` whole."""
    with atomic_write(path) as beside:
        beside.write_bytes(html_page(heading, rows, notes).encode("utf-8", "replace"))


def _card(row: FeatureRow) -> str:
    facts = [
        ("weight", "" if row.weight is None else f"{row.weight:.4f}"),
        ("density", "" if row.density is None else f"{row.density:.3%} of tokens"),
        ("found", _text("; ".join(row.why))),
        ("raises", " ".join(f"<code>{_text(t)}</code>" for t in row.tokens)),
        ("lowers", " ".join(f"<code>{_text(t)}</code>" for t in row.lowered)),
        ("more", f'<a href="{escape(row.link)}">Neuronpedia</a>' if row.link else ""),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts if value)
    label = f"<p>{_text(row.label)}</p>" if row.label else ""
    largest = max((max(e.activations) for e in row.excerpts), default=0.0)
    excerpts = "".join(_excerpt(excerpt, largest) for excerpt in row.excerpts)
    return (
        f'<article id="f{row.id}"><h2>Feature {row.id}</h2>{label}<dl>{listed}</dl>'
        f"{f'<ol>{excerpts}</ol>' if excerpts else ''}</article>\n"
    )


def _text(text: str) -> str:
    return escape(escape_text(text, keep=""))


def _excerpt(excerpt: Excerpt, largest: float) -> str:
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


def visible(text: str) -> str:
    """Text without line breaks, control or direction characters."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else "·" for c in text)


def _characters(tokens: Sequence[str]) -> Iterable[tuple[int, int]]:
    """(first, end) of runs of tokens that share a character: "" stands with the token after it."""
    first = 0
    for n, text in enumerate(tokens):
        if text or n == len(tokens) - 1:
            yield first, n + 1
            first = n + 1


def print_features(told: dict[str, Any], console: Console) -> None:
    """Print what ``fgsteer features`` has to tell: a table of features, then their excerpts."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(told["heading"]))
    if "raises" in told:
        console.print(Text(f"  raises  {' '.join(told['raises'])}\n  lowers  {' '.join(told['lowers'])}"))
    rows = told["features"]
    if not rows:
        console.print("  no features" + (": this method works on residual means" if "method" in told else ""))
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
