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
