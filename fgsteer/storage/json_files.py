"""JSON that is read without trust: no key twice, nothing nested too deep, and errors that name the line."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fgsteer.errors import DataError, FormatError

if sys.platform != "win32":
    pass

from fgsteer.storage.atomic import atomic_write

DEEPEST = 64  # levels of JSON


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def write_json(path: str | Path, value: object) -> None:
    """Write JSON whole."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=to_plain_number) + "\n"
    with atomic_write(path) as beside:
        beside.write_bytes(text.encode("utf-8", "replace"))


def to_plain_number(value: Any) -> Any:
    """A number of numpy or torch as one of Python, for JSON. Raises DataError for anything else."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise DataError(f"a {type(value).__name__} to be kept as JSON", "texts, numbers, lists and objects") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that is not trusted.

    Raises ValueError, also for a key that an object has twice, and for what later fails to print or encode.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
        if not level:
            break
    else:
        raise ValueError(f"nested deeper than {DEEPEST}")
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # refuses half a character
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError for a key that it has twice: one of the values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.60} stands twice in one object")
    return found


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises FormatError naming the file and the line."""
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeError as error:
        raise FormatError(f"{path} is not UTF-8 JSON: {error}") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}, line {error.lineno}: {error.msg}", "JSON") from error
    except ValueError as error:
        raise FormatError(f"{path}: {error}", "JSON") from error


def text_sha256(value: object) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
