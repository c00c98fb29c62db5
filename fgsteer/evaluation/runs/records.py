"""A benchmark run: its records, and how they are written to and loaded from a file.

run = load_run("bench.jsonl")
run.records[0].bcs
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from fgsteer.errors import DataError, FormatError
from fgsteer.errors.checks import checked, describe_value
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import a, count
from fgsteer.evaluation.metrics.intervals import COMPLETE
from fgsteer.methods import method_name, specs
from fgsteer.storage.json_files import parse_json
from fgsteer.storage.lines import read_lines

HALVES = ("tune", "report")
TEXT_LENGTH = 80  # characters of a text that errors show in full


class Unit(NamedTuple):
    """What two methods are paired by: a prompt and a seed."""

    prompt: int
    seed: int


class Setting(NamedTuple):
    """How a concept's texts were steered. ``matched``: the cost (nats) that set the coefficient, or None."""

    concept: str
    method: str
    layer: int | None
    coefficient: float
    matched: float | None

    def describe(self) -> str:
        """The setting in words. Raises DataError for a method that fgsteer bench does not have."""
        layer = "" if self.layer is None else f", layer {self.layer}"
        cost = "" if self.matched is None else f", matched at {self.matched:g} nats"
        return f"{self.concept}: {method_name(self.method)}{layer}, coefficient {self.coefficient:g}{cost}"


@dataclass(frozen=True, slots=True, repr=False)
class EvalRecord(OneLineRepr):
    """One generated text and its scores: a line of a run.

    These fields, with their types and with what may be None, are the schema of the file: ``as_row`` writes them,
    ``parse_record`` loads them, and both check them.

    Args:
        concept: Name of the contrast set.
        method: Name of the method, as in its table.
        layer: Layer that was steered; None where nothing was.
        coefficient: Strength of steering; 0 where nothing was steered.
        matched: The cost in nats at which methods are compared, for a record of that comparison; else None.
        prompt: Number of the prompt.
        seed: Number of the seed.
        half: "tune" or "report".
        text: What was generated, without its prompt.
        behavior: How much the text shows the concept, in [0, 1].
        coherence: How coherent the text is, in [0, 1].
        ce: Cross-entropy of the text under the unsteered model, in nats a token.
        ce_rise: Nats a token by which this coefficient raises the cross-entropy of neutral texts, where measured.
        kl: KL from the unsteered model along the text, in nats, where it was drawn with nothing cut off and measured.
        distinct: The share of different ones among its 3-grams of tokens, likewise.

    Raises:
        DataError: A field has another type, or a value out of its range.
    """

    concept: str
    method: str
    layer: int | None
    coefficient: float
    matched: float | None
    prompt: int
    seed: int
    half: str
    text: str
    behavior: float
    coherence: float
    ce: float
    ce_rise: float | None = None
    kl: float | None = None
    distinct: float | None = None

    def __post_init__(self) -> None:
        for name, (kind, may_be_null) in _schema().items():
            value = getattr(self, name)
            if not (_fits(value, kind) or (value is None and may_be_null)):
                raise DataError(f"{name} {_written(value)}", _EXPECTED[kind] + (" or None" if may_be_null else ""))
        if self.half not in HALVES:
            raise DataError(f"half {_written(self.half)}", " or ".join(map(repr, HALVES)))
        for name in ("behavior", "coherence"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} {getattr(self, name)}", "a number from 0 to 1")

    @property
    def bcs(self) -> float:
        """Behavior times coherence."""
        return self.behavior * self.coherence

    @property
    def unit(self) -> Unit:
        """Prompt and seed."""
        return Unit(self.prompt, self.seed)

    @property
    def setting(self) -> Setting:
        """Everything but prompt, seed, half and scores."""
        return Setting(self.concept, self.method, self.layer, self.coefficient, self.matched)

    def as_row(self) -> dict[str, Any]:
        """The record as a JSON object, as it stands in a run's file."""
        row = {name: getattr(self, name) for name in _schema()}
        return {name: value for name, value in row.items() if value is not None or name not in OWN_TEXT}


OWN_TEXT = ("kl", "distinct")  # fields that only records of own texts have
_EXPECTED = {str: "a text", int: "a whole number", float: "a finite number"}


def _fits(value: object, kind: type) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return not isinstance(value, float) or math.isfinite(value)


@cache
def _schema() -> dict[str, tuple[type, bool]]:
    """{field: (its JSON type, whether it may be null)}, of the annotations of ``EvalRecord``."""
    hints = get_type_hints(EvalRecord)
    schema = {}
    for field in fields(EvalRecord):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        (kind,) = set(kinds) - {NoneType}
        schema[field.name] = kind, NoneType in kinds
    return schema


def _written(value: object) -> str:
    """A value as errors show it."""
    short = value is None or isinstance(value, bool | float) or (isinstance(value, str) and len(value) < TEXT_LENGTH)
    return repr(value) if short else describe_value(value)


def parse_record(row: Any) -> EvalRecord:
    """The record of a JSON object that has every field of ``EvalRecord``; what else it has is passed over.

    Raises:
        DataError: It is not an object, lacks a field, or has a value of another type or out of range.
    """
    if not isinstance(row, Mapping):
        raise DataError(a(type(row).__name__), "an object")
    values: dict[str, Any] = {}
    for name, (kind, _) in _schema().items():
        if name not in row and name not in OWN_TEXT:
            raise DataError(f"The field {name!r} is missing.")
        value = row.get(name)
        try:
            values[name] = float(value) if kind is float and type(value) is int else value
        except OverflowError:
            raise DataError(f"{name} {describe_value(value)}", _EXPECTED[kind]) from None
    return EvalRecord(**values)


@dataclass(frozen=True, eq=False, repr=False)
class Run(OneLineRepr):
    """A run of a benchmark.

    Args:
        header: What was run: plan, versions, hashes and the command.
        records: Every text with its scores.
    """

    header: Mapping[str, Any]
    records: Sequence[EvalRecord]

    def __repr__(self) -> str:
        methods, concepts = count(len(self.methods), "method"), count(len(self.concepts), "concept")
        return f"Run({count(len(self.records), 'text')}: {methods}, {concepts})"

    @cached_property
    def cells(self) -> dict[tuple[Setting, str], dict[Unit, EvalRecord]]:
        """Records by setting and half, then by unit."""
        cells: dict[tuple[Setting, str], dict[Unit, EvalRecord]] = {}
        for record in self.records:
            cells.setdefault((record.setting, record.half), {})[record.unit] = record
        return cells

    @cached_property
    def settings(self) -> list[Setting]:
        """Every setting once."""
        return list(dict.fromkeys(setting for setting, _ in self.cells))

    @property
    def concepts(self) -> list[str]:
        """Concepts in the order of the file."""
        return list(dict.fromkeys(setting.concept for setting in self.settings))

    @property
    def methods(self) -> list[str]:
        """Methods in the order of tables: the known, then others by name."""
        known = [method.name for method in specs()]
        return sorted(
            {s.method for s in self.settings}, key=lambda m: (known.index(m) if m in known else len(known), m)
        )

    def layers(self, method: str | None = None) -> list[int]:
        """The layers that a method, or any method, steered with a grid of several coefficients."""
        grid = {(s.layer, s.method) for s in self.settings if s.coefficient and s.matched is None}
        methods = self.swept if method is None else [m for m in self.swept if m == method]
        return sorted({layer for layer, steered_by in grid if layer is not None and steered_by in methods})

    @property
    def swept(self) -> list[str]:
        """Methods with a grid of several coefficients."""
        coefficients: dict[str, set[float]] = {}
        for setting in self.settings:
            if setting.matched is None:
                coefficients.setdefault(setting.method, set()).add(setting.coefficient)
        return [method for method in self.methods if len(coefficients.get(method, ())) > 1]

    @cached_property
    def has_kl(self) -> bool:
        """Whether what each text cost the model that wrote it was measured."""
        return bool(self.records) and all(record.kl is not None for record in self.records)

    @property
    def cost_unit(self) -> str:
        """What the costs are in that set coefficients."""
        return "nats of own-text KL" if self.has_kl else "nats of CE rise"

    @property
    def targets(self) -> list[float]:
        """Costs, in ``cost_unit``, to which coefficients were calibrated."""
        return sorted({s.matched for s in self.settings if s.matched is not None})

    def values(self, setting: Setting, half: str = "report", measure: str = "bcs") -> dict[Unit, float]:
        """{unit: bcs, behavior, coherence, kl or distinct}.

        Raises DataError where the half has no record of the setting.
        """
        if (setting, half) not in self.cells:
            raise DataError(
                f"no record of {setting.describe()} in the half {half!r}",
                "records of every setting in both halves",
                COMPLETE,
            )
        return {unit: getattr(record, measure) for unit, record in self.cells[setting, half].items()}

    def mean(self, setting: Setting, half: str = "report", measure: str = "bcs") -> float:
        """Mean over the units of ``values``."""
        return mean(self.values(setting, half, measure).values())

    def only(self, *, concepts: Collection[str] | None = None, methods: Collection[str] | None = None) -> Run:
        """The run of these concepts and methods alone; None takes all of them."""
        records = [
            r
            for r in self.records
            if (concepts is None or r.concept in concepts) and (methods is None or r.method in methods)
        ]
        return Run(self.header, records)


@checked
def load_run(path: str | Path) -> Run:
    """Load a run from its file of JSON lines: a header, then records.

    A last line that breaks off is what a killed writer leaves, and is passed over.

    Args:
        path: The file, such as bench.jsonl, or bench.jsonl.gz compressed by gzip.

    Returns:
        The run.

    Raises:
        FormatError: The file cannot be read, or a line of it, which is named, is damaged, has a value out of range,
            repeats a text, or has a concept's prompt and seed that are in the other half too.
    """
    header: dict[str, Any] = {}
    records: list[EvalRecord] = []
    line_of: dict[Any, int] = {}
    number = 0
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            row = parse_json(line)
            if number == 1:
                header = _parse_header(row)
            else:
                records.append(parse_record(row))
                _check_new(records[-1], number, line_of)
        except (ValueError, TypeError, ArithmeticError) as error:
            expected = "the header" if number == 1 else "a record"
            raise FormatError(f"Line {number} of {path} is not {expected} of fgsteer bench. {error}") from error
    if not number:
        raise FormatError(f"{path} has no whole line.", "the header of a run of fgsteer bench, then its records")
    return Run(header, records)


def _whole_lines(path: str | Path) -> Iterator[bytes]:
    """Yield the lines of a file without their line breaks, and without a last one that breaks off."""
    for line in read_lines(path):
        if line.endswith(b"\n") or _is_json(line):
            yield line.removesuffix(b"\n")


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    except ValueError:  # JSON, of a kind that is refused
        pass
    return True


def _parse_header(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(a(type(row).__name__), "an object")
    kinds = {"fgsteer": str, "version": str, "command": str, "plan": dict, "versions": dict, "sha256": dict}
    for name, kind in kinds.items():
        if name not in row:
            raise DataError(f"The field {name!r} is missing.")
        if not isinstance(row[name], kind):
            raise DataError(f"{name} {_written(row[name])}", "a text" if kind is str else "an object")
    return row


def _check_new(record: EvalRecord, number: int, line_of: dict[Any, int]) -> None:
    """Raises DataError for a text that stands there before, and for a unit that its concept has in the other half."""
    text = (record.setting, record.unit)
    other = (record.concept, record.unit, HALVES[record.half == "tune"])
    if text in line_of:
        raise DataError(f"It has the same setting, prompt and seed as line {line_of[text]}.", "each text once")
    if other in line_of:
        raise DataError(
            f"It has a prompt and seed that line {line_of[other]} has in the other half.", "halves that share nothing"
        )
    line_of[text] = number
    line_of.setdefault((record.concept, record.unit, record.half), number)


def mean(values: Collection[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
