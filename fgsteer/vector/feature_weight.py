"""One feature of a vector, as tables show it."""

from __future__ import annotations

from dataclasses import dataclass

from fgsteer.display.tables import Cell, Share
from fgsteer.errors.reprs import OneLineRepr


@dataclass(frozen=True, repr=False)
class FeatureWeight(OneLineRepr):
    """One feature of a vector.

    Args:
        id: The feature's number in its SAE.
        weight: Its weight in the vector, in units of feature activation.
        density: The share of tokens on which it fires, where known.
        label: What it is said to mean, "" where no label is known.
    """

    id: int
    weight: float
    density: float | None = None
    label: str = ""

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        density = None if self.density is None else Share(self.density)
        return {"feature": self.id, "label": self.label, "weight": float(self.weight), "fires on": density}
