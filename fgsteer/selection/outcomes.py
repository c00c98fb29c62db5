"""How answers change: how many a steered model gets right that it did not, and the other way.

change_of([0, 1, 1, 0], [1, 1, 0, 0]).side_effect_ratio           0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fgsteer.display.tables import Cell
from fgsteer.errors import DataError
from fgsteer.errors.reprs import OneLineRepr


@dataclass(frozen=True, repr=False)
class OutcomeChange(OneLineRepr):
    """Rewards of answers to the same prompts, before and after.

    Args:
        items: The number of prompts.
        before: The mean reward without steering.
        after: The mean reward with it.
        improved: How many answers got a higher reward.
        worsened: How many got a lower one.
    """

    items: int
    before: float
    after: float
    improved: int
    worsened: int

    @property
    def side_effect_ratio(self) -> float | None:
        """``worsened/(worsened + improved)``, CorrSteer's SER (arXiv 2508.12535); None where nothing changed."""
        changed = self.worsened + self.improved
        return self.worsened / changed if changed else None

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {
            "items": self.items,
            "before": float(self.before),
            "after": float(self.after),
            "improved": self.improved,
            "worsened": self.worsened,
            "SER": self.side_effect_ratio,
        }


def change_of(before: Sequence[float], after: Sequence[float]) -> OutcomeChange:
    """How rewards change. Raises DataError for other numbers of them, or none."""
    if len(before) != len(after) or not len(before):
        raise DataError(f"{len(before)} rewards before and {len(after)} after", "the rewards of the same prompts")
    pairs = list(zip(before, after, strict=True))
    return OutcomeChange(
        len(pairs),
        sum(before) / len(pairs),
        sum(after) / len(pairs),
        sum(new > old for old, new in pairs),
        sum(new < old for old, new in pairs),
    )
