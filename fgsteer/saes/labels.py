"""Labels: what features are said to mean, from Neuronpedia's exports or a plain {"id": "label"}.

Only files are read, nothing from the network. Neuronpedia keeps an SAE's explanations as a folder of
``batch-N.jsonl.gz``; a folder, one of its files or an older JSON export can be loaded.

    labels = load_labels("explanations/", sae)          {42: "weddings", ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.errors import FormatError, PairingError
from fgsteer.storage.json_files import parse_json, read_json
from fgsteer.storage.lines import read_lines

if TYPE_CHECKING:
    from fgsteer.saes.sae import SAE

_MAX_LINE_BYTES = 1 << 20  # of one row: ten times what an explanation with its embedding takes
_LINE_SUFFIXES = (".jsonl", ".jsonl.gz")


def load_labels(path: str | Path, sae: SAE | None = None) -> dict[int, str]:
    """Load the labels of features.

    A row has ``modelId``, ``layer``, ``index`` and ``description``. Rows are on a line each, in a JSON list, or in a
    list under ``explanations``; an object {"id": "label"} works too. Where an id has several labels the first is
    kept. Control characters become spaces.

    Args:
        path: A file, or a folder whose .jsonl and .jsonl.gz files are all read.
        sae: The SAE whose features they describe, where it is to be checked.

    Returns:
        {feature id: label}.

    Raises:
        FormatError: A row cannot be used; the error names file and row.
        PairingError: Rows are of two SAEs, of another SAE than ``sae.neuronpedia`` names, or have an id that
            ``sae`` lacks.
    """
    path = Path(path)
    expected = "" if sae is None else sae.neuronpedia
    labels: dict[int, str] = {}
    for where, feature, label, source in _labels(path):
        expected = expected or source
        if source and source != expected:
            raise PairingError(
                f"one of {source} in {where}", f"explanations of {expected} alone", "pass the explanations of one SAE"
            )
        if sae is not None and feature >= sae.d_sae:
            raise PairingError(
                f"a label of feature {feature} in {where}",
                f"features 0 to {sae.d_sae - 1}, which the SAE {sae.source} has",
                "pass the labels of this SAE",
            )
        text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
        if text:
            labels.setdefault(feature, text)
    return labels


def _labels(path: Path) -> Iterator[tuple[str, int, str, str]]:
    """Yield (where, feature, label, "modelId/layer" or "") of every row."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(_LINE_SUFFIXES))
        if not files:
            raise FormatError(f"{path} holds no .jsonl or .jsonl.gz file.", "a folder that Neuronpedia exported")
        for file in files:
            yield from _labels(file)
        return
    if path.name.endswith(_LINE_SUFFIXES):
        rows: Iterable[tuple[str, Any]] = _lines(path)
    else:
        value = read_json(path)
        if isinstance(value, dict) and not isinstance(value.get("explanations"), list):
            yield from (_parse_entry(path, key, label) for key, label in value.items())
            return
        explanations = value["explanations"] if isinstance(value, dict) else value
        if not isinstance(explanations, list) or not explanations:
            raise FormatError(f"{value!r:.60} in {path}", 'explanations, or an object {"feature id": "label"}')
        rows = ((f"{path}, row {n}", row) for n, row in enumerate(explanations, 1))
    for where, row in rows:
        yield _parse_row(where, row)


def _parse_entry(path: Path, key: str, label: object) -> tuple[str, int, str, str]:
    """Parse an entry of an object {"id": "label"}. Raises FormatError."""
    if not (key.isdecimal() and len(key) < 10) or not isinstance(label, str):
        raise FormatError(f"{key!r:.40}: {label!r:.60} in {path}", 'an object {"feature id": "label"}')
    return f"{path}, key {key!r}", int(key), label, ""


def _parse_row(where: str, row: object) -> tuple[str, int, str, str]:
    """Parse an explanation. Raises FormatError."""
    fields = row if isinstance(row, dict) else {}
    index, label = str(fields.get("index", "")), fields.get("description")
    if not (index.isdecimal() and len(index) < 10) or not isinstance(label, str | None):
        raise FormatError(f"{row!r:.80} in {where}", "an explanation with modelId, layer, index and description")
    names = [fields.get(key) for key in ("modelId", "layer")]
    source = "/".join(map(str, names)) if all(names) else ""
    return where, int(index), label or "", source


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) of every line that is not blank, one in memory at a time."""
    for number, line in enumerate(read_lines(path, _MAX_LINE_BYTES), 1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, parse_json(line)
        except ValueError as error:
            raise FormatError(f"{where} is not JSON: {error}.", "one JSON object on each line") from error
