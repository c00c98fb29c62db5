"""Reprs: one short line each, never a tensor in full; an SAE's and a vector's tell what they are."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.display.tables import Table
from fgsteer.errors.reprs import OneLineRepr, short_repr
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.receipts.record import OwnText
from fgsteer.receipts.retention import Change
from tests.helpers import runs
from tests.helpers.saes import make_sae
from tests.helpers.tiny import tiny_model, word_tokenizer

LIMIT = 300
AT = fg.Hookpoint(1)
LONG = "the bride wore a ring\n" * 400


def traced():
    """A trace of long texts with its parts, and changes of features."""
    likely, action = fg.NextToken(3, LONG, -1 / 3), fg.TokenAction(True, None, 1 / 3, 1 / 7)
    numbers = (-1 / 3, -1 / 7, 1 / 3, 1 / 7)
    token = fg.TracedToken(3, LONG, "prompt", *numbers, (likely,) * 5, (likely,) * 5, 1 / 3, (action,) * 9)
    text = fg.TracedText(0, "steered", LONG, 3, (token,) * 400)
    steered = fg.TracedIntervention("Add", str(AT), "all", LONG, LONG)
    feature = fg.TracedFeature(3, LONG, 1 / 3, 1 / 7)
    whole = fg.Trace((LONG,) * 9, (text,) * 9, (steered,) * 9, (feature,) * 64, str(AT), {"model": LONG})
    change = fg.FeatureChange(3, LONG, 1 / 3, 1 / 7, 1 / 9, 1 / 11, 1 / 13, 1 / 17)
    table = Table([change] * 20)
    changes = fg.FeatureChanges(table, table, table, 1 / 3, 1 / 7, "prompts", 9, 9, LONG, {"prompts": 18})
    return [likely, action, token, text, steered, feature, whole, change, changes, fg.Sampling()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of every public dataclass and of what holds tensors, as large as they come."""
    wide, narrow = torch.randn(4096), torch.randn(4096).abs()
    sae = make_sae("topk", d_sae=4000)
    sae = dataclasses.replace(sae, source="a/folder/of/some/depth" * 9, labels=dict.fromkeys(range(4000), LONG))
    provenance = {"method": "fgaa", "data": [{"name": LONG}] * 40, "feature_density": {str(n): 0.1 for n in range(999)}}
    features = {n: float(n) for n in range(2000)}
    vector = fg.SteeringVector(wide, AT, reference=wide, features=features, provenance=provenance)
    moments = fg.Moments(20, wide.double(), wide.double(), narrow.double())
    contrast, pooled = fg.Contrast(moments, moments), fg.Pooled(torch.randn(20, 4096), torch.randn(20, 4096))
    places = {fg.Hookpoint(n): contrast for n in range(60)}
    pair = fg.ContrastPair(LONG, [{"role": "user", "content": LONG}] * 9, prompt=LONG)
    excerpt = fg.Excerpt(("word",) * 500, (1.0,) * 500, 3, 7)
    run = fg.load_run(runs.write(tmp_path_factory.mktemp("run") / "run.jsonl", runs.rows(concepts=("love",))))
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    texts = ["the bride wore a ring", "a cat ran"]
    swept = fg.sweep(model, tokenizer, fg.ContrastSet("x", positives=texts, negatives=["a dog sat", "the man"]),
                     layers=[0, 1], ce_rises=[0.01], neutral=texts)  # fmt: skip
    long_gate = (fg.Projection(vector).mean() > 1 / 3) & (fg.Feature(sae, 3) < 1 / 3)
    plan = BenchPlan(tuple(fg.shipped_contrasts()), methods=("unsteered",), settings={"fgaa": {"n_positive": 8}})
    common = {"hookpoint": AT, "model_name": "org/" + "name" * 30, "method": "fgaa", "scope": "reply"}
    interval = Interval(1 / 3, 1 / 7, 1 / 9, 10**6, 10**6, 1 / 3)
    score = fg.DirectionScore(-1, 2, 1 / 3, 1 / 7, 1 / 9)
    return [
        sae,
        vector,
        vector * 2.0,
        *(vector.add(2.0), vector.ablate(), vector.clamp(1.0), vector.affine(1.0)),
        fg.Add(direction=wide, coefficient=1 / 3, bos=True, **common),
        fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets=dict.fromkeys(range(900), 2.0)),
        fg.edit(sae, dict.fromkeys(range(900), ("at_most", 2.0))),
        *(vector.add_relative(0.3), vector.add_keeping_norm(2.0), vector.clamp(at_least=1 / 3, at_most=2 / 3)),
        fg.ClampSubspace(directions=torch.randn(9, 4096), targets=[1 / 3] * 9, **common),
        fg.Rotate(direction=wide, other=narrow, by=1 / 3, **common),
        fg.Remap(weight=torch.randn(9, 9), bias=torch.randn(9), strength=1 / 3, **common),
        fg.AdaptiveAdd(direction=wide, read=narrow, bias=1 / 3, **common),
        fg.Scale(width=4096, coefficient=1 / 3, read=narrow, **common),
        fg.CacheSteering(
            layers=range(60),
            keys=torch.randn(60, 9, 128),
            values=torch.randn(60, 9, 128),
            d_model=4096,
            value_coefficient=1 / 3,
            model_name="org/" + "name" * 30,
        ),
        fg.Add(direction=wide, when=(long_gate & ~long_gate) | long_gate, **common),
        *(fg.Projection(vector).mean(), fg.Cosine(vector), fg.Probe(wide, AT, 1 / 3), fg.Feature(sae, 3)),
        fg.GateFit(fg.Feature(sae, 3).max() > 1 / 3, *[fg.GateScores(1 / 3, 1 / 3, 1 / 3, 1 / 3, (10**6, 10**6))] * 2),
        fg.GateScores(1 / 3, 1 / 3, 1 / 3, 1 / 3, (10**6, 10**6)),
        *(moments, contrast, pooled),
        fg.ContrastStatistics(places, {AT: contrast}, {"model": LONG}, ({"name": LONG},) * 50, {AT: pooled}),
        fg.FeatureDensity(narrow, narrow, narrow, 10**9, "3f" * 32, 0.01, {"name": LONG}),
        fg.EffectApproximator(torch.randn(64, 4096), wide, AT, "a7" * 32, {"plan": {"prompts": [LONG] * 16}}),
        excerpt,
        fg.measure_examples(model, tokenizer, make_sae("relu"), texts),
        fg.FeatureRow(3, 0.5, 0.01, ("word",) * 99, LONG, ("word",) * 99, "https://" + LONG, (excerpt,) * 9, (LONG,)),
        fg.FoundFeature(3, 0.5, (LONG,) * 9),
        fg.SeenFeature(3, LONG, 0.5, "word"),
        fg.FeatureWeight(3, 1 / 3, 1 / 7, LONG),
        fg.Comparison((LONG,) * 9, (LONG,) * 9, (LONG,) * 9),
        *traced(),
        pair,
        fg.ContrastSet("x" * 500, pairs=[pair] * 400, held_out=fg.load_contrast("love")),
        fg.LogProbabilities(torch.randn(9, 400), torch.ones(400)),
        fg.AnswerProbabilities(torch.randn(9, 400), torch.randn(9, 400)),
        fg.Steerability(wide),
        fg.Coherence.fit(model, tokenizer, texts),
        fg.CoherenceScores(wide, wide, wide),
        fg.diagnose(fg.collect(model, tokenizer, fg.load_contrast("love"), hookpoints=AT, keep_pooled=True)),
        *(run, run.records[0], dataclasses.replace(run.records[0], text=LONG)),
        *(swept, swept.cells[0]),
        *(plan, Bench(model, tokenizer, {1: sae}, {}, fg.KeywordJudge(), plan)),
        fg.registry(search="gemma-scope")[0],
        fg.CostEstimate(1, 2, 3, 4, 5.0),
        fg.SAETraining(lr=1 / 3),
        fg.SAEQuality(10**9, 10**6, *[1 / 3] * 6),
        *(score, fg.DirectionSelection(vector, score, Table([score] * 99), (9, 9), (9, 9))),
        fg.ResidualShift(AT, torch.randn(64, 4096), wide, wide, 64, {"name": LONG}),
        fg.TransferMap(torch.randn(9, 64), narrow[:9], narrow[:9], AT, AT, source_model={"name": LONG}),
        fg.TransferQuality(10**9, 10**6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, wide),
        fg.AutoencoderTraining(lr=1 / 3),
        fg.audit(model, tokenizer, tiny_model("llama", seed=1), texts),
        fg.PerplexityPoint(1 / 3, 1 / 3, 1 / 3),
        fg.SamplePoint(10**6, *[1 / 3] * 5),
        fg.SignedSlopes(10**6, 1 / 3, 1 / 3, interval, interval, interval, LONG),
        fg.StyleEffect(LONG, LONG, interval, interval, interval),
        fg.OpenStyle([LONG] * 99, fg.KeywordJudge(), LONG),
        fg.SuffixSearch(LONG, (10**6,) * 99, (1 / 3,) * 99, wide, wide, torch.randn(9, 4096), 1 / 3, 1 / 3),
        *(AT, fg.Hookpoint.parse("model.layers.3.mlp")),
        *recipes(wide, vector),
        *mechanisms(model, tokenizer, texts, wide),
        fg.ConceptCone(torch.linalg.qr(torch.randn(4096, 3))[0].T, AT, 1 / 3, (1 / 3,) * 999, provenance),
        fg.Independence(narrow[:60], narrow[:60]),
        fg.ComponentRow(10**6, 1 / 3, (LONG,) * 9, (LONG,) * 9, ((10**6, 1 / 3),) * 9, (LONG,) * 9),
        fg.TokenRelevance((LONG,) * 99, (LONG,) * 99, wide, 1 / 3),
        fg.TriggerWord(LONG, 10**6, 1 / 3),
        fg.VectorTraining(lr=1 / 3),
        *(fg.AdaptiveTraining(lr=1 / 3), fg.ScalingTraining(lr=1 / 3), fg.KLThenSteerTraining(lr=1 / 3)),
        fg.ScalingRow(AT, "ends:100,100", 1 / 3, 1 / 3),
        fg.ActivationScaling(
            tuple(fg.Scale(width=4096, read=wide, **common) for _ in range(60)),
            (1 / 3,) * 200,
            (1 / 3, 1 / 3),
            {"examples": 10**6},
        ),
        *selections(sae, vector, wide, narrow),
        *axbench_parts(),
        *receipts(interval),
    ]


def selections(sae, vector, wide, narrow):
    """What ranks features, and advice on contrast data."""
    ranking = fg.FeatureRanking.of(
        "max_auc", narrow[:4000], sae, held_out=wide[:4000], chance=1 / 3, settings={"a": LONG}
    )
    change = fg.OutcomeChange(10**6, 1 / 3, 1 / 7, 10**6, 10**6)
    return [
        *(ranking, fg.RankedFeature(10**6, 1 / 3, 1 / 7, LONG), change),
        fg.FeatureActivations(torch.randn(9, 4000), wide[:9] > 0, wide[:9] > 0, sae, {"contrast": LONG}),
        fg.CorrSteer((vector,) * 30, (ranking,) * 30, change, (change,) * 30, 10**9, 1 / 3, "A"),
        fg.Advice("leakage", LONG, 1 / 3, LONG, serious=True, details={"texts": [LONG] * 99}),
    ]


def axbench_parts():
    """What AxBench's files hold, its settings, and a result."""
    text = fg.AxBenchText(LONG, LONG, losing=LONG)
    concept = fg.AxBenchConcept(10**6, LONG, 10**6, "text", (text,) * 99, (text,) * 99, (text,) * 99)
    content = {"methods": [{}] * 99, "concepts": 500, "data": LONG, "model": "org/" + LONG, "judge": LONG}
    return [
        *(text, concept, fg.AxBenchData(LONG, (concept,) * 99, (LONG,) * 805, 10**6)),
        *(fg.AxBenchPlan(), fg.AxBenchResult(content)),
    ]


def receipts(interval):
    """What a vector does besides."""
    wide, change = torch.randn(40, 40).double(), Change(interval, interval, interval)
    turns = ((1 / 3,) * 99,) * 99
    parts = {
        "dose": fg.Dose(1 / 3, 1 / 7, 1 / 9, 10**6, 10**6),
        "own_text": OwnText(interval, interval, 10**6),
        "wrong_way": interval,
        "retention": fg.Retention(change, change, {LONG: (1 / 3, 1 / 7)}),
        "refusals": fg.Refusals(change, change),
        "drift": fg.Drift(turns, turns, interval, interval),
        "rerouting": fg.Rerouting(1 / 3, 1 / 7, 1 / 9, 1 / 11, 10**6, (10**6,) * 99, ((1, 2, 1 / 3, 1 / 7),) * 99),
    }
    whole = fg.Receipt("caa", "blocks.1.hook_resid_post", 1 / 3, "Add", "all", 1 / 3, **parts, left_out={LONG: LONG})
    own = fg.OwnTextKL(wide, wide, wide.long(), 10**6, [[LONG] * 40] * 40)
    return [own, change, *(part for part in parts.values() if part is not interval), whole]


def recipes(wide, vector):
    """What decides by prompts."""
    return [
        fg.AddByPrompt(direction=wide, hookpoint=AT, reading=fg.Projection(vector).last(), bias=1 / 3),
        fg.Preview([fg.Projection(vector)] * 40, appended=[7] * 40),
        fg.TanhCosine(vector),
        fg.AdaSteerRule(8, 1 / 3, 1 / 7, 1 / 9),
        fg.GateEffect(1 / 3, 1 / 7, 1 / 9, 1 / 11),
    ]


def mechanisms(model, tokenizer, texts, wide):
    """What says why steering works."""
    pushed = fg.SteeringVector(torch.ones(32), 0).add(40.0)
    found = fg.attribute_steering(model, tokenizer, texts, pushed, metric="kl", steps=2, max_new_tokens=2)
    circuit = fg.CircuitPoint("edges", 10**6, 1 / 3, 10**6, 1 / 3, 1 / 7, 1 / 9, 1 / 11, 1 / 13)
    faithful = fg.Faithful(LONG, 1 / 3, 1 / 7, 1 / 9, 1 / 11, 1 / 13)
    value = fg.ValueVector(10**6, 10**6, wide, (LONG,) * 99, (LONG,) * 99)
    circuits, values = Table([circuit] * 99), Table([value] * 99)
    return [
        *(found, circuit, faithful, value, fg.NodeEffect("L29.H17", 29, 17, 1 / 3, 1 / 7)),
        fg.Explanation(found, found, circuits, circuits, Table([faithful] * 99), Table(), values, {"prompt": LONG}),
    ]


def test_every_public_repr_is_one_short_line(made):
    for value in made:
        assert len(repr(value)) < LIMIT, type(value)
        assert "\n" not in repr(value), type(value)
        assert "tensor(" not in repr(value), type(value)
        assert repr(value).startswith(type(value).__name__), type(value)
    known = {type(value) for value in made}
    public = {value for value in (getattr(fg, name) for name in vars(fg)["__all__"]) if dataclasses.is_dataclass(value)}
    assert {kind for kind in public if not inspect.isabstract(kind)} <= known


def test_an_sae_and_a_vector_say_what_they_are():
    assert repr(fg.load_sae("default")) == (
        "SAE(topk, k 24, at blocks.2.hook_resid_post, d_model 320, d_sae 5120, from 'default/layer_2')"
    )
    normed = dataclasses.replace(make_sae("jumprelu"), input_norm="layer_norm")
    assert repr(normed).startswith("SAE(jumprelu, layer_norm, at blocks.1.hook_resid_post, d_model 32, d_sae ")
    direction = torch.zeros(32)
    direction[0] = 2.0
    vector = fg.SteeringVector(direction, AT, features={3: 0.5, 9: -4.0, 1: 1.0, 2: 0.25}, provenance={"method": "sta"})
    told = "SteeringVector(sta at blocks.1.hook_resid_post, d_model 32, norm 2, 4 features {9: -4, 1: 1, 3: 0.5, …})"
    assert repr(vector) == told
    assert repr(vector.add(8.0)) == "Add(hookpoint=blocks.1.hook_resid_post, method='sta', direction=float32 (32,), coefficient=8)"  # fmt: skip  # noqa: E501
    bare = fg.SteeringVector(direction, AT)
    assert repr(bare) == "SteeringVector(bare at blocks.1.hook_resid_post, d_model 32, norm 2, 0 features)"


class Untold:
    def __str__(self):
        raise AssertionError("rendered")


def test_values_in_brief():
    assert short_repr(torch.zeros(2, 3)) == "float32 (2, 3)"
    assert short_repr(np.zeros(4)) == "float64 (4,)"
    assert (short_repr(1 / 3), short_repr(8), short_repr(True), short_repr(None)) == ("0.3333", "8", "True", "None")
    assert short_repr("x" * 99) == f"'{'x' * 39}…'"
    assert short_repr({1: 2.0}) == "{1: 2}"
    assert (short_repr({}), short_repr(()), short_repr([1] * 9)) == ("{}", "()", "(9 entries)")
    assert short_repr((torch.zeros(2),)) == "(1 entry)"
    assert short_repr(torch.nn.Linear(2, 2)) == "Linear"  # which prints its sizes
    assert short_repr([Untold()] * 9) == "(9 entries)"  # nothing is rendered that is not shown

    @dataclasses.dataclass(frozen=True, repr=False)
    class Kept(OneLineRepr):
        value: int
        other: int = 2

    assert (repr(Kept(1)), repr(Kept(1, 3))) == ("Kept(value=1)", "Kept(value=1, other=3)")
