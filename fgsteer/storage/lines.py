"""Files of lines, plain or compressed by gzip (.gz): read a line at a time, within bounds, and compressed whole.

for line in read_lines("bench.jsonl.gz"): ...
write_lines("copy.jsonl.gz", lines)
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError
from fgsteer.storage.atomic import atomic_write

SUFFIX = ".gz"
MAX_LINE_BYTES = 1 << 24  # of a line of a compressed file: far more than a header or a generated text takes
# A file of records shrinks to a seventh or so. One that grows beyond both limits was made to fill the memory.
MAX_EXPANSION = 200
MAX_SMALL_BYTES = 1 << 26  # up to which a file may grow however small it is


def read_lines(path: str | Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file, each with its line break, with one in memory at a time.

    Args:
        path: The file, which is taken for a compressed one where its name ends with .gz.
        max_line_bytes: The longest line of a compressed file.

    Raises:
        FormatError: The file cannot be read, or a compressed one is damaged, or far larger than its size suggests.
    """
    path, number, total = Path(path), 0, 0
    try:
        if path.suffix.lower() != SUFFIX:
            with open(path, "rb") as file:
                yield from file
            return
        limit = max(MAX_SMALL_BYTES, MAX_EXPANSION * os.path.getsize(path))
        with gzip.open(path) as packed:
            while line := packed.readline(max_line_bytes + 1):
                number, total = number + 1, total + len(line)
                if len(line) > max_line_bytes:
                    raise FormatError(f"{path}, line {number} is longer than {max_line_bytes} bytes.", "shorter lines")
                if total > limit:
                    raise FormatError(
                        f"{path} holds more than {limit} bytes, far more than its size suggests.",
                        "a file of records",
                        "unpack it with gzip -d if you trust it",
                    )
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).removesuffix(".")
        raise FormatError(f"Cannot read {path} after line {number}: {reason}.", "a whole file of gzip") from error
    except OSError as error:
        change = "check the name of the file"
        raise FormatError(f"Cannot read {path}: {error.strerror or error}.", change=change) from error


def as_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def write_lines(path: str | Path, lines: Iterable[bytes]) -> None:
    """Write lines, each with its line break, to a file, atomically; compressed where its name ends with .gz.

    A compressed file has the same bytes whenever it is made. Raises FormatError for one that cannot be written.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        if Path(path).suffix.lower() != SUFFIX:
            file.writelines(lines)
            return
        with gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
            packed.writelines(lines)


def compress(source: str | Path, target: str | Path) -> None:
    """Write a copy of a file of lines to a target that ends with .gz. Raises FormatError as ``write_lines`` does."""
    with open(source, "rb") as plain:
        write_lines(target, plain)


def decompress(source: str | Path, target: str | Path) -> None:
    """Write a plain copy of a compressed file. Raises FormatError as ``read_lines`` and ``write_lines`` do."""
    write_lines(target, read_lines(source))
