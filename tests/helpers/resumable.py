"""Jobs that leave their work behind and go on from it: each as a function of a folder and what it is made of."""

from __future__ import annotations

import torch

import fgsteer as fg
from fgsteer.effects.rollouts import Sampling
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.distributors import Torchrun
from fgsteer.evaluation.bench.plan import BenchPlan
from tests.helpers.saes import make_sae
from tests.helpers.tiny import word_tokenizer

TEXTS = ["the man sat on a ship", "a dog ran to the sea", "the king said no", "she took the bread and tea"]
SIDES = {
    "positives": ["the bride wore a ring", "the groom", "a wedding"],
    "negatives": ["a dog sat", "a cat", "the ship"],
}


class LengthJudge:
    name = "length"

    def score(self, texts, concept):
        return torch.tensor([min(1.0, len(text) / 100) for text in texts], dtype=torch.float64)


def contrast(**changes):
    sides = {name: tuple(texts) for name, texts in {**SIDES, **changes}.items()}
    return fg.ContrastSet("own", **sides, held_out=fg.ContrastSet("held", positives=["a ring"], negatives=["a cat"]))


PARTS = {"model": None, "tokenizer": word_tokenizer(), "sae": make_sae(d_sae=24), "contrast": contrast()}
PLAN = {
    "methods": ("unsteered", "caa"),
    "layers": (1,),
    "ce_rises": (0.05,),
    "matched": None,
    "prompts": 2,
    "max_new_tokens": 3,
    "own_prompts": ("the man", "a dog", "the old king", "she took"),
    "neutral": tuple(TEXTS),
}
SHORT = {"sampling": Sampling(max_new_tokens=2), "target_ce_rise": 0.05}


def bench_of(model, tokenizer, sae, contrast, judge=None, effects=None, **plan):
    made = BenchPlan(concepts=("own",), **{**PLAN, **plan})
    return Bench(model, tokenizer, {1: sae}, {1: effects} if effects else {}, judge or LengthJudge(), made,
                 contrasts=[contrast])  # fmt: skip


def collect(where, model, tokenizer, sae, contrast, fresh=False, **options):
    fg.collect(model, tokenizer, contrast, sae=sae, work=where, fresh=fresh, **options)


def density(where, model, tokenizer, sae, contrast, fresh=False, **options):
    fg.measure_density(model, tokenizer, sae, contrast.positives, work=where, fresh=fresh, **options)


def effects(where, model, tokenizer, sae, contrast, fresh=False, **options):
    plan = {"prompts": TEXTS[:2], "texts": contrast.positives, "vectors": None, "rollouts": 2, "rows": 24, **SHORT}
    fg.EffectApproximator.measure(model, tokenizer, sae, work=where, fresh=fresh, **{**plan, **options})


def bench(where, model, tokenizer, sae, contrast, fresh=False, **options):
    bench_of(model, tokenizer, sae, contrast, **options).run(where / "run.jsonl", fresh=fresh)


def shared_bench(where, model, tokenizer, sae, contrast, fresh=False, **options):
    Torchrun().run(bench_of(model, tokenizer, sae, contrast, **options), where / "run.jsonl", fresh=fresh)


RUNS = {"collect": collect, "density": density, "effects": effects, "bench": bench, "shared": shared_bench}
