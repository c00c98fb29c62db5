"""What a resumable run noted when it began, compared with what it would note now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import PairingError
from fgsteer.errors.escaping import escape_text

SHOWN = 4  # differences that an error tells


TEXT = 40  # characters of a value in it


def check_same_plan(where: str | Path, kept: Any, now: Mapping[str, Any]) -> None:
    """Raises PairingError, saying what differs, unless what a run noted when it began is what it would note now."""
    told = json.loads(json.dumps(now))
    if kept == told:
        return
    found = list(_differences(kept, told)) if isinstance(kept, dict) else []
    change = "start over with fresh=True, which removes what is there; or write elsewhere"
    if not isinstance(kept, dict) or ("versions" in told and "versions" not in kept):
        raise PairingError(
            f"{where} is a run of an earlier version, which noted less of what it was made of",
            "a run that says what its model, tokenizer, texts and settings were",
            change,
        )
    shown = ", ".join(f"{name} was {old} and is {new}" for name, old, new in found[:SHOWN])
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise PairingError(f"{where} holds a run of something else: {shown}{more}", "what it was begun with", change)


def _differences(kept: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, old, new) of each value that differs, shortened; lists of one length entry by entry."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in sorted({*kept, *now}):
            yield from _differences(kept.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for number, pair in enumerate(zip(kept, now, strict=True)):
            yield from _differences(*pair, f"{name}[{number}]")
    elif kept != now:
        old, new = (value if isinstance(value, str) else json.dumps(value) for value in (kept, now))
        alike = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        start = max(0, alike - TEXT // 2)
        yield f"{json.dumps(name)[1:TEXT]}".rstrip('"'), _short(old, start), _short(new, start)


def _short(text: str, start: int) -> str:
    """Some of a text from where it differs, on one line; of a hash its beginning."""
    if len(text) == 64 and not start:
        return text[:12]
    end = start + TEXT
    return ("…" if start else "") + escape_text(text[start:end], keep="") + ("…" if len(text) > end else "")
