"""Training vectors: several in common batches beside one at a time, in vectors a minute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import fgsteer as fg
from timing.bench import Bench, distance
from timing.clock import Case, Contender, Row

CONCEPTS = ("anger", "love", "sea", "war")
EPOCHS = 1  # of the default recipe's six: a vector's time is in proportion to them
ALONE, TOGETHER = "train, one at a time", "train_many, in common batches"


def train(bench: Bench) -> Iterator[Row]:
    """Four vectors of the default recipe, in the residual stream and of an SAE's features."""
    model, tokenizer = fg.load_model("default", device=str(bench.clock.device), dtype=bench.dtype)
    concepts = CONCEPTS[:2] if bench.quick else CONCEPTS
    contrasts = {name: fg.load_contrast(name) for name in concepts}
    recipe, sae = fg.VectorTraining.recipe("reps_relative", epochs=EPOCHS), fg.load_sae("default")
    for space, place in (("residual", {"hookpoint": sae.hookpoint}), ("sae", {"sae": sae})):
        options: dict[str, Any] = {"objective": recipe, "space": space, **place}
        case = Case("train", "default", f"{space}, {EPOCHS} epoch", 60 * len(concepts), "vectors/min", _apart, 0.01)
        contenders = [
            Contender(ALONE, partial(_alone, model, tokenizer, contrasts, options)),
            Contender(TOGETHER, partial(fg.train_many, model, tokenizer, contrasts, **options), ALONE),
        ]
        yield from bench.clock.compare(case, contenders)


def _alone(model: Any, tokenizer: Any, contrasts: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fg.train(model, tokenizer, contrast, **options) for name, contrast in contrasts.items()}


def _apart(one: Mapping[str, fg.SteeringVector], other: Mapping[str, fg.SteeringVector]) -> float:
    """How far the vectors of a name are apart at most, as a share of their length."""
    return max(distance(one[name].direction, other[name].direction) for name in one)
