"""The linear map from vectors to effects, fitted to measured shards, and the figures that tell how well it predicts.

M, b, figures = fit_shards(plan.measure_shards(model, tokenizer, sae, folder))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.effects.measuring import EffectShard
from fgsteer.effects.ridge import LinearMoments, best_ridge
from fgsteer.errors import DataError

SHUFFLE_SIZE = 20  # the least training vectors whose effects are shuffled together; small shards are joined for that


@dataclass(frozen=True, eq=False)
class Agreement:
    """Sums over vectors of their effects in even and in odd rollouts, which tell effect from noise; two of them add up.

    Args:
        count: The number of vectors.
        even: ``Σe``, (n,).
        odd: ``Σo``, (n,).
        product: ``Σ e·o``.
        square: ``Σ‖(e + o)/2‖²``.
    """

    count: int
    even: Float[Tensor, " n"]
    odd: Float[Tensor, " n"]
    product: float
    square: float

    @classmethod
    def of(cls, even: Float[Tensor, "count n"], odd: Float[Tensor, "count n"]) -> Agreement:
        """Sums over the rows."""
        e, o = even.double(), odd.double()
        return cls(len(e), e.sum(0), o.sum(0), float((e * o).sum()), float(((e + o) / 2).square().sum()))

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.count + other.count,
            self.even + other.even,
            self.odd + other.odd,
            self.product + other.product,
            self.square + other.square,
        )

    @property
    def ceiling(self) -> float:
        """The share of the mean's variance that is effect, not noise: the halves' covariance over the variance."""
        mean = (self.even + self.odd) / 2
        variance = self.square - float(mean @ mean) / self.count
        return (self.product - float(self.even @ self.odd) / self.count) / variance if variance > 0 else 0.0


@dataclass(frozen=True, eq=False)
class ShardSums:
    """What a fit needs of all shards: moments by split, and the agreement of the held-out vectors' halves."""

    train: LinearMoments
    shuffled: LinearMoments
    validation: LinearMoments
    held_out: LinearMoments
    agreement: Agreement

    @classmethod
    def over(cls, shards: Iterable[EffectShard]) -> tuple[ShardSums, int]:
        """The sums, and the number of vectors left out because no strength costs the target.

        Raises DataError with too few vectors.
        """
        sums: dict[str, Any] = {}
        waiting: list[tuple[Tensor, Tensor]] = []
        skipped, seed = 0, 0

        def add(name: str, value: LinearMoments | Agreement) -> None:
            sums[name] = sums[name] + value if name in sums else value

        def add_shuffled() -> None:
            x, y = (torch.cat(rows) for rows in zip(*waiting, strict=True))
            waiting.clear()
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
            add("shuffled", LinearMoments.of(x, y[order]))

        for shard in shards:
            skipped += int((~shard.strengths.isfinite()).sum())
            for name, value in _shard_sums(shard):
                add(name, value)
            waiting.append(_train_rows(shard))
            if sum(len(x) for x, _ in waiting) >= SHUFFLE_SIZE:
                seed = shard.first
                add_shuffled()
        if sum(len(x) for x, _ in waiting):
            add_shuffled()
        if len(sums) < 5 or sums["held_out"].count < 2:
            raise DataError(
                "too few vectors that change what the model says",
                "at least twenty vectors that do, as a tenth is held out",
                "measure more vectors, or set a smaller target_ce_rise",
            )
        return cls(**sums), skipped


def _train_rows(shard: EffectShard) -> tuple[Tensor, Tensor]:
    """The vectors and effects of a shard that are neither for validation nor held out."""
    rows = shard.strengths.isfinite() & ((shard.first + torch.arange(len(shard.strengths))) % 10 > 1)
    return shard.vectors[rows], shard.effects[rows]


def _shard_sums(shard: EffectShard) -> Iterator[tuple[str, LinearMoments | Agreement]]:
    """A shard's contribution to each of the sums."""
    reached = shard.strengths.isfinite()
    number = shard.first + torch.arange(len(reached))
    x, y = shard.vectors, shard.effects
    for name, rows in (
        ("train", reached & (number % 10 > 1)),
        ("validation", reached & (number % 10 == 0)),
        ("held_out", reached & (number % 10 == 1)),
    ):
        if not rows.any():
            continue
        yield name, LinearMoments.of(x[rows], y[rows])
        if name == "held_out":
            yield "agreement", Agreement.of(shard.even[rows], shard.odd[rows])


def fit_shards(shards: Iterable[EffectShard]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Fit effects by ridge regression from sums that stream, with λ chosen on validation vectors.

    A tenth of the vectors validates and a tenth is held out. λ maximises R² on the validation vectors; the fit then
    takes training and validation vectors together.

    Args:
        shards: The measured shards.

    Returns:
        ``M (d_model, d_sae)``, ``b (d_sae,)``, and figures, all on the held-out vectors: ``r2 = 1 − Σ‖y − ŷ‖² /
        Σ‖y − ȳ‖²`` with ȳ of the training vectors, so that the bias alone scores 0; ``ceiling``, what each vector's
        true effect would score, from the agreement of even and odd rollouts; ``shuffled``, a fit to effects that were
        shuffled among the vectors; ``explained`` and ``explained_by_bias``, the shares of ``Σ‖y‖²`` that the fit and
        the mean effect of any vector explain.

    Raises:
        DataError: There are too few vectors.
    """
    sums, skipped = ShardSums.over(shards)
    share = best_ridge(sums.train, sums.validation)
    both = sums.train + sums.validation
    ridge = share * both.mean_eigenvalue()
    M, b = both.fit(ridge)
    held_out = sums.held_out
    mean = both.y / both.count
    deviations = held_out.about(torch.zeros_like(held_out.x), mean).yy
    shuffled_fit = sums.shuffled.fit(share * sums.shuffled.mean_eigenvalue())
    figures = {
        "vectors": both.count + held_out.count,
        "skipped": skipped,
        "ridge": ridge,
        "ridge_in_mean_eigenvalues": share,
        "held_out_vectors": held_out.count,
        "r2": 1 - held_out.squared_error(M, b) / deviations,
        "ceiling": sums.agreement.ceiling,
        "shuffled": 1 - held_out.squared_error(*shuffled_fit) / deviations,
        "explained": 1 - held_out.squared_error(M, b) / held_out.yy,
        "explained_by_bias": 1 - deviations / held_out.yy,
    }
    return M, b, figures
