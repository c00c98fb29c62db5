"""Numbers that no argument can be: each public function raises a typed error, and none takes nan for a number."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

import fgsteer as fg
from fgsteer.effects.measuring import decoder_directions
from fgsteer.effects.rollouts import Sampling
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, tiny_model, word_tokenizer

NOT_NUMBERS = ["1", True, [1], "\udcff"]
LARGE = [2**63, 2**70, 1.5, 1e300]
VALUES = [
    math.nan,
    math.inf,
    -math.inf,
    2**63,
    2**70,
    -(2**70),
    10**400,
    -3,
    1.5,
    1e300,
    torch.tensor(math.nan),
    *NOT_NUMBERS,
]
TEXTS = ["the man sat", "a cat ran"]
DATA = fg.ContrastSet("x", positives=["the bride wore a ring", "the groom"], negatives=["a dog sat", "a cat"])


@pytest.fixture(scope="module")
def parts():
    model, tokenizer, sae = tiny_model("llama"), word_tokenizer(), make_sae()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = fg.collect(model, tokenizer, DATA, sae=sae, keep_pooled=True)
    effects = fg.EffectApproximator(torch.randn(32, 24), torch.randn(24), sae.hookpoint, sae.sha256)
    return SimpleNamespace(m=model, t=tokenizer, sae=sae, stats=stats, vec=fg.ace(stats), effects=effects)


def generating(**options):
    """Calls of generate with one option of a value."""
    name = next(name for name, value in options.items() if value is None)
    return lambda p, v: fg.generate(p.m, p.t, "the", **{"max_new_tokens": 2, **options, name: v})


def planned(name):
    return lambda _, v: fg.BenchPlan(**{"concepts": ("sea",), "layers": (1,), "methods": ("caa",), name: v})


def measured(function, name):
    return lambda p, v: function(p.m, p.t, p.sae, TEXTS, **{name: v})


def swept(name):
    given = {"layers": [1], "ce_rises": None if name == "coefficients" else [0.01], "controls": 0}
    return lambda p, v: fg.sweep(p.m, p.t, DATA, neutral=TEXTS, **{**given, name: v if name == "matched" else [v]})


CALLS = {
    "max_new_tokens": generating(max_new_tokens=None),
    "min_new_tokens": generating(min_new_tokens=None),
    "temperature": generating(do_sample=True, temperature=None),
    "top_p": generating(do_sample=True, top_p=None),
    "num_beams": generating(num_beams=None),
    "num_return_sequences": generating(num_return_sequences=None, do_sample=True),
    "stream": lambda p, v: fg.stream(p.m, p.t, "the", max_new_tokens=v),
    "add": lambda p, v: p.vec.add(v),
    "clamp": lambda p, v: p.vec.clamp(v),
    "affine": lambda p, v: p.vec.affine(v),
    "times": lambda p, v: p.vec * v,
    "over": lambda p, v: p.vec / v,
    "layer": lambda _, v: fg.Hookpoint(v),
    "hookpoint": lambda _, v: fg.Hookpoint.parse(v),
    "place of a vector": lambda p, v: fg.SteeringVector(torch.ones(D_MODEL), v).check(p.m),
    "tokens of collect": lambda p, v: fg.collect(p.m, p.t, DATA, sae=p.sae, tokens=v),
    "max_tokens of collect": lambda p, v: fg.collect(p.m, p.t, DATA, sae=p.sae, max_tokens=v),
    "batch_tokens of collect": lambda p, v: fg.collect(p.m, p.t, DATA, sae=p.sae, batch_tokens=v),
    "max_tokens of density": measured(fg.measure_density, "max_tokens"),
    "batch_tokens of density": measured(fg.measure_density, "batch_tokens"),
    "top of examples": measured(fg.measure_examples, "top"),
    "window of examples": measured(fg.measure_examples, "window"),
    "features of examples": lambda p, v: fg.measure_examples(p.m, p.t, p.sae, TEXTS, features=[v]),
    "top of a search": lambda p, v: fg.find_features(p.m, p.t, p.sae, "cat", top=v),
    "features described": lambda p, v: fg.describe_features(p.m, p.t, p.sae, [v]),
    "tokens described": lambda p, v: fg.describe_features(p.m, p.t, p.sae, [1], tokens=v),
    "coefficient of output scores": lambda p, v: fg.output_scores(p.m, p.t, p.sae, [1], prompt="the", coefficient=v),
    "features of output scores": lambda p, v: fg.output_scores(p.m, p.t, p.sae, [v], prompt="the"),
    "top of seen features": lambda p, v: fg.seen_features(p.m, p.t, p.sae, "the man", top=v),
    "batch_tokens of scoring": lambda p, v: fg.cross_entropy(p.m, p.t, TEXTS, batch_tokens=v),
    "target": lambda p, v: fg.calibrate(p.m, p.t, p.vec.unit().add, TEXTS, target_kl=v),
    "start": lambda p, v: fg.calibrate(p.m, p.t, p.vec.unit().add, TEXTS, target_kl=0.001, start=v),
    "tolerance": lambda p, v: fg.calibrate(p.m, p.t, p.vec.unit().add, TEXTS, target_kl=0.001, tolerance=v),
    "targets": lambda p, v: fg.calibrate_grid(p.m, p.t, [p.vec.add], TEXTS, target_ce_rises=[v]),
    "layers of a sweep": swept("layers"),
    "costs of a sweep": swept("ce_rises"),
    "strengths of a sweep": swept("coefficients"),
    "matched of a sweep": swept("matched"),
    "n_positive": lambda p, v: fg.fgaa(p.stats, p.sae, bos_share=None, n_positive=v),
    "max_density": lambda p, v: fg.fgaa(p.stats, p.sae, max_density=v),
    "bos_share": lambda p, v: fg.fgaa(p.stats, p.sae, bos_share=v),
    "mu": lambda p, v: fg.sae_ts(p.sae, [1], p.effects, mu=v),
    "bias_weight": lambda p, v: fg.sae_ts(p.sae, [1], p.effects, bias_weight=v),
    "decoder_weight": lambda p, v: fg.sae_ts(p.sae, [1], p.effects, decoder_weight=v),
    "feature": lambda p, v: fg.from_features(p.sae, [v]),
    "weight": lambda p, v: fg.from_features(p.sae, {1: v}),
    "target of a clamp": lambda p, v: fg.ClampFeature(hookpoint=p.sae.hookpoint, sae=p.sae, targets={1: v}),
    "direction": lambda p, v: p.sae.direction(v),
    "seed": lambda _, v: Sampling(seed=v),
    "top_k": lambda _, v: Sampling(top_k=v),
    "count of rows": lambda p, v: decoder_directions(p.sae, v),
    "seed of rows": lambda p, v: decoder_directions(p.sae, 5, v),
    "ce_rises": lambda _, v: planned("ce_rises")(_, (0.5, v)),
    **{f"{name} of a plan": planned(name) for name in ("prompts", "seeds", "texts", "batch_rows", "matched", "seed")},
    **{f"{name} of a plan": planned(name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")},
}


PAIRS = [fg.ContrastPair("the bride", "a dog", "he said"), fg.ContrastPair("the groom", "a cat", "she ran")]
NO_BATCH = {
    "calibrate_many": lambda p: fg.calibrate_many(p.m, p.t, [p.vec.unit().add], TEXTS, batch_tokens=0),
    "collect": lambda p: fg.collect(p.m, p.t, DATA, hookpoints=[1], batch_tokens=0),
    "corrsteer": lambda p: fg.corrsteer(p.m, p.t, p.sae, ["the"] * 16, lambda n, answer: n, batch_tokens=0),
    "cross_entropy": lambda p: fg.cross_entropy(p.m, p.t, TEXTS, batch_tokens=0),
    "grains": lambda p: fg.grains(p.m, p.t, PAIRS, 1, top=1, steps=1, batch_tokens=0),
    "kl_then_steer": lambda p: fg.kl_then_steer(p.m, p.t, TEXTS, [DATA], batch_tokens=0),
    "learned_mask": lambda p: fg.learned_mask(p.m, p.t, p.sae, PAIRS * 2, batch_tokens=0),
    "log_probabilities": lambda p: fg.log_probabilities(p.m, p.t, [("the", "cat")], batch_tokens=0),
    "measure_sae": lambda p: fg.measure_sae(p.m, p.t, p.sae, TEXTS, batch_tokens=0),
    "train": lambda p: fg.train(p.m, p.t, PAIRS, hookpoint=1, batch_tokens=0),
    "train_adaptive": lambda p: fg.train_adaptive(p.m, p.t, [("the", "cat")], hookpoints=1, batch_tokens=0),
}


@pytest.mark.parametrize("name", NO_BATCH)
def test_a_batch_of_no_tokens_is_refused(name, parts):
    with pytest.raises(fg.DataError, match="batch_tokens = 0"):
        NO_BATCH[name](parts)


SEARCHES = {"start", "target", "targets", "costs of a sweep"}  # of which a large number is a long one


@pytest.mark.filterwarnings("ignore::fgsteer.errors.FgsteerWarning")
@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_an_argument_cannot_be(name, parts):
    for value in VALUES:
        if name in SEARCHES and any(value is large for large in LARGE):
            continue
        try:
            CALLS[name](parts, value)
        except fg.FgsteerError:
            continue
        assert not (isinstance(value, float) and math.isnan(value)), "nan was taken"
        assert not isinstance(value, str), f"{value!r} was taken for a number"
