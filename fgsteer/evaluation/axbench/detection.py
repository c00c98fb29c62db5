"""How well a reading tells texts that show a concept from those that do not.

detection([3.0, 1.0, 2.5], ["positive", "negative", "hard negative"]).auroc                       1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.evaluation.axbench.files import HARD_NEGATIVE, NEGATIVE, POSITIVE
from fgsteer.evaluation.judges.learning import auc

COLUMNS_AT_ONCE = 512  # features that are compared together: bounds memory, not results


@dataclass(frozen=True)
class Detection:
    """Detection of a concept by a reading of texts.

    Attributes:
        auroc: Area under the ROC curve of positives against all other texts, hard negatives among them.
        auroc_plain: The same without hard negatives.
        threshold: Youden's threshold of positives against negatives; None where no threshold is better than chance.
        positive_accuracy: The share of positives at or above it.
        negative_accuracy: The share of negatives below it.
        hard_accuracy: The share of hard negatives below it; None without hard negatives.
        hard_average: Mean of the accuracies on positives and hard negatives, AxBench's measure; None without them.
    """

    auroc: float
    auroc_plain: float
    threshold: float | None
    positive_accuracy: float | None
    negative_accuracy: float | None
    hard_accuracy: float | None
    hard_average: float | None


def aurocs(readings: Float[Tensor, "texts n"], positive: Bool[Tensor, " texts"]) -> Float[Tensor, " n"]:
    """Areas under the ROC curves of n readings of the same texts, float64.

    Raises DataError without texts of both kinds.
    """
    up, down = readings[positive], readings[~positive]
    starts = range(0, readings.shape[1], COLUMNS_AT_ONCE)
    return torch.cat([auc(up[:, n : n + COLUMNS_AT_ONCE], down[:, n : n + COLUMNS_AT_ONCE]) for n in starts])


def youden_threshold(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """The value t at which the share of positives ≥ t exceeds that of negatives ≥ t most; of equals the largest.

    None where no share exceeds the other.
    """
    best, threshold = 0.0, None
    for value in sorted({*positives, *negatives}, reverse=True):
        caught = sum(x >= value for x in positives) / len(positives)
        gain = caught - sum(x >= value for x in negatives) / len(negatives)
        if gain > best:
            best, threshold = gain, value
    return threshold


def detection(readings: Sequence[float], categories: Sequence[str]) -> Detection:
    """Measure the detection by a text's largest reading. Raises DataError without positives or without negatives."""
    by: dict[str, list[float]] = {POSITIVE: [], NEGATIVE: [], HARD_NEGATIVE: []}
    for reading, category in zip(readings, categories, strict=True):
        by[category].append(float(reading))
    values = torch.tensor([[float(reading)] for reading in readings], dtype=torch.float64)
    positive = torch.tensor([category == POSITIVE for category in categories])
    plain = torch.tensor([category != HARD_NEGATIVE for category in categories])
    threshold = youden_threshold(by[POSITIVE], by[NEGATIVE]) if by[POSITIVE] and by[NEGATIVE] else None

    def below(kind: str) -> float | None:
        if threshold is None or not by[kind]:
            return None
        return sum(value < threshold for value in by[kind]) / len(by[kind])

    missed, negative, hard = below(POSITIVE), below(NEGATIVE), below(HARD_NEGATIVE)
    caught = None if missed is None else 1 - missed
    return Detection(
        float(aurocs(values, positive)[0]),
        float(aurocs(values[plain], positive[plain])[0]),
        threshold,
        caught,
        negative,
        hard,
        None if caught is None or hard is None else (caught + hard) / 2,
    )
