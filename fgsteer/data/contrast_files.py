"""Contrast sets from their names, from files, and from the other forms that public functions accept.

load_contrast("wedding")          a set that ships with the package
load_contrast("pairs.jsonl")      rows {"positive", "negative"} and the like
save_contrast(contrast, "pairs.json")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fgsteer.data.chat import Text, check_text
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.data.corpora import file_kind, read_rows
from fgsteer.data.file_kinds import CONTRAST_KINDS, ROW_KINDS
from fgsteer.data.shipped import shipped_contrasts, shipped_path
from fgsteer.errors import DataError, FormatError
from fgsteer.errors.checks import describe_value
from fgsteer.errors.wording import a
from fgsteer.storage.json_files import read_json, write_json

Contrastable = ContrastSet | str | Path | Mapping[str, Any] | Sequence[Any]  # what as_contrast accepts

# names of the fields of a row that hold the prompt, the positive and the negative
_ROW_FIELDS: tuple[tuple[str | None, str, str], ...] = (
    ("prompt", "positive", "negative"),
    ("prompt", "chosen", "rejected"),
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
)


def load_contrast(source: Contrastable) -> ContrastSet:
    """Load a contrast set by its shipped name, from a file, or from what such a file holds.

    A ``.json`` file holds ``{"positive": [...], "negative": [...]}`` of any sizes, ``{"pairs": [...]}`` of rows, or a
    list of rows; ``.jsonl`` and
    ``.ndjson`` files hold a row on each line; ``.csv``, ``.tsv`` and ``.parquet`` files hold rows under a header, as
    ``read_documents`` reads them. A row has ``positive`` and ``negative`` (with an optional ``prompt``); ``prompt``,
    ``chosen`` and ``rejected``; or, as in CAA, ``question``, ``answer_matching_behavior`` and
    ``answer_not_matching_behavior``. Any text may be a list of chat messages.

    Args:
        source: The name of a shipped set, the path of a file, or what such a file holds.

    Returns:
        The contrast set, named after the file unless the file names it.

    Raises:
        DataError: There is no such set or file, or something in it cannot be used; the error names the file, the
            line or row, and the field.
    """
    if not isinstance(source, str | Path):
        return as_contrast(source)
    name = str(source)
    path = shipped_path(name) or Path(source)
    if not path.is_file():
        raise DataError(
            f"There is no contrast set or file {name!r}.",
            f"a {CONTRAST_KINDS} file, or one of {', '.join(shipped_contrasts() + shipped_contrasts(chat=True))}",
        )
    kind = file_kind(path)
    if kind in ROW_KINDS:
        return ContrastSet(path.stem, pairs=[_row_pair(row, where) for where, row in read_rows(path)])
    if kind != ".json":
        raise DataError(f"{path}", f"a {CONTRAST_KINDS} file", "rename or convert the file")
    if path.suffix.lower() != kind:
        raise DataError(
            f"{path}, which is compressed",
            "a plain .json file",
            "unpack it; only rows, as in .jsonl, may be compressed",
        )
    try:
        value = read_json(path)
    except FormatError as error:
        raise DataError(str(error)) from error
    if isinstance(value, Mapping):
        return _two_sided(value, path.stem, str(path))
    if isinstance(value, list):
        return ContrastSet(path.stem, pairs=[_row_pair(row, f"{path}, row {i}") for i, row in enumerate(value, 1)])
    raise DataError(f"{a(type(value).__name__)} in {path}", "an object of two lists, or a list of rows")


def save_contrast(contrast: Contrastable, path: str | Path) -> None:
    """Write a contrast set to a JSON file, which ``load_contrast`` loads again as the same texts.

    Args:
        contrast: A contrast set, or what ``collect`` takes.
        path: The file, which ends in .json; one that is there is replaced.

    Raises:
        DataError: The path ends otherwise, or the set has pairs beside single texts, which no file holds together.
        FormatError: The file cannot be written.
    """
    if Path(path).suffix.lower() != ".json":
        raise DataError(f"{path} for a contrast set", "a name that ends in .json", "rename the file")
    write_json(path, _as_rows(as_contrast(contrast)))


def _as_rows(contrast: ContrastSet) -> dict[str, Any]:
    """A set as ``load_contrast`` reads it. Raises DataError for pairs beside single texts."""
    if contrast.pairs and (contrast.positives or contrast.negatives):
        raise DataError(f"{contrast.name!r}, with pairs and single texts", "either pairs or single texts to write")
    described = {"name": contrast.name} | ({"description": contrast.description} if contrast.description else {})
    if contrast.pairs:
        pairs = [{"prompt": p.prompt, "positive": p.positive, "negative": p.negative} for p in contrast.pairs]
        texts: dict[str, Any] = {"pairs": [{k: v for k, v in pair.items() if v} for pair in pairs]}
    else:
        texts = {"positive": list(contrast.positives), "negative": list(contrast.negatives)}
    held_out = {} if contrast.held_out is None else {"held_out": _as_rows(contrast.held_out)}
    return {**described, **texts, **held_out}


def as_contrast(contrast: Contrastable) -> ContrastSet:
    """Make a contrast set from any of the forms that public functions accept; of two texts the first is positive.

    Raises DataError naming the entry that cannot be used.
    """
    if isinstance(contrast, ContrastSet):
        return contrast
    if isinstance(contrast, str | Path):
        return load_contrast(contrast)
    if isinstance(contrast, Mapping):
        return _two_sided(contrast, "contrast", "the contrast")
    if not isinstance(contrast, Iterable):
        raise DataError(
            f"{describe_value(contrast)} for contrast",
            'a ContrastSet, a name, a path, {"positive": [...], "negative": [...]}, or a list of pairs',
        )
    return ContrastSet(
        "pairs", pairs=[_as_pair(entry, f"pairs[{n}] of the contrast") for n, entry in enumerate(contrast)]
    )


def _as_pair(entry: object, where: str) -> ContrastPair:
    """Make a pair from a pair, a row or two texts. Raises DataError."""
    if isinstance(entry, ContrastPair):
        return entry
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return ContrastPair(check_text(entry[0], f"{where}, positive"), check_text(entry[1], f"{where}, negative"))
    if isinstance(entry, Mapping):
        return _row_pair(entry, where)
    raise DataError(
        f"{describe_value(entry)} in {where}",
        'a ContrastPair, {"positive": text, "negative": text}, or (positive, negative)',
    )


def _row_pair(row: object, where: str) -> ContrastPair:
    """Make a pair from one row. Raises DataError naming file, line and field."""
    if not isinstance(row, Mapping):
        raise DataError(f"{a(type(row).__name__)} in {where}", "an object with the fields positive and negative")
    for prompt, positive, negative in _ROW_FIELDS:
        if positive in row or negative in row:
            for field in (positive, negative):
                if field not in row:
                    raise DataError(f"{where}, which has no field {field!r}", f"the fields {positive} and {negative}")
            check_text(row[positive], f"{where}, field {positive!r}")
            check_text(row[negative], f"{where}, field {negative!r}")
            before = check_text(row.get(prompt, "") if prompt else "", f"{where}, field {prompt!r}", empty=True)
            return ContrastPair(row[positive], row[negative], before)
    raise DataError(
        f"{where}, with {'the fields ' + ', '.join(map(repr, row)) if row else 'no field'}",
        f"the fields {', or '.join(f'{positive} and {negative}' for _, positive, negative in _ROW_FIELDS)}",
    )


def _two_sided(value: Mapping[str, Any], name: str, where: str) -> ContrastSet:
    """Make a set from an object of two lists, or of pairs, with an optional held_out object of the same form."""
    sides: dict[str, list[Text]] = {"positive": [], "negative": []}
    pairs = value.get("pairs", [])
    if not isinstance(pairs, list | tuple) or ("pairs" in value and not pairs):
        raise DataError(f"{pairs!r:.40} in {where}, field 'pairs'", "a list of at least one row")
    for field in sides if not pairs else ():
        key = field if field in value else field + "s"
        if key not in value:
            raise DataError(f"{where}, which has no field {field!r}", "an object with the lists positive and negative")
        if not isinstance(value[key], list | tuple) or not value[key]:
            raise DataError(f"{value[key]!r:.40} in {where}, field {key!r}", "a list of at least one text")
        sides[field] = [check_text(t, f"{where}, field {key!r}[{i}]") for i, t in enumerate(value[key])]
    held_out = value.get("held_out")
    if held_out is not None and not isinstance(held_out, Mapping):
        raise DataError(
            f"{a(type(held_out).__name__)} in {where}, field 'held_out'",
            "an object with the lists positive and negative",
        )
    return ContrastSet(
        name=str(value.get("name", name)),
        pairs=[_row_pair(row, f"{where}, field 'pairs'[{i}]") for i, row in enumerate(pairs)],
        positives=sides["positive"],
        negatives=sides["negative"],
        held_out=_two_sided(held_out, f"{name}:held_out", f"{where}, held_out") if held_out else None,
        description=str(value.get("description") or ""),
    )
