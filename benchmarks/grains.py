"""GrAInS against CAA at equal cost: how far each moves a chat model to the style that pairs of replies show.

Both vectors are built from the same pairs of a shipped contrast, for one layer of SmolLM2, and brought to the strength
at which neutral texts cost RISE nats a token more. Reported is the change of log p(positive) − log p(negative), in nats
a token, on held-out pairs, with 95 % intervals over pairs (bootstrap), beside a random direction.

    python benchmarks/grains.py             writes results/smollm2/grains.json and grains.md
    python benchmarks/grains.py --docs      puts the table into docs/guides/methods.md
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from subject import ROOT, run_benchmark

import fgsteer as fg

PAGE = ROOT / "docs" / "guides" / "methods.md"
CONTRAST, LAYER = "cheerful", 14
PAIRS, HELD_OUT, NEUTRAL = 12, 20, 8
RISE = 0.1  # nats a token, of neutral texts
STEPS, TOP = 20, 5
RESAMPLES = 2000


def margins(model: Any, tokenizer: Any, pairs: Sequence[fg.ContrastPair], steering: Sequence[Any]) -> torch.Tensor:
    """log p(positive) − log p(negative) of each pair under each entry, in nats a token, (entries, pairs)."""
    sides = []
    for side in ("positive", "negative"):
        texts = [(pair.prompt, getattr(pair, side)) for pair in pairs]
        found = fg.log_probabilities(model, tokenizer, texts, steering)
        sides.append(found.sums / found.counts)
    return sides[0] - sides[1]


def interval(values: torch.Tensor) -> dict[str, float]:
    """The mean, with a bootstrap interval over pairs."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = values.numpy()[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def measure() -> dict[str, Any]:
    """Build the vectors, match their cost, and measure held-out pairs."""
    model, tokenizer = fg.load_model("smollm2", dtype="bfloat16", device="cpu")
    contrast = fg.load_contrast(CONTRAST)
    assert contrast.held_out is not None
    pairs, held_out = contrast.pairs[:PAIRS], contrast.held_out.pairs[:HELD_OUT]
    neutral = list(fg.load_neutral()[0])[:NEUTRAL]
    seconds: dict[str, float] = {}

    def timed(name: str, build: Callable[[], fg.SteeringVector]) -> fg.SteeringVector:
        began = time.monotonic()
        vector = build()
        seconds[name] = time.monotonic() - began
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
        return vector

    def caa() -> fg.SteeringVector:
        stats = fg.collect(model, tokenizer, pairs, hookpoints=[LAYER], tokens="answer", progress=False)
        return fg.caa(stats)

    vectors = {
        "caa": timed("caa", caa),
        "grains": timed("grains", lambda: fg.grains(model, tokenizer, pairs, LAYER, top=TOP, steps=STEPS)),
        "grains_pca": timed(
            "grains_pca", lambda: fg.grains(model, tokenizer, pairs, LAYER, top=TOP, steps=STEPS, component="pca")
        ),
    }
    noise = torch.randn(vectors["caa"].d_model, generator=torch.Generator().manual_seed(0))
    vectors["random"] = fg.SteeringVector(noise, vectors["caa"].hookpoint)
    makes = [vector.unit().add for vector in vectors.values()]
    strengths = fg.calibrate_many(model, tokenizer, makes, neutral, target_ce_rise=RISE)
    entries = [None, *(make(strength) for make, strength in zip(makes, strengths, strict=True))]
    found = margins(model, tokenizer, held_out, entries)
    rows = {
        name: {
            "strength": float(strength),
            "seconds": seconds.get(name),
            "cosine": float(torch.nn.functional.cosine_similarity(vector.direction, vectors["caa"].direction, dim=0)),
            **interval(found[number] - found[0]),
        }
        for number, ((name, vector), strength) in enumerate(zip(vectors.items(), strengths, strict=True), 1)
    }
    return {"contrast": CONTRAST, "layer": LAYER, "pairs": len(pairs), "held_out": len(held_out), "rows": rows}


def table(content: Mapping[str, Any]) -> str:
    """The vectors with what they change, in Markdown."""
    names = {"caa": "CAA", "grains": "GrAInS, mean", "grains_pca": "GrAInS, PCA", "random": "a random direction"}
    lines = ["| | change of the margin, nats a token | cosine with CAA | seconds to build |", "|---|---|---|---|"]
    for name, row in content["rows"].items():
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        change = f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(f"| {names[name]} | {change} | {row['cosine']:+.2f} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark("grains", __doc__, PAGE, measure, table)
