"""Corpora: the documents of text files, tables and data sets, one after another.

The suffix of a file tells how it is read, in any case, and compressed with .gz, .bz2 or .xz too.

    read_documents("stories.txt")                          a document a line
    read_documents("stories.parquet", field="story")       a column of .parquet, .csv or .tsv
    read_documents("stories.jsonl.gz")                     the field "text" of JSON rows
    as_documents(load_dataset("me/stories")["train"])      rows of the datasets library
"""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO

from fgsteer.errors import DataError
from fgsteer.storage.json_files import parse_json

Row = tuple[str, object]  # where it stands, and what it is: a text, or an object of fields
FIELD = "text"
_NAMED = "field= (in a command --field) names the field that holds the text"
_COMPRESSED: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_LARGEST_CELL = 2**31 - 1  # characters of one cell of a .csv file, which may be a whole book


def _lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield f"{path}, line {number}", line.strip()


def _json_lines(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        if line:
            try:
                yield where, parse_json(str(line))
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}", "one JSON object a line") from error


def _json(path: Path) -> Iterator[Row]:
    """The items of a list, or the rows of an object of columns."""
    with _open(path) as file:
        try:
            value = parse_json(file.read())
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}", "a list", "name it .jsonl if each line is JSON") from error
    if isinstance(value, Mapping):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        longest = max(map(len, columns.values()), default=0)
        value = [{name: column[n] for name, column in columns.items() if n < len(column)} for n in range(longest)]
    if not isinstance(value, list) or not value:
        raise DataError(f"{path} holds no list", "a list of objects or of texts, or an object of columns")
    for number, row in enumerate(value, 1):
        yield f"{path}, row {number}", row


def _table(path: Path, separator: str) -> Iterator[Row]:
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        header = _next(reader, f"{path}, header")
        number = 0
        while (cells := _next(reader, f"{path}, row {number + 1}")) is not None:
            if not cells:
                continue  # a blank line
            number += 1
            where = f"{path}, row {number}"
            if header is None or len(cells) != len(header) or len(set(header)) < len(header):
                raise DataError(
                    f"{where} has {len(cells)} cells under the header {header}",
                    "a header of different names, and as many cells in every row",
                    "put quotes around texts that hold the separator",
                )
            yield where, dict(zip(header, cells, strict=True))


def _next(reader: Iterator[list[str]], where: str) -> list[str] | None:
    """The next row of a table, whatever the size of its cells. Raises DataError."""
    limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{where} is damaged: {error}", "quotes that are closed, and doubled inside quotes") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, fields: Collection[str]) -> Iterator[Row]:
    """Objects of these columns, or of all where it has none of them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} without pyarrow", "pyarrow, which reads Parquet", "pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                raise DataError(f"{path} has columns that are named twice: {', '.join(twice)}", "each name once")
            columns = [name for name in names if name in fields] or None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} after row {number}: {error}", "a Parquet file") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, separator=","),
    ".tsv": partial(_table, separator="\t"),
}


def _open(path: Path, newline: str | None = None) -> IO[str]:
    """A UTF-8 file, uncompressed where its suffix says that it is compressed."""
    unpack: Callable[..., IO[str]] = _COMPRESSED.get(path.suffix.lower(), open)
    return unpack(path, "rt", encoding="utf-8-sig", newline=newline)


def file_kind(path: str | Path) -> str:
    """The suffix that tells how a file is read, in lower case: ".jsonl" of C.JSONL.GZ."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_rows(path: str | Path, fields: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a file with where each stands: lines of .txt, else what JSON holds, or objects of columns.

    ``fields`` are what is wanted of .parquet. Raises DataError: at once for a suffix that is not read, later
    naming file and row.
    """
    kind = file_kind(path)
    if kind == ".parquet":
        return _typed(Path(path), _parquet(Path(path), fields))
    if kind not in _READERS:
        known = ", ".join([*_READERS, ".parquet"])
        raise DataError(
            f"{path} ends in {kind!r}" if kind else f"{path} has no suffix",
            f"{known}; all but .parquet also with {', '.join(_COMPRESSED)} after it",
            "rename a plain text file of a document a line to .txt",
        )
    return _typed(Path(path), _READERS[kind](Path(path)))


def _typed(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", "a file that can be read") from error
    except (UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}", "UTF-8 text, whole if compressed") from error


def read_documents(path: str | Path, field: str = FIELD) -> Iterator[str]:
    """Documents of a corpus file, one at a time; those of white space alone are left out.

    Args:
        path: ``.txt`` (a document a line), ``.jsonl`` or ``.ndjson`` (an object or a text a line), ``.json``
            (a list of objects or of texts, or an object of columns), ``.csv`` or ``.tsv`` (with a header), or
            ``.parquet``, in upper or lower case; all but the last may be compressed (``.gz``, ``.bz2``, ``.xz``).
        field: the field or column that holds the text.

    Returns:
        An iterator that reads as it goes.

    Raises:
        DataError: at once for a suffix that is not read; later for a file that cannot be read, is not UTF-8
            or is damaged, and for a row without the field or with another value than a text, naming file and row.
    """
    return (text for text in _texts(read_rows(path, (field,)), field) if text.strip())


def as_documents(texts: Iterable[object], field: str = FIELD) -> Iterator[str]:
    """Documents of an iterable of texts, or of rows that hold one in a field, as those of the ``datasets`` library.

    Raises DataError at once for one text or path, the splits of a data set or a data frame, whose items are
    not documents; later naming the row.
    """
    kind = type(texts).__name__
    if isinstance(texts, Mapping):
        raise DataError(f"texts={{{', '.join(map(repr, texts)):.60}}}, a {kind}", "texts, or one split of a data set")
    if hasattr(texts, "columns"):
        raise DataError(f"texts of type {kind}", "texts", f"pass one column, as frame[{field!r}]")
    if isinstance(texts, str | bytes | Path) or not isinstance(texts, Iterable):
        hint = "pass a list of texts, or fgsteer.read_documents(path)"
        raise DataError(f"texts={texts!r:.60} of type {kind}", "an iterable of texts", hint)
    return _texts(((f"text {number}", row) for number, row in enumerate(texts)), field)


def _texts(rows: Iterable[Row], field: str) -> Iterator[str]:
    """The texts of rows. Raises DataError."""
    for where, row in rows:
        text, place = row, where
        if isinstance(row, Mapping):
            text, place = row.get(field), f"{where}, field {field!r}"
            if field not in row:
                fields = ", ".join(map(repr, row)) or "none"
                raise DataError(f"{where} has no field {field!r}", f"one of its fields: {fields}", _NAMED)
        if not isinstance(text, str):
            value = "null" if text is None else f"{type(text).__name__} {text!r:.40}"
            raise DataError(f"{place} is {value}", "a text", _NAMED)
        yield text
