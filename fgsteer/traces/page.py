"""A trace as one HTML page that stands alone, without a script: tokens in colours, and a table under each of them.

What the colours show is chosen by radio buttons, which the style sheet reads; the table of a token appears while the
pointer or the keyboard is on it.

trace_page(found)                                                the text of the file
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

from fgsteer.display.pages import SHADES, standalone_page, visible
from fgsteer.errors.wording import count
from fgsteer.evaluation.page_parts import STYLE, card_markup, escaped, facts_markup, table_markup
from fgsteer.traces.parts import NextToken, TracedFeature, TracedIntervention, TracedText, TracedToken

MOST_VIEWS = 16  # of features that colours can show; all are in the tables
UNKNOWN = "–"
SIGN = {"steered": "what the steered model wrote", "unsteered": "what the unsteered model wrote", "given": "as given"}

_STYLE = (
    STYLE
    + """
.views{display:flex;flex-wrap:wrap;gap:.35rem .5rem;margin:.5rem 0 0;padding:0;border:0;font-size:.9rem}
.views legend{color:var(--quiet);padding:0;margin-bottom:.25rem}
.views label{border:1px solid var(--line);border-radius:1rem;padding:.1rem .6rem;cursor:pointer;background:var(--card)}
.views input{position:absolute;opacity:0;width:1px;height:1px}
.views label:has(:checked){border-color:var(--link);color:var(--link);font-weight:600}
.views label:has(:focus-visible){outline:2px solid var(--link);outline-offset:1px}
.text{line-height:2;margin:.5rem 0;unicode-bidi:isolate}
.t{white-space:pre-wrap;border-radius:.15rem;padding:.1rem 0;outline-offset:1px;unicode-bidi:isolate}
.t:hover,.t:focus{outline:2px solid var(--link)}
.t.new{border-bottom:2px solid var(--line)}.t.special{color:var(--quiet);font-size:.8em}
.tip{display:none;position:fixed;right:1rem;bottom:1rem;z-index:2;max-width:min(32rem,calc(100vw - 2rem));
 max-height:75vh;overflow:auto;padding:.6rem .8rem;background:var(--card);border:1px solid var(--line);
 border-radius:.5rem;box-shadow:0 .2rem 1rem #0005;font-size:.85rem;line-height:1.4;white-space:normal;
 color:var(--text)}
.t:hover>.tip,.t:focus>.tip{display:block}.text:has(.t:hover) .t:focus:not(:hover)>.tip{display:none}
.tip table{font-size:.8rem;margin:.3rem 0}.tip th:first-child{background:none;position:static;max-width:14rem}
.tip b{font-size:.95rem}main{padding-bottom:2rem}
body:has(#view-gate:checked) .g1{background:var(--s4)}body:has(#view-gate:checked) .g0{background:var(--line)}
@media (max-width:40rem){.tip{left:.5rem;right:.5rem;bottom:.5rem;max-width:none;max-height:45vh}
 main{padding-bottom:46vh}}
@media print{.tip,.views{display:none!important}}
"""
)


class TraceParts(Protocol):
    """What a page shows, as ``Trace`` has it."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts."""

    @property
    def texts(self) -> tuple[TracedText, ...]:
        """Each prompt with its completions."""

    @property
    def interventions(self) -> tuple[TracedIntervention, ...]:
        """What steered."""

    @property
    def features(self) -> tuple[TracedFeature, ...]:
        """The features whose activations the tokens hold."""

    @property
    def hookpoint(self) -> str:
        """Where the features are read."""

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for."""


@dataclass(frozen=True)
class _View:
    """What colours can show: a number of each token, on one scale for all texts."""

    name: str
    label: str
    value: Callable[[TracedToken], float]
    unit: str = ""


def trace_page(found: TraceParts) -> str:
    """The HTML of a trace."""
    views = _views(found)
    scales = {view.name: _scale(view, found) for view in views}
    rules = "".join(
        f"body:has(#view-{view.name}:checked) .{view.name}-{shade}{{background:var(--s{shade})}}"
        for view in views
        for shade in range(1, SHADES + 1)
    )
    cards = [card_markup("Colours", _choices(found, views, scales))]
    for number, prompt in enumerate(found.prompts):
        of_prompt = [text for text in found.texts if text.prompt == number]
        content = "".join(_text(found, text, views, scales) for text in of_prompt)
        cards.append(card_markup(f"Prompt {number + 1}: {_short(prompt, 80)}", content))
    cards += [
        card_markup("Features", _features(found)),
        card_markup("What steered", _interventions(found)),
        card_markup("Settings", facts_markup(found.settings)),
    ]
    above = (
        '<p class="quiet">Before is the unsteered model, after the steered one, on the same tokens. Point at a token, '
        "or move to it with the Tab key, to see what each of them expected there.</p>"
    )
    return standalone_page("What steering did", above, "\n".join(cards), _STYLE + rules)


def _views(found: TraceParts) -> list[_View]:
    tokens = [token for text in found.texts for token in text.tokens]
    views = [
        _View("kl", "KL(steered‖unsteered)", lambda token: _known(token.kl_steered_unsteered), "nats"),
        _View("likelier", "made likelier", lambda token: token.log_ratio, "nats"),
        _View("dose", "dose", lambda token: token.dose, "‖h′ − h‖/‖h‖"),
    ]
    views = [view for view in views if any(math.isfinite(view.value(token)) for token in tokens)]

    def of_feature(place: int) -> Callable[[TracedToken], float]:
        return lambda token: token.features_after[place]

    for place, feature in enumerate(found.features[:MOST_VIEWS]):
        label = f"{feature.id} {_short(feature.label, 24)}".strip()
        views.append(_View(f"f{place}", label, of_feature(place), "activation after steering"))
    return views


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _scale(view: _View, found: TraceParts) -> float:
    """The number that gets the strongest colour: the largest of tokens that are not special, which can be far off."""
    numbers = (view.value(token) for text in found.texts for token in text.tokens if token.kind != "special")
    return max((number for number in numbers if math.isfinite(number)), default=0.0)


def _shade(number: float, largest: float) -> int:
    """The step of the scale, 0 for none."""
    if not number > 0 or not largest > 0:
        return 0
    return SHADES if number >= largest else 1 + int(SHADES * number / largest)


def _choices(found: TraceParts, views: Sequence[_View], scales: dict[str, float]) -> str:
    """The radio buttons, and what the strongest colour of each means."""
    gated = any(item.gate for item in found.interventions)
    names = [(view.name, view.label) for view in views]
    if any(token.actions for text in found.texts for token in text.tokens):
        before_features = len(names) - len(found.features[:MOST_VIEWS])
        names.insert(before_features, ("gate", "gate" if gated else "where it acts"))
    buttons = "".join(
        f'<label><input type="radio" name="view" id="view-{name}"{" checked" if not place else ""}>'
        f"{escaped(label)}</label>"
        for place, (name, label) in enumerate(names)
    )
    rows = [(view.label, f"{scales[view.name]:.3g} {view.unit}") for view in views]
    legend = (
        '<p class="legend">From none to the strongest: '
        + "".join(f'<span class="scale"><span class="s{n}">{n}</span></span>' for n in range(1, SHADES + 1))
        + " in five equal steps. Tokens of the completion are underlined. "
        "For the gate, coloured tokens are those at which an intervention acted, grey ones those at which a gate was "
        "shut.</p>"
    )
    table = table_markup("strongest colours", ("colour", "strongest at"), rows)
    return (
        f'<fieldset class="views"><legend>What colours show</legend>{buttons}</fieldset>{legend}'
        f"<details><summary>What the strongest colour means</summary>{table}</details>"
    )


def _text(found: TraceParts, text: TracedText, views: Sequence[_View], scales: dict[str, float]) -> str:
    tokens = "".join(
        _token(found, token, place >= text.prompt_tokens, views, scales) for place, token in enumerate(text.tokens)
    )
    cells = text.cells()
    whole = {
        "KL(steered‖unsteered) in all": text.kl_steered_unsteered,
        "log p after − log p before in all": text.log_ratio,
        "mean log-probability before": cells["log-probability before"],
        "and after": cells["log-probability after"],
        "mean dose": text.mean_dose,
    }
    known = [f"{name} {shown}" for name, value in whole.items() if (shown := _number(value)) != UNKNOWN]
    summary = ", ".join([count(len(text.written), "token"), *known])
    return (
        f'<h3>{escaped(SIGN[text.source].capitalize())}</h3><p class="legend">{escaped(summary)}</p>'
        f'<div class="text">{tokens}</div>'
    )


def _token(found: TraceParts, token: TracedToken, new: bool, views: Sequence[_View], scales: dict[str, float]) -> str:
    classes = ["t", *(["new"] if new else []), *(["special"] if token.kind == "special" else [])]
    classes += [f"{v.name}-{shade}" for v in views if (shade := _shade(v.value(token), scales[v.name]))]
    if any(action.acts for action in token.actions):
        classes.append("g1")
    elif any(action.gate is False for action in token.actions):
        classes.append("g0")
    shown = escaped(token.text) or "∅"
    line = "<br>" if "\n" in token.text else ""
    return (
        f'<span class="{" ".join(classes)}" tabindex="0">{shown}<span class="tip" role="tooltip">'
        f"{_tip(found, token)}</span></span>{line}"
    )


def _tip(found: TraceParts, token: TracedToken) -> str:
    """The tables under a token."""
    lines = [f"<b>“{escaped(token.text)}”</b> {escaped(f'id {token.id}, {token.kind}')}"]
    if token.log_probability_before is not None:
        rows = [
            ("log-probability", _number(token.log_probability_before), _number(token.log_probability_after)),
            *_ranks(token.top_before, token.top_after),
        ]
        if token.kl_steered_unsteered is not None:
            lines.append(
                f"KL(steered‖unsteered) {_number(token.kl_steered_unsteered)}, "
                f"KL(unsteered‖steered) {_number(token.kl_unsteered_steered)} nats"
            )
        lines.append(_plain_table(("in its place", "before", "after"), rows))
    if math.isfinite(token.dose):
        lines.append(f"dose {_number(token.dose)}")
    acts = [
        (
            f"{number}. {item.kind} at {item.hookpoint}",
            "open" if action.gate else "" if action.gate is None else "shut",
            _number(action.strength) if action.acts else "–",
            _number(action.dose),
        )
        for number, (item, action) in enumerate(zip(found.interventions, token.actions, strict=False), 1)
    ]
    if acts:
        lines.append(_plain_table(("what steered", "gate", "strength", "dose"), acts))
    features = [
        (f"{feature.id} {_short(feature.label, 30)}", _number(before), _number(after))
        for feature, before, after in zip(found.features, token.features_before, token.features_after, strict=True)
        if before or after
    ]
    if features:
        lines.append(_plain_table(("feature", "before", "after"), features))
    return "<br>".join(lines)


def _ranks(before: Sequence[NextToken], after: Sequence[NextToken]) -> Iterable[tuple[str, str, str]]:
    """The likeliest tokens of both models by rank, with their probabilities."""
    for rank, (old, new) in enumerate(zip_longest(before, after), 1):
        yield f"likeliest {rank}", _likely(old), _likely(new)


def _likely(token: NextToken | None) -> str:
    if token is None or not token.log_probability <= 1e-3:  # rounding may leave a little above 0
        return UNKNOWN
    return f"“{token.text}” {math.exp(token.log_probability):.1%}"


def _plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escaped(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><th>{escaped(first)}</th>{''.join(f'<td>{escaped(cell)}</td>' for cell in others)}</tr>"
        for first, *others in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _features(found: TraceParts) -> str:
    if not found.features:
        return ""
    note = f'<p class="legend">Means over all tokens that are not special, at {escaped(found.hookpoint)}.</p>'
    rows = [
        (
            f"{f.id} {f.label}".strip(),
            _number(f.mean_before),
            _number(f.mean_after),
            f"{f.mean_after - f.mean_before:+.3g}",
        )
        for f in found.features
    ]
    return note + table_markup("features", ("feature", "before", "after", "change"), rows)


def _interventions(found: TraceParts) -> str:
    if not found.interventions:
        return "<p>Nothing.</p>"
    rows = [
        (f"{number}. {item.kind}", item.hookpoint, item.scope, item.gate or "none", _short(item.description, 160))
        for number, item in enumerate(found.interventions, 1)
    ]
    return table_markup("interventions", ("intervention", "hookpoint", "scope", "gate", "in full"), rows)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else UNKNOWN


def _short(text: str, most: int) -> str:
    """A text in at most so many characters, without line breaks."""
    flat = visible(text)
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"
