"""Contrast statistics: one streaming pass that yields all that every method needs.

An example contributes the mean over its selected tokens, of the residual stream and of
the SAE's feature activations (encoded first, then averaged). Kept are count, mean and
M2 of these per side, and how many examples fired each feature: O(d_model + d_sae)
memory, whatever the number of texts. Statistics of disjoint data add up. On request the
examples' mean activations are kept as well, for what moments cannot tell (``diagnose``).

    stats = collect(model, tokenizer, pairs, sae=sae)
    stats.save("stats.safetensors"); both = stats + other
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations import TokenRow, TokenRule, batches, text_batches
from fgsteer.data import ContrastPair, ContrastSet, Text, as_contrast
from fgsteer.errors import DataError, FormatError, PairingError
from fgsteer.files import read_tensors, write_tensors
from fgsteer.hookpoints import Hookpoint, resolve
from fgsteer.models import check_pairing, identity
from fgsteer.pooling import pool, pool_features
from fgsteer.prefixes import arrange_for, read
from fgsteer.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Space = Literal["residual", "feature"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean (n,), sum of squared deviations M2 (n,) and firing count (n,) of examples, in float64.

    Adding two merges them exactly (Chan, Golub & LeVeque 1979).
    """

    count: int
    mean: Float[Tensor, " n"]
    m2: Float[Tensor, " n"]
    fired: Float[Tensor, " n"]

    @classmethod
    def of(cls, examples: Float[Tensor, "count n"]) -> Moments:
        """Moments of the rows of (count, n)."""
        wide = torch.float32 if examples.device.type == "mps" else torch.float64
        rows = examples.to(wide)
        mean = rows.mean(0)
        return cls(
            len(rows),
            mean.double(),
            (rows - mean).square().sum(0).double(),
            (rows > 0).sum(0).double(),
        )

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no example."""
        zero = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zero, zero, zero)

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise PairingError(f"moments of widths {len(self.mean)} and {len(other.mean)}", "equal widths")
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta.square() * (self.count * other.count / count),
            self.fired + other.fired,
        )

    @property
    def variance(self) -> Float[Tensor, " n"]:
        """Unbiased variance (n,); nan for fewer than two examples."""
        return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)

    def cpu(self) -> Moments:
        """The same moments on the CPU."""
        return Moments(self.count, self.mean.cpu(), self.m2.cpu(), self.fired.cpu())


Totals = dict[tuple[Space, Hookpoint, bool], Moments]  # by space, hookpoint, and whether positive


@dataclass(frozen=True, eq=False)
class Contrast:
    """Moments of the two sides, in one space at one hookpoint."""

    positive: Moments
    negative: Moments

    def __add__(self, other: Contrast) -> Contrast:
        return Contrast(self.positive + other.positive, self.negative + other.negative)

    @property
    def difference(self) -> Float[Tensor, " n"]:
        """mean⁺ − mean⁻ (n,), float64."""
        return self.positive.mean - self.negative.mean


@dataclass(frozen=True, eq=False)
class Pooled:
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


@dataclass(frozen=True, eq=False)
class ContrastStatistics:
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

    def at(self, space: Space, hookpoint: Hookpoint | str | None = None) -> tuple[Hookpoint, Contrast]:
        """The contrast of a space at a hookpoint, by default the only one (or the SAE's).

        Raises PairingError naming what was collected.
        """
        table = self.residual if space == "residual" else self.feature
        if hookpoint is None and len(table) != 1 and len(self.feature) == 1:
            hookpoint = next(iter(self.feature))
        at = Hookpoint.parse(hookpoint) if hookpoint is not None else next(iter(table)) if len(table) == 1 else None
        if at is None or at not in table:
            raise PairingError(
                f"{space} statistics at {at or 'an unnamed hookpoint'}",
                f"one of {', '.join(map(str, table)) or 'none (collect was run without an SAE)'}",
                "pass hookpoint=, or collect again with sae= or hookpoints=",
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
        try:
            for key, count in header["counts"].items():
                space, name, side = key.split("/")
                parts = {part: tensors[f"{key}/{part}"] for part in ("mean", "m2", "fired")}
                moments = Moments(int(count), **parts)
                if moments.count < 1 or not moments.mean.shape == moments.m2.shape == moments.fired.shape:
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
                dict(header["reading"]),
                tuple(dict(entry) for entry in header["data"]),
                pooled,
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise FormatError(f"{path} is damaged: {error}", "a file written by ContrastStatistics.save") from error


def _read_pooled(
    name: str, pairs: int, tensors: Mapping[str, Tensor], residual: Mapping[Hookpoint, Contrast]
) -> Pooled:
    """The examples kept at a hookpoint. Raises ValueError when they are not those that its moments counted."""
    contrast = residual[Hookpoint.parse(name)]
    kept = Pooled(tensors[f"pooled/{name}/positive"], tensors[f"pooled/{name}/negative"], pairs)
    for rows, moments in ((kept.positive, contrast.positive), (kept.negative, contrast.negative)):
        if rows.shape != (moments.count, len(moments.mean)) or not 0 <= pairs <= moments.count:
            raise ValueError(f"pooled/{name} of shape {tuple(rows.shape)} with {pairs} pairs")
    return kept


def _identity(reading: Mapping[str, Any]) -> dict[str, Any]:
    """A reading with its SAE named by hash alone: one SAE may have been loaded from two places."""
    sae = reading.get("sae")
    return {**reading, "sae": sae.get("sha256") if isinstance(sae, Mapping) else sae}


def _check_finite(pooled: Tensor, at: Hookpoint, rows: Sequence[TokenRow]) -> None:
    bad = (~torch.isfinite(pooled).all(1)).nonzero()[:, 0].tolist()
    if bad:
        row = rows[bad[0]]
        side = "positive" if row.positive else "negative"
        raise DataError(
            f"activations of {side} text {row.index} are not finite at {at}",
            "finite values",
            "load the model in float32 or bfloat16, or drop the text",
        )


def _texts(contrast: ContrastSet) -> Iterator[tuple[Text, Text, bool]]:
    """Pairs first, both sides of each together, so that what they share is found in one window."""
    positives, negatives = list(contrast.side(True)), list(contrast.side(False))
    pairs = len(contrast.pairs)
    for positive, negative in zip(positives[:pairs], negatives[:pairs], strict=True):
        yield *positive, True
        yield *negative, False
    yield from ((*text, True) for text in positives[pairs:])
    yield from ((*text, False) for text in negatives[pairs:])


def _pooled(examples: Tensor, contrast: ContrastSet) -> Pooled:
    """Examples in the order of ``_texts`` as those of either side."""
    pairs, unpaired = len(contrast.pairs), len(contrast.pairs) + contrast.count(True)
    positive = torch.cat([examples[: 2 * pairs : 2], examples[2 * pairs : unpaired]])
    negative = torch.cat([examples[1 : 2 * pairs : 2], examples[unpaired:]])
    return Pooled(positive, negative, pairs)


def _add_examples(totals: Totals, space: Space, at: Hookpoint, rows: Tensor, positive: Tensor) -> None:
    """Merge a batch's examples (batch, n) into the totals of the side that each belongs to."""
    for side in (True, False):
        part = rows[positive == side]
        if len(part):
            moments, key = Moments.of(part), (space, at, side)
            totals[key] = totals[key] + moments if key in totals else moments


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    contrast: ContrastSet | str | Path | Sequence[ContrastPair],
    *,
    sae: SAE | None = None,
    hookpoints: Iterable[Hookpoint | str] | Hookpoint | str | None = None,
    tokens: TokenRule = "all",
    bos: bool = False,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    keep_pooled: bool = False,
    share_prefixes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> ContrastStatistics:
    """Statistics of both sides of a contrast, from one forward pass per text up to the last hookpoint.

    Per example i: ``h̄ᵢ = mean_t h_t`` and ``z̄ᵢ = mean_t φ(h_t)`` over the tokens that the
    rule selects; kept are count, mean, M2 over examples and ``Σᵢ 1[z̄ᵢ > 0]``.

    ``hookpoints`` default to the SAE's; strings are parsed. A transcoder's features are kept
    under the hookpoint that it writes, read from the one that it reads. ``tokens``: all, last, answer
    (the completion after its prompt), letter (the single-letter answer token), or an
    index. Position 0 and padding are not read, position 0 only with ``bos=True``.
    ``batch_tokens`` bounds a batch and changes nothing but speed: by default 8,192, on a CPU 1,024.
    ``keep_pooled`` keeps the ``h̄ᵢ`` themselves, O(examples · d_model) memory at each hookpoint, for ``diagnose``.
    ``share_prefixes`` runs once what several texts begin with, as the answers to one prompt do, where that
    saves a quarter of the tokens; results differ by rounding. ``progress`` is called with the number of texts done.

    Raises DataError for a text without a token to read or with non-finite activations,
    PairingError for an SAE of another width, HookpointError for a missing hookpoint.
    """
    contrast = as_contrast(contrast)
    wanted = _hookpoints(hookpoints, sae)
    for at in wanted:
        resolve(model, at)
    if sae is not None:
        check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    recorded = wanted if sae is None else [*wanted, sae.input_hookpoint]
    totals: Totals = {}
    kept: dict[Hookpoint, Tensor] = {}
    placed: dict[torch.device, SAE] = {}
    counts = [contrast.count(side) for side in (True, False)]
    done = 0
    options = {"rule": tokens, "bos": bos, "batch_tokens": batch_tokens, "max_tokens": max_tokens}
    arrange = arrange_for(model) if share_prefixes else batches
    for batch in text_batches(model, tokenizer, _texts(contrast), arrange=arrange, **options):
        acts, reads = read(model, batch, recorded)
        positive = torch.tensor([row.positive for row in batch.rows])
        for at, values in acts.items():
            rows = pool(values, reads)
            _check_finite(rows, at, batch.rows)
            if at in wanted:
                _add_examples(totals, "residual", at, rows, positive)
                if keep_pooled:
                    examples = kept.setdefault(at, torch.empty(sum(counts), rows.shape[1]))
                    examples[[row.index for row in batch.rows]] = rows.cpu()
            if sae is not None and at == sae.input_hookpoint:
                if values.device not in placed:
                    placed[values.device] = sae.to(values.device, torch.float32)
                features = pool_features(placed[values.device], values, reads)
                _add_examples(totals, "feature", sae.hookpoint, features, positive)
        done += len(batch.rows)
        if progress is not None:
            progress(done)
    tables: dict[Space, dict[Hookpoint, Contrast]] = {"residual": {}, "feature": {}}
    for space, at, side in totals:
        if side:
            tables[space][at] = Contrast(totals[space, at, True].cpu(), totals[space, at, False].cpu())
    reading = {
        "model": identity(model),
        "sae": {"source": sae.source, "sha256": sae.sha256} if sae is not None else None,
        "tokens": tokens,
        "bos": bos,
        "max_tokens": max_tokens,
    }
    data = {"name": contrast.name, "sha256": contrast.sha256, "count": counts}
    pooled = {at: _pooled(examples, contrast) for at, examples in kept.items()}
    return ContrastStatistics(tables["residual"], tables["feature"], reading, (data,), pooled)


def _hookpoints(hookpoints: Iterable[Hookpoint | str] | Hookpoint | str | None, sae: SAE | None) -> list[Hookpoint]:
    """Hookpoints asked for, the SAE's among them. Raises DataError when there is none."""
    if hookpoints is None:
        given: list[Hookpoint] = []
    elif isinstance(hookpoints, str | Hookpoint):
        given = [Hookpoint.parse(hookpoints)]
    else:
        given = [Hookpoint.parse(h) for h in hookpoints]
    if sae is not None:
        given.append(sae.hookpoint)
    if not given:
        raise DataError(
            "neither sae nor hookpoints", "at least one", 'pass sae=, or hookpoints="blocks.12.hook_resid_post"'
        )
    return list(dict.fromkeys(given))
