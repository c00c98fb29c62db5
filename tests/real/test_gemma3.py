"""Gemma 3 270M, whose blocks see a window of tokens or all of them: recording and steering beyond the window."""

from __future__ import annotations

import pytest
import torch

import fgsteer as fg

pytestmark = pytest.mark.real

NEW_TOKENS = 6
SENTENCE = "The old ship left the harbour at dawn, and number {} stood on the deck, looking at the sea. "


@pytest.fixture(scope="module")
def ids(gemma3):
    """A text that is longer than the window."""
    model, tokenizer = gemma3
    text = "".join(SENTENCE.format(number) for number in range(40))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : model.config.sliding_window + 90]
    assert ids.shape[1] == model.config.sliding_window + 90
    return ids.to(model.device)


def test_it_has_blocks_of_both_kinds(gemma3):
    model, _ = gemma3
    assert model.config.model_type == "gemma3_text"
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(model.config.layer_types) == model.config.num_hidden_layers == 18


@torch.no_grad()
def test_recording_is_that_of_transformers_beyond_the_window(gemma3, ids):
    model, _ = gemma3
    layers = (2, 5, 11)
    recorded = fg.record(model, ids, None, [fg.Hookpoint(layer) for layer in layers])
    states = model(ids, output_hidden_states=True).hidden_states
    for layer in layers:
        torch.testing.assert_close(recorded[fg.Hookpoint(layer)], states[layer + 1], atol=1e-2, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layer", [4, 5])
def test_steered_cached_decoding_is_the_steered_full_pass_beyond_the_window(gemma3, ids, layer):
    """Block 4 attends within the window and block 5 to everything; later blocks of both kinds read what was added."""
    model, tokenizer = gemma3
    norm = fg.record(model, ids, None, [fg.Hookpoint(layer)])[fg.Hookpoint(layer)][0, 1:].norm(dim=1).median()
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(layer))
    item = fg.Add(hookpoint=fg.Hookpoint(layer), direction=direction / direction.norm(), coefficient=0.3 * float(norm))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with fg.steer(model, item):
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        whole = model(made.sequences, use_cache=False).logits
    assert made.sequences.shape[1] == ids.shape[1] + len(made.logits)
    cached = torch.stack(made.logits, 1)
    full = whole[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(cached, full, atol=2e-2, rtol=1e-3)
    assert not torch.allclose(full[:, 0], model(ids).logits[:, -1], atol=0.5)
