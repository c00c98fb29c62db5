"""KL-then-steer: whether a model that was trained to stay as it is under steering pays less for the same behavior.

The embedded default is trained on its own texts while random ones of ten shipped concepts are steered. Then vectors of
six other concepts are built, from the model as it was and from the trained one, for one layer. Both are brought to the
same push, that is the change of log p of a concept's texts less that of its other texts, and reported is what neutral
texts cost more than in the untouched model. The rate of training and strengths are chosen on one half of the texts, and
the other half is reported; the two models are compared at one strength too, and with a random vector of the same norm.

    python benchmarks/kl_then_steer.py             writes results/kl_then_steer.json and kl_then_steer.md
    python benchmarks/kl_then_steer.py --docs      puts the table into docs/guides/train.md
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from beginnings import like, strength
from subject import ROOT, TUNING_CONCEPTS, over_items, run_benchmark, verdict, with_interval

import fgsteer as fg
from fgsteer.data.shipped import load_bench_prompts

PAGE = ROOT / "docs" / "guides" / "train.md"
MODEL, LAYER = "default", 2
SETTINGS = fg.KLThenSteerTraining(rank=16, batch=8, epochs=4, probability=0.5)
RATES = (1e-4, 3e-4, 1e-3)
SAMPLES, NEW_TOKENS = 4, 32  # texts of each opener that it is trained on, and their tokens
SIDE = 12  # texts of either side of a concept that is steered in training
RISE = 0.5  # nats a token, of neutral texts in the untouched model, which sets the push
ROWS = {
    "base": "untouched, + vector",
    "same push": "trained, + its vector, same push",
    "same strength": "trained, + its vector, same strength",
    "base, random": "untouched, + random vector",
    "trained, random": "trained, + random vector",
}


def own_texts(model: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """Openers with what the model writes after them."""
    prompts = load_bench_prompts()
    torch.manual_seed(0)
    return [
        pair
        for _ in range(SAMPLES)
        for pair in zip(
            prompts,
            fg.generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, do_sample=True, top_p=0.9),
            strict=True,
        )
    ]


def short(name: str) -> fg.ContrastSet:
    """The first texts of a concept's sides."""
    whole = fg.load_contrast(name)
    return fg.ContrastSet(name, positives=whole.positives[:SIDE], negatives=whole.negatives[:SIDE])


class Subject:
    """A model that is steered for a concept, and what it says of texts: push and cost by strength."""

    def __init__(self, model: Any, tokenizer: Any, concept: str, untouched: Sequence[float]) -> None:
        contrast = fg.load_contrast(concept)
        assert contrast.held_out is not None
        self.model, self.tokenizer, self.untouched = model, tokenizer, untouched
        stats = fg.collect(model, tokenizer, contrast, hookpoints=[LAYER], progress=False)
        self.vector = fg.caa(stats)
        self.sides = [list(contrast.held_out.side(side)) for side in (True, False)]
        self.neutral = list(fg.load_neutral()[0])

    def push(self, entry: Any, half: int) -> float:
        """The change of log p of a half of the positives less that of the negatives, in nats a token."""
        changes = []
        for side in self.sides:
            found = fg.log_probabilities(self.model, self.tokenizer, side[half::2], [None, entry])
            means = (found.sums / found.counts).mean(1)
            changes.append(float(means[1] - means[0]))
        return changes[0] - changes[1]

    def cost(self, entry: Any, half: int) -> float:
        """What a half of the neutral texts cost more than in the untouched model, in nats a token."""
        loss = fg.cross_entropy(self.model, self.tokenizer, self.neutral[half::2], steering=entry)
        return loss - self.untouched[half]


def compare(plain: Subject, trained: Subject, c: float) -> dict[str, Any]:
    """Push and cost, by half of the texts, of both models at one push, at one strength, and with a random vector."""
    wanted = plain.push(plain.vector.add(c), 0)
    same, reached = strength(lambda c: trained.push(trained.vector.add(c), 0), c, wanted)
    noise = fg.SteeringVector(like(plain.vector.direction, 0), plain.vector.hookpoint)
    conditions = {
        "base": (plain, plain.vector.add(c)),
        "same push": (trained, trained.vector.add(same)),
        "same strength": (trained, trained.vector.add(c)),
        "base, random": (plain, noise.add(c)),
        "trained, random": (trained, noise.add(c)),
    }
    return {
        "strength": c,
        "same_push": same,
        "wanted": wanted,
        "reached": reached,
        "cosine": float(torch.cosine_similarity(plain.vector.direction, trained.vector.direction, dim=0)),
        "norms": [plain.vector.norm, trained.vector.norm],
        "rows": {
            name: {what: [getattr(one, what)(entry, half) for half in (0, 1)] for what in ("push", "cost")}
            for name, (one, entry) in conditions.items()
        },
    }


def extra(concepts: Mapping[str, Any], half: int) -> list[float]:
    """By concept, what the trained model pays more at the same push."""
    return [one["rows"]["same push"]["cost"][half] - one["rows"]["base"]["cost"][half] for one in concepts.values()]


def measure() -> dict[str, Any]:
    """Train at each rate, measure concept by concept, and keep the rate that pays least on the half that chooses."""
    base, tokenizer = fg.load_model(MODEL, device="cpu")
    neutral = list(fg.load_neutral()[0])
    untouched = [fg.cross_entropy(base, tokenizer, neutral[half::2]) for half in (0, 1)]
    texts = own_texts(base, tokenizer)
    plain = {concept: Subject(base, tokenizer, concept, untouched) for concept in TUNING_CONCEPTS}
    strengths = {
        concept: strength(lambda c, one=one: one.cost(one.vector.add(c), 0), 1.0, RISE)[0]  # type: ignore[misc]
        for concept, one in plain.items()
    }
    contrasts = [short(name) for name in fg.shipped_contrasts() if name not in TUNING_CONCEPTS]
    tried: list[dict[str, Any]] = []
    for lr in RATES:
        settings = replace(SETTINGS, lr=lr)
        model, _ = fg.load_model(MODEL, device="cpu")
        adapted: Any = fg.kl_then_steer(model, tokenizer, texts, contrasts, settings=settings, progress=False)
        tuned = adapted.merge_and_unload()
        concepts = {
            concept: compare(one, Subject(tuned, tokenizer, concept, untouched), strengths[concept])
            for concept, one in plain.items()
        }
        unsteered = fg.cross_entropy(tuned, tokenizer, neutral[1::2]) - untouched[1]
        tried.append({"settings": asdict(settings), "unsteered": unsteered, "concepts": concepts})
        print(lr, statistics.fmean(extra(concepts, 0)), statistics.fmean(extra(concepts, 1)), flush=True)
    best = min(tried, key=lambda one: statistics.fmean(extra(one["concepts"], 0)))
    rates = {f"{one['settings']['lr']:g}": statistics.fmean(extra(one["concepts"], 0)) for one in tried}
    return {"model": MODEL, "layer": LAYER, "texts": len(texts), "rates": rates, **best}


def table(content: Mapping[str, Any]) -> str:
    """Push and cost by model and vector, means over concepts, in Markdown."""
    concepts = content["concepts"]
    lines = ["| | push, nats a token | cost of neutral texts, nats a token |", "|---|---|---|"]
    for name, title in ROWS.items():
        cells = [
            with_interval(over_items([concept["rows"][name][what][1] for concept in concepts.values()]), "+.3f")
            for what in ("push", "cost")
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append(f"| trained, unsteered | | {content['unsteered']:+.3f} |")
    mean, low, high = over_items(extra(concepts, 1))
    by_rate = ", ".join(f"{more:+.3f} (trained at a rate of {rate})" for rate, more in content["rates"].items())
    ratio = statistics.fmean(one["same_push"] / one["strength"] for one in concepts.values())
    lines += [
        "",
        f"Of {len(concepts)} concepts that were not trained on, at block {content['layer']} of {content['model']}, "
        f"with 95 % intervals over concepts. On the texts that choose, the trained model pays {by_rate} nats a token "
        f"more at the same push; the rate {content['settings']['lr']:g} was taken. On the others it pays "
        f"{with_interval((mean, low, high), '+.3f')} nats a token more: {verdict(-mean, -high, -low)}. It takes "
        f"{ratio:.2f} times the strength.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark("kl_then_steer", __doc__, PAGE, measure, table, model="default")
