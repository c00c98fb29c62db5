"""What a caller has changed in torch changes no result: gradients that are off, another default dtype or device.

Notebooks begin with ``torch.set_grad_enabled(False)`` or ``torch.set_default_device("cuda")``. Here the default device
is "meta", whose tensors hold nothing: whatever were made there without a word would end in an error.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.errors.defaults import has_usual_defaults, usual_defaults
from tests.helpers.saes import make_sae
from tests.helpers.steering import vector
from tests.helpers.tiny import D_MODEL, WORDS, tiny_model, word_tokenizer

AT = fg.Hookpoint(1)
PAIRS = [fg.ContrastPair("the bride", "a dog", "he said"), fg.ContrastPair("the groom", "a cat", "she ran")]
ANSWERED = [("the man", "a dog ran"), ("the woman", "the cat sat")]
CHOICES = [("the man", "sat", "ran"), ("a woman", "ran", "sat")]
SIDES = {"positive": ["the bride wore a ring", "a wedding"], "negative": ["a dog sat", "the sad cat"]}
TEXTS = [" ".join(WORDS[(7 * n + 5 * k) % 60] for k in range(5 + n % 3)) for n in range(24)]
OPTIONS: Any = {"batch_size": 2, "epochs": 2, "reply_tokens": 4}


class Parts:
    """What calls take, of their own, so that nothing that another left on a model is of help."""

    def __init__(self) -> None:
        self.m, self.t = tiny_model("llama"), word_tokenizer()
        self.tuned = tiny_model("llama", seed=1)
        self.sae, self.v, self.other = make_sae(layer=1), vector(1), vector(3)
        self.topk = make_sae("topk", d_sae=4096, layer=0)
        self.stats = fg.collect(self.m, self.t, SIDES, sae=self.sae)
        self.basis = torch.eye(D_MODEL)[:2]
        self.wide = torch.ones(2, fg.load_sae("default").d_model)
        self.rows = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(0))
        self.prompts = self.t(["the man", "a dog"], return_tensors="pt")


def adaptive(p: Parts) -> Any:
    settings = fg.AdaptiveTraining(steps=5)
    return [v.direction for v in fg.train_adaptive(p.m, p.t, ANSWERED, hookpoints=AT, objective=settings)]


def adapted(p: Parts) -> Any:
    settings = fg.KLThenSteerTraining(rank=None, epochs=2)
    return list(fg.kl_then_steer(p.m, p.t, TEXTS[:4], [SIDES], hookpoints=[AT], settings=settings).parameters())


def attributed(p: Parts) -> Any:
    found = fg.attribute_steering(p.m, p.t, ["the man"], p.v.add(2.1), max_new_tokens=2, steps=2)
    return [found.effects, found.node_effects, found.edge_effects]


def mapped(p: Parts) -> Any:
    training = fg.AutoencoderTraining(hidden=8, epochs=2)
    found = fg.fit_transfer(p.m, p.t, p.m, p.t, TEXTS, 1, 0, kind="autoencoder", training=training)
    return [found.weight, found.hidden_weight]


def trained_sae(p: Parts) -> Any:
    settings = fg.SAETraining(d_sae=16, k=4, tokens=64, batch=16)
    with TemporaryDirectory() as folder:
        sae, _ = fg.train_sae(p.m, p.t, TEXTS, AT, folder, settings=settings, held_out=4)
    return [sae.W_enc, sae.W_dec]


def component_effects(p: Parts) -> Any:
    low = fg.residual_shift(p.m, p.tuned, p.t, TEXTS[:8])[0]
    return list(fg.component_effects(p.m, p.t, low, p.other, TEXTS[:2], components=3, steps=3))


def suffix(p: Parts) -> Any:
    return fg.find_suffix(p.m, p.t, p.v, TEXTS[:9], length=2, steps=3, candidates=8, top=8).history


def steered(items: Any) -> Any:
    """The token ids that transformers itself generates within a steer block, and logits of a pass."""

    def call(p: Parts) -> Any:
        with fg.steer(p.m, items(p)), torch.no_grad():
            ids = p.m.generate(**p.prompts, max_new_tokens=8, do_sample=False)
            return [ids, p.m(**p.prompts).logits]

    return call


def saved(p: Parts) -> Any:
    with TemporaryDirectory() as folder:
        adaptive = fg.SteeringVector(p.v.direction, AT, read=p.other.direction, bias=0.1)
        adaptive.save(f"{folder}/v.safetensors")
        back = fg.SteeringVector.load(f"{folder}/v.safetensors")
    return [back.direction, back.read, [back.bias]]


def selected(p: Parts) -> Any:
    found = fg.select_direction(
        p.m, p.t, TEXTS[:4], TEXTS[4:8], refusal_tokens=["cat"], held_out=(TEXTS[8:12], TEXTS[12:16]),
        filter_requests=False, max_kl=None, min_induce=None,
    )  # fmt: skip
    return [found.vector.direction]


def calibrated(p: Parts) -> Any:
    return [fg.calibrate(p.m, p.t, p.v.unit().add, TEXTS[:6], target_kl=0.01)]


def effects(p: Parts) -> Any:
    measured = {
        "vectors": p.rows,
        "prompts": ["the man", "a dog"],
        "texts": TEXTS[:4],
        "rollouts": 2,
        "target_ce_rise": 0.01,
    }
    found = fg.EffectApproximator.measure(p.m, p.t, p.sae, sampling=fg.Sampling(max_new_tokens=3), **measured)
    again = fg.EffectApproximator.fit(p.rows, p.rows, hookpoint=AT, sae_sha256=p.sae.sha256)
    return [found.M, found.b, again.M, again.predict(p.other.direction), again.project(p.other.direction)]


def draws(p: Parts) -> Any:
    return [fg.Sampling(seed=3).noise(0, 1, 2, 5)]


def judged(p: Parts) -> Any:
    judge = fg.KeywordJudge({"x": ["bride", "wedding"]})
    return [judge.score(["a bride", "the dog ran", "the wedding bride"], "x")]


CALLS = {
    "attribute_steering": attributed,
    "component_effects": component_effects,
    "find_suffix": suffix,
    "fit_transfer": mapped,
    "grains": lambda p: [fg.grains(p.m, p.t, PAIRS, 1, top=1, steps=3).direction],
    "kl_then_steer": adapted,
    "learned_mask": lambda p: fg.learned_mask(p.m, p.t, p.sae, PAIRS * 2, features=8).scores,
    "token_relevance": lambda p: [one.values for one in fg.token_relevance(p.m, p.t, p.other, TEXTS[:2], steps=3)],
    "train": lambda p: [fg.train(p.m, p.t, PAIRS, hookpoint=AT).direction],
    "train_adaptive": adaptive,
    "train_cone": lambda p: [fg.train_cone(p.m, p.t, TEXTS[:4], TEXTS[4:8], p.v, dimension=2, **OPTIONS).basis],
    "train_many": lambda p: [v.direction for v in fg.train_many(p.m, p.t, {"x": PAIRS}, hookpoint=AT).values()],
    "train_refusal_direction": lambda p: [
        fg.train_refusal_direction(p.m, p.t, TEXTS[:4], TEXTS[4:8], p.v, **OPTIONS).direction
    ],
    "train_sae": trained_sae,
    "train_scaling": lambda p: (
        fg.train_scaling(p.m, p.t, CHOICES, hookpoints=[AT], settings=fg.ScalingTraining(steps=5)).losses
    ),
    "ablate": steered(lambda p: p.v.ablate()),
    "add": steered(lambda p: p.v.add(3.1)),
    "at_least": steered(lambda p: fg.ClampFeature(sae=p.sae, hookpoint=AT, at_least={3: 5.1}, at_most={5: 0.3})),
    "caa": lambda p: [fg.caa(fg.collect(p.m, p.t, SIDES, hookpoints=[AT])).direction],
    "calibrate": calibrated,
    "clamp": steered(lambda p: p.v.clamp(2.1)),
    "cross_entropy": lambda p: [fg.cross_entropy(p.m, p.t, TEXTS, steering=p.v.add(1.1))],
    "density": lambda p: [fg.measure_density(p.m, p.t, p.sae, TEXTS).density],
    "cone": lambda p: [v.direction for v in fg.ConceptCone(p.basis, AT, 1.0).sample(3)],
    "effects": effects,
    "keywords": judged,
    "noise": draws,
    "preview": steered(lambda p: p.v.add(3.1, when=fg.Preview([fg.Projection(p.other)], appended=[5]) > 0.1)),
    "features": lambda p: [fg.from_features(p.sae, {1: 2.1, 3: 1.0}).direction],
    "fgaa": lambda p: [fg.fgaa(p.stats, p.sae, bos_share=None, max_density=None).direction],
    "gate": steered(lambda p: p.v.add(3.1, when=(fg.Feature(p.sae, 3) > 0.1) & (fg.Feature(p.sae, 4) > 0.3))),
    "gate on a prompt": steered(lambda p: p.v.add(3.1, when=fg.Projection(p.other).mean() > 0.1)),
    "gate on topk": steered(lambda p: p.v.add(3.1, when=fg.Feature(p.topk, 3) > 0.1)),
    "generate": lambda p: fg.generate(p.m, p.t, TEXTS[:3], steering=p.v.add(3.1), max_new_tokens=6),
    "load_model": lambda p: [fg.load_model("default")[0](torch.tensor([[5, 6]], device="cpu")).logits],
    "load_sae": lambda p: [fg.load_sae("default").encode(p.wide)],
    "log_probabilities": lambda p: [fg.log_probabilities(p.m, p.t, [("the", "cat")], steering=[p.v.add(1.1)]).sums],
    "measure_sae": lambda p: [[fg.measure_sae(p.m, p.t, p.sae, TEXTS).explained_variance]],
    "output_scores": lambda p: [fg.output_scores(p.m, p.t, p.sae, [1, 2], prompt="the")],
    "per row": steered(lambda p: [p.v.add(2.1), None]),
    "residual_shift": lambda p: [fg.residual_shift(p.m, p.tuned, p.t, TEXTS[:6])[0].components],
    "rotate": steered(lambda p: fg.Rotate(direction=p.v.direction, other=p.other.direction, by=0.7, hookpoint=AT)),
    "save": saved,
    "scale": steered(lambda p: fg.Scale(width=D_MODEL, coefficient=0.7, hookpoint=AT)),
    "select_direction": selected,
    "sta": lambda p: [fg.sta(p.stats, p.sae).direction],
    "stream": lambda p: ["".join(map(str, fg.stream(p.m, p.t, "the man", steering=p.v.add(3.1), max_new_tokens=6)))],
    "token strength": steered(
        lambda p: fg.AdaptiveAdd(
            direction=p.v.direction, read=p.other.direction, bias=0.1, coefficient=1.7, hookpoint=AT
        )
    ),
    "trace": lambda p: [fg.trace(p.m, p.t, "the man", steering=p.v.add(2.1), max_new_tokens=3).as_dict()],
}


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
}


def found_in(call: str, state: Any) -> list[Any]:
    parts = Parts()
    torch.manual_seed(0)
    with state():
        found = list(CALLS[call](parts))
    return [one.tolist() if isinstance(one, torch.Tensor) else one for one in found]


@functools.cache
def expected(call: str) -> list[Any]:
    return found_in(call, nullcontext)


@pytest.mark.filterwarnings("ignore::fgsteer.errors.SelectionWarning")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_the_same_in_every_state(call, state):
    assert found_in(call, STATES[state]) == expected(call)


THROUGH_THE_MODEL = [
    "attribute_steering", "component_effects", "find_suffix", "grains", "kl_then_steer", "learned_mask",
    "token_relevance", "train", "train_adaptive", "train_cone", "train_many", "train_refusal_direction",
    "train_scaling",
]  # fmt: skip


@pytest.mark.parametrize("call", THROUGH_THE_MODEL)
def test_no_gradient_goes_through_a_model_made_in_inference_mode(call):
    parts = Parts()
    with torch.inference_mode():
        parts.m = tiny_model("llama")
        with pytest.raises(fg.DataError, match="made inside"):
            CALLS[call](parts)
    assert all(parameter.requires_grad for parameter in parts.m.parameters())


def test_the_default_dtype_of_threads_comes_back_after_the_last():
    """Of two calls that overlap, neither takes float32 from the other, and what the caller had comes back."""
    seen = []
    with default_dtype(torch.float64), ThreadPoolExecutor() as pool:
        entered, left = Event(), Event()

        def first() -> None:
            with usual_defaults():
                entered.set()
                left.wait(10)

        def second() -> None:
            entered.wait(10)
            assert not has_usual_defaults(), "as the first call will set another default back"
            with usual_defaults():
                left.set()
                one.result()
                seen.append(torch.get_default_dtype())

        one = pool.submit(first)
        pool.submit(second).result()
        assert torch.get_default_dtype() == torch.float64
    assert seen == [torch.float32]
    assert has_usual_defaults()
