"""Pairs of answers that were written so far: a file of lines that only grows, from which a stopped run goes on.

The first line says what the run is made of, and each of the others holds the two answers to one prompt. A line that was
cut short by a kill is passed over, and written anew.

    kept = WorkFile("pirate.work.jsonl", plan)
    kept.add(3, "Arr, the sky be blue!", "The sky is blue.")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, TypeGuard

from fgsteer.data.chat import check_unicode
from fgsteer.errors import FormatError
from fgsteer.storage.atomic import append_bytes
from fgsteer.storage.json_files import parse_json
from fgsteer.storage.lines import as_line, read_lines
from fgsteer.storage.plans import check_same_plan
from fgsteer.storage.targets import file_target

LONGEST_ANSWER_CHARACTERS = 20_000
_KIND = "described contrast"


class WorkFile:
    """Pairs of answers by the number of their prompt, in memory and in a file.

    Args:
        path: The file, or None to keep them in memory only.
        plan: What the answers depend on; only a run of the same plan goes on.
        fresh: Whether to start over.

    Raises:
        FormatError: The file cannot be read or written, or is not such a file.
        PairingError: The file holds a run of another plan.
    """

    def __init__(self, path: str | Path | None, plan: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.pairs: dict[int, tuple[str, str]] = {}
        self._path = None if path is None else file_target(path)
        self._lock = Lock()
        self._torn = False
        if self._path is None:
            return
        if self._path.is_file() and not fresh:
            self._load(self._path, plan)
        if fresh and self._path.is_file():
            self._path.unlink()
        if not self._path.is_file():
            append_bytes(self._path, as_line({"fgsteer": _KIND, "plan": dict(plan)}))

    def _load(self, path: Path, plan: Mapping[str, Any]) -> None:
        lines = read_lines(path)
        header = _parsed(next(lines, b""))
        if header.get("fgsteer") != _KIND:
            raise FormatError(f"{path}, which is no such file", "a work file of describe_contrast", "name another file")
        check_same_plan(path, header.get("plan"), plan)
        last = b"\n"
        for last in lines:
            row = _parsed(last)
            number, positive, negative = (row.get(key) for key in ("number", "positive", "negative"))
            if isinstance(number, int) and is_answer(positive) and is_answer(negative):
                self.pairs[number] = positive, negative
        self._torn = not last.endswith(b"\n")

    def add(self, number: int, positive: str, negative: str) -> None:
        """Keep the two answers to a prompt, first on disk, then in memory. Raises FormatError."""
        with self._lock:
            if self._path is not None:
                line = as_line({"number": number, "positive": positive, "negative": negative})
                append_bytes(self._path, b"\n" + line if self._torn else line)
                self._torn = False
            self.pairs[number] = positive, negative


def is_answer(value: object) -> TypeGuard[str]:
    """Whether a value can be an answer: a Unicode text of bounded length; it may be empty."""
    if not isinstance(value, str) or len(value) > LONGEST_ANSWER_CHARACTERS:
        return False
    try:
        check_unicode(value, "an answer")
    except ValueError:
        return False
    return True


def _parsed(line: bytes) -> dict[str, Any]:
    """A line as an object; an empty one for a line that is none."""
    try:
        value = parse_json(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
