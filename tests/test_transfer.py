"""Maps between models: pairs of tokens, both kinds of map against loops, planted maps, vectors, the switch, files."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import fgsteer as fg
from fgsteer.storage.files import write_tensors
from fgsteer.transfer.autoencoder import train_autoencoder
from fgsteer.transfer.fitting import RIDGES
from fgsteer.transfer.pairs import Side, pair_texts
from tests.helpers.steering import batch, run
from tests.helpers.tiny import D_MODEL, FAMILIES, WORDS, model_of, tiny_model, word_tokenizer
from tests.reference import transfer as reference

AT = fg.Hookpoint(1)
CONTRAST = {
    "positive": ["the bride wore a ring", "the wedding was happy"],
    "negative": ["a dog sat", "the sad cat ran"],
}


def sentences(number, words=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, 45, (number, words), generator=g).tolist()  # without punctuation
    return [" ".join(WORDS[n] for n in row[: 4 + len(row) * k % 6]) for k, row in enumerate(picks)]


TEXTS = sentences(80)
HELD_OUT = sentences(12, seed=1)


def byte_tokenizer():
    """One token a byte, none of them special but BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "<pad>": 1, **{letter: n + 2 for n, letter in enumerate(letters)}}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def bytewise():
    """A model of another width and depth, which reads bytes."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        pad_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, whose activations are those of the loops to rounding."""
    return tiny_model("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def other():
    return tiny_model("llama", seed=5, dtype=torch.float64)


def planted(model, weight, bias):
    """A model whose second block gives ``W h + b``."""
    changed = copy.deepcopy(model)

    def turn(_, __, out):
        return (out[0] @ weight.T + bias, *out[1:]) if isinstance(out, tuple) else out @ weight.T + bias

    changed.model.layers[1].register_forward_hook(turn)
    return changed


def orthogonal(seed=0, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=dtype))[0]


def fit(a, tokenizer, b, **options):
    return fg.fit_transfer(a, tokenizer, b, tokenizer, TEXTS, 1, 1, **options)


# ---------------------------------------------------------------- pairs of tokens


def test_tokens_of_one_tokenizer_pair_one_by_one(llama, tokenizer):
    side = Side(llama, tokenizer, AT)
    other_side = Side(llama, word_tokenizer(), AT)  # equal, and another object
    pairs = pair_texts(side, other_side, ["the man sat </s> on it", "a"], max_tokens=6)
    # BOS is at 0, </s> at 4; the row is cut after six tokens
    assert [(pair.source.selected, pair.target.selected) for pair in pairs] == [((1, 2, 3, 5),) * 2, ((1,), (1,))]
    without = Side(llama, word_tokenizer(bos=False), AT)
    (pair,) = pair_texts(side, without, ["the man sat"], max_tokens=None)
    assert (pair.source.selected, pair.target.selected) == ((2, 3), (1, 2)), "its first word is at position 0"
    chat = [{"role": "user", "content": "the man"}]
    (pair,) = pair_texts(side, other_side, [chat], max_tokens=None)
    assert pair.source.selected == pair.target.selected


def test_tokens_of_two_tokenizers_pair_where_they_end(llama, tokenizer, bytewise):
    words, by_byte = Side(llama, tokenizer, AT), Side(bytewise, byte_tokenizer(), AT)
    text = "the cat é sat"
    (pair,) = pair_texts(words, by_byte, [text], max_tokens=None)
    ends = [text.index(word) + len(word) for word in text.split()]
    # byte n of the text, from 1, is token n after BOS; é has two bytes, of which the last one counts
    expected = [len(text[:end].encode()) for end in ends]
    assert (pair.source.selected, pair.target.selected) == ((1, 2, 3, 4), tuple(expected))
    (back,) = pair_texts(by_byte, words, [text], max_tokens=8)
    assert (back.source.selected, back.target.selected) == ((3, 7), (1, 2)), "what is cut has no partner"


def test_tokens_that_cannot_be_aligned_are_refused(llama, tokenizer, bytewise):
    words, by_byte = Side(llama, tokenizer, AT), Side(bytewise, byte_tokenizer(), AT)
    by_byte.tokenizer.chat_template = tokenizer.chat_template
    with pytest.raises(fg.DataError, match="contents of the messages"):
        pair_texts(words, by_byte, [[{"role": "user", "content": "the man"}]], max_tokens=None)

    class Slow:
        is_fast = False

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *args, **kwargs):
            return self.inner(*args, **{**kwargs, "return_offsets_mapping": False})

    with pytest.raises(fg.DataError, match=r"Slow, which does not tell where.*use_fast"):
        pair_texts(Side(llama, Slow(tokenizer), AT), by_byte, ["the man"], max_tokens=None)
    same = Side(llama, Slow(tokenizer), AT)
    (pair,) = pair_texts(words, same, ["the man"], max_tokens=None)
    assert pair.target.selected == (1, 2), "one vocabulary needs no offsets"


# ---------------------------------------------------------------- affine maps


def naive_pairs(tokenizer, texts):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return ids, [(t, n, n) for t, row in enumerate(ids) for n in range(1, len(row))]


def test_the_affine_map_is_ridge_regression(wide, other, tokenizer):
    """On all texts, with a given λ, whatever the batches; stored in float32."""
    found = fit(wide, tokenizer, other, ridge=0.01, max_norm_ratio=None, batch_tokens=40)
    ids, pairs = naive_pairs(tokenizer, TEXTS)
    x, y = reference.paired_states(wide, ids, 1, other, ids, 1, pairs)
    weight, bias = reference.ridge(x, y, 0.01)
    # activations pass through float32, 6e-8 of values of size 10, through a solve of condition 1e2 to 1e3
    assert np.abs(found.weight.numpy() - weight).max() < 1e-5
    assert np.abs(found.bias.numpy() - bias).max() < 1e-4
    assert np.abs(found.mean.numpy() - y.mean(0)).max() < 1e-5
    assert found.about["tokens"] + found.about["held_out_tokens"] == len(pairs)


def test_lambda_is_the_best_on_held_out_texts(wide, other, tokenizer):
    found = fit(wide, tokenizer, other, max_norm_ratio=None)
    split = [[text for n, text in enumerate(TEXTS) if (n % 10 == 9) == held] for held in (False, True)]
    rows = []
    for half in split:
        ids, pairs = naive_pairs(tokenizer, half)
        rows.append(reference.paired_states(wide, ids, 1, other, ids, 1, pairs))
    (x, y), (x_held, y_held) = rows
    errors = {}
    for share in RIDGES[::2]:
        weight, bias = reference.ridge(x, y, share)
        residual = y_held - (x_held @ weight.T + bias)
        errors[share] = float(((residual / y.std(0)) ** 2).sum())
    best = min(errors, key=lambda share: errors[share])
    chosen = found.about["ridge_in_mean_eigenvalues"]
    assert RIDGES[0] < best < RIDGES[-1]
    assert best / 10 < chosen < best * 10, "one of the best and its neighbours, which the loops leave out"
    spread = ((y_held - y.mean(0)) / y.std(0)) ** 2
    assert found.about["held_out_error"] <= errors[best] / spread.sum() * (1 + 1e-6)


def test_a_planted_map_is_returned(wide, tokenizer):
    """Also the identity, from a model to itself, which changes no loss."""
    R, b = orthogonal(), torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = fit(wide, tokenizer, planted(wide, R, b))
    # 400 tokens of float32 activations in 32 dimensions, λ of 1e-10 mean eigenvalues
    assert torch.allclose(found.weight.double(), R, atol=1e-4)
    assert torch.allclose(found.bias.double(), b, atol=1e-3)
    same = fit(wide, tokenizer, wide)
    assert torch.allclose(same.weight, torch.eye(D_MODEL), atol=1e-5)
    quality = fg.measure_transfer(same, wide, tokenizer, wide, tokenizer, HELD_OUT)
    assert quality.fvu < 1e-10
    assert quality.ce_spliced == pytest.approx(quality.ce, abs=1e-5)
    assert abs(quality.ce_ablated - quality.ce) > 0.01, "the mean says other things"


def test_a_map_that_is_held_to_the_identity(wide, tokenizer):
    """Ridge regression of the difference, which with a large λ is the identity and a shift."""
    small = 0.05 * torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    tuned = planted(wide, torch.eye(D_MODEL, dtype=torch.float64) + small, torch.ones(D_MODEL, dtype=torch.float64))
    found = fit(wide, tokenizer, tuned, ridge=0.1, identity=True, max_norm_ratio=None)
    ids, pairs = naive_pairs(tokenizer, TEXTS)
    x, y = reference.paired_states(wide, ids, 1, tuned, ids, 1, pairs)
    weight, bias = reference.ridge(x, y - x, 0.1)
    assert np.abs(found.weight.numpy() - weight - np.eye(D_MODEL)).max() < 1e-5
    assert np.abs(found.bias.numpy() - bias).max() < 1e-4
    assert np.abs(found.mean.numpy() - y.mean(0)).max() < 1e-5
    held = fit(wide, tokenizer, tuned, ridge=1e12, identity=True)
    assert torch.allclose(held.weight, torch.eye(D_MODEL), atol=1e-6)
    same = fit(wide, tokenizer, wide, identity=True)
    assert torch.equal(same.weight, torch.eye(D_MODEL))
    assert not same.bias.any()
    few: Any = {"texts": TEXTS[:10], "hookpoint_a": 1, "hookpoint_b": 1, "max_tokens": 3}  # 20 tokens, 32 dimensions
    errors = [
        fg.measure_transfer(
            fg.fit_transfer(wide, tokenizer, tuned, tokenizer, identity=identity, **few),
            wide,
            tokenizer,
            tuned,
            tokenizer,
            HELD_OUT,
        ).fvu
        for identity in (True, False)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_massive_activations_are_left_out(wide, tokenizer):
    """One token in forty has a thousand times the norm, where a linear map would be decided by it."""
    sink = tokenizer("sea")["input_ids"][1]
    model = copy.deepcopy(wide)
    with torch.no_grad():
        model.model.embed_tokens.weight[sink] *= 1e5
    R = orthogonal(2)
    found = fit(model, tokenizer, planted(model, R, torch.zeros(D_MODEL, dtype=torch.float64)))
    times = sum(list(tokenizer(text)["input_ids"]).count(sink) for text in TEXTS)
    assert found.about["left_out"] == times > 0
    everything = fit(model, tokenizer, model, max_norm_ratio=None)
    assert everything.about["left_out"] == 0


# ---------------------------------------------------------------- maps with a hidden layer

QUICK = fg.AutoencoderTraining(hidden=40, epochs=3, batch=64)


def test_a_hidden_layer_learns_what_no_affine_map_can():
    g = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(12, 6, generator=g), torch.randn(5, 12, generator=g)
    x, held = torch.randn(4000, 6, generator=g) * 20 + 30, torch.randn(500, 6, generator=g) * 20 + 30
    target = [((each - 30) / 20 @ w1.T).relu() @ w2.T * 50 + 7 for each in (x, held)]
    training = fg.AutoencoderTraining(hidden=32, epochs=40, seed=1)
    layers, errors = train_autoencoder(x, target[0], held, target[1], training)
    mapped = reference.autoencoder(held.double().numpy(), *(part.double().numpy() for part in layers))
    error = float(((torch.as_tensor(mapped) - target[1]) ** 2 / target[0].double().var(0)).mean())
    # the held-out error is that of the weights that come back, in float32 and in raw units
    assert error == pytest.approx(min(errors), rel=1e-3)
    linear = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1).double(), target[0].double()).solution
    residual = target[1] - torch.cat([held, torch.ones(len(held), 1)], 1).double() @ linear
    assert error < 0.2 * float((residual**2 / target[0].double().var(0)).mean())
    again, _ = train_autoencoder(x, target[0], held, target[1], training)
    assert all(torch.equal(one, two) for one, two in zip(layers, again, strict=True)), "seeded"
    noise, quick = torch.randn(500, 5, generator=g) * target[0].std(0), fg.AutoencoderTraining(hidden=64, patience=2)
    _, errors = train_autoencoder(x, target[0], held, noise, quick)
    assert len(errors) - 1 - errors.index(min(errors)) == 2, "it stops when held-out tokens gain no more"
    assert len(errors) < quick.epochs


def test_the_map_with_a_hidden_layer_is_its_equation(wide, bytewise, tokenizer):
    found = fg.fit_transfer(wide, tokenizer, bytewise, byte_tokenizer(), TEXTS, 1, 0, kind="autoencoder")
    assert found.hidden_weight is not None
    assert found.hidden_bias is not None
    assert found.hidden_weight.shape == (math.isqrt(32 * 24), 32), "the width of the paper"
    x = torch.randn(5, 32, dtype=torch.float64)
    parts = (found.weight, found.bias, found.hidden_weight, found.hidden_bias)
    naive = reference.autoencoder(x.numpy(), *(part.double().numpy() for part in parts))
    assert np.abs(found(x).numpy() - naive).max() < 1e-12  # rounding of sums in float64
    assert (found.kind, found.d_source, found.d_target) == ("autoencoder", 32, 24)
    assert "autoencoder" in repr(found)
    assert "hidden 27" in repr(found)


# ---------------------------------------------------------------- quality


@pytest.mark.parametrize("kind", ["affine", "autoencoder"])
def test_quality_equals_loops(wide, other, tokenizer, kind):
    found = fit(wide, tokenizer, other, kind=kind, training=QUICK, max_norm_ratio=None)
    quality = fg.measure_transfer(
        found, wide, tokenizer, other, tokenizer, HELD_OUT, max_norm_ratio=None, batch_tokens=30
    )
    ids, pairs = naive_pairs(tokenizer, HELD_OUT)
    x, y = reference.paired_states(wide, ids, 1, other, ids, 1, pairs)
    mapped = found(torch.as_tensor(x)).numpy()
    total, by_dimension, cosine, centred = reference.figures(y, mapped, found.mean.double().numpy())
    # activations and maps pass through float32
    assert quality.tokens == len(pairs)
    assert quality.fvu == pytest.approx(total, rel=1e-4)
    assert quality.fvu_by_dimension.numpy() == pytest.approx(by_dimension, rel=1e-4)
    assert quality.fvu_median == pytest.approx(np.sort(by_dimension)[(D_MODEL - 1) // 2], rel=1e-4)
    assert quality.fvu_above_one == (by_dimension > 1).mean()
    assert (quality.cosine, quality.centred_cosine) == pytest.approx((cosine, centred), rel=1e-4)
    losses = dict.fromkeys(("ce", "ce_spliced", "ce_ablated"), 0.0)
    for number, row in enumerate(ids):
        own = [(n, j) for n, (t, _, j) in enumerate(pairs) if t == number]
        put: dict[str, Any] = {
            "ce": {},
            "ce_spliced": {j: mapped[n] for n, j in own},
            "ce_ablated": {j: found.mean for _, j in own},
        }
        for name, replaced in put.items():
            losses[name] += reference.spliced_loss(other, row, 1, replaced)
    scored = sum(len(row) - 1 for row in ids)
    for name, loss in losses.items():
        assert getattr(quality, name) == pytest.approx(loss / scored, rel=1e-4)
    assert quality.spliced == len(pairs) / sum(map(len, ids))
    assert set(quality.as_dict()) == {*vars(quality)} - {"fvu_by_dimension"}


def test_quality_between_tokenizers(wide, bytewise, tokenizer):
    """Only bytes that end a word have a partner, and are spliced."""
    letters = byte_tokenizer()
    found = fg.fit_transfer(wide, tokenizer, bytewise, letters, TEXTS, 1, 0)
    quality = fg.measure_transfer(found, wide, tokenizer, bytewise, letters, HELD_OUT)
    words, all_bytes = (sum(len(t(text)["input_ids"]) for text in HELD_OUT) for t in (tokenizer, letters))
    assert quality.tokens == words - len(HELD_OUT)
    assert quality.spliced == pytest.approx(quality.tokens / all_bytes)
    assert quality.ce != quality.ce_spliced


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("kind", ["affine", "autoencoder"])
def test_vectors_are_differences_of_mapped_activations(wide, other, tokenizer, kind):
    found = fit(wide, tokenizer, other, kind=kind, training=QUICK)
    stats = found.collect(wide, tokenizer, CONTRAST, keep_pooled=True)
    means = []
    for side in CONTRAST.values():
        texts = [found(torch.as_tensor(reference.states(wide, tokenizer(t)["input_ids"], 1)[1:])).mean(0) for t in side]
        means.append(torch.stack(texts).mean(0))
    vector = fg.caa(stats)
    # pooled in float32
    assert torch.allclose(vector.direction.double(), means[0] - means[1], atol=1e-5)
    assert vector.hookpoint == AT
    assert vector.provenance["transfer"]["sha256"] == found.sha256
    assert vector.provenance["model"]["d_model"] == D_MODEL
    assert fg.ace(stats).reference is not None
    assert fg.pca(stats).norm == pytest.approx(1)
    direct = fg.caa(fg.collect(wide, tokenizer, CONTRAST, hookpoints=1))
    wrong = found(direct.direction)  # f(v), which adds the bias and bends
    assert not torch.allclose(wrong, vector.direction, atol=0.01)
    if kind == "affine":
        own = fg.collect(wide, tokenizer, CONTRAST, hookpoints=1)
        for same in (found.vector(own), found.direction(direct)):
            assert torch.allclose(same.direction, vector.direction, atol=1e-5)
        assert torch.allclose(wrong - vector.direction, found.bias, atol=1e-5), "f(v) − Wv = b"
        reference_mean = found.vector(own).reference
        assert reference_mean is not None
        assert torch.allclose(reference_mean.double(), means[1], atol=1e-5)
        fg.generate(other, tokenizer, ["the man"], steering=found.vector(own).affine(1.0), max_new_tokens=2)
        return
    for call in (
        lambda: found.direction(direct),
        lambda: found.vector(fg.collect(wide, tokenizer, CONTRAST, hookpoints=1)),
    ):
        with pytest.raises(fg.FgsteerError, match=r"hidden layer.*collect"):
            call()


def test_what_does_not_fit_the_map_is_refused(wide, bytewise, tokenizer):
    letters = byte_tokenizer()
    found = fg.fit_transfer(wide, tokenizer, bytewise, letters, TEXTS, 1, 0)
    with pytest.raises(fg.PairingError, match=r"blocks\.2"):
        found.direction(fg.SteeringVector(torch.ones(D_MODEL), 2))
    with pytest.raises(fg.PairingError, match="hookpoint"):
        found.vector(fg.collect(wide, tokenizer, CONTRAST, hookpoints=2))
    with pytest.raises(fg.PairingError, match="d_model"):
        found.collect(bytewise, letters, CONTRAST)
    with pytest.raises(fg.PairingError, match="width 24"):
        found(torch.ones(24))
    with pytest.raises(fg.PairingError, match=r"hookpoint_b='blocks\.1"):
        found.switch()
    with pytest.raises(fg.PairingError, match="d_model"):
        fg.measure_transfer(found, bytewise, letters, wide, tokenizer, HELD_OUT)
    with pytest.raises(fg.SelectionError, match="same mean"):
        found.vector(fg.collect(wide, tokenizer, {"positive": ["a cat"], "negative": ["a cat"]}, hookpoints=1))
    across = fg.fit_transfer(wide, tokenizer, bytewise, letters, TEXTS, 1, 1)
    with pytest.raises(fg.PairingError, match="from width 32 to width 24"):
        across.switch()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"texts": TEXTS[:9]}, fg.DataError, "at least 10 texts"),
        ({"texts": "the man"}, fg.DataError, "a list of texts"),
        ({"texts": ["</s>"] * 20}, fg.DataError, "pair of tokens"),
        ({"kind": "quadratic"}, fg.DataError, "affine, autoencoder"),
        ({"ridge": -1.0}, fg.DataError, "ridge"),
        ({"kind": "autoencoder", "identity": True}, fg.DataError, "affine map between models of one width"),
        ({"max_norm_ratio": 0.5}, fg.DataError, "more than 1"),
        ({"hookpoint_b": 9}, fg.HookpointError, "block"),
        ({"texts": None}, fg.DataError, "a list of texts"),
    ],
)
def test_what_cannot_be_fitted_is_refused(llama, tokenizer, change, error, match):
    options: Any = {"texts": TEXTS, "hookpoint_a": 1, "hookpoint_b": 1, **change}
    with pytest.raises(error, match=match):
        fg.fit_transfer(llama, tokenizer, llama, tokenizer, **options)


def test_settings_that_cannot_be():
    for change in ({"hidden": 0}, {"epochs": 0}, {"lr": -1.0}, {"seed": -1}, {"batch": 1.5}):
        with pytest.raises(fg.FgsteerError, match=next(iter(change))):
            fg.AutoencoderTraining(**change)
    with pytest.raises(fg.PairingError, match="transposed"):
        fg.TransferMap(torch.ones(4, 3), torch.ones(3), torch.ones(4), AT, AT)
    with pytest.raises(fg.PairingError, match="mean"):
        fg.TransferMap(torch.ones(4, 3), torch.ones(4), torch.ones(3), AT, AT)


# ---------------------------------------------------------------- the switch


@pytest.mark.parametrize("kind", ["affine", "autoencoder"])
def test_the_switch_puts_the_other_models_activations_in_place(wide, tokenizer, kind):
    """In a pass of A, block 1 gives f(h); with a planted map A then speaks as the model that it was planted in."""
    R = orthogonal(4)
    b = planted(wide, R, torch.ones(D_MODEL, dtype=torch.float64))
    found = fit(wide, tokenizer, b, kind=kind, training=QUICK)
    ids = torch.tensor([tokenizer("the man sat on the ship")["input_ids"]])
    with fg.steer(wide, found.switch()):
        switched, acts = wide(ids).logits, fg.record(wide, ids, None, [AT])[AT][0]
    h = fg.record(wide, ids, None, [AT])[AT][0]
    assert torch.equal(acts[0], h[0]), "BOS, to which no map is fitted"
    assert torch.allclose(acts[1:], found(h[1:]), atol=1e-4)  # h + (f(h) − h), weights in float32
    with fg.steer(wide, found.switch(0.5)):
        half = fg.record(wide, ids, None, [AT])[AT][0]
    assert torch.allclose(half[1:], (h[1:] + found(h[1:])) / 2, atol=1e-4)
    assert not torch.allclose(switched, wide(ids).logits, atol=0.1)
    if kind == "affine":
        with fg.steer(wide, found.switch(bos=True)):
            assert torch.allclose(wide(ids).logits, b(ids).logits, atol=0.01)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_switch_that_is_off_changes_no_bit(family, dtype, tokenizer):
    """At strength 0, with a gate that is shut, in rows that are not steered; and hooks are gone after an exception."""
    model = tiny_model(family, dtype=dtype)
    found = fg.fit_transfer(model, tokenizer, tiny_model(family, seed=2, dtype=dtype), tokenizer, TEXTS, 1, 1)
    inputs = batch(tokenizer)
    plain = model(**inputs).logits
    shut = found.switch(when=fg.Projection(fg.SteeringVector(torch.ones(D_MODEL), 1)) > 1e9)
    for item in (found.switch(0.0), shut):
        with fg.steer(model, item):
            assert torch.equal(model(**inputs).logits, plain)
    on = found.switch()
    expected = run(model, inputs, on)
    mixed = run(model, inputs, [on, None, on])
    assert mixed == [expected[0], run(model, inputs, None)[1], expected[2]]
    with fg.steer(model, [None, on, None]):
        rows = model(**inputs).logits
    assert torch.equal(rows[0], plain[0])
    assert not torch.equal(rows[1], plain[1])
    with pytest.raises(ZeroDivisionError), fg.steer(model, on):
        raise ZeroDivisionError
    assert torch.equal(model(**inputs).logits, plain)


def test_a_strength_that_is_none_is_refused(wide, tokenizer):
    found = fit(wide, tokenizer, wide)
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(fg.DataError, match="strength"):
            found.switch(strength)
    with pytest.raises(fg.PairingError, match="hidden_bias"):
        fg.Remap(hookpoint=1, weight=torch.eye(4), bias=torch.ones(4), hidden_weight=torch.eye(4))
    with pytest.raises(fg.SteeringError, match="nan or inf"):
        fg.Remap(hookpoint=1, weight=torch.eye(4) * torch.inf, bias=torch.ones(4))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["affine", "autoencoder"])
def test_a_map_in_a_file_is_the_same_map(llama, tokenizer, tmp_path, kind):
    found = fit(llama, tokenizer, model_of("qwen2"), kind=kind, training=QUICK)
    path = tmp_path / "m.safetensors"
    found.save(path)
    loaded = fg.TransferMap.load(path)
    x = torch.randn(3, D_MODEL)
    assert torch.equal(found(x), loaded(x))
    assert torch.equal(found.mean, loaded.mean)
    assert loaded.describe() == found.describe()
    assert (loaded.source_model, loaded.target_model) == (found.source_model, found.target_model)
    assert repr(loaded) == repr(found)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    steering = [found.switch(0.5, scope="generated")]
    fg.save_steering(tmp_path / "s.safetensors", steering)
    (item,) = fg.load_steering(tmp_path / "s.safetensors")
    inputs = batch(tokenizer)
    assert run(llama, inputs, item) == run(llama, inputs, steering[0])


def test_files_that_are_no_map_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(fg.FormatError, match="no file"):
        fg.TransferMap.load(path)
    fg.SteeringVector(torch.ones(4), 1).save(path)
    with pytest.raises(fg.FormatError, match="a vector file"):
        fg.TransferMap.load(path)
    names = ("source", "target")
    header: dict[str, Any] = dict.fromkeys(names, "blocks.1.hook_resid_post")
    header |= {"source_model": {}, "target_model": {}, "about": {}}
    tensors = {"weight": torch.eye(4), "bias": torch.ones(4), "mean": torch.ones(4)}
    write_tensors(path, tensors, kind="transfer", header=header)
    assert fg.TransferMap.load(path).kind == "affine"
    for changed, more in (
        ({**tensors, "bias": torch.ones(3)}, {}),
        ({**tensors, "weight": torch.eye(4) * torch.nan}, {}),
        ({**tensors, "hidden_weight": torch.eye(4)}, {}),
        ({"weight": torch.eye(4)}, {}),
        (tensors, {"source": "nowhere"}),
        (tensors, {"about": 3}),
    ):
        write_tensors(path, changed, kind="transfer", header={**header, **more})
        with pytest.raises(fg.FgsteerError):
            fg.TransferMap.load(path)


# ---------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["affine", "autoencoder"])
def test_gpu_twin(tokenizer, kind):
    """Both models on a GPU, or one of them; the map itself is kept on the host."""
    places = (("cpu", "cpu"), ("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda"))
    found = []
    for first, second in places:
        a, b = tiny_model("llama").to(first), tiny_model("llama", seed=5).to(second)
        mapping = fit(a, tokenizer, b, kind=kind, training=QUICK)
        assert mapping.weight.device.type == "cpu"
        quality = fg.measure_transfer(mapping, a, tokenizer, b, tokenizer, HELD_OUT)
        inputs = batch(tokenizer).to(first)
        with fg.steer(a, mapping.switch()):
            logits = a(**inputs).logits.cpu()
        found.append((mapping.weight, torch.tensor(list(quality.as_dict().values())), logits))
    for one in found[1:]:
        for expected, got in zip(found[0], one, strict=True):
            assert torch.allclose(expected.double(), got.double(), atol=5e-3, rtol=5e-3)  # float32 in another order
