"""JSON that is read without trust: no key twice, nothing nested too deep, and errors that name the line."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fgsteer.errors import DataError, FormatError
from fgsteer.errors.wording import a
from fgsteer.storage.atomic import atomic_write

MAX_LEVELS = 64  # of lists and objects within one another
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, atomically. Raises FormatError where the file cannot be written."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=to_plain_number) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def to_plain_number(value: Any) -> Any:
    """Turn a number of numpy or torch into one of Python, for JSON. Raises DataError for anything else."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise DataError(a(type(value).__name__), "texts, numbers, lists and objects, which JSON can hold") from None


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text that is not trusted.

    Raises ValueError, also for a key that an object has twice, and for texts that could not be printed or encoded.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_LEVELS} levels") from None
    level = [value]
    for _ in range(MAX_LEVELS):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
        if not level:
            break
    else:
        raise ValueError(f"it is nested deeper than {MAX_LEVELS} levels")
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a character
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object. Raises ValueError for a key that it has twice: one of the values would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.60} stands twice in one object")
    return value


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    """Return the values that an object or a list holds."""
    return node.values() if isinstance(node, dict) else node


def read_json(path: str | Path) -> Any:
    """Load a JSON file. Raises FormatError naming the file and the line."""
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeError as error:
        raise FormatError(f"{path} is not JSON in UTF-8: {error}.") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{path} is not JSON: {error.msg} in line {error.lineno}.") from error
    except ValueError as error:
        raise FormatError(f"{path} cannot be used: {error}.", "JSON with each key once in an object") from error


def text_sha256(value: object) -> str:
    """Hash a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
