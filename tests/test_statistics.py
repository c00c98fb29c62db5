"""collect(), Moments and density: against naive loops, and invariant to how they are batched."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fgsteer as fg
from tests.helpers.examples import DOWN, SET, UP, naive_examples
from tests.helpers.saes import make_sae
from tests.helpers.tiny import SITES
from tests.reference import sparse as reference


@pytest.mark.parametrize("site", SITES)
def test_collect_equals_one_text_at_a_time(family_model, tokenizer, site):
    sae = make_sae()
    stats = fg.collect(family_model, tokenizer, SET, sae=sae, hookpoints=[f"blocks.0.hook_{site}"])
    for at, space, encoder in ((fg.Hookpoint(0, site), "residual", None), (sae.hookpoint, "feature", sae)):
        _, contrast = stats.at(space, at)
        for side, texts in (("positive", UP), ("negative", DOWN)):
            count, mean, m2 = reference.moments(naive_examples(family_model, tokenizer, texts, at, encoder))
            got = getattr(contrast, side)
            assert got.count == count
            # float32 forward passes at other batch shapes
            assert np.allclose(got.mean.numpy(), mean, rtol=1e-4, atol=1e-4)
            assert np.allclose(got.m2.numpy(), m2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", ["all", "last", 2, -1])
def test_batching_and_padding_side_change_nothing(llama, tokenizer, tokens):
    sae = make_sae()
    expected = fg.collect(llama, tokenizer, SET, sae=sae, tokens=tokens, batch_tokens=1)
    other = copy.deepcopy(tokenizer)
    other.padding_side = "right"
    for batch_tokens, tok in ((16, tokenizer), (100_000, tokenizer), (100_000, other)):
        got = fg.collect(llama, tok, SET, sae=sae, tokens=tokens, batch_tokens=batch_tokens)
        for space in ("residual", "feature"):
            a, b = expected.at(space)[1], got.at(space)[1]
            for side in ("positive", "negative"):
                x, y = getattr(a, side), getattr(b, side)
                assert torch.allclose(x.mean, y.mean, atol=1e-5)  # float32 at other batch shapes
                assert torch.equal(x.fired, y.fired)


def test_parts_add_up_and_survive_a_file(llama, tokenizer, tmp_path):
    sae = make_sae()
    whole = fg.collect(llama, tokenizer, SET, sae=sae)
    parts = [
        fg.collect(llama, tokenizer, fg.ContrastSet("p", positives=UP[i::2], negatives=DOWN[i::2]), sae=sae)
        for i in range(2)
    ]
    parts[0].save(tmp_path / "a.safetensors")
    merged = fg.ContrastStatistics.load(tmp_path / "a.safetensors") + parts[1]
    for space in ("residual", "feature"):
        a, b = whole.at(space)[1], merged.at(space)[1]
        assert torch.allclose(a.difference, b.difference, atol=1e-5)
        assert torch.allclose(a.positive.m2, b.positive.m2, atol=1e-4)
    with pytest.raises(fg.PairingError, match="tokens"):
        _ = whole + fg.collect(llama, tokenizer, SET, sae=sae, tokens="last")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 7), st.integers(1, 7))
def test_moments_merge_is_the_whole(seed, n, m):
    rows = torch.randn(n + m, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 100
    merged = fg.Moments.of(rows[:n]) + fg.Moments.of(rows[n:])
    count, mean, m2 = reference.moments([row.numpy() for row in rows])
    assert merged.count == count
    # float64 sums of a dozen terms of size 1e2
    assert np.allclose(merged.mean, mean, rtol=1e-12, atol=1e-10)
    assert np.allclose(merged.m2, m2, rtol=1e-10, atol=1e-8)


def test_answer_tokens_letters_and_chat(llama, tokenizer):
    from fgsteer.activations.tokens import TokenReader

    def selected(prompt, completion, rule):
        (rows,) = TokenReader(tokenizer, rule=rule).rows([(prompt, completion, True)])
        return tokenizer.decode([rows[0].ids[i] for i in rows[0].selected])

    assert selected("the man said", "yes the end", "answer").startswith("yes the")
    assert selected("the man said ", "yes", "answer") == "yes"
    assert selected("the man said", "( A )", "letter") == "A"
    user = [{"role": "user", "content": "the man"}]
    assert selected(user, "yes", "answer") == "yes"
    assert "tea" in selected(user, [{"role": "assistant", "content": "tea"}], "answer")
    with pytest.raises(fg.DataError, match="exactly one token"):
        selected("the man", "yes no", "letter")


def test_bad_texts_are_named(llama, tokenizer):
    with pytest.raises(fg.DataError, match="text 1"):
        fg.collect(
            llama,
            tokenizer,
            fg.ContrastSet("x", positives=["the man", "a"], negatives=["dog"]),
            hookpoints="blocks.1.hook_resid_post",
            tokens=2,
        )
    with pytest.raises(fg.DataError, match="neither an SAE nor a hookpoint"):
        fg.collect(llama, tokenizer, SET)
    with pytest.raises(fg.PairingError, match="d_model"):
        fg.collect(llama, tokenizer, SET, sae=make_sae(d_model=16))
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(fg.DataError, match="not finite"):
        fg.collect(broken, tokenizer, SET, hookpoints="blocks.1.hook_resid_post")


def test_no_later_block_runs(llama, tokenizer):
    ran = []
    handle = llama.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    fg.collect(llama, tokenizer, SET, hookpoints="blocks.1.hook_resid_post")
    handle.remove()
    assert not ran


def test_density_equals_the_loop(llama, tokenizer, tmp_path):
    sae = make_sae("jumprelu")
    texts = UP + DOWN
    documents = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        documents.append(sae.encode(fg.record(llama, ids, None, [sae.hookpoint])[sae.hookpoint][0]).numpy())
    shares, bos_share = reference.density(documents)
    for batch_tokens in (1, 4096):
        got = fg.measure_density(llama, tokenizer, sae, texts, batch_tokens=batch_tokens)
        assert np.allclose(got.density, shares, atol=1e-12)
        assert got.bos_features(0.99).tolist() == [bool(s >= 0.99) for s in bos_share]
    got.save(tmp_path / "d.safetensors")
    back = fg.FeatureDensity.load(tmp_path / "d.safetensors").check(sae)
    assert torch.equal(back.fired, got.fired)
    with pytest.raises(fg.PairingError):
        back.check(make_sae("jumprelu", seed=4))


def test_attention_sinks_are_told_and_bos_takes_their_place(llama, tokenizer):
    """A word with a huge embedding stands for the first word of a text without BOS."""
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("bride", add_special_tokens=False)["input_ids"][0]] *= 1e4
    contrast = fg.ContrastSet("weddings", positives=["bride a church", "groom a church"], negatives=["a church"] * 2)
    with pytest.warns(
        fg.FgsteerWarning, match=r"1 token of the 1\d that were read .*0\.hook_resid_pre.*prepend_bos=True"
    ):
        fg.collect(model, tokenizer, contrast, hookpoints="blocks.0.hook_resid_pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.collect(llama, tokenizer, contrast, hookpoints="blocks.0.hook_resid_pre")
        fg.collect(model, tokenizer, contrast, hookpoints="blocks.0.hook_resid_pre", bos=True)  # sinks are asked for
