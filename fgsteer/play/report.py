"""Reports: a whole comparison as one HTML page that stands alone, without a script.

report_page(report)         the page of what ``write`` made
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fgsteer.display.pages import SHADES, standalone_page
from fgsteer.evaluation.page_parts import STYLE, card_markup, escaped, facts_markup, table_markup
from fgsteer.play.plan import ContrastItem, EditItem, FeatureItem, Item, VectorItem
from fgsteer.play.turns import Event
from fgsteer.play.writing import Written

NAMES = {"steered": "Steered", "unsteered": "Unsteered", "random": "Random direction of equal norm"}
MOST_SHADED_NATS = 4.0
"""Nats of divergence at which a token has the darkest shade."""
_STYLE = STYLE + (
    ".text{white-space:pre-wrap;line-height:1.8;unicode-bidi:isolate}"
    ".text span{border-radius:.15rem;white-space:pre-wrap}.text .special{color:var(--quiet);font-size:.8em}"
)


@dataclass
class Report:
    """What a run of the page made.

    Args:
        written: The plan and its texts.
        model_name: The model.
        cost: What everything that steers costs neutral text, and each item's dose.
        tokens: The events of the texts' tokens, by column and seed.
        movement: The event of the features that moved.
        scores: {"coherence" or "behavior": {column: a score for each seed}}.
        code: Code that writes the texts again, by language.
    """

    written: Written
    model_name: str
    cost: dict[str, Any] = field(default_factory=dict)
    tokens: dict[tuple[str, int], Event] = field(default_factory=dict)
    movement: Event = field(default_factory=dict)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Keep what an event of ``read_texts`` says."""
        if event["event"] == "tokens":
            self.tokens[event["column"], event["seed"]] = event
        elif event["event"] == "features":
            self.movement = event


def report_page(report: Report) -> str:
    """The HTML of a report; every text in it is escaped."""
    plan = report.written.plan
    facts = {
        "model": report.model_name,
        "prompt": plan.prompt,
        "as": "a message in a chat" if plan.chat else "a text to continue",
        "sampling": f"temperature {plan.temperature:g}, {plan.max_new_tokens} tokens",
    }
    if "cost" in report.cost:
        facts["cost"] = f"{report.cost['cost']:.3f} nats a token of neutral text"
    parts = [card_markup("What was asked for", facts_markup(facts)), card_markup("What steers", _items(report))]
    for seed in plan.seeds:
        texts = "".join(
            f"<h3>{escaped(name)}</h3>{_text(report, column, seed)}"
            for column, name in NAMES.items()
            if (column, seed) in report.written.texts
        )
        parts.append(card_markup(f"Seed {seed}", texts))
    parts.append(card_markup("Features that rose and fell", _movement(report.movement)))
    parts.append(card_markup("Scores", _scores(report)))
    code = "".join(
        f"<h3>{escaped(name)}</h3><pre>{escaped(text, lines=True)}</pre>" for name, text in report.code.items()
    )
    parts.append(card_markup("The same by code", code))
    above = (
        f'<p class="quiet">Shades show how far steering moved each token\'s distribution, KL(steered‖unsteered), up to '
        f"{MOST_SHADED_NATS:g} nats; hover over a token for its value.</p>"
    )
    return standalone_page("Steering compared", above, "".join(parts), _STYLE)


def describe_item(item: Item) -> str:
    """An item in a few words."""
    if isinstance(item, EditItem):
        amount = "" if item.edit == "off" else f" {item.amount:g}"
        return f"feature {item.feature} of {item.sae}: {item.edit.replace('_', ' ')}{amount}"
    if isinstance(item, FeatureItem):
        return f"feature {item.feature} of {item.sae}"
    if isinstance(item, VectorItem):
        return f"vector {item.name}"
    if isinstance(item, ContrastItem):
        sizes = f"{len(item.positives)} against {len(item.negatives)} texts"
        return f"{item.method} of {sizes} at {item.sae if item.layer is None else f'layer {item.layer}'}"
    return type(item).__name__


def _items(report: Report) -> str:
    plan = report.written.plan
    if not plan.active:
        return "<p>Nothing.</p>"
    doses = report.cost.get("doses") or [None] * len(plan.active)
    rows = []
    for item, dose in zip(plan.active, doses, strict=True):
        gate = ""
        if item.gate is not None:
            sign = "not above" if item.gate.inverted else "above"
            gate = f"feature {item.gate.feature} of {item.gate.sae} {sign} {item.gate.above:g} {item.gate.pooling}"
        operation = "edit" if isinstance(item, EditItem) else item.op
        size = "" if dose is None else f"{dose:.3f} ‖h‖"
        rows.append((describe_item(item), operation, f"{item.amount:g}", size, str(item.scope_in(plan.chat)), gate))
    return table_markup("what steers", ["", "operation", "amount", "dose", "scope", "gate"], rows)


def _text(report: Report, column: str, seed: int) -> str:
    event = report.tokens.get((column, seed))
    if event is None:
        text = report.written.texts[column, seed]  # type: ignore[index]
        return f'<p class="text">{escaped(text, lines=True)}</p>'
    spans = []
    for token in event["tokens"]:
        kl = token["kl"] or 0.0
        shade = min(SHADES, math.ceil(SHADES * kl / MOST_SHADED_NATS)) if kl > 0.05 else 0
        classes = " ".join([*([f"s{shade}"] if shade else []), *(["special"] if token["special"] else [])])
        shown = escaped(token["text"], lines=True)
        spans.append(f'<span class="{classes}" title="{kl:.2f} nats">{shown}</span>' if classes else shown)
    figures = [
        f"{label} {event[name]:{form}}"
        for name, label, form in (
            ("kl", "KL of the whole text, in nats:", ".2f"),
            ("surprise", "nats a token under the unsteered model:", ".2f"),
            ("distinct", "share of distinct trigrams:", ".0%"),
        )
        if event.get(name) is not None
    ]
    return f'<p class="text">{"".join(spans)}</p><p class="quiet">{escaped("; ".join(figures))}</p>'


def _movement(event: Event) -> str:
    if not event.get("rows"):
        return ""
    with_error = any(row["error"] is not None for row in event["rows"])
    heads = ["feature", "observed", *(["standard error"] if with_error else []), "predicted"]
    rows = []
    for row in event["rows"]:
        cells = [f"{row['feature']} {row['label']}", f"{row['observed']:+.3f}"]
        cells += [f"{row['error']:.3f}"] if with_error else []
        rows.append([*cells, "" if row["predicted"] is None else f"{row['predicted']:+.3f}"])
    note = event["why"]
    if event["correlation"] is not None:
        note = f"Predicted and observed correlate at {event['correlation']:.2f} over {event['fires']} features."
    return table_markup("features", heads, rows) + (f'<p class="quiet">{escaped(note)}</p>' if note else "")


def _scores(report: Report) -> str:
    rows = [
        [f"{name}, {NAMES[column].lower()}", *(f"{value:.2f}" for value in values)]
        for name, by_column in report.scores.items()
        for column, values in by_column.items()
    ]
    return table_markup("scores", ["", *(f"seed {seed}" for seed in report.written.plan.seeds)], rows) if rows else ""
