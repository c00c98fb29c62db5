"""How well a feature's largest activation in a text tells which side the text is on.

max_auc(activations)[0]                                the feature that AxBench calls SAE-A
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.selection.pooled import FeatureActivations
from fgsteer.selection.ranking import FeatureRanking

PERMUTATIONS = 20  # of labels, whose best scores say what chance gives
COLUMNS = 1 << 10  # features that are sorted at once: bounds memory, not results
# of the activations and several assignments of sides to texts
Score = Callable[[Float[Tensor, "texts features"], Bool[Tensor, "k texts"]], Float[Tensor, "k features"]]


@checked
def max_auc(activations: FeatureActivations, *, permutations: int = PERMUTATIONS, seed: int = 0) -> FeatureRanking:
    """Rank features by the area under the ROC curve of their largest activation in a text (AxBench, arXiv 2501.17148).

    ``AUROC = P(a⁺ > a⁻) + P(a⁺ = a⁻)/2`` over all pairs of a positive and a negative text. The first feature is SAE-A,
    which needs no judge. A feature that fires on no text that chooses is not compared.

    Args:
        activations: What ``max_activations`` gives.
        permutations: How often labels are permuted to find the best AUROC that chance gives, of which ``chance`` is
            the median; 0 leaves it out.
        seed: The seed of the permutations.

    Returns:
        The ranking, with AUROCs on both halves.

    Raises:
        SelectionError: No feature fires.
    """
    return _ranking("max_auc", activations, auroc, permutations, seed, {})


@checked
def calibrated_f1(
    activations: FeatureActivations,
    *,
    base_rate: float = 1e-3,
    min_support: int = 50,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> FeatureRanking:
    """Rank features by the F1 that each would have, at its best threshold, if the behavior were as rare as it is.

    ``F1ᶜ = 2TP/(2TP + c·FP + FN)`` with ``c = π(1 − π₀)/(π₀(1 − π))``, where π is the share of positive texts here and
    π₀ that in the world. It does not depend on π, and is F1 where π = π₀ (arXiv 2605.31183). A threshold is at least
    0, so that a feature has to fire. On the half that reports, thresholds are those that were chosen.

    Args:
        activations: What ``max_activations`` gives.
        base_rate: π₀.
        min_support: The least number of positive texts that choose; the paper asks for 50.
        permutations: As in ``max_auc``.
        seed: As in ``max_auc``.

    Returns:
        The ranking, with F1ᶜ on both halves.

    Raises:
        SelectionError: There are fewer positive texts than ``min_support``, or no feature fires.
    """
    check_range("base_rate", base_rate, 1e-9, 1 - 1e-9)
    check_range("min_support", min_support, 1, 2**31, whole=True)
    support = int(activations.half(True)[1].sum())
    if support < min_support:
        raise SelectionError(
            f"{support} positive texts to choose on",
            f"at least {min_support}",
            "add texts, or pass min_support= to do with fewer",
        )

    def score(values: Tensor, sides: Tensor) -> Tensor:
        return best_f1(values, sides, base_rate)[0]

    ranking = _ranking("calibrated_f1", activations, score, permutations, seed, {"base_rate": base_rate})
    if ranking.held_out is None:
        return ranking
    ids = list(ranking)
    thresholds = _scores(lambda v, sides: best_f1(v, sides, base_rate)[1], *activations.half(True))[ids]
    values, positive = activations.half(False)
    held_out = f1_at(values[:, ids], positive, thresholds.float(), base_rate)
    return FeatureRanking(**{**vars(ranking), "held_out": held_out})


def _ranking(
    by: str,
    activations: FeatureActivations,
    score: Score,
    permutations: int,
    seed: int,
    settings: dict[str, object],
) -> FeatureRanking:
    """Rank by a score of both halves, and find what chance gives."""
    check_range("permutations", permutations, 0, 100_000, whole=True)
    check_range("seed", seed, 0, 2**63 - 1, whole=True)
    values, positive = activations.half(True)
    fires = (values > 0).any(0)
    if not bool(fires.any()) or bool(positive.all()) or not bool(positive.any()):
        raise SelectionError(
            "no feature that fires on a text, or one side alone",
            "texts of both sides, and a feature that fires on one",
            "check the hookpoint and the tokens that are read",
        )
    random = torch.Generator().manual_seed(seed)
    permuted = [positive[torch.randperm(len(positive), generator=random)] for _ in range(permutations)]
    chance = None
    if permuted:
        chance = float(_by_columns(score, values[:, fires], torch.stack(permuted)).amax(1).median())
    return FeatureRanking.of(
        by,
        _scores(score, values, positive),
        activations.sae,
        candidates=fires,
        held_out=_scores(score, *activations.half(False)) if activations.reports else None,
        chance=chance,
        settings={**activations.about, **settings, "permutations": permutations, "seed": seed},
    )


def _by_columns(score: Score, values: Tensor, sides: Tensor) -> Float[Tensor, "k features"]:
    """A score of all features, some at a time."""
    starts = range(0, values.shape[1], COLUMNS)
    return torch.cat([score(values[:, start : start + COLUMNS], sides) for start in starts], 1)


def _scores(score: Score, values: Tensor, positive: Tensor) -> Float[Tensor, " features"]:
    """A score of all features for one assignment of sides."""
    return _by_columns(score, values, positive[None])[0]


def auroc(values: Float[Tensor, "texts features"], sides: Bool[Tensor, "k texts"]) -> Float[Tensor, "k features"]:
    """``P(a⁺ > a⁻) + P(a⁺ = a⁻)/2`` of each column: ``(Σ rank⁺ − n⁺(n⁺ + 1)/2)/(n⁺n⁻)``, ties sharing a rank."""
    ordered, order = values.sort(0)
    number = torch.arange(1, len(values) + 1, dtype=torch.float64)[:, None].expand(values.shape)
    # of equal values the mean of the first number and the last
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(new, number, 0.0).cummax(0).values
    ends = torch.ones_like(new)
    ends[:-1] = new[1:]
    last = torch.where(ends, number, float(len(values) + 1)).flip(0).cummin(0).values.flip(0)
    ranks = torch.zeros(values.shape, dtype=torch.float64).scatter_(0, order, (first + last) / 2)
    labels = sides.double()
    p, n = labels.sum(1, keepdim=True), (1 - labels).sum(1, keepdim=True)
    return (labels @ ranks - p * (p + 1) / 2) / (p * n)


def calibrated(tp: Tensor, fp: Tensor, fn: Tensor, share: float, base_rate: float) -> Tensor:
    """``F1ᶜ = 2TP/(2TP + c·FP + FN)``, ``c = π(1 − π₀)/(π₀(1 − π))`` of a share π of positives; 0 where TP is 0."""
    weight = share * (1 - base_rate) / (base_rate * (1 - share))
    return torch.where(tp > 0, 2 * tp / (2 * tp + weight * fp + fn).clamp(min=1e-300), 0.0)


def best_f1(
    values: Float[Tensor, "texts features"], sides: Bool[Tensor, "k texts"], base_rate: float
) -> tuple[Float[Tensor, "k features"], Float[Tensor, "k features"]]:
    """The best F1ᶜ of each column over thresholds, and that threshold: texts with at least as much are found.

    Thresholds are the values above 0; of equal F1ᶜ the highest.
    """
    ordered, order = values.sort(0, descending=True)
    allowed = ordered > 0
    allowed[:-1] &= ordered[:-1] != ordered[1:]  # a threshold takes equal values together
    found = []
    for positive in sides:
        labels = positive[order].double()
        total = float(positive.sum())
        tp, fp = labels.cumsum(0), (1 - labels).cumsum(0)
        scores = torch.where(allowed, calibrated(tp, fp, total - tp, total / len(positive), base_rate), -1.0)
        best, place = scores.max(0)
        threshold = torch.where(best > 0, ordered.gather(0, place[None])[0].double(), torch.inf)
        found.append((best.clamp(min=0), threshold))
    scores, thresholds = (torch.stack(part) for part in zip(*found, strict=True))
    return scores, thresholds


def f1_at(
    values: Float[Tensor, "texts features"],
    positive: Bool[Tensor, " texts"],
    thresholds: Float[Tensor, " features"],
    base_rate: float,
) -> Float[Tensor, " features"]:
    """F1ᶜ of each column at a threshold of its own."""
    found, labels = values >= thresholds, positive[:, None]
    tp, fp, fn = ((found & labels).sum(0), (found & ~labels).sum(0), (~found & labels).sum(0))
    return calibrated(tp.double(), fp.double(), fn.double(), float(positive.double().mean()), base_rate)
