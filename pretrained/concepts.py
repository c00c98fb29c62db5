"""Does an SAE know the shipped concepts? Best single features, and the density threshold of FGAA's filter.

peaks = contrast_activations(model, tokenizer, sae)
best_single_features(peaks)["wedding"]["held_out_auc"]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import fgsteer as fg
from fgsteer.evaluation.judges.learning import auc

THETAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
KNOWN = 0.8  # held-out AUC at which one feature is said to carry a concept
TOP = 16  # features of a score in the choice of θ
SLACK = 0.005  # of mean AUC: the smallest θ within it of the best is chosen


class Side(NamedTuple):
    """Feature activations of a group of sentences, over their tokens besides the first."""

    mean: torch.Tensor  # (sentences, d_sae)
    peak: torch.Tensor  # (sentences, d_sae)


def contrast_activations(model: Any, tokenizer: Any, sae: fg.SAE) -> dict[str, list[Side]]:
    """Per shipped concept: positives, negatives, held-out positives, held-out negatives."""

    sae = sae.to(model.device, torch.float32)

    def side(texts: tuple[str, ...]) -> Side:
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right").to(model.device)
        values = fg.record(model, batch["input_ids"], batch["attention_mask"], [sae.hookpoint])[sae.hookpoint]
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = [sae.encode(row[1:length]) for row, length in zip(values, lengths, strict=True)]
        return Side(torch.stack([r.mean(0) for r in rows]).cpu(), torch.stack([r.amax(0) for r in rows]).cpu())

    found = {}
    for name in fg.shipped_contrasts():
        contrast = fg.load_contrast(name)
        assert contrast.held_out is not None
        found[name] = [side(x) for c in (contrast, contrast.held_out) for x in (c.positives, c.negatives)]
    return found


def best_single_features(activations: dict[str, list[Side]]) -> dict[str, dict[str, float]]:
    """Per concept, the feature whose peak in a sentence ranks the training sentences best, and its held-out AUC."""
    result = {}
    for name, (up, down, up_held, down_held) in activations.items():
        train = auc(up.peak, down.peak)
        best = int(train.argmax())
        held = auc(up_held.peak[:, best], down_held.peak[:, best])
        result[name] = {"feature": best, "train_auc": float(train[best]), "held_out_auc": float(held)}
    return result


def choose_density(activations: dict[str, list[Side]], density: torch.Tensor) -> tuple[float, dict[str, Any]]:
    """(θ, table): the smallest θ whose mean AUC over the concepts is within ``SLACK`` of the best.

    A score weighs the ``TOP`` features below θ with the largest difference of means on the
    training sentences; it is measured on the held-out ones.
    """
    table: dict[str, dict[str, float]] = {}
    for theta in THETAS:
        scores = {}
        for name, (up, down, up_held, down_held) in activations.items():
            weights = torch.where(density > theta, 0.0, (up.mean.mean(0) - down.mean.mean(0)).double())
            top = weights.topk(min(TOP, len(weights))).indices
            chosen = torch.zeros_like(weights).index_put_((top,), weights[top].clamp(min=0)).float()
            scores[name] = float(auc(up_held.mean @ chosen, down_held.mean @ chosen))
        table[str(theta)] = {"mean": sum(scores.values()) / len(scores), **scores}
    best = max(row["mean"] for row in table.values())
    return min(float(theta) for theta, row in table.items() if row["mean"] >= best - SLACK), table
