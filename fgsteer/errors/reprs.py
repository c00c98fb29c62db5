"""One-line reprs of objects that hold tensors, texts or many entries.

@dataclass(frozen=True, repr=False)
class Moments(OneLineRepr): ...              Moments(count=20, mean=float64 (576,), …)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, Field, fields
from typing import Any

MAX_CHARACTERS = 240  # of a repr, about; the fields that come after are left out
MAX_TEXT_CHARACTERS = 40  # of a text in it
MAX_SHOWN_ENTRIES = 3  # of a collection


class OneLineRepr:
    """Base of dataclasses whose repr is one short line: fields that are not at their default, tensors by shape."""

    __slots__ = ()

    def __repr__(self) -> str:
        shown: list[str] = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.repr and not _is_default(field, value):
                shown.append(f"{field.name}={short_repr(value)}")
            if sum(map(len, shown)) > MAX_CHARACTERS - 2 * MAX_TEXT_CHARACTERS:
                shown.append("…")
                break
        return f"{type(self).__name__}({', '.join(shown)})"


def short_repr(value: Any) -> str:
    """Describe a value in a few dozen characters, on one line."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        text = repr(value if len(value) <= MAX_TEXT_CHARACTERS else f"{value[: MAX_TEXT_CHARACTERS - 1]}…")
        return text if len(text) <= 2 * MAX_TEXT_CHARACTERS else f"text of {len(value)} characters"
    if isinstance(value, Mapping | Sequence | Set):
        return _entries(value)
    if value is None or isinstance(value, bool | int):
        return str(value)
    text = str(value)
    return text if 0 < len(text) <= MAX_TEXT_CHARACTERS and text.isprintable() else type(value).__name__


def _entries(value: Mapping[Any, Any] | Sequence[Any] | Set[Any]) -> str:
    """Describe a collection by its entries where they are few and plain, else by their number."""
    mapped, text = isinstance(value, Mapping), ""
    if len(value) <= MAX_SHOWN_ENTRIES and all(isinstance(entry, str | int | float | None) for entry in _flat(value)):
        entries = [f"{k!r}: {short_repr(v)}" for k, v in value.items()] if mapped else [short_repr(v) for v in value]  # type: ignore[union-attr]
        text = ", ".join(entries)
    left, right = ("{", "}") if mapped else ("(", ")")
    number = f"{len(value)} {'entry' if len(value) == 1 else 'entries'}"
    return f"{left}{text if len(text) <= MAX_TEXT_CHARACTERS and (text or not value) else number}{right}"


def _flat(value: Any) -> Any:
    """Return the entries of a collection, for a mapping its keys and values."""
    return [*value, *value.values()] if isinstance(value, Mapping) else value


def _is_default(field: Field[Any], value: Any) -> bool:
    """Tell whether a field has its default value."""
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is MISSING or hasattr(value, "shape"):
        return False
    return type(value) is type(default) and bool(value == default)
