"""A ranking of features: which come first, by what, out of how many, and what chance would give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.display.tables import Cell, Table
from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.saes.sae import SAE

SHOWN = 10  # features of a ranking in a notebook


@dataclass(frozen=True, repr=False)
class RankedFeature(OneLineRepr):
    """One feature of a ranking.

    Args:
        id: The feature's number in its SAE.
        score: Its score on the half that chose.
        held_out: Its score on the other half, None where there was none.
        label: What it is said to mean, "" where no label is known.
    """

    id: int
    score: float
    held_out: float | None = None
    label: str = ""

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {"feature": self.id, "label": self.label, "score": float(self.score), "held out": self.held_out}


@dataclass(frozen=True, eq=False, repr=False)
class FeatureRanking(OneLineRepr, Sequence[int]):
    """Features in the order of a score, as a sequence of ids: ``ranking[0]`` is the best, ``ranking[:8]`` are eight.

    Wherever feature ids are taken, ``ranking[:n]`` can stand.

    Attributes:
        by: What the score is, such as "max_auc".
        ids: The ids of the features that were compared, best first; of equal scores the lower id.
        scores: Their scores, in that order, float64, on the half that chose.
        held_out: Their scores on the half that did not choose, or None where nothing was held out.
        chance: The best score that as many features have by chance, None where that is not known.
        sae: The hash of the SAE.
        settings: What else the scores depend on.
        labels: What the features are said to mean.
    """

    by: str
    ids: tuple[int, ...]
    scores: Float[Tensor, " compared"]
    held_out: Float[Tensor, " compared"] | None = None
    chance: float | None = None
    sae: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        by: str,
        scores: Float[Tensor, " d_sae"],
        sae: SAE,
        *,
        candidates: Tensor | None = None,
        held_out: Float[Tensor, " d_sae"] | None = None,
        chance: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> FeatureRanking:
        """Rank features by their scores (d_sae,), largest first.

        ``candidates`` (d_sae,) marks those that are compared; scores that are nan are not.
        Raises SelectionError where there is none.
        """
        compared = ~scores.isnan() if candidates is None else candidates & ~scores.isnan()
        order = torch.sort(torch.where(compared, scores, -math.inf), descending=True, stable=True).indices
        ids = order[: int(compared.sum())]
        if not len(ids):
            raise SelectionError(
                f"no feature to rank by {by}", "at least one that fires", "check the texts and the hookpoint"
            )
        return cls(
            by,
            tuple(ids.tolist()),
            scores[ids].double(),
            None if held_out is None else held_out[ids].double(),
            chance,
            sae.sha256,
            settings or {},
            sae.labels,
        )

    @property
    def compared(self) -> int:
        """The number of features that were compared."""
        return len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return list(self.ids[index]) if isinstance(index, slice) else self.ids[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __contains__(self, value: object) -> bool:
        return value in self.ids

    @checked
    def top(self, n: int = SHOWN) -> Table[RankedFeature]:
        """The first n features with their scores, as a list that shows as a table.

        Args:
            n: The number of features; fewer are returned where fewer were compared.
        """
        check_range("n", n, 0, MAX_COUNT, whole=True)
        held_out = [None] * n if self.held_out is None else [float(x) for x in self.held_out[:n]]
        pairs = zip(self.ids[:n], self.scores[:n].tolist(), held_out, strict=False)
        return Table(RankedFeature(j, score, other, self.labels.get(j, "")) for j, score, other in pairs)

    def pairs(self) -> list[tuple[int, float]]:
        """(id, score) of every feature, best first."""
        return list(zip(self.ids, self.scores.tolist(), strict=True))

    def check(self, sae: SAE) -> FeatureRanking:
        """Return the ranking. Raises PairingError where it is of another SAE."""
        if self.sae and self.sae != sae.sha256:
            raise PairingError(
                f"a ranking of the features of SAE {self.sae[:12]}",
                f"a ranking of those of SAE {sae.sha256[:12]}",
                "rank the features of this SAE",
            )
        return self

    def about(self) -> str:
        """What the best feature is and what the ranking rests on, in words."""
        best = self.top(1)[0]
        text = f"Feature {best.id} has the best {self.by}, {best.score:.3f}, of {self.compared:,} that were compared"
        text += "" if best.held_out is None else f"; on the half that did not choose it has {best.held_out:.3f}"
        return text + ("." if self.chance is None else f". By chance the best of them would have {self.chance:.3f}.")

    def _repr_html_(self) -> str:
        return f"<p>{self.about()}</p>{self.top()._repr_html_()}"

    def as_dict(self, n: int = SHOWN) -> dict[str, Any]:
        """The first n features and what they rest on, as plain JSON."""
        return {
            "by": self.by,
            "compared": self.compared,
            "chance": self.chance,
            "settings": dict(self.settings),
            "features": [
                {"id": row.id, "score": row.score, "held_out": row.held_out, "label": row.label} for row in self.top(n)
            ],
        }
