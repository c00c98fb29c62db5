"""What the embedded model writes: unsteered, and steered towards a few concepts. Nothing is selected.

unsteered(model, tokenizer, seed=0)
steered(model, tokenizer, sae, effects, seed=0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import fgsteer as fg

CONCEPTS = ("love", "food", "music", "fear", "war")
MU, BIAS = 0.1, 0.0  # of the projection through effects
CE_RISE = 0.35  # nats a token that steering costs the neutral texts
TEXTS = 16  # of these
OPTIONS = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 48}
PROMPTS = 10


def _write(model: Any, tokenizer: Any, seed: int, steering: Any) -> list[list[str]]:
    """[prompt, continuation] of the first neutral prompts."""
    prompts = fg.load_neutral()[1][:PROMPTS]
    torch.manual_seed(seed)
    texts = fg.generate(model, tokenizer, prompts, steering=steering, **OPTIONS)
    return [list(pair) for pair in zip(prompts, texts, strict=True)]


def unsteered(model: Any, tokenizer: Any, seed: int) -> list[list[str]]:
    """[prompt, continuation] of the model alone."""
    return _write(model, tokenizer, seed, None)


def steered(model: Any, tokenizer: Any, sae: fg.SAE, effects: fg.EffectApproximator, seed: int) -> Mapping[str, Any]:
    """How it was steered, and per concept the coefficient and [prompt, continuation].

    FGAA through effects, at the coefficient that costs ``CE_RISE``.
    """
    texts = fg.load_neutral()[0][:TEXTS]
    found = {}
    for name in CONCEPTS:
        stats = fg.collect(model, tokenizer, fg.load_contrast(name), sae=sae)
        vec = fg.fgaa(stats, sae, effects, mu=MU, bias_weight=BIAS)
        coefficient = fg.calibrate(model, tokenizer, vec.add, texts, target_ce_rise=CE_RISE, start=8.0)
        written = _write(model, tokenizer, seed, vec.add(coefficient))
        found[name] = {"coefficient": coefficient, "samples": written}
    return {"mu": MU, "bias_weight": BIAS, "ce_rise": CE_RISE, "texts": TEXTS, "concepts": found}
