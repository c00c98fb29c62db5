"""Contrast statistics: what one streaming pass keeps of two sides of texts, for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.display.tables import Cell, table_html, title_html
from fgsteer.errors import PairingError
from fgsteer.errors.reprs import MAX_SHOWN_ENTRIES, OneLineRepr
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.moments import Moments
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors

Space = Literal["residual", "feature"]
TOP_DIFFERENCES = 5  # features that a notebook shows


@dataclass(frozen=True, eq=False, repr=False)
class Contrast(OneLineRepr):
    """Moments of the two sides, in one space at one hookpoint. Raises PairingError for sides of two widths."""

    positive: Moments
    negative: Moments

    def __post_init__(self) -> None:
        if self.positive.mean.shape != self.negative.mean.shape:
            raise PairingError(f"sides of {len(self.positive.mean)} and {len(self.negative.mean)}", "one width")

    def __add__(self, other: Contrast) -> Contrast:
        return Contrast(self.positive + other.positive, self.negative + other.negative)

    @property
    def difference(self) -> Float[Tensor, " n"]:
        """mean⁺ − mean⁻ (n,), float64."""
        return self.positive.mean - self.negative.mean


@dataclass(frozen=True, eq=False, repr=False)
class Pooled(OneLineRepr):
    """Mean activation of every example, float32: ``positive (n⁺, d_model)`` and ``negative (n⁻, d_model)``.

    The first ``pairs`` of both sides are pairs, in the same order; so they stay when two are added.
    """

    positive: Float[Tensor, "positives d_model"]
    negative: Float[Tensor, "negatives d_model"]
    pairs: int = 0

    def __add__(self, other: Pooled) -> Pooled:
        def join(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a[: self.pairs], b[: other.pairs], a[self.pairs :], b[other.pairs :]])

        pairs = self.pairs + other.pairs
        return Pooled(join(self.positive, other.positive), join(self.negative, other.negative), pairs)


@dataclass(frozen=True, eq=False, repr=False)
class ContrastStatistics(OneLineRepr):
    """What ``collect`` read: residual contrasts by hookpoint, and the feature contrast of one SAE.

    ``reading`` says how it was read (model, SAE, token rule) and must agree when two are
    added; ``data`` lists what was read. Raises PairingError on addition otherwise. ``pooled``
    holds the residual examples themselves where they were kept, in both when two are added.
    """

    residual: Mapping[Hookpoint, Contrast]
    feature: Mapping[Hookpoint, Contrast] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[Mapping[str, Any]] = ()
    pooled: Mapping[Hookpoint, Pooled] = field(default_factory=dict)

    def __repr__(self) -> str:
        sides = next(iter(self.residual.values()), None)
        texts = "no texts" if sides is None else f"{sides.positive.count} + {sides.negative.count} texts"
        places = (
            ", ".join(map(str, self.residual))
            if len(self.residual) <= MAX_SHOWN_ENTRIES
            else f"{len(self.residual)} hookpoints"
        )
        features = f", features at {', '.join(map(str, self.feature))}" if self.feature else ""
        return f"ContrastStatistics({texts} at {places or 'no hookpoint'}{features})"

    def _repr_html_(self) -> str:
        rows: list[list[Cell]] = []
        for space, table in (("residual", self.residual), ("feature", self.feature)):
            for at, contrast in table.items():
                difference = contrast.difference
                largest = difference.abs().topk(min(TOP_DIFFERENCES, len(difference))).indices.tolist()
                top = ", ".join(f"{j}: {float(difference[j]):+.3g}" for j in largest) if space == "feature" else ""
                counts = contrast.positive.count, contrast.negative.count
                rows.append([str(at), space, *counts, len(difference), float(difference.norm()), top])
        headings = ["hookpoint", "space", "positive texts", "negative texts", "width", "‖mean⁺ − mean⁻‖"]
        names = ", ".join(dict.fromkeys(str(entry.get("name") or "") for entry in self.data))
        title = f"ContrastStatistics of {names}" if names else "ContrastStatistics"
        return title_html(title) + table_html([*headings, "largest differences by feature"], rows)

    def __add__(self, other: ContrastStatistics) -> ContrastStatistics:
        ours, theirs = _identity(self.reading), _identity(other.reading)
        differing = {
            key: (ours.get(key), theirs.get(key)) for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)
        }
        if differing or set(self.residual) != set(other.residual) or set(self.feature) != set(other.feature):
            raise PairingError(
                f"statistics that differ in {differing or 'hookpoints'}", "the same reading on both sides"
            )
        return ContrastStatistics(
            {at: self.residual[at] + other.residual[at] for at in self.residual},
            {at: self.feature[at] + other.feature[at] for at in self.feature},
            self.reading,
            (*self.data, *other.data),
            {at: self.pooled[at] + other.pooled[at] for at in self.pooled if at in other.pooled},
        )

    def at(self, space: Space, hookpoint: Hookpoint | str | int | None = None) -> tuple[Hookpoint, Contrast]:
        """The contrast of a space at a hookpoint, by default the only one (or the SAE's).

        Raises PairingError naming what was collected.
        """
        table = self.residual if space == "residual" else self.feature
        if hookpoint is None and len(table) != 1 and len(self.feature) == 1:
            hookpoint = next(iter(self.feature))
        if space == "feature" and not table:
            raise PairingError(
                "statistics without features, as they were collected without an SAE",
                "statistics that hold feature activations",
                "collect again with sae=, the SAE whose features are to be selected",
            )
        at = Hookpoint.parse(hookpoint) if hookpoint is not None else next(iter(table)) if len(table) == 1 else None
        if at is None or at not in table:
            raise PairingError(
                f"{space} statistics at {at or 'an unnamed hookpoint'}",
                f"one of {', '.join(map(str, table))}, where they were collected",
                "name it with hookpoint=, or collect again with hookpoints=",
            )
        return at, table[at]

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole."""
        tensors, counts = {}, {}
        for space, table in (("residual", self.residual), ("feature", self.feature)):
            for at, contrast in table.items():
                for side in ("positive", "negative"):
                    moments: Moments = getattr(contrast, side)
                    key = f"{space}/{at}/{side}"
                    counts[key] = moments.count
                    for part in ("mean", "m2", "fired"):
                        tensors[f"{key}/{part}"] = getattr(moments, part)
        for at, kept in self.pooled.items():
            tensors |= {f"pooled/{at}/positive": kept.positive, f"pooled/{at}/negative": kept.negative}
        header = {
            "reading": dict(self.reading),
            "data": [dict(d) for d in self.data],
            "counts": counts,
            "pooled": {str(at): kept.pairs for at, kept in self.pooled.items()},
        }
        write_tensors(path, tensors, kind="statistics", header=header)

    @classmethod
    def load(cls, path: str | Path) -> ContrastStatistics:
        """Read a file that ``save`` wrote. Raises FormatError."""
        tensors, header = read_tensors(path, kind="statistics")
        tables: dict[str, dict[Hookpoint, dict[str, Moments]]] = {"residual": {}, "feature": {}}
        with refuse_damaged(path, "a file written by ContrastStatistics.save"):
            for key, count in header["counts"].items():
                space, name, side = key.split("/")
                parts = {part: tensors[f"{key}/{part}"].double() for part in ("mean", "m2", "fired")}
                moments = Moments(int(count), **parts)
                if not 1 <= moments.count < 2**53 or {part.shape for part in parts.values()} != {
                    (moments.mean.numel(),)
                }:
                    raise ValueError(f"{key}: count {count} and shapes that do not agree")
                tables[space].setdefault(Hookpoint.parse(name), {})[side] = moments
            built = {s: {at: Contrast(**sides) for at, sides in table.items()} for s, table in tables.items()}
            pooled = {
                Hookpoint.parse(name): _read_pooled(name, int(pairs), tensors, built["residual"])
                for name, pairs in header.get("pooled", {}).items()
            }
            return cls(
                built["residual"],
                built["feature"],
                _read_reading(header["reading"]),
                tuple(dict(entry) for entry in header["data"]),
                pooled,
            )


def _read_reading(reading: Any) -> dict[str, Any]:
    """How they were read, with objects for model and SAE where they are named. Raises ValueError."""
    model, sae = reading.get("model"), reading.get("sae")
    named = model is None or isinstance(model.get("name"), str | None)
    if not named or not (sae is None or isinstance(sae["sha256"], str)):
        raise ValueError(f"reading {reading!r:.200}")
    return dict(reading)


def _read_pooled(
    name: str, pairs: int, tensors: Mapping[str, Tensor], residual: Mapping[Hookpoint, Contrast]
) -> Pooled:
    """The examples kept at a hookpoint. Raises ValueError when they are not those that its moments counted."""
    contrast = residual[Hookpoint.parse(name)]
    kept = Pooled(tensors[f"pooled/{name}/positive"].float(), tensors[f"pooled/{name}/negative"].float(), pairs)
    for rows, moments in ((kept.positive, contrast.positive), (kept.negative, contrast.negative)):
        if rows.shape != (moments.count, len(moments.mean)) or not 0 <= pairs <= moments.count:
            raise ValueError(f"pooled/{name} of shape {tuple(rows.shape)} with {pairs} pairs")
    return kept


def _identity(reading: Mapping[str, Any]) -> dict[str, Any]:
    """A reading with its SAE named by hash alone: one SAE may have been loaded from two places."""
    sae = reading.get("sae")
    return {**reading, "sae": sae.get("sha256") if isinstance(sae, Mapping) else sae}
