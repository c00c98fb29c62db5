"""Contrast data: what shows a behavior and what does not, and the files it comes in.

A ``ContrastSet`` holds pairs, or positives and negatives of any two sizes. Texts are
strings or chat messages; an optional prompt stands before a pair's two completions. Of conversations,
what both sides begin with is the prompt.

    load_contrast("wedding")          a set that ships with the package
    load_contrast("pairs.jsonl")      rows {"positive", "negative"} and the like
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fgsteer.data.chat import Text, check_unicode, plain_message
from fgsteer.data.conversations import after_prompt, separate, split_prompt
from fgsteer.data.corpora import file_kind, read_rows
from fgsteer.errors import DataError, FormatError
from fgsteer.errors.checks import describe_value
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.storage.json_files import read_json, text_sha256

FEWEST_TO_HOLD_OUT = 6  # texts a side, to put a third of them aside
LONGEST_NAME = 100  # bytes of a name that files are called by
_NAME = re.compile(r"\w[\w .+-]*")
SHIPPED = Path(__file__).resolve().parent / "contrast_sets"

# Field names of one row: where the prompt, the positive and the negative stand.
_ROWS: tuple[tuple[str | None, str, str], ...] = (
    ("prompt", "positive", "negative"),
    ("prompt", "chosen", "rejected"),
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
)


def check_text(value: object, where: str, *, empty: bool = False) -> Text:
    """The value as a text, messages with text parts as messages of one text. Raises DataError naming where it stood."""
    if isinstance(value, str):
        if not value.strip() and not empty:
            raise DataError(f"{where} is empty", "a text or chat messages")
        return check_unicode(value, where)
    if isinstance(value, Sequence) and (value or empty):
        return [plain_message(message, f"{where}, message {number}") for number, message in enumerate(value)]
    hint = "put the message into a list: [message]" if isinstance(value, Mapping) and "role" in value else ""
    raise DataError(f"{where} is {type(value).__name__} {value!r:.60}", "a text or a list of chat messages", hint)


@dataclass(frozen=True, repr=False)
class ContrastPair(OneLineRepr):
    """Two completions of one prompt, with and without the behavior.

    Each of ``positive``, ``negative`` and ``prompt`` is a string or a list of chat
    messages. Two whole conversations are taken apart: the messages that both begin with become the prompt
    (as in TRL), and one that ``prompt`` gives as well is not said twice. Raises DataError for anything
    else, or for an empty completion.
    """

    positive: Text
    negative: Text
    prompt: Text = ""

    def __post_init__(self) -> None:
        positive, negative = check_text(self.positive, "positive"), check_text(self.negative, "negative")
        prompt = check_text(self.prompt, "prompt", empty=True)
        for name, text in zip(("prompt", "positive", "negative"), separate(prompt, positive, negative), strict=True):
            object.__setattr__(self, name, text)


@dataclass(frozen=True, repr=False)
class ContrastSet(OneLineRepr):
    """Texts with and without a behavior: ``pairs``, or ``positives`` and ``negatives``, or both.

    The two sides need not be of equal size. ``held_out`` is a set of the same behavior
    that nothing is built from. ``description`` tells a judge that is a language model what the behavior is.
    Raises DataError when a side is empty.
    """

    name: str
    pairs: Sequence[ContrastPair] = ()
    positives: Sequence[Text] = ()
    negatives: Sequence[Text] = ()
    held_out: ContrastSet | None = None
    description: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        for field in ("positives", "negatives"):
            texts = getattr(self, field)
            if isinstance(texts, str):
                raise DataError(f"{field} of {self.name!r} is one string", "a list of texts")
            object.__setattr__(
                self, field, tuple(check_text(t, f"{field}[{i}] of {self.name!r}") for i, t in enumerate(texts))
            )
        pairs = tuple(self.pairs)
        for number, pair in enumerate(pairs):
            if not isinstance(pair, ContrastPair):
                raise DataError(f"pairs[{number}] of {self.name!r} is {type(pair).__name__}", "a ContrastPair")
        object.__setattr__(self, "pairs", pairs)
        for positive, word in ((True, "positive"), (False, "negative")):
            if not self.count(positive):
                raise DataError(f"contrast set {self.name!r} has no {word} text", "at least one on either side")

    def side(self, positive: bool) -> Iterator[tuple[Text, Text]]:
        """(prompt, completion) of every text of one side, in order; no prompt is "".

        The completion of a single conversation is its last assistant's message.
        """
        for pair in self.pairs:
            yield after_prompt(pair.prompt, pair.positive if positive else pair.negative)
        for text in self.positives if positive else self.negatives:
            yield split_prompt(text)

    def count(self, positive: bool) -> int:
        """Number of texts of one side."""
        return len(self.pairs) + len(self.positives if positive else self.negatives)

    def hold_out(self) -> ContrastSet:
        """The set with every third pair and text of either side as its held-out part; itself where it has one.

        Raises DataError for fewer than six texts a side.
        """
        if self.held_out is not None:
            return self
        fewest = min(self.count(True), self.count(False))
        if fewest < FEWEST_TO_HOLD_OUT:
            raise DataError(
                f"contrast set {self.name!r} with {count(fewest, 'text')} on a side, and no held_out part",
                f"{FEWEST_TO_HOLD_OUT} texts a side, of which every third is held out, or a held_out part of its own",
                'add "held_out": {"positive": [...], "negative": [...]} to its file',
            )

        def part(name: str, out: bool) -> ContrastSet:
            pairs, positives, negatives = (
                [entry for number, entry in enumerate(entries) if (number % 3 == 2) == out]
                for entries in (self.pairs, self.positives, self.negatives)
            )
            return ContrastSet(name, pairs, positives, negatives)  # type: ignore[arg-type]  # each of its own kind

        held_out = part(f"{self.name}:held_out", out=True)
        return dataclasses.replace(part(self.name, out=False), held_out=held_out, description=self.description)

    @cached_property
    def sha256(self) -> str:
        """Hash of the texts, in order, without the name and the held-out part."""
        plain = [
            [[_plain(prompt), _plain(completion)] for prompt, completion in self.side(positive)]
            for positive in (True, False)
        ]
        return text_sha256(plain)


Contrastable = ContrastSet | str | Path | Mapping[str, Any] | Sequence[Any]  # what as_contrast takes


def _plain(text: Text) -> str | list[dict[str, str]]:
    return text if isinstance(text, str) else [dict(message) for message in text]


def _row_pair(row: object, where: str) -> ContrastPair:
    """One row as a pair. Raises DataError naming file, line and field."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {type(row).__name__}", "an object with positive and negative")
    for prompt, positive, negative in _ROWS:
        if positive in row or negative in row:
            for field in (positive, negative):
                if field not in row:
                    raise DataError(f"{where} has no field {field!r}", f"{positive} and {negative}")
            check_text(row[positive], f"{where}, field {positive!r}")
            check_text(row[negative], f"{where}, field {negative!r}")
            before = check_text(row.get(prompt, "") if prompt else "", f"{where}, field {prompt!r}", empty=True)
            return ContrastPair(row[positive], row[negative], before)
    raise DataError(
        f"{where} has fields {', '.join(map(repr, row)) or 'none'}",
        " or ".join(f"{positive}/{negative}" for _, positive, negative in _ROWS),
    )


def _two_sided(value: Mapping[str, Any], name: str, where: str) -> ContrastSet:
    """A set from an object of two lists, with an optional held_out object of the same form."""
    sides = {}
    for field in ("positive", "negative"):
        key = field if field in value else field + "s"
        if key not in value:
            raise DataError(f"{where} has no field {field!r}", "an object with lists positive and negative")
        if not isinstance(value[key], list | tuple) or not value[key]:
            raise DataError(f"{where}, field {key!r} is {value[key]!r:.40}", "a list of texts, not empty")
        sides[field] = [check_text(t, f"{where}, field {key!r}[{i}]") for i, t in enumerate(value[key])]
    held_out = value.get("held_out")
    if held_out is not None and not isinstance(held_out, Mapping):
        raise DataError(f"{where}, field 'held_out' is {type(held_out).__name__}", "an object")
    return ContrastSet(
        name=str(value.get("name", name)),
        positives=sides["positive"],
        negatives=sides["negative"],
        held_out=_two_sided(held_out, f"{name}:held_out", f"{where}, held_out") if held_out else None,
        description=str(value.get("description") or ""),
    )


def check_name(name: str) -> str:
    """A contrast set's name, if a file can be called so. Raises DataError."""
    if not _NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME or name.endswith((" ", ".", ".running")):
        raise DataError(
            f"a contrast set named {name[:LONGEST_NAME]!r}",
            f"a name that a file can have: letters, digits, spaces and . + - _, at most {LONGEST_NAME} bytes",
            'give its file another name, or a "name" of its own',
        )
    return name


def shipped_contrasts() -> list[str]:
    """Names of the contrast sets that ship with the package."""
    return sorted(p.stem for p in SHIPPED.glob("*.json") if p.stem != "neutral")


def load_contrast(source: Contrastable) -> ContrastSet:
    """A contrast set by its shipped name, from a file, or from what such a file holds.

    ``.json``: ``{"positive": [...], "negative": [...]}`` of any sizes, or a list of rows; ``.jsonl`` and
    ``.ndjson``: a row a line; ``.csv``, ``.tsv`` and ``.parquet``: rows under a header, as ``read_documents``
    reads them. A row has ``positive`` and ``negative`` (with an optional ``prompt``), ``prompt``,
    ``chosen`` and ``rejected``, or CAA's ``question``, ``answer_matching_behavior`` and
    ``answer_not_matching_behavior``. Any text may be a list of chat messages.

    Raises DataError naming the file, the line or row, and the field.
    """
    if not isinstance(source, str | Path):
        return as_contrast(source)
    name = str(source)
    if name in shipped_contrasts():
        source = SHIPPED / f"{name}.json"
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"no contrast set {name!r}", f"a .json or .jsonl file, or one of {', '.join(shipped_contrasts())}"
        )
    kind = file_kind(path)
    if kind in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        return ContrastSet(path.stem, pairs=[_row_pair(row, where) for where, row in read_rows(path)])
    if kind != ".json":
        raise DataError(f"{path} ends in {kind!r}", "a .json, .jsonl, .ndjson, .csv, .tsv or .parquet file")
    if path.suffix.lower() != kind:
        raise DataError(f"{path} is compressed", "a .json file as it is", "unpack it; rows in .jsonl may be compressed")
    try:
        value = read_json(path)
    except FormatError as error:
        raise DataError(str(error)) from error
    if isinstance(value, Mapping):
        return _two_sided(value, path.stem, str(path))
    if isinstance(value, list):
        return ContrastSet(path.stem, pairs=[_row_pair(row, f"{path}, row {i}") for i, row in enumerate(value, 1)])
    raise DataError(f"{path} holds {type(value).__name__}", "an object of two lists, or a list of rows")


def load_neutral() -> tuple[list[str], list[str]]:
    """The shipped neutral sentences and neutral prompts, on no behavior in particular."""
    value = read_json(SHIPPED / "neutral.json")
    return list(value["texts"]), list(value["prompts"])


def load_bench_prompts() -> list[str]:
    """The prompts that a benchmark draws from: those of ``load_neutral``, then as many again and more."""
    value = read_json(SHIPPED / "neutral.json")
    return [*value["prompts"], *value["more_prompts"]]


def as_contrast(contrast: Contrastable) -> ContrastSet:
    """A contrast set from any of the forms that public functions accept; of two texts the first is positive.

    Raises DataError naming the entry.
    """
    if isinstance(contrast, ContrastSet):
        return contrast
    if isinstance(contrast, str | Path):
        return load_contrast(contrast)
    if isinstance(contrast, Mapping):
        return _two_sided(contrast, "contrast", "the contrast")
    if not isinstance(contrast, Iterable):
        raise DataError(
            f"contrast is {describe_value(contrast)}",
            'a ContrastSet, a name, a path, {"positive": [...], "negative": [...]}, or a list of pairs',
        )
    return ContrastSet(
        "pairs", pairs=[_as_pair(entry, f"pairs[{n}] of the contrast") for n, entry in enumerate(contrast)]
    )


def _as_pair(entry: object, where: str) -> ContrastPair:
    """A pair, a row or two texts as a pair. Raises DataError."""
    if isinstance(entry, ContrastPair):
        return entry
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return ContrastPair(check_text(entry[0], f"{where}, positive"), check_text(entry[1], f"{where}, negative"))
    if isinstance(entry, Mapping):
        return _row_pair(entry, where)
    raise DataError(
        f"{where} is {describe_value(entry)}",
        'a ContrastPair, {"positive": text, "negative": text}, or (positive, negative)',
    )
