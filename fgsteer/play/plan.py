"""Plans: everything that is set on the page, as frozen values that are checked when JSON becomes them.

plan = parse_plan({"prompt": "I think", "items": [{"kind": "feature", "sae": "layer_2", "feature": 5, "amount": 90}]})
plan.as_json()                 what the share file holds; parse_plan makes the same plan of it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from fgsteer.data.chat import Text
from fgsteer.errors import DataError, FgsteerError
from fgsteer.errors.checks import describe_value, is_whole_number
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.table import OPERATIONS, intervention_spec
from fgsteer.interventions.token_scopes import parse_scope

MAX_ITEMS = 16
MAX_SEEDS = 8
MAX_NEW_TOKENS = 512
MAX_TEXT_CHARS = 8_000
MAX_CONTRAST_TEXTS = 64
MAX_NAME_CHARS = 64
MAX_TEMPERATURE = 5.0
EDITS = ("off", "set", "at_least", "at_most", "plus", "times")
CONTRAST_METHODS = ("fgaa", "caa", "sta", "ace")
POOLINGS = ("", "last", "mean", "max")
AUTOMATIC = "auto"
"""The scope that is "reply" in a chat, whose question is then read as it is, and otherwise "all"."""


@dataclass(frozen=True)
class GateSetting:
    """When something steers: while a feature's activation is above a threshold, or is not.

    Args:
        sae: The key of the SAE.
        feature: The feature that is read.
        above: The threshold.
        pooling: "" decides for each token; "last", "mean" or "max" decide once, by the prompt.
        inverted: Whether it steers where the feature is not above the threshold.
    """

    sae: str
    feature: int
    above: float = 0.0
    pooling: Literal["", "last", "mean", "max"] = ""
    inverted: bool = False

    def __post_init__(self) -> None:
        _check_name("a gate's sae", self.sae)
        _check_feature("a gate's feature", self.feature)
        _check_finite("a gate's threshold", self.above)
        _check_choice("a gate's pooling", self.pooling, POOLINGS)
        _check_flag("inverted", self.inverted)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that steers.

    Args:
        amount: Its strength: what ``InterventionSpec.make`` takes, or the number of an edit.
        op: What a vector does, a name of the table of interventions.
        scope: The tokens that are steered, or "auto".
        gate: When it steers; None for always.
        on: Whether it steers at all; what is off stays on the page.
    """

    amount: float = 0.0
    op: str = "add"
    scope: str = AUTOMATIC
    gate: GateSetting | None = None
    on: bool = True

    def __post_init__(self) -> None:
        _check_finite("amount", self.amount)
        _check_choice("op", self.op, OPERATIONS)
        _check_flag("on", self.on)
        if self.scope != AUTOMATIC:
            parse_scope(self.scope)

    def scope_in(self, chat: bool) -> Scope:
        """The scope, with "auto" decided."""
        return parse_scope(("reply" if chat else "all") if self.scope == AUTOMATIC else self.scope)


@dataclass(frozen=True, kw_only=True)
class FeatureItem(Item):
    """The decoder row of one feature, at norm 1."""

    sae: str
    feature: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("sae", self.sae)
        _check_feature("feature", self.feature)


@dataclass(frozen=True, kw_only=True)
class EditItem(FeatureItem):
    """A change of one feature's activation: off, set, at least, at most, plus, times."""

    edit: str = "off"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("edit", self.edit, EDITS)


@dataclass(frozen=True, kw_only=True)
class VectorItem(Item):
    """A vector that was loaded or saved, by its name."""

    name: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("name", self.name)


@dataclass(frozen=True, kw_only=True)
class ContrastItem(Item):
    """A vector that is built of two lists of texts.

    Args:
        method: One of ``CONTRAST_METHODS``.
        sae: The key of the SAE whose features FGAA and STA choose, and at whose layer all steer without ``layer``.
        positives: Texts with the behavior.
        negatives: Texts without it.
        layer: The layer of CAA and ACE, which need no SAE.
    """

    method: str
    sae: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("method", self.method, CONTRAST_METHODS)
        _check_name("sae", self.sae)
        for name in ("positives", "negatives"):
            texts = getattr(self, name)
            if not isinstance(texts, list | tuple) or not 0 < len(texts) <= MAX_CONTRAST_TEXTS:
                raise DataError(
                    describe_value(texts), f"1 to {MAX_CONTRAST_TEXTS} texts as {name}", "write one text a line"
                )
            object.__setattr__(self, name, tuple(_checked_text(name, text) for text in texts))
        if self.layer is not None:
            _check_whole("layer", self.layer, 0, 10_000)
            if self.method not in ("caa", "ace"):
                raise DataError(f"a layer for {self.method}", "no layer", "its layer is that of its SAE")


KINDS: dict[str, type[Item]] = {
    "feature": FeatureItem,
    "edit": EditItem,
    "vector": VectorItem,
    "contrast": ContrastItem,
}


@dataclass(frozen=True)
class Plan:
    """Everything that is set on the page.

    Args:
        prompt: The text to continue, or the message to answer.
        items: What steers, in the order in which it acts.
        chat: Whether the prompt is a user's message.
        system: The system message of a chat.
        max_new_tokens: How many tokens are written.
        temperature: 0 takes the most probable token.
        seeds: A text is written for each.
        control: Whether a text is written under random directions of the same norms too.
        control_seed: The seed of these directions.
    """

    prompt: str = ""
    items: tuple[Item, ...] = ()
    chat: bool = False
    system: str = ""
    max_new_tokens: int = 48
    temperature: float = 0.0
    seeds: tuple[int, ...] = (0,)
    control: bool = False
    control_seed: int = 0

    def __post_init__(self) -> None:
        _checked_text("prompt", self.prompt)
        _checked_text("system", self.system)
        _check_flag("chat", self.chat)
        _check_flag("control", self.control)
        _check_whole("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        _check_whole("control_seed", self.control_seed, 0, 2**31)
        if not 0 <= _check_finite("temperature", self.temperature) <= MAX_TEMPERATURE:
            raise DataError(f"temperature = {self.temperature:g}", f"a temperature from 0 to {MAX_TEMPERATURE:g}")
        if not 0 < len(self.seeds) <= MAX_SEEDS or len(set(self.seeds)) < len(self.seeds):
            raise DataError(f"{len(self.seeds)} seeds", f"1 to {MAX_SEEDS} seeds, all of them different")
        for seed in self.seeds:
            _check_whole("a seed", seed, 0, 2**31)
        if len(self.items) > MAX_ITEMS:
            raise DataError(f"{len(self.items)} items", f"at most {MAX_ITEMS}", "remove what does not steer")

    @property
    def active(self) -> tuple[Item, ...]:
        """The items that are on."""
        return tuple(item for item in self.items if item.on)

    @property
    def text(self) -> Text:
        """The prompt as ``fg.generate`` takes it: a text, or a conversation."""
        if not self.chat:
            return self.prompt
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": self.prompt}]

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``fg.generate``."""
        sampled = {"temperature": float(self.temperature)} if self.temperature else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **sampled}

    def as_json(self) -> dict[str, Any]:
        """The plan as plain JSON, which ``parse_plan`` takes."""
        names = {kind: name for name, kind in KINDS.items()}
        whole = asdict(self)
        kinds = [names[type(item)] for item in self.items]
        items = [{"kind": kind, **entry} for kind, entry in zip(kinds, whole["items"], strict=True)]
        return {**whole, "seeds": list(self.seeds), "items": items}


def parse_plan(value: object) -> Plan:
    """The plan of some JSON that is not trusted. Raises DataError for anything else."""
    entry = _object("a plan", value)
    items = entry.get("items", [])
    seeds = entry.get("seeds", [0])
    for name, listed in (("items", items), ("seeds", seeds)):
        if not isinstance(listed, list | tuple):
            raise DataError(describe_value(listed), f"a list as {name}")
    fields_of = {**entry, "items": tuple(map(parse_item, items)), "seeds": tuple(seeds)}
    plan: Plan = _made(Plan, "a plan", fields_of)
    return plan


def parse_item(value: object) -> Item:
    """One item of some JSON. Raises DataError for anything else."""
    entry = _object("an item", value)
    kind = entry.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"{describe_value(kind)} as the kind of an item", f"one of {', '.join(KINDS)}")
    if entry.get("gate") is not None:
        entry["gate"] = _made(GateSetting, "a gate", _object("a gate", entry["gate"]))
    item: Item = _made(KINDS[kind], f"an item of the kind {kind}", entry)
    return item


def has_dose(item: Item) -> bool:
    """Whether an item adds something of a size, so that its strength has a dose in units of the activations' norm."""
    return not isinstance(item, EditItem) and intervention_spec(item.op).amount == "coefficient"


def _made(kind: Callable[..., Any], what: str, entry: dict[str, Any]) -> Any:
    """A dataclass of a dictionary. Raises DataError for unknown keys, missing keys and wrong values."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, entry.keys() - known)):
        raise DataError(f"the keys {', '.join(unknown):.100} in {what}", f"keys among {', '.join(sorted(known))}")
    try:
        return kind(**entry)
    except FgsteerError:
        raise
    except TypeError as error:
        raise DataError(f"{what} that lacks something: {str(error).partition('__() ')[2]:.150}") from error


def _object(what: str, value: object) -> dict[str, Any]:
    """A copy of a JSON object. Raises DataError for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataError(describe_value(value), f"{what} as a JSON object")
    return dict(value)


def _checked_text(name: str, text: object) -> str:
    """The text. Raises DataError for what is no text of bounded length."""
    if not isinstance(text, str) or len(text) > MAX_TEXT_CHARS:
        got = f"{len(text):,} characters" if isinstance(text, str) else describe_value(text)
        raise DataError(f"{got} as {name}", f"a text of at most {MAX_TEXT_CHARS:,} characters", "shorten it")
    return text


def _check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS * 4:
        raise DataError(f"{describe_value(value)} as {name}", "a name")


def _check_feature(name: str, value: object) -> None:
    _check_whole(name, value, 0, 2**31)


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if not is_whole_number(value) or not least <= value <= most:
        raise DataError(f"{describe_value(value)} as {name}", f"a whole number from {least} to {most}")


def _check_finite(name: str, value: Any) -> float:
    most = sys.float_info.max  # a whole number of JSON may be larger
    if isinstance(value, bool) or not isinstance(value, int | float) or not -most <= value <= most:
        raise DataError(f"{describe_value(value)} as {name}", "a finite number")
    return float(value)


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise DataError(f"{describe_value(value)} as {name}", "true or false")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise DataError(f"{describe_value(value)} as {name}", f"one of {', '.join(map(repr, choices))}")
