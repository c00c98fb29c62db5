"""Contrast statistics: what one streaming pass keeps of two sides of texts, for every method.

An example contributes the mean over its selected tokens, of the residual stream and of the SAE's feature
activations (encoded first, then averaged). Of these the moments are kept, a side each: O(d_model + d_sae)
memory, whatever the number of texts. Statistics of disjoint data add up. The examples' means themselves are
kept on request, for what moments cannot tell (``diagnose``).

    stats = collect(model, tokenizer, pairs, sae=sae)
    stats.save("stats.safetensors"); both = stats + other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.display.tables import Cell, table_html, title_html
from fgsteer.errors import PairingError
from fgsteer.errors.reprs import MAX_SHOWN_ENTRIES, OneLineRepr
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.moments import Moments, Space, key_name, load_moments, moment_tensors, parse_key
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors

TOP_DIFFERENCES = 5  # features that a notebook shows


@dataclass(frozen=True, eq=False, repr=False)
class Contrast(OneLineRepr):
    """Moments of the two sides, in one space at one hookpoint. Raises PairingError for sides of two widths."""

    positive: Moments
    negative: Moments

    def __post_init__(self) -> None:
        if self.positive.mean.shape != self.negative.mean.shape:
            raise PairingError(
                f"sides of widths {len(self.positive.mean)} and {len(self.negative.mean)}",
                "two sides of one width",
                "take both at the same hookpoint of the same model",
            )

    def __add__(self, other: Contrast) -> Contrast:
        return Contrast(self.positive + other.positive, self.negative + other.negative)

    @property
    def difference(self) -> Float[Tensor, " n"]:
        """Difference of the means, mean⁺ − mean⁻ (n,), in float64."""
        return self.positive.mean - self.negative.mean


@dataclass(frozen=True, eq=False, repr=False)
class Pooled(OneLineRepr):
    """Mean activation of every example, float32: ``positive (n⁺, d_model)`` and ``negative (n⁻, d_model)``.

    The first ``pairs`` rows of both sides are pairs, in the same order. They stay so when two are added.
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
    """What ``collect`` gives: residual contrasts by hookpoint, and the feature contrast of one SAE.

    Attributes:
        residual: The contrast of the residual stream (or of a sublayer) at each hookpoint.
        feature: The contrast of the SAE's feature activations, at the SAE's hookpoint.
        reading: How the texts were read: model, SAE, token rule. It must agree when two are added.
        data: What was read, an entry for each contrast set.
        pooled: The pooled residual activations of each text, where they were kept. A sum has them where both had them.

    Adding two merges statistics of disjoint data. Raises PairingError for statistics that were read differently.
    """

    residual: Mapping[Hookpoint, Contrast]
    feature: Mapping[Hookpoint, Contrast] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[Mapping[str, Any]] = ()
    pooled: Mapping[Hookpoint, Pooled] = field(default_factory=dict)

    def __repr__(self) -> str:
        sides = next(iter(self.residual.values()), None)
        texts = "no texts" if sides is None else f"{sides.positive.count} + {sides.negative.count} texts"
        few = len(self.residual) <= MAX_SHOWN_ENTRIES
        places = ", ".join(map(str, self.residual)) if few else f"{len(self.residual)} hookpoints"
        features = f", features at {', '.join(map(str, self.feature))}" if self.feature else ""
        return f"ContrastStatistics({texts} at {places or 'no hookpoint'}{features})"

    def _repr_html_(self) -> str:
        rows: list[list[Cell]] = []
        largest = ""
        for space, table in (("residual", self.residual), ("feature", self.feature)):
            for hookpoint, contrast in table.items():
                difference = contrast.difference
                texts = f"{contrast.positive.count} + {contrast.negative.count}"
                rows.append([str(hookpoint), space, texts, len(difference), float(difference.norm())])
                if space == "feature":
                    top = difference.abs().topk(min(TOP_DIFFERENCES, len(difference))).indices.tolist()
                    largest = ", ".join(f"{j} by {float(difference[j]):+.3g}" for j in top)
        names = ", ".join(dict.fromkeys(str(entry.get("name") or "") for entry in self.data))
        title = f"ContrastStatistics of {names}" if names else "ContrastStatistics"
        note = f"Features that differ most: {largest}." if largest else ""
        return title_html(title) + table_html(["hookpoint", "space", "texts", "width", "‖mean⁺ − mean⁻‖"], rows, note)

    def __add__(self, other: ContrastStatistics) -> ContrastStatistics:
        ours, theirs = _identify_sae_by_hash(self.reading), _identify_sae_by_hash(other.reading)
        differences = [f"{key} ({ours.get(key)!r} and {theirs.get(key)!r})" for key in _differing(ours, theirs)]
        if set(self.residual) != set(other.residual) or set(self.feature) != set(other.feature):
            differences.append("hookpoints")
        if differences:
            raise PairingError(
                f"statistics that differ in {', '.join(differences)}",
                "two statistics of the same model, SAE, token rule and hookpoints",
                "collect both with the same arguments",
            )
        return ContrastStatistics(
            {at: self.residual[at] + other.residual[at] for at in self.residual},
            {at: self.feature[at] + other.feature[at] for at in self.feature},
            self.reading,
            (*self.data, *other.data),
            {at: self.pooled[at] + other.pooled[at] for at in self.pooled if at in other.pooled},
        )

    def at(self, space: Space, hookpoint: Hookpoint | str | int | None = None) -> tuple[Hookpoint, Contrast]:
        """Return the contrast of a space at a hookpoint.

        Args:
            space: "residual" or "feature".
            hookpoint: Where; by default the only one there is, or else the SAE's.

        Returns:
            The hookpoint and its contrast.

        Raises:
            PairingError: Nothing was collected there; it names what was.
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
                str(at or "no hookpoint"),
                f"one of the hookpoints at which {space} statistics were collected: {', '.join(map(str, table))}",
                "name one with hookpoint=, or collect again with hookpoints=",
            )
        return at, table[at]

    def save(self, path: str | Path) -> None:
        """Write the statistics as safetensors, atomically. Raises FormatError where the file cannot be written."""
        tensors: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        tables: tuple[tuple[Space, Mapping[Hookpoint, Contrast]], ...]
        tables = (("residual", self.residual), ("feature", self.feature))
        for space, table in tables:
            for hookpoint, contrast in table.items():
                for positive, moments in ((True, contrast.positive), (False, contrast.negative)):
                    name = key_name((space, hookpoint, positive))
                    counts[name] = moments.count
                    tensors |= moment_tensors(name, moments)
        for hookpoint, pooled in self.pooled.items():
            tensors |= {
                f"pooled/{hookpoint}/positive": pooled.positive,
                f"pooled/{hookpoint}/negative": pooled.negative,
            }
        header = {
            "reading": dict(self.reading),
            "data": [dict(entry) for entry in self.data],
            "counts": counts,
            "pooled": {str(hookpoint): pooled.pairs for hookpoint, pooled in self.pooled.items()},
        }
        write_tensors(path, tensors, kind="statistics", header=header)

    @classmethod
    def load(cls, path: str | Path) -> ContrastStatistics:
        """Load a file that ``save`` wrote. Raises FormatError for any other, or a damaged one."""
        tensors, header = read_tensors(path, kind="statistics")
        tables: dict[Space, dict[Hookpoint, dict[str, Moments]]] = {"residual": {}, "feature": {}}
        with refuse_damaged(path, "a file written by ContrastStatistics.save"):
            for name, count in header["counts"].items():
                space, hookpoint, positive = parse_key(name)
                side = "positive" if positive else "negative"
                tables[space].setdefault(hookpoint, {})[side] = load_moments(tensors, name, int(count))
            residual, feature = ({at: Contrast(**sides) for at, sides in table.items()} for table in tables.values())
            pooled = {
                Hookpoint.parse(name): _load_pooled(name, int(pairs), tensors, residual)
                for name, pairs in header.get("pooled", {}).items()
            }
            data = tuple(dict(entry) for entry in header["data"])
            return cls(residual, feature, _check_reading(header["reading"]), data, pooled)


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """List the keys under which two mappings hold different values."""
    return [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]


def _check_reading(reading: Any) -> dict[str, Any]:
    """Return how texts were read. Raises ValueError where model or SAE are not objects that name them."""
    model, sae = reading.get("model"), reading.get("sae")
    model_is_named = model is None or isinstance(model.get("name"), str | None)
    if not model_is_named or not (sae is None or isinstance(sae["sha256"], str)):
        raise ValueError(f"it was read with {reading!r:.200}")
    return dict(reading)


def _load_pooled(
    name: str, pairs: int, tensors: Mapping[str, Tensor], residual: Mapping[Hookpoint, Contrast]
) -> Pooled:
    """Load the examples of a hookpoint. Raises ValueError when they are not those that its moments counted."""
    contrast = residual[Hookpoint.parse(name)]
    pooled = Pooled(tensors[f"pooled/{name}/positive"].float(), tensors[f"pooled/{name}/negative"].float(), pairs)
    for rows, moments in ((pooled.positive, contrast.positive), (pooled.negative, contrast.negative)):
        if rows.shape != (moments.count, len(moments.mean)) or not 0 <= pairs <= moments.count:
            raise ValueError(f"pooled/{name} has the shape {tuple(rows.shape)} with {pairs} pairs")
    return pooled


def _identify_sae_by_hash(reading: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reading that names its SAE by hash alone: one SAE may have been loaded from two places."""
    sae = reading.get("sae")
    return {**reading, "sae": sae.get("sha256") if isinstance(sae, Mapping) else sae}
