"""Shared fixtures: tiny random models of each family, a word tokenizer, and hand-sized SAEs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from tests.tiny import FAMILIES, tiny_model, word_tokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session")
def models():
    """One tiny float32 model of each family, built once."""
    return {family: tiny_model(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama(models):
    return models["llama"]


@pytest.fixture(params=sorted(FAMILIES))
def family_model(request, models):
    return models[request.param]


def make_sae(activation="relu", d_model=32, d_sae=24, layer=1, seed=0, **extra) -> SAE:
    """A random SAE whose features fire on about half of random inputs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    fields = {}
    if activation == "jumprelu":
        fields["threshold"] = normal(d_sae).abs() * 0.3
    if activation == "topk":
        fields["k"] = 5
    if activation == "gated":
        fields.update(gate_bias=normal(d_sae) * 0.2, gate_scale=normal(d_sae).exp())
    return SAE(
        W_enc=normal(d_model, d_sae) * 0.5,
        W_dec=normal(d_sae, d_model),
        b_enc=normal(d_sae) * 0.1,
        b_dec=normal(d_model) * 0.1,
        hookpoint=Hookpoint(layer),
        activation=activation,
        **fields,
        **extra,
    )


@pytest.fixture
def sae():
    return make_sae()
