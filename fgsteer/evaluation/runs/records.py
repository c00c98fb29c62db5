"""A benchmark run: its records, the settings chosen on one half, and what they score on the other.

A coefficient, and a layer where there are several, is chosen per concept and method by the mean
BCS (behavior times coherence) of the half "tune"; what it scores is read on the half "report".

    run = load_run("bench.jsonl")
    best_settings(run)["wedding", "fgaa"].coefficient
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fgsteer.errors import DataError, FormatError
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.evaluation.metrics.intervals import COMPLETE, paired_differences
from fgsteer.methods import method_name, specs
from fgsteer.storage.json_files import parse_json

HALVES = ("tune", "report")
_KINDS = {
    "concept": str,
    "method": str,
    "layer": int,
    "coefficient": float,
    "matched": float,
    "prompt": int,
    "seed": int,
    "half": str,
    "text": str,
    "behavior": float,
    "coherence": float,
    "ce": float,
    "ce_rise": float,
}
_MAY_BE_NULL = ("layer", "matched", "ce_rise")


class Unit(NamedTuple):
    """What two methods are paired by."""

    prompt: int
    seed: int


class Setting(NamedTuple):
    """How a concept's texts were steered. ``matched``: the CE rise (nats) that set the coefficient, or None."""

    concept: str
    method: str
    layer: int | None
    coefficient: float
    matched: float | None


@dataclass(frozen=True, slots=True, repr=False)
class EvalRecord(OneLineRepr):
    """One generated text and its scores: a line of a run.

    ``behavior`` and ``coherence`` in [0, 1]; ``ce``: nats a token of the text under the unsteered
    model; ``ce_rise``: nats a token by which this coefficient raises neutral texts, where measured.
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


@dataclass(frozen=True, eq=False, repr=False)
class Run(OneLineRepr):
    """A run's header (plan, versions, hashes, command) and its records."""

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
        """Layers that were steered on the coefficient grid by a method, or by any, of more than one coefficient."""
        grid = {(s.layer, s.method) for s in self.settings if s.coefficient and s.matched is None}
        wanted = self.swept if method is None else [m for m in self.swept if m == method]
        return sorted({layer for layer, found in grid if layer is not None and found in wanted})

    @property
    def swept(self) -> list[str]:
        """Methods with a grid of several coefficients."""
        seen: dict[str, set[float]] = {}
        for setting in self.settings:
            if setting.matched is None:
                seen.setdefault(setting.method, set()).add(setting.coefficient)
        return [method for method in self.methods if len(seen.get(method, ())) > 1]

    @property
    def targets(self) -> list[float]:
        """CE rises (nats) to which coefficients were calibrated."""
        return sorted({s.matched for s in self.settings if s.matched is not None})

    def values(self, setting: Setting, half: str = "report", measure: str = "bcs") -> dict[Unit, float]:
        """{unit: bcs, behavior or coherence}. Raises DataError where the half has no record of the setting."""
        if (setting, half) not in self.cells:
            raise DataError(
                f"no record of {told(setting)} in the half {half!r}",
                "both halves of every setting",
                COMPLETE,
            )
        return {unit: getattr(record, measure) for unit, record in self.cells[setting, half].items()}

    def mean(self, setting: Setting, half: str = "report", measure: str = "bcs") -> float:
        """Mean over the units of ``values``."""
        return mean(self.values(setting, half, measure).values())

    def only(self, *, concepts: Collection[str] | None = None, methods: Collection[str] | None = None) -> Run:
        """The run without other concepts and methods."""
        kept = [
            r
            for r in self.records
            if (concepts is None or r.concept in concepts) and (methods is None or r.method in methods)
        ]
        return Run(self.header, kept)


def load_run(path: str | Path) -> Run:
    """Read a run's JSON lines: a header, then records.

    A last line that breaks off is what a killed writer leaves, and is passed over. Raises
    FormatError, naming the line, for anything else: damage, a value out of range, a text given
    twice, a concept's (prompt, seed) in both halves.
    """
    try:
        *lines, last = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    if last and _is_json(last):
        lines.append(last)
    if not lines:
        raise FormatError(f"{path} has no whole line", "the header of fgsteer bench")
    header: dict[str, Any] = {}
    records: list[EvalRecord] = []
    seen: dict[Any, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if number == 1:
                header = _header(row)
            else:
                records.append(_record(row))
                _check_new(records[-1], number, seen)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            wanted = "the header" if number == 1 else "a record"
            raise FormatError(f"{path}, line {number}: {why}", f"{wanted} of fgsteer bench") from error
    return Run(header, records)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    except ValueError:  # JSON, of a kind that is refused
        pass
    return True


def _header(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TypeError("not an object")
    kinds = {"fgsteer": str, "version": str, "command": str, "plan": dict, "versions": dict, "sha256": dict}
    for name, kind in kinds.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name} {row[name]!r}")
    return row


def _record(row: Any) -> EvalRecord:
    if not isinstance(row, dict):
        raise TypeError("not an object")
    values: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        value = row[name]
        number = kind is float and type(value) in (int, float)
        if value is None and name in _MAY_BE_NULL:
            values[name] = None
        elif math.isfinite(value) if number else type(value) is kind:
            values[name] = kind(value)
        else:
            raise TypeError(f"{name} {value!r}")
    record = EvalRecord(**values)
    if record.half not in HALVES or not (0 <= record.behavior <= 1 and 0 <= record.coherence <= 1):
        raise ValueError(f"half {record.half!r}, behavior {record.behavior}, coherence {record.coherence}")
    return record


def _check_new(record: EvalRecord, number: int, seen: dict[Any, int]) -> None:
    """Refuse a text given before, and a (prompt, seed) that its concept has in the other half."""
    text = (record.setting, record.unit)
    other = (record.concept, record.unit, HALVES[record.half == "tune"])
    for key, what in ((text, "the same text"), (other, "this prompt and seed in the other half")):
        if key in seen:
            raise ValueError(f"{what} as line {seen[key]}")
    seen[text] = number
    seen.setdefault((record.concept, record.unit, record.half), number)


def best_coefficients(run: Run, matched: float | None = None) -> dict[tuple[str, str, int | None], Setting]:
    """The setting of highest mean BCS on "tune" for each (concept, method, layer).

    Of equal ones the smaller coefficient, then the positive; a setting without a rival is taken as it
    is. ``matched``: a target of ``run.targets``, None for the grid. Raises DataError where a rival has
    no record on "tune", PairingError where rivals were tried on other prompts or seeds.
    """
    settings = [setting for setting in run.settings if setting.matched == matched]
    return {key: _best(run, rivals) for key, rivals in _groups(settings, lambda s: s[:3]).items()}


@lru_cache(maxsize=4)
def best_settings(run: Run, matched: float | None = None) -> dict[tuple[str, str], Setting]:
    """The best of ``best_coefficients`` over layers for each (concept, method); of equals the lower layer."""
    rivals = _groups(best_coefficients(run, matched).values(), lambda s: s[:2])
    return {key: _best(run, settings) for key, settings in rivals.items()}


def _groups(settings: Iterable[Setting], key: Callable[[Setting], Any]) -> dict[Any, list[Setting]]:
    groups: dict[Any, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(key(setting), []).append(setting)
    return groups


def _best(run: Run, rivals: Sequence[Setting]) -> Setting:
    if len(rivals) == 1:
        return rivals[0]
    first = run.values(rivals[0], "tune")
    for rival in rivals[1:]:
        paired_differences(run.values(rival, "tune"), first, f"tuning {told(rival)}")

    def rank(s: Setting) -> tuple[float, ...]:
        return run.mean(s, "tune"), -(s.layer or 0), -abs(s.coefficient), s.coefficient

    return max(rivals, key=rank)


def told(setting: Setting) -> str:
    """A setting in words."""
    layer = "" if setting.layer is None else f", layer {setting.layer}"
    at = "" if setting.matched is None else f", matched at {setting.matched:g} nats"
    return f"{setting.concept}: {method_name(setting.method)}{layer}, coefficient {setting.coefficient:g}{at}"


def mean(values: Collection[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
