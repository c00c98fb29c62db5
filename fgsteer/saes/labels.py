"""Labels: what features are said to mean, from Neuronpedia's exports or a plain {"id": "label"}.

Files only, no network. Neuronpedia keeps an SAE's explanations as a folder of
``batch-N.jsonl.gz``; a folder, one of its files or an older JSON export is read.

    labels = load_labels("explanations/", sae)          {42: "weddings", ...}
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.errors import FormatError, PairingError
from fgsteer.storage.json_files import parse_json, read_json

if TYPE_CHECKING:
    from fgsteer.saes.sae import SAE

_LINE = 1 << 20  # bytes of one row: ten times what an explanation with its embedding takes
_LINE_FILES = (".jsonl", ".jsonl.gz")


def load_labels(path: str | Path, sae: SAE | None = None) -> dict[int, str]:
    """{feature id: label} of a file, or of all .jsonl and .jsonl.gz files in a folder.

    A row has ``modelId``, ``layer``, ``index`` and ``description``; rows come a line each, as a JSON
    list, or under ``explanations``. An object {"id": "label"} is read too. Where an id has several
    labels the first is kept. Lines are streamed, and control characters become spaces.
    Raises FormatError with file and row, PairingError for rows of two SAEs, of another SAE
    than ``sae.neuronpedia`` names, or with an id that ``sae`` lacks.
    """
    path = Path(path)
    expected = "" if sae is None else sae.neuronpedia
    labels: dict[int, str] = {}
    for where, feature, label, source in _labels(path):
        expected = expected or source
        if source and source != expected:
            raise PairingError(f"{where} is of {source}", f"of {expected}", "pass the explanations of one SAE")
        if sae is not None and feature >= sae.d_sae:
            raise PairingError(f"{where} labels feature {feature}", f"0 to {sae.d_sae - 1} of {sae.source}")
        text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
        if text:
            labels.setdefault(feature, text)
    return labels


def _labels(path: Path) -> Iterator[tuple[str, int, str, str]]:
    """(where, feature, label, "modelId/layer" or "") of every row."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(_LINE_FILES))
        if not files:
            raise FormatError(f"{path} has no .jsonl or .jsonl.gz file", "a Neuronpedia export")
        for file in files:
            yield from _labels(file)
        return
    if path.name.endswith(_LINE_FILES):
        rows: Iterable[tuple[str, Any]] = _lines(path)
    else:
        value = read_json(path)
        if isinstance(value, dict) and not isinstance(value.get("explanations"), list):
            yield from (_plain(path, key, label) for key, label in value.items())
            return
        listed = value["explanations"] if isinstance(value, dict) else value
        if not isinstance(listed, list) or not listed:
            raise FormatError(f"{path} holds {value!r:.60}", 'explanations, or an object {"feature id": "label"}')
        rows = ((f"{path}, row {n}", row) for n, row in enumerate(listed, 1))
    for where, row in rows:
        yield _row(where, row)


def _plain(path: Path, key: str, label: object) -> tuple[str, int, str, str]:
    if not (key.isdecimal() and len(key) < 10) or not isinstance(label, str):
        raise FormatError(f"{path} holds {key!r:.40}: {label!r:.60}", 'an object {"feature id": "label"}')
    return f"{path}, key {key!r}", int(key), label, ""


def _row(where: str, row: object) -> tuple[str, int, str, str]:
    fields = row if isinstance(row, dict) else {}
    index, label = str(fields.get("index", "")), fields.get("description")
    if not (index.isdecimal() and len(index) < 10) or not isinstance(label, str | None):
        raise FormatError(f"{where} is {row!r:.80}", "an explanation with modelId, layer, index and description")
    named = [fields.get(key) for key in ("modelId", "layer")]
    source = "/".join(str(part) for part in named) if all(named) else ""
    return where, int(index), label or "", source


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of every line that is not blank, one in memory at a time."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while line := file.readline(_LINE + 1):
                number += 1
                if len(line) > _LINE:
                    raise FormatError(f"{path}, line {number} is longer than {_LINE} bytes", "one explanation a line")
                if line.strip():
                    yield f"{path}, line {number}", parse_json(line)
    except FormatError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"cannot read {path} after line {number}: {error}", "a .jsonl or .jsonl.gz file") from error
    except ValueError as error:
        raise FormatError(f"{path}, line {number} is not JSON: {error}", "one JSON object a line") from error
