"""Scores in the answers of a chat model, and the file that keeps them.

cache = AnswerCache("answers.jsonl")
cache.add(key, read_score('{"score": 7}'))
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from fgsteer.errors import FormatError
from fgsteer.evaluation.judges.chat_client import BrokenAnswerError
from fgsteer.storage.atomic import append_bytes
from fgsteer.storage.json_files import parse_json
from fgsteer.storage.targets import file_target

LOWEST_SCORE, HIGHEST_SCORE = 1, 10
_OBJECT = re.compile(r"\{[^{}]*\}")


def parse_score(answer: str) -> int:
    """The score in an answer: that of the last JSON object which has one, else a bare number.

    Raises BrokenAnswerError for an answer without a score from 1 to 10.
    """
    value: Any = answer
    for text in _OBJECT.findall(answer):
        with contextlib.suppress(ValueError):
            value = parse_json(text).get("score", value)
    if isinstance(value, bool) or not re.fullmatch(r"\s*\d{1,2}(\.0+)?\s*", str(value)):
        raise BrokenAnswerError(answer)
    if not LOWEST_SCORE <= (score := int(float(value))) <= HIGHEST_SCORE:
        raise BrokenAnswerError(answer)
    return score


class AnswerCache:
    """Scores by key, in memory and in a JSONL file that only grows, ``{"key": sha256, "score": 7}`` a line.

    A line that was cut short by a kill is passed over, and its question is asked again.

    Args:
        path: The file, or None to keep scores in memory only.
        parse: Finds the score in an answer, and raises BrokenAnswerError for one without.

    Raises:
        FormatError: The file cannot be read or written, or is not such a cache.
    """

    def __init__(self, path: str | Path | None = None, parse: Callable[[str], int] = parse_score) -> None:
        self.parse = parse
        self.scores: dict[str, int] = {}
        self._path = None if path is None else Path(path)
        self._lock = Lock()
        self._torn = False
        if self._path is not None:
            if os.path.isfile(self._path):
                self._load(self._path)
            else:
                file_target(self._path)  # before anything is asked

    def _load(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(
                f"Cannot read {path}: {error.strerror}.", "a file of answers that this judge wrote"
            ) from error
        for line in data.split(b"\n"):
            try:
                row = parse_json(line)
                self.scores[str(row["key"])] = self.parse(str(row["score"]))
            except (ValueError, LookupError, TypeError, BrokenAnswerError):
                continue
        self._torn = not data.endswith(b"\n") and bool(data)
        if data.count(b"\n") and not self.scores:
            raise FormatError(
                f"{path} holds no scores.",
                "a file of answers that this judge wrote",
                "name another file with cache=",
            )

    def add(self, key: str, score: int) -> None:
        """Keep a score, first on disk, then in memory. Raises FormatError."""
        with self._lock:
            if self._path is not None:
                line = json.dumps({"key": key, "score": score}) + "\n"
                append_bytes(self._path, ("\n" + line if self._torn else line).encode())
                self._torn = False
            self.scores[key] = score
