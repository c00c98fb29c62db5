"""What is found by gradients is found where the caller has turned gradients off, as notebooks often do."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

import fgsteer as fg
from tests.helpers.saes import make_sae
from tests.helpers.steering import vector
from tests.helpers.tiny import WORDS, tiny_model, word_tokenizer

AT = fg.Hookpoint(1)
PAIRS = [fg.ContrastPair("the bride", "a dog", "he said"), fg.ContrastPair("the groom", "a cat", "she ran")]
ANSWERED = [("the man", "a dog ran"), ("the woman", "the cat sat")]
CHOICES = [("the man", "sat", "ran"), ("a woman", "ran", "sat")]
SIDES = {"positive": ["the bride wore a ring", "a wedding"], "negative": ["a dog sat", "the sad cat"]}
TEXTS = [" ".join(WORDS[(7 * n + 5 * k) % 60] for k in range(5 + n % 3)) for n in range(24)]
OPTIONS: Any = {"batch_size": 2, "epochs": 2, "reply_tokens": 4}


class Parts:
    """A model of its own, so that nothing that another call left on it is of help."""

    def __init__(self) -> None:
        self.model, self.tokenizer = tiny_model("llama"), word_tokenizer()
        self.both = self.model, self.tokenizer


def adapted(p: Parts) -> list[Tensor]:
    settings = fg.KLThenSteerTraining(rank=None, epochs=2)
    return list(fg.kl_then_steer(*p.both, TEXTS[:4], [SIDES], hookpoints=[AT], settings=settings).parameters())


def attributed(p: Parts) -> list[Tensor]:
    found = fg.attribute_steering(*p.both, ["the man"], vector().add(2.0), max_new_tokens=2, steps=2)
    assert found.edge_effects is not None
    return [found.effects, found.node_effects, found.edge_effects]


def mapped(p: Parts) -> list[Tensor]:
    training = fg.AutoencoderTraining(hidden=8, epochs=2)
    found = fg.fit_transfer(*p.both, *p.both, TEXTS, 1, 0, kind="autoencoder", training=training)
    return [found.weight, found.hidden_weight]


def trained_sae(p: Parts) -> list[Tensor]:
    settings = fg.SAETraining(d_sae=16, k=4, tokens=64, batch=16)
    with TemporaryDirectory() as folder:
        sae, _ = fg.train_sae(*p.both, TEXTS, AT, folder, settings=settings, held_out=4)
    return [sae.W_enc, sae.W_dec]


def effects(p: Parts) -> list[Tensor]:
    low = fg.residual_shift(p.model, tiny_model("llama", seed=1), p.tokenizer, TEXTS[:8])[0]
    return list(fg.component_effects(*p.both, low, vector(3), TEXTS[:2], components=3, steps=3))


CALLS = {
    "adaptive": lambda p: [
        v.direction for v in fg.train_adaptive(*p.both, ANSWERED, hookpoints=AT, objective=fg.AdaptiveTraining(steps=5))
    ],
    "attribution": attributed,
    "autoencoder": mapped,
    "component effects": effects,
    "cone": lambda p: [fg.train_cone(*p.both, TEXTS[:4], TEXTS[4:8], vector(1), dimension=2, **OPTIONS).basis],
    "grains": lambda p: [fg.grains(*p.both, PAIRS, 1, top=1, steps=3).direction],
    "kl_then_steer": adapted,
    "mask": lambda p: [torch.as_tensor(fg.learned_mask(*p.both, make_sae(layer=1), PAIRS * 2, features=8).scores)],
    "refusal direction": lambda p: [
        fg.train_refusal_direction(*p.both, TEXTS[:4], TEXTS[4:8], vector(1), **OPTIONS).direction
    ],
    "relevance": lambda p: [one.values for one in fg.token_relevance(*p.both, vector(3), TEXTS[:2], steps=3)],
    "sae": trained_sae,
    "scaling": lambda p: [
        torch.tensor(fg.train_scaling(*p.both, CHOICES, hookpoints=[AT], settings=fg.ScalingTraining(steps=5)).losses)
    ],
    "suffix": lambda p: [
        torch.tensor(fg.find_suffix(*p.both, vector(), TEXTS[:9], length=2, steps=3, candidates=8, top=8).history)
    ],
    "train": lambda p: [fg.train(*p.both, PAIRS, hookpoint=AT).direction],
    "train_many": lambda p: [v.direction for v in fg.train_many(*p.both, {"x": PAIRS}, hookpoint=AT).values()],
}


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_taken_whatever_the_mode(call):
    torch.manual_seed(0)
    expected = CALLS[call](Parts())
    for mode in (torch.no_grad, torch.inference_mode):
        parts = Parts()
        torch.manual_seed(0)
        with mode():
            found = CALLS[call](parts)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert torch.isfinite(one).all()
