"""Corpora: the documents of text files, tables and data sets, one after another.

The suffix of a file, in upper or lower case, decides how it is read. Files may be compressed (.gz, .bz2, .xz).

    read_documents("stories.txt")                          a document on each line
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

from fgsteer.data.chat import Text, check_text
from fgsteer.errors import DataError
from fgsteer.errors.wording import a
from fgsteer.storage.json_files import parse_json

Row = tuple[str, object]  # where it is, for messages, and its value: a text, or an object of fields
FIELD, MESSAGES = "text", "messages"
_PASS_FIELD = "pass field= (to a command --field), the field that holds the text"
_COMPRESSED: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MAX_CELL_CHARACTERS = 2**31 - 1  # of a .csv file: one cell may be a whole book


def _lines(path: Path) -> Iterator[Row]:
    """Yield the lines of a file."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield f"{path}, line {number}", line.strip()


def _json_lines(path: Path) -> Iterator[Row]:
    """Yield the value on each line that is not blank."""
    for where, line in _lines(path):
        if line:
            try:
                yield where, parse_json(str(line))
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}.", "one JSON object on each line") from error


def _json(path: Path) -> Iterator[Row]:
    """Yield the items of a list, or the rows of an object of columns."""
    with _open(path) as file:
        try:
            value = parse_json(file.read())
        except ValueError as error:
            raise DataError(
                f"{path} is not JSON: {error}.", "one JSON list", "if each line is JSON, rename the file to .jsonl"
            ) from error
    if isinstance(value, Mapping):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        longest = max(map(len, columns.values()), default=0)
        value = [{name: column[n] for name, column in columns.items() if n < len(column)} for n in range(longest)]
    if not isinstance(value, list) or not value:
        raise DataError(f"{path} holds no list.", "a list of objects or of texts, or an object of columns")
    for number, row in enumerate(value, 1):
        yield f"{path}, row {number}", row


def _table(path: Path, separator: str) -> Iterator[Row]:
    """Yield the rows of a table as objects, by the names in its header."""
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
                    f"{where} has {len(cells)} cells under the header {header}.",
                    "a header of different names, and as many cells in every row as in the header",
                    "put quotes around texts that hold the separator",
                )
            yield where, dict(zip(header, cells, strict=True))


def _next(reader: Iterator[list[str]], where: str) -> list[str] | None:
    """Return the next row of a table, whatever the size of its cells. Raises DataError."""
    limit = csv.field_size_limit(_MAX_CELL_CHARACTERS)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{where} is damaged: {error}.", "quotes that are closed, and doubled inside quotes") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, fields: Collection[str]) -> Iterator[Row]:
    """Yield rows as objects of these columns, or of all where the file has none of them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow, which is not installed.", change="install it with pip install pyarrow"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                raise DataError(f"{path} has several columns named {', '.join(twice)}.", "columns of different names")
            columns = [name for name in names if name in fields] or None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"Cannot read {path} after row {number}: {error}.", "a Parquet file") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, separator=","),
    ".tsv": partial(_table, separator="\t"),
}


def _open(path: Path, newline: str | None = None) -> IO[str]:
    """Open a UTF-8 file, which is uncompressed where its suffix says that it is compressed."""
    unpack: Callable[..., IO[str]] = _COMPRESSED.get(path.suffix.lower(), open)
    return unpack(path, "rt", encoding="utf-8-sig", newline=newline)


def file_kind(path: str | Path) -> str:
    """Return the suffix that decides how a file is read, in lower case: ".jsonl" of C.JSONL.GZ."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_rows(path: str | Path, fields: Collection[str] = ()) -> Iterator[Row]:
    """Return an iterator of the rows of a file: lines of .txt, what JSON holds, or objects of columns.

    ``fields`` are the columns that are read of a .parquet file. Raises DataError: at once for a suffix that is not
    known, later naming file and row.
    """
    kind = file_kind(path)
    if kind == ".parquet":
        return _as_data_errors(Path(path), _parquet(Path(path), fields))
    if kind not in _READERS:
        known = ", ".join([*_READERS, ".parquet"])
        raise DataError(
            f"{path}, which ends in {kind!r}" if kind else f"{path}, which has no suffix",
            f"a file that ends in {known}, or, except .parquet, in one of these and {', '.join(_COMPRESSED)}",
            "rename a text file with a document on each line to .txt",
        )
    return _as_data_errors(Path(path), _READERS[kind](Path(path)))


def _as_data_errors(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows. Raises DataError for what reading the file raises."""
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", "a file that can be read") from error
    except (UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"Cannot read {path}: {error}.", "text in UTF-8, and nothing cut off") from error


def read_documents(path: str | Path, field: str = FIELD) -> Iterator[str]:
    """Read the documents of a corpus file, one at a time; those of white space alone are left out.

    Args:
        path: ``.txt`` (a document on each line), ``.jsonl`` or ``.ndjson`` (an object or a text on each), ``.json``
            (a list of objects or of texts, or an object of columns), ``.csv`` or ``.tsv`` (with a header), or
            ``.parquet``, in upper or lower case; all but the last may be compressed (``.gz``, ``.bz2``, ``.xz``).
        field: The field or column that holds the text.

    Returns:
        An iterator of texts, which reads the file as it goes.

    Raises:
        DataError: At once for a suffix that is not known; later for a file that cannot be read, is not UTF-8
            or is damaged, and for a row without the field or with another value than a text, naming file and row.
    """
    return (text for text in _texts(read_rows(path, (field,)), field) if text.strip())


def read_texts(path: str | Path, field: str = FIELD, messages: str = MESSAGES) -> Iterator[Text]:
    """Read the texts of a corpus file, which may be conversations.

    Args:
        path: As for ``read_documents``.
        field: The field or column that holds the text.
        messages: The field that holds a conversation, a list of chat messages, in rows that have no text.

    Returns:
        An iterator of strings and of conversations, which reads the file as it goes.

    Raises:
        DataError: As for ``read_documents``.
    """
    for where, row in read_rows(path, (field, messages)):
        if isinstance(row, Mapping) and row.get(field) is None and row.get(messages) is not None:
            yield check_text(row[messages], where)
        else:
            yield from (text for text in _texts([(where, row)], field) if text.strip())


def as_documents(texts: Iterable[object], field: str = FIELD) -> Iterator[str]:
    """Yield the documents of an iterable of texts, or of rows with a field, as the ``datasets`` library has them.

    Raises DataError at once for a single text or path, the splits of a data set or a data frame, whose items are
    not documents; later naming the row.
    """
    kind = type(texts).__name__
    if isinstance(texts, Mapping):
        raise DataError(
            f"{a(kind)} of {', '.join(map(repr, texts)):.60} for texts",
            "texts, or one split of a data set",
            "pass one of its values",
        )
    if hasattr(texts, "columns"):
        raise DataError(f"{a(kind)} for texts", "an iterable of texts", f"pass one column, as frame[{field!r}]")
    if isinstance(texts, str | bytes | Path) or not isinstance(texts, Iterable):
        hint = "pass a list of texts, or fgsteer.read_documents(path)"
        raise DataError(f"{a(kind)}, {texts!r:.60}, for texts", "an iterable of texts", hint)
    return _texts(((f"text {number}", row) for number, row in enumerate(texts)), field)


def _texts(rows: Iterable[Row], field: str) -> Iterator[str]:
    """Yield the texts of rows. Raises DataError."""
    for where, row in rows:
        text, place = row, where
        if isinstance(row, Mapping):
            text, place = row.get(field), f"{where}, field {field!r}"
            if field not in row:
                fields = ", ".join(map(repr, row)) or "none"
                raise DataError(
                    f"{where}, which has the fields {fields}", f"a row with the field {field!r}", _PASS_FIELD
                )
        if not isinstance(text, str):
            value = "null" if text is None else f"{a(type(text).__name__)}, {text!r:.40},"
            raise DataError(f"{value} in {place}", "a text", _PASS_FIELD)
        yield text
