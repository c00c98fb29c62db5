"""Features seen in a text: against hidden states encoded one token at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fgsteer as fg
from fgsteer.methods.selection import PAPER_MAX_DENSITY
from fgsteer.saes.density import FeatureDensity
from tests.helpers.tiny import word_tokenizer

PROMPT, TEXT = "the old king", " took the ship and the queen sat"


def naive(model, tokenizer, sae, prompt, text, allowed):
    """{feature: (largest activation, its token)} over the tokens of the text."""
    ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
    first = max(1, len(tokenizer(prompt)["input_ids"]) if prompt else 1)
    hidden = model(ids, output_hidden_states=True).hidden_states[sae.hookpoint.layer + 1][0].detach()
    found = {}
    for place in range(first, ids.shape[1]):
        token = tokenizer.decode(ids[0, place]).strip()
        for feature, value in enumerate(sae.encode(hidden[place]).tolist()):
            if value > found.get(feature, (0.0, ""))[0] and feature in allowed:
                found[feature] = (value, token)
    return found


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("dense", [False, True])
def test_features_are_those_of_the_largest_activation(llama, tokenizer, sae, prompt, dense):
    allowed = set(range(sae.d_sae))
    if dense:  # every other feature fires too often
        fired = torch.tensor([1000 * PAPER_MAX_DENSITY * (1 + j % 2) for j in range(sae.d_sae)], dtype=torch.float64)
        zero = torch.zeros(sae.d_sae, dtype=torch.float64)
        counts = FeatureDensity(fired=fired, tokens=1000, documents=zero, first=zero, sae_sha256=sae.sha256)
        sae, allowed = replace(sae, density=counts), set(range(0, sae.d_sae, 2))
    sae = replace(sae, labels={j: f"label {j}" for j in range(sae.d_sae)})
    expected = naive(llama, tokenizer, sae, prompt, TEXT, allowed)
    seen = fg.seen_features(llama, tokenizer, sae, TEXT, prompt=prompt, top=4)
    assert [f.id for f in seen] == sorted(expected, key=lambda j: -expected[j][0])[:4]
    for feature in seen:
        value, token = expected[feature.id]
        assert feature.activation == pytest.approx(value, rel=1e-5)  # float32, summed in another order
        assert (feature.token, feature.label) == (token, f"label {feature.id}")
        assert str(feature).startswith(f"{feature.id} label {feature.id}, ")
    every = fg.seen_features(llama, tokenizer, sae, TEXT, prompt=prompt, top=10_000)
    assert len(every) == len(expected)  # no feature that does not fire


def test_a_reply_to_a_conversation(llama, sae):
    """The tokens are those of the reply, after the template's own."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}the "
    asked = [{"role": "user", "content": "a dog sat"}]
    seen = fg.seen_features(llama, tokenizer, sae, TEXT, prompt=asked, top=4)
    bare = replace(sae, prepend_bos=False)  # a template writes its own special tokens, and this one none
    by_hand = fg.seen_features(llama, tokenizer, bare, TEXT, prompt="a dog sat </s> the ", top=4)
    assert [(f.id, f.token) for f in seen] == [(f.id, f.token) for f in by_hand]
    assert seen


def test_an_empty_text_shows_nothing_and_other_models_are_refused(llama, tokenizer, sae):
    assert fg.seen_features(llama, tokenizer, sae, "", prompt=PROMPT) == []
    with pytest.raises(fg.PairingError):
        fg.seen_features(llama, tokenizer, fg.load_sae("default"), TEXT)
