"""Compare the plan that a resumable run noted when it began with the plan that it would note now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import PairingError
from fgsteer.errors.escaping import escape_text

MAX_SHOWN_DIFFERENCES = 4
MAX_VALUE_CHARACTERS = 40  # of each value in a message


def check_same_plan(where: str | Path, noted: Any, current: Mapping[str, Any]) -> None:
    """Raise PairingError, saying what differs, unless the plan that a run noted is the current one.

    Args:
        where: The file or folder of the run, for the message.
        noted: The plan that the run noted when it began.
        current: The plan that it would note now.
    """
    plan = json.loads(json.dumps(current))
    if noted == plan:
        return
    change = "start over with fresh=True, which removes what is there; or write elsewhere"
    if not isinstance(noted, dict) or ("versions" in plan and "versions" not in noted):
        raise PairingError(
            f"{where} holds a run of an earlier version of fgsteer, which did not note all that it depends on.",
            "a run that notes its model, tokenizer, texts and settings",
            change,
        )
    raise PairingError(
        f"{where} holds a run of something else: {describe_differences(noted, plan)}.",
        "the model, tokenizer, texts and settings that the run was begun with",
        change,
    )


def describe_differences(noted: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What differs between two plans that do, the first few values of each, in words."""
    differences = list(_differences(noted, current))
    shown = [f"{name} was {old} and is {new}" for name, old, new in differences[:MAX_SHOWN_DIFFERENCES]]
    if len(differences) > MAX_SHOWN_DIFFERENCES:
        shown.append(f"and {len(differences) - MAX_SHOWN_DIFFERENCES} more")
    return ", ".join(shown)


def _differences(noted: Any, current: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (name, old, new) of each value that differs, shortened; lists of equal length entry by entry."""
    if isinstance(noted, dict) and isinstance(current, dict):
        for key in sorted({*noted, *current}):
            yield from _differences(noted.get(key), current.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(noted, list) and isinstance(current, list) and len(noted) == len(current):
        for number, pair in enumerate(zip(noted, current, strict=True)):
            yield from _differences(*pair, f"{name}[{number}]")
    elif noted != current:
        old, new = (value if isinstance(value, str) else json.dumps(value) for value in (noted, current))
        same = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        start = max(0, same - MAX_VALUE_CHARACTERS // 2)
        yield json.dumps(name)[1:MAX_VALUE_CHARACTERS].rstrip('"'), _shorten(old, start), _shorten(new, start)


def _shorten(text: str, start: int) -> str:
    """Return some of a text from ``start`` on, on one line; of a hash its beginning."""
    if len(text) == 64 and not start:
        return text[:12]
    end = start + MAX_VALUE_CHARACTERS
    return ("…" if start else "") + escape_text(text[start:end], keep="") + ("…" if len(text) > end else "")
