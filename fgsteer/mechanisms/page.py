"""An explanation as one HTML page that stands alone: maps, curves and tables, without a script.

write_explanation(Path("love.html"), found)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from fgsteer.display.pages import SHADES, standalone_page
from fgsteer.evaluation.page_parts import STYLE, card_markup, escaped, facts_markup, table_markup
from fgsteer.mechanisms.circuits import CircuitPoint
from fgsteer.mechanisms.explanation import Explanation
from fgsteer.storage.atomic import atomic_write

FAITHFUL = 0.85
TOP = 12  # edges, and heads whose value vectors are shown
Point = tuple[float, float]
Series = tuple[str, str, Sequence[Point]]  # a name, a class of the style, points

_STYLE = (
    STYLE
    + """
.map td{min-width:2.3rem;text-align:right;border:1px solid var(--card);padding:.15rem .3rem}.map td.s5{font-weight:600}
.map tbody tr>:last-child{border-left:.4rem solid var(--card)}
.chart{display:block;width:100%;max-width:34rem;height:auto;margin:.25rem 0}
.chart text{fill:var(--quiet);font-size:13px}.chart line{stroke:var(--line)}
.chart polyline{fill:none;stroke-width:2}.chart circle{stroke:none}
.own polyline{stroke:var(--link)}.own circle,b.own{fill:var(--link);color:var(--link)}
.second polyline{stroke:#c2571a}.second circle,b.second{fill:#c2571a;color:#c2571a}
.third polyline{stroke:#2f8f5b}.third circle,b.third{fill:#2f8f5b;color:#2f8f5b}
.random polyline{stroke:var(--quiet);stroke-dasharray:4 3}.random circle,b.random{fill:var(--quiet);color:var(--quiet)}
.words :is(td,th):nth-child(n+3){
 white-space:normal;text-align:left;min-width:12rem;overflow-wrap:anywhere;unicode-bidi:isolate}
.words th{white-space:nowrap}
"""
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP_EDGE, BOTTOM = 460, 210, 34, 16, 10, 28  # of a chart, in its own units
APART = 34  # of numbers below a chart, at least


def write_explanation(path: str | Path, found: Explanation) -> None:
    """Write an explanation as a page. Raises FormatError where the file cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_text(explanation_page(found), encoding="utf-8")


def explanation_page(found: Explanation) -> str:
    """The HTML of an explanation."""
    cards = [
        card_markup("In short", _summary(found)),
        card_markup("Heads and MLPs", _map(found)),
        card_markup("Circuits of edges", _circuits(found.edges, "edges"), wide=False),
        card_markup("Circuits of heads", _circuits(found.heads, "heads"), wide=False),
        card_markup("Parts frozen", _freezing(found), wide=False),
        card_markup("Strongest edges", _edges(found), wide=False),
        card_markup("Sparse vectors", _sparsity(found)),
        card_markup("What heads write where they read the vector", _values(found)),
        card_markup("Settings", facts_markup(found.settings)),
    ]
    above = f'<p class="quiet">{escaped(found.settings["vector"])}, times {found.settings["coefficient"]:g}</p>'
    return standalone_page("What carries this vector", above, "\n".join(cards), _STYLE)


def _summary(found: Explanation) -> str:
    """The results in sentences."""
    own, other = found.attribution, found.held_out
    frozen = {row.name: row for row in found.freezing}
    left = " ".join(
        f"With {what} of the unsteered run {frozen[name].faithfulness:.0%} is left."
        for name, what in (("qk", "the attention weights"), ("ov", "the values"), ("mlp", "the MLP outputs"))
        if name in frozen
    )
    lines = [
        f"Steering moves the mean logit difference between the unsteered and the steered next token by "
        f"{own.difference:.3f}, at {sum(own.positions)} positions of {len(own.texts)} texts. The parts add up to it "
        f"with an error of {own.error:.2g}. {_left_out(own.left_out + other.left_out)}",
        f"{left} What is left is a share of the Kullback–Leibler divergence between both runs, on {len(other.texts)} "
        "other texts; below 0, the run is farther from the steered one than the unsteered one is.",
        f"{_least(found.heads, 'heads')} {_least(found.edges, 'edges')}",
    ]
    return "".join(f"<p>{escaped(line)}</p>" for line in lines)


def _left_out(number: int) -> str:
    return f"Left out: {number} texts, in which steering changes no next token." if number else ""


def _least(points: Iterable[CircuitPoint], what: str) -> str:
    """How many edges or heads are enough."""
    for point in sorted(points, key=lambda point: point.size):
        if point.faithfulness >= FAITHFUL:
            random = "" if point.random is None else f", as many random ones {point.random:.0%}"
            return f"{point.size:,} {what} ({point.share:.1%}) keep {point.faithfulness:.0%} of the effect{random}."
    return f"No circuit of {what} that was run keeps {FAITHFUL:.0%} of the effect."


def _map(found: Explanation) -> str:
    """Effects by layer and head, with the MLPs at the right, in per cent of the whole."""
    rows = found.attribution.table()
    if not rows:
        return "<p>No block reads this vector.</p>"
    largest = max(abs(row.share) for row in rows) or 1.0
    shares = {(row.layer, row.head): row.share for row in rows}
    heads = sorted({row.head for row in rows if row.head is not None})
    top = "".join(f'<th scope="col">{name}</th>' for name in ("layer", *heads, "MLP"))
    body = []
    for layer in sorted({row.layer for row in rows}):
        cells = "".join(_cell(shares[layer, head], largest) for head in (*heads, None))
        body.append(f'<tr><th scope="row">{layer}</th>{cells}</tr>')
    return (
        '<p class="legend">The effect of each head, and of the MLP at the right, in per cent of the whole; darker is '
        "more, in either direction. A part's effect holds that of all it acts through, so that they do not add up.</p>"
        '<div class="scroll map" role="region" tabindex="0" aria-label="Effects of heads and MLPs">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(share: float, largest: float) -> str:
    shade = round(SHADES * abs(share) / largest)
    text = f"{100 * share:.1f}".replace("-", "−")
    return f'<td class="s{shade}">{text}</td>' if shade else f"<td>{text}</td>"


def _circuits(points: Sequence[CircuitPoint], what: str) -> str:
    """A curve, and its numbers."""
    drawn = [point for point in points if point.size]
    series: list[Series] = [(f"strongest {what}", "own", [(p.size, p.faithfulness) for p in drawn])]
    if any(point.random is not None for point in drawn):
        series.append((f"random {what}", "random", [(p.size, p.random) for p in drawn if p.random is not None]))
    note = "Heads are kept beside all MLPs." if what == "heads" else ""
    rows = [
        (
            f"{p.size:,}",
            f"{p.share:.1%}",
            f"{p.faithfulness:.2f} [{p.low:.2f}, {p.high:.2f}]",
            f"{p.token_match:.2f}",
            "" if p.random is None else f"{p.random:.2f}",
        )
        for p in points
    ]
    chart = _chart(series, f"faithfulness by number of {what}")
    heads = (what, "share", "faithfulness, 95 %", "same tokens", "random")
    return f'{chart}<p class="legend">{note}</p>{table_markup(f"circuits of {what}", heads, rows)}'


def _freezing(found: Explanation) -> str:
    names = {"qk": "attention weights", "ov": "values", "mlp": "MLPs"}
    rows = [
        (
            ", ".join(names[part] for part in row.name.split(" + ")) if row.name else "nothing",
            f"{row.faithfulness:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{row.token_match:.2f}",
        )
        for row in found.freezing
    ]
    note = '<p class="legend">What is frozen is as in the unsteered run, at every block that reads the vector.</p>'
    return note + table_markup("parts frozen", ("frozen", "faithfulness, 95 %", "same tokens"), rows)


def _edges(found: Explanation) -> str:
    own = found.attribution
    if own.edge_effects is None:
        return ""
    order = own.edge_effects.abs().flatten().argsort(descending=True, stable=True)[:TOP].tolist()
    width = len(own.graph.readers)
    rows = []
    for number in order:
        effect = float(own.edge_effects.flatten()[number])
        node, reader = own.graph.nodes[number // width], own.graph.readers[number % width]
        rows.append((f"{node} → {reader}", f"{effect:.3f}", f"{effect / own.difference:.1%}"))
    return table_markup("strongest edges", ("edge", "effect", "share"), rows)


def _sparsity(found: Explanation) -> str:
    points = found.sparsity
    if not points:
        return "<p>No threshold left an entry.</p>"
    names = (
        ("ratio", "own", "largest share of effect"),
        ("entries", "second", "largest entries"),
        ("effects", "third", "largest effects"),
        ("random", "random", "random"),
    )
    series: list[Series] = [(name, kind, [(p.count, getattr(p, by)) for p in points]) for by, kind, name in names]
    rows = [
        (f"{p.tau:g}", f"{p.count:,}", f"{p.sparsity:.1%}", *(f"{getattr(p, by):.2f}" for by, _, _ in names))
        for p in points
    ]
    heads = ("τ", "entries", "sparsity", *(name for _, _, name in names))
    note = (
        '<p class="legend">Faithfulness of vectors of few entries, scaled to the norm of the whole one, by how the '
        "entries were chosen.</p>"
    )
    return f"{note}{_chart(series, 'faithfulness by number of entries')}{table_markup('sparse vectors', heads, rows)}"


def _values(found: Explanation) -> str:
    """Value vectors of each layer, and of the heads of largest effect."""
    strongest = [(row.layer, row.head) for row in found.attribution.table() if row.head is not None][:TOP]
    by_place = {(row.layer, row.head): row for row in found.values}
    rows = [by_place[place] for place in strongest] + [row for row in found.values if row.head is None]
    cells = [(row.name, f"{float(row.vector.norm()):.3g}", " ".join(row.raises), " ".join(row.lowers)) for row in rows]
    note = (
        '<p class="legend">The heads of largest effect, then each layer as a whole: what they write to the stream '
        "where they attend to steered tokens, read through the final norm and the unembedding.</p>"
    )
    return (
        f'{note}<div class="words">{table_markup("value vectors", ("heads", "norm", "raises", "lowers"), cells)}</div>'
    )


def _chart(series: Sequence[Series], label: str) -> str:
    """A chart of curves over a number on a logarithmic scale, from 0 to 1, or from what is lower."""
    points = [point for _, _, own in series for point in own]
    if not points:
        return ""
    left, right = (math.log10(bound(x for x, _ in points)) for bound in (min, max))
    low, high = min(0.0, *(max(y, -1.0) for _, y in points)), max(1.0, *(min(y, 1.5) for _, y in points))

    def place(x: float, y: float) -> str:
        across = (math.log10(x) - left) / ((right - left) or 1.0)
        up = (min(max(y, low), high) - low) / (high - low)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP_EDGE):.1f}"

    parts = []
    for y in (low, 0.0, 0.5, 1.0) if low < -0.2 else (0.0, 0.5, 1.0):
        across = place(10**left, y).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{across}" y2="{across}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{across}" dy="3.5" text-anchor="end">{y:.1f}</text>')
    last = float("-inf")
    for x in sorted({x for _, _, own in series for x, _ in own}):
        along = float(place(x, low).split(",")[0])
        if along - last >= APART:
            parts.append(f'<text x="{along}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_short(x)}</text>')
            last = along
    for _, kind, own in series:
        drawn = [place(x, y) for x, y in own]
        dots = "".join('<circle cx="{}" cy="{}" r="2.5"/>'.format(*dot.split(",")) for dot in drawn)
        parts.append(f'<g class="{kind}"><polyline points="{" ".join(drawn)}"/>{dots}</g>')
    legend = " ".join(f'<b class="{kind}">●</b> {escaped(name)}' for name, kind, _ in series)
    return (
        f'<p class="legend">{legend}</p><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escaped(label)}">{"".join(parts)}</svg>'
    )


def _short(number: float) -> str:
    """A number in few characters."""
    return f"{number:g}" if number < 1000 else f"{number / 1000:.3g}k"
