"""Exported control vectors in a real llama.cpp, against Hugging Face hooks: log-probabilities of every next token."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.export import gguf
from fgsteer.models.shipped import DEFAULT, SHIPPED

pytestmark = pytest.mark.llama_cpp
ROOT = Path(__file__).resolve().parents[2]
TEXT = "The king looked at the sea and said to his men that the ship would have to leave before the morning, and"
# float32 on both sides over 5 blocks; logits of size 20
TOLERANCE = 5e-4


class Engine:
    """One llama.cpp context with a float32 cache."""

    def __init__(self, path: Path) -> None:
        import llama_cpp as c

        self.c = c
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        assert self.model
        options = c.llama_context_default_params()
        options.n_ctx = options.n_batch = 128
        options.n_threads = options.n_threads_batch = 2
        options.type_k = options.type_v = 0  # float32
        options.flash_attn_type = 0
        self.context = c.llama_init_from_model(self.model, options)
        vocabulary = c.llama_model_get_vocab(self.model)
        self.vocab, self.width = c.llama_vocab_n_tokens(vocabulary), c.llama_model_n_embd(self.model)
        self.layers = c.llama_model_n_layer(self.model)

    def steer(self, vectors) -> None:
        """Set the control vector to a file's directions, or to none."""
        rows = np.zeros((self.layers - 1, self.width), np.float32)
        for vector in vectors:
            rows[vector.hookpoint.layer - 1] += vector.direction.numpy()
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert self.c.llama_set_adapter_cvec(self.context, data, rows.size, self.width, 1, self.layers - 1) == 0

    def log_probabilities(self, ids) -> torch.Tensor:
        """(tokens, vocabulary) of what follows each token."""
        c = self.c
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        batch = c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert c.llama_decode(self.context, batch) == 0
        logits = np.ctypeslib.as_array(c.llama_get_logits(self.context), (len(ids), self.vocab)).copy()
        c.llama_batch_free(batch)
        return torch.tensor(logits).log_softmax(-1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    command = [sys.executable, "-m", "tests.llama_cpp.convert", str(SHIPPED[DEFAULT].model_folder()), str(path)]
    subprocess.run(command, check=True, cwd=ROOT)
    return Engine(path)


@pytest.fixture(scope="module")
def model():
    return fg.load_model("default", dtype=torch.float32)


def hooked(model, ids, items=None):
    with torch.no_grad(), fg.steer(model, items):
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def direction(layer, size=20.0):
    d = fg.load_sae("default").d_model
    row = torch.randn(d, generator=torch.Generator().manual_seed(layer))
    return fg.SteeringVector(row / row.norm() * size, fg.Hookpoint(layer))


def worst(a, b):
    return float((a - b).abs().max())


def test_the_models_agree_unsteered(engine, model):
    ids = model[1](TEXT)["input_ids"]
    engine.steer([])
    assert worst(engine.log_probabilities(ids), hooked(model[0], ids)) < TOLERANCE


@pytest.mark.parametrize("layers", [(1,), (2,), (3,), (4,), (1, 3)])
def test_an_exported_vector_does_what_hooks_do(engine, model, layers, tmp_path):
    ids = model[1](TEXT)["input_ids"]
    items = [direction(layer).add(1.5, bos=True) for layer in layers]
    gguf.write(items, tmp_path / "v.gguf", model_type="llama")
    engine.steer(gguf.read(tmp_path / "v.gguf"))
    found, expected = engine.log_probabilities(ids), hooked(model[0], ids, items)
    assert worst(found, expected) < TOLERANCE
    assert worst(expected, hooked(model[0], ids)) > 0.5  # or the test would test nothing
    moved = [replace(item, hookpoint=fg.Hookpoint((item.hookpoint.layer + 1) % 5)) for item in items]
    assert worst(found, hooked(model[0], ids, moved)) > 0.1  # the block is the right one
    engine.steer([])
    assert worst(engine.log_probabilities(ids), hooked(model[0], ids)) < TOLERANCE


def test_a_folded_checkpoint_runs(model, tmp_path):
    """Biases of Llama's MLP go through the converter and are added."""
    item = direction(2).add(1.5, bos=True)
    fg.export.checkpoint.write([item], tmp_path / "folded", *model)
    command = [sys.executable, "-m", "tests.llama_cpp.convert", str(tmp_path / "folded"), str(tmp_path / "m.gguf")]
    subprocess.run(command, cwd=ROOT, check=True)
    ids = model[1](TEXT)["input_ids"]
    found = Engine(tmp_path / "m.gguf").log_probabilities(ids)
    assert worst(found, hooked(model[0], ids, item)) < TOLERANCE
