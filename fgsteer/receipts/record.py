"""The receipt of a vector at a strength: what was measured, as plain JSON and in words.

slip.save("receipt.json")
fg.load_receipt("receipt.json").facts()["relative dose"]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fgsteer.display.tables import Cell, facts_html
from fgsteer.errors import FormatError
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.receipts.dose import Dose
from fgsteer.receipts.drift import Drift
from fgsteer.receipts.refusals import Refusals
from fgsteer.receipts.rerouting import Rerouting
from fgsteer.receipts.retention import Change, Retention
from fgsteer.storage.json_files import read_json, write_json
from fgsteer.storage.json_values import value_of
from fgsteer.vector import SteeringVector

PROVENANCE = "receipt"  # the key under which a vector's provenance holds one
PARTS = ("dose", "own_text", "wrong_way", "retention", "refusals", "drift", "rerouting")
MAX_CHARACTERS = 200  # of a reason


@dataclass(frozen=True, repr=False)
class OwnText(OneLineRepr):
    """What the steered model's own texts cost; see ``own_text_kl``.

    Args:
        kl: Nats a text.
        distinct: The share of different 3-grams.
        max_new_tokens: The most tokens of a text.
    """

    kl: Interval
    distinct: Interval
    max_new_tokens: int


@dataclass(frozen=True, repr=False)
class Receipt:
    """What a vector at a strength does besides what it is for.

    Args:
        method: How the vector was made.
        hookpoint: Where it acts.
        norm: Its norm.
        intervention: The kind of intervention, such as "Add".
        scope: The tokens that it acts on.
        coefficient: Its coefficient.
        dose: How large the change is beside the activations.
        own_text: What the steered model's own texts cost.
        wrong_way: The share of inputs that move the wrong way.
        retention: Perplexity of plain text, questions with one right answer, tasks.
        refusals: Over- and under-refusal.
        drift: Where conversations go on the vector's axis.
        rerouting: How much the vector can move attention.
        left_out: Why parts are not there, by name.
    """

    method: str
    hookpoint: str
    norm: float
    intervention: str
    scope: str
    coefficient: float
    dose: Dose | None = None
    own_text: OwnText | None = None
    wrong_way: Interval | None = None
    retention: Retention | None = None
    refusals: Refusals | None = None
    drift: Drift | None = None
    rerouting: Rerouting | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        shown = [f"{escape_text(self.method, keep='')} at {self.hookpoint}, coefficient {self.coefficient:g}"]
        shown += [f"dose {self.dose.relative:.3g}"] if self.dose else []
        shown += [f"own text {self.own_text.kl.mean:.3g} nats"] if self.own_text else []
        shown += [f"wrong way {self.wrong_way.mean:.0%}"] if self.wrong_way else []
        shown += [f"cross-entropy {self.retention.cross_entropy.difference.mean:+.3g}"] if self.retention else []
        return f"Receipt({', '.join(shown)})"

    def _repr_html_(self) -> str:
        facts: dict[str, Cell] = dict(self.facts())
        return facts_html("Receipt", facts)

    def as_dict(self) -> dict[str, Any]:
        """The receipt as plain JSON; parts that were left out are null."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the receipt as a JSON file. Raises FormatError where it cannot be written."""
        write_json(path, self.as_dict())

    def stored_in(self, vector: SteeringVector) -> SteeringVector:
        """The vector with this receipt in its provenance, where its file and its model card have it."""
        return replace(vector, provenance={**vector.provenance, PROVENANCE: self.as_dict()})

    def facts(self) -> dict[str, str]:
        """What was measured in words, by name; what was left out, with its reason, last."""
        facts = {
            "vector": f"{self.method} at {self.hookpoint}, norm {self.norm:.4g}",
            "steering": f"{self.intervention}, coefficient {self.coefficient:g}, scope {self.scope}",
            **dict(self._measured()),
        }
        names = {"wrong_way": "wrong way", "own_text": "own-text KL"}
        return facts | {f"{names.get(k, k)} (left out)": reason for k, reason in self.left_out.items()}

    def _measured(self) -> Iterator[tuple[str, str]]:
        if dose := self.dose:
            yield (
                "relative dose",
                f"{dose.relative:.3f} of the activations' mean norm, {dose.mean_norm:.4g} over the last {dose.last} of "
                f"{dose.context} tokens; zone by hidden-directions: {dose.zone}",
            )
        if own := self.own_text:
            yield (
                "own-text KL",
                f"{shown(own.kl)} nats a text of at most {own.max_new_tokens} tokens; distinct 3-grams "
                f"{shown(own.distinct)}",
            )
        if wrong := self.wrong_way:
            yield "wrong way", f"{shown(wrong)} of {wrong.units} inputs move away from the behavior"
        if kept := self.retention:
            before, after = kept.perplexity
            rise = shown(kept.cross_entropy.difference, sign=True)
            yield "plain text", f"perplexity {before:.1f} → {after:.1f}; cross-entropy {rise} nats a token"
            yield "questions", f"{described(kept.choices)} answered rightly, of {kept.choices.unsteered.units}"
            for task, (unsteered, steered) in kept.tasks.items():
                yield task, f"{unsteered:.3f} → {steered:.3f}"
        if refusals := self.refusals:
            yield "over-refusal", f"{described(refusals.over)} of {refusals.over.unsteered.units} harmless requests"
            yield "under-refusal", f"{described(refusals.under)} of {refusals.under.unsteered.units} harmful requests"
        if drift := self.drift:
            yield (
                "drift",
                f"{shown(drift.steered, sign=True)} along the vector a turn; unsteered "
                f"{shown(drift.unsteered, sign=True)}",
            )
        if risk := self.rerouting:
            yield (
                "rerouting",
                f"{risk.relative:.2f} times what queries of any direction move, {risk.top_relative:.2f} in the "
                f"{len(risk.top)} heads of the largest risk of {risk.heads}",
            )


def shown(value: Interval, sign: bool = False) -> str:
    """A mean with its interval."""
    middle, low, high = (f"{number:{'+' if sign else ''}.3f}" for number in value)
    return f"{middle} [{low}, {high}]"


def described(change: Change) -> str:
    """A measure without and with steering."""
    difference = shown(change.difference, sign=True)
    return f"{change.unsteered.mean:.3f} → {change.steered.mean:.3f}, {difference}"


def load_receipt(path: str | Path) -> Receipt:
    """Load a receipt that ``Receipt.save`` wrote.

    Raises:
        FormatError: The file cannot be read, or is no receipt.
    """
    try:
        return parse_receipt(read_json(path))
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path} is no receipt. {error}", "a file that Receipt.save wrote") from error


def parse_receipt(value: Any) -> Receipt:
    """The receipt of its plain JSON. Raises TypeError, ValueError for anything else."""
    receipt: Receipt = value_of(Receipt, value, "receipt")
    return receipt
