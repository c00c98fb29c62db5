"""One intervention for each row of a batch, as few updates as possible.

updates = stack([vec.add(8.0), None, vec.ablate()])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fgsteer.interventions.base import Intervention
from fgsteer.interventions.kernel import Update

# what a row without it has of an update's part; read, plane, relative, entrywise and keep_norm are 0
UNBOUNDED = {"lo": -math.inf, "hi": math.inf}


def stack(rows: Sequence[Intervention | None]) -> list[tuple[Update, list[int]]]:
    """Updates that apply one intervention to each row, with the rows that each of them changes.

    Interventions that project share one update, in which other rows have w = 0; those that read features, or have as
    many terms as the stream is wide, have one update each. Scopes are not looked at: callers group rows by scope first.
    """
    own_rows: dict[int, tuple[Update, list[int]]] = {}
    linear: dict[int, Update] = {}
    for number, item in enumerate(rows):
        if item is None:
            continue
        if id(item) in own_rows:
            own_rows[id(item)][1].append(number)
            continue
        update = item.update()
        if update.sae is None and update.write.shape[1] < update.write.shape[2]:
            linear[number] = update
        else:
            own_rows[id(item)] = update, [number]
    updates = list(own_rows.values())
    if linear:
        updates.append((_stack_linear(linear, len(rows)), list(linear)))
    return updates


def _stack_linear(updates: Mapping[int, Update], count: int) -> Update:
    """Updates of some of ``count`` rows as one, as wide as the widest; the other rows get w = 0."""
    parts: dict[str, Any] = {}
    widest = max(update.write.shape[1] for update in updates.values())
    for name in ("write", "const", "lam", "read", "lo", "hi", "plane", "relative", "entrywise", "keep_norm"):
        values = {n: value[0] for n, update in updates.items() if (value := getattr(update, name)) is not None}
        if not values:
            continue
        sample = next(iter(values.values()))
        by_term = name not in ("plane", "relative", "entrywise", "keep_norm")  # of shape (k, …)
        shape = (widest, *sample.shape[1:]) if by_term else sample.shape
        part = sample.new_full((count, *shape), UNBOUNDED.get(name, 0))
        for number, value in values.items():
            if by_term:
                part[number, : len(value)] = value
            else:
                part[number] = value
        parts[name] = part
    return Update(**parts, of_prompt=any(update.of_prompt for update in updates.values()))
