"""A made-up benchmark run: strengths, prompts and noise from one seed, as the bench would write it."""

import json
import math
import random

CONCEPTS = ("anger", "christian", "conspiracy", "french", "london", "love", "praise", "wedding")
# how well a method finds its concept, and what a unit of coefficient costs its text
METHODS = {
    "random": (0.0, 1.0),
    "prompt": (0.5, 0.0),
    "caa": (0.62, 1.0),
    "ace": (0.6, 1.1),
    "pca": (0.4, 1.0),
    "sae_feature": (0.5, 1.2),
    "sta": (0.6, 0.9),
    "sae_ts": (0.72, 0.9),
    "fgaa": (0.68, 0.95),
    "fgaa_effects": (0.85, 0.85),
    "minus_bias": (0.1, 0.4),
}
STORY = (
    "the next day she went to see her old friend who lived by the sea and they talked for a long while about what "
    "had happened since the last summer when it rained every morning"
)
WORDS = STORY.split()


def rows(
    concepts=CONCEPTS,
    methods=METHODS,
    layers=(1, 2),
    coefficients=(2.0, 4.0, 8.0, 16.0, 32.0),
    prompts=8,
    seeds=4,
    matched=(0.5,),
    seed=0,
):
    """Header and records of a run, as dictionaries."""
    rng = random.Random(seed)
    units = [(p, s) for p in range(prompts) for s in range(seeds)]
    ease = {unit: rng.gauss(0, 0.06) for unit in units}  # a prompt moves every concept and method together
    yield header(concepts, methods, layers, coefficients, prompts, seeds)
    for concept in concepts:
        gift = {m: min(1.0, max(0.0, a + rng.gauss(0, 0.12) * (a > 0))) for m, (a, _) in methods.items()}
        settings = [("unsteered", layers[0], 0.0, None)]
        for method in methods:
            grid = (0.0,) if method == "prompt" else coefficients
            settings += [
                (method, layer, c, None) for layer in (layers[:1] if method == "prompt" else layers) for c in grid
            ]
            if method != "prompt":
                settings += [(method, layer, 7.5 + gift[method], target) for layer in layers for target in matched]
        for method, layer, coefficient, target in settings:
            strength, cost = gift.get(method, 0.0), methods.get(method, (0, 0))[1]
            pull = strength * (1 - math.exp(-coefficient / 7)) * (1.0 if layer == layers[-1] else 0.85)
            pull = strength * 0.8 if method == "prompt" else pull
            harm = cost * (coefficient / 26) ** 2
            for p, s in units:
                behavior = _inside(0.06 + pull + ease[p, s] + rng.gauss(0, 0.12))
                coherence = _inside(math.exp(-harm) - 0.08 + rng.gauss(0, 0.08))
                yield {
                    "concept": concept,
                    "method": method,
                    "layer": layer,
                    "coefficient": coefficient,
                    "matched": target,
                    "prompt": p,
                    "seed": s,
                    "half": "tune" if (p + s) % 2 else "report",
                    "text": _text(rng, concept, behavior, coherence),
                    "behavior": behavior,
                    "coherence": coherence,
                    "ce": round(2.6 - 1.5 * math.log(max(coherence, 0.05)), 4),
                    "ce_rise": None if method in ("unsteered", "prompt") else round(harm, 4),
                }


def header(concepts, methods, layers, coefficients, prompts, seeds):
    return {
        "fgsteer": "bench",
        "version": "0.1.0",
        "plan": {
            "model": "default",
            "concepts": list(concepts),
            "methods": ["unsteered", *methods],
            "layers": list(layers),
            "coefficients": list(coefficients),
            "prompts": ["I think", "The next day", "She said that", "My friend", "It was", "They went", "In the", "We"][
                :prompts
            ],
            "seeds": seeds,
            "max_new_tokens": 32,
            "judge": {"name": "embedding", "auc": {c: round(0.9 + 0.01 * n, 3) for n, c in enumerate(concepts)}},
        },
        "versions": {"fgsteer": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "sha256": {"model": "3f" * 32, "sae": "a7" * 32},
        "command": "fgsteer bench --model default --out results/bench.jsonl",
    }


def write(path, made):
    """The file a bench would leave."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return path


def _inside(value):
    return round(min(1.0, max(0.0, value)), 4)


def _text(rng, concept, behavior, coherence):
    words = rng.sample(WORDS, 22)
    for n in range(len(words)):
        if rng.random() < behavior * 0.25:
            words[n] = concept
        elif rng.random() > coherence:
            words[n] = words[0]
    return f" {' '.join(words)}."
