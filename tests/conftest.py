"""Shared fixtures: tiny random models of each family, a word tokenizer, and hand-sized SAEs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.saes import make_sae
from tests.helpers.tiny import FAMILIES, model_of, word_tokenizer


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
    return {family: model_of(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama(models):
    return models["llama"]


@pytest.fixture(params=sorted(FAMILIES))
def family_model(request, models):
    return models[request.param]


@pytest.fixture
def sae():
    return make_sae()


@pytest.fixture(autouse=True)
def leave_shared_models_as_they_were(models):
    """After each test: what it did to the models that others use too would decide how those end, by their order."""
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    for model in models.values():
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
