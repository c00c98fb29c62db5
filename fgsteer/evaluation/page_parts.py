"""The parts of an HTML page of results: cards, tables, lists of facts, and pictures in the page's own colors.

standalone_page("Results", "", card_markup("Costs", table_markup("costs", ["layer", "nats"], [("1", "0.5")])), STYLE)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fgsteer.display.pages import LIGHT, visible
from fgsteer.evaluation.drawing import Picture, rendered

STYLE = """
.wide{grid-column:1/-1}article>h2{margin-bottom:.5rem}article>h3{font-size:.95rem;margin:.75rem 0 .25rem}
.scroll{overflow-x:auto;overflow-wrap:normal;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .45rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
th{font-weight:600}thead th{white-space:normal;border-top:0;color:var(--quiet);font-weight:400;vertical-align:bottom}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);
 white-space:normal;min-width:6.5rem;max-width:12rem;overflow-wrap:anywhere}
figure{margin:0}figure svg{display:block;width:100%;height:auto;max-width:30rem}
figcaption{font-size:.9rem;color:var(--quiet)}
pre{white-space:pre-wrap;background:var(--page);border-radius:.3rem;padding:.5rem;margin:.25rem 0;font-size:.85rem}
blockquote{margin:.1rem 0 .6rem;padding-left:.6rem;border-left:.2rem solid var(--line);
 white-space:pre-wrap;unicode-bidi:isolate}
.seen{display:flex;flex-wrap:wrap;gap:.3rem;list-style:none;margin:-.3rem 0 .8rem;padding:0;font-size:.8rem}
.seen li{display:block;background:var(--page);border:0;border-radius:.3rem;padding:.1rem .4rem;unicode-bidi:isolate}
.legend{font-size:.85rem;margin:.25rem 0 .5rem}
summary{cursor:pointer;color:var(--link)}dl{grid-template-columns:fit-content(8rem) 1fr}
@media print{article{break-inside:auto}figure,tr{break-inside:avoid}}
"""

_THEMED = {color: f"var(--{name})" for name, color in LIGHT.items() if name in ("text", "quiet", "line", "card")}


def figure_markup(picture: Picture, prefix: str) -> str:
    """The picture inline, with ids of its own, and with the page's colors for text and background."""
    svg = rendered(picture.figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for color, themed in _THEMED.items():
        svg = svg.replace(color, themed)
    caption = escaped(picture.caption)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def card_markup(heading: str, content: str, wide: bool = True) -> str:
    """A card with a heading; nothing without content."""
    title = f"<h2>{escaped(heading)}</h2>" if heading else ""
    opened = '<article class="wide">' if wide else "<article>"
    return f"{opened}{title}{content}</article>" if content else ""


def table_markup(label: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls by itself; the first cell of a row names it."""
    top = "".join(f'<th scope="col">{escaped(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in others)}</tr>'
        for first, *others in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(label)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts_markup(values: Mapping[str, Any]) -> str:
    """A list of names and values."""
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
    return f"<dl>{''.join(f'<dt>{escaped(key)}</dt><dd>{escaped(text)}</dd>' for key, text in texts.items())}</dl>"


def escaped(value: object, lines: bool = False) -> str:
    """Escaped text without characters that move or hide what stands beside it; line breaks are kept or made visible."""
    parts = str(value).split("\n") if lines else [str(value)]
    return "\n".join(escape(visible(part)) for part in parts)
