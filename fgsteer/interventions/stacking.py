"""One intervention for each row of a batch, as few updates as possible.

updates = stack([vec.add(8.0), None, vec.ablate()])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fgsteer.interventions.kernel import Update
from fgsteer.interventions.kinds import ClampFeature, Intervention


def stack(rows: Sequence[Intervention | None]) -> list[tuple[Update, list[int]]]:
    """Updates that apply one intervention to each row, with the rows that each of them changes.

    Interventions that project share one update, in which other rows have w = 0; those that read features have one
    update each. Scopes are not looked at: callers group rows by scope first.
    """
    feature_rows: dict[int, tuple[Intervention, list[int]]] = {}
    linear: dict[int, Update] = {}
    for number, item in enumerate(rows):
        if isinstance(item, ClampFeature):
            feature_rows.setdefault(id(item), (item, []))[1].append(number)
        elif item is not None:
            linear[number] = item.update()
    updates = [(item.update(), numbers) for item, numbers in feature_rows.values()]
    if linear:
        updates.append((_stack_linear(linear, len(rows)), list(linear)))
    return updates


def _stack_linear(updates: Mapping[int, Update], count: int) -> Update:
    """Rank-one updates of some of ``count`` rows as one update; the other rows get w = 0."""
    sample = next(iter(updates.values()))
    write = torch.zeros(count, 1, sample.write.shape[-1], device=sample.write.device)
    read = torch.zeros_like(write)
    const = torch.zeros(count, 1, device=write.device)
    lam = torch.zeros_like(const)
    for number, update in updates.items():
        write[number], const[number], lam[number] = update.write[0], update.const[0], update.lam[0]
        if update.read is not None:
            read[number] = update.read[0]
    reads = any(update.read is not None for update in updates.values())
    return Update(write, const, lam, read if reads else None)
