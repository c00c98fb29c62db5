"""Selection scores and output scores against naive loops; the selection step, its filters and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fgsteer as fg
from fgsteer.models.hookpoints import decoder_of, resolve
from tests.helpers.saes import make_sae
from tests.helpers.tiny import word_tokenizer
from tests.reference import scores as reference

K = 24
NAMES = ("mean_difference", "frequency", "welch_t", "f_statistic", "pearson", "mutual_information")
# multiples of 1/8 up to 4, zero often: sums are exact, so constants and ties are so on both sides
VALUES = st.one_of(st.just(0.0), st.integers(0, 32).map(lambda i: i / 8))


@st.composite
def sides(draw):
    """Raw examples of two sides of 2 to 9: random, never firing, constant, and constant per side."""
    n = [draw(st.integers(2, 9)) for _ in range(2)]
    pos, neg = (draw(arrays(np.float64, (size, 5), elements=VALUES)) for size in n)
    pos[:, 1] = neg[:, 1] = 0
    pos[:, 2] = neg[:, 2] = 1.5
    pos[:, 3], neg[:, 3] = draw(VALUES), draw(VALUES)
    return pos, neg


def contrast_of(pos, neg):
    return fg.Contrast(fg.Moments.of(torch.as_tensor(pos)), fg.Moments.of(torch.as_tensor(neg)))


@pytest.mark.parametrize("name", NAMES)
@given(data=sides())
@settings(max_examples=60, deadline=None)
def test_score_is_the_loop_over_raw_examples(name, data):
    got = fg.SCORES[name](contrast_of(*data))
    assert got.dtype == torch.float64
    expected = np.array(getattr(reference, name)(*data))
    # float64 on both sides; the information is a difference of entropies of about 1 nat
    assert np.allclose(got.numpy(), expected, rtol=1e-10, atol=1e-14)
    assert (got[1], got[2]) == (0, 0)  # never fires, constant
    assert torch.allclose(fg.SCORES[name](contrast_of(*data[::-1])), -got, rtol=1e-12, atol=1e-14)


def test_every_score_has_an_oracle_and_amplitude_is_the_mean_difference():
    assert set(fg.SCORES) == {*NAMES, "amplitude"}
    assert fg.SCORES["amplitude"] is fg.SCORES["mean_difference"]


def test_scores_by_hand():
    contrast = contrast_of([[1.0, 3.0, 2.0], [3.0, 3.0, 0.0]], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    by_name = {name: fg.SCORES[name](contrast).tolist() for name in NAMES}
    assert by_name["mean_difference"] == [2.0, 2.0, 1.0]
    assert by_name["frequency"] == [2.0, 0.0, 1.0]
    assert by_name["welch_t"] == [2.0, float("inf"), 1.0]  # s² = 2, √(2/2 + 0) = 1
    assert by_name["f_statistic"] == [4.0, float("inf"), 1.0]  # t² for sides of equal size
    assert by_name["pearson"] == pytest.approx([(2 / 3) ** 0.5, 1.0, (1 / 3) ** 0.5])  # r² = F/(F + N − 2)
    # ln 2 where firing tells the side, 0 where all fire, H(1/4) − ln(2)/2 where one of four does
    assert by_name["mutual_information"] == pytest.approx([np.log(2), 0.0, 0.75 * np.log(4 / 3)])


@given(data=sides())
@settings(max_examples=40, deadline=None)
def test_f_ranks_as_pearson_and_scores_ignore_scale(data):
    contrast, scaled = contrast_of(*data), contrast_of(data[0] * 4, data[1] * 4)
    r, f = fg.SCORES["pearson"](contrast), fg.SCORES["f_statistic"](contrast)
    n = len(data[0]) + len(data[1])
    exact = r.abs() < 1 - 1e-9
    assert torch.allclose(f[exact], (r * r.abs() / (1 - r**2) * (n - 2))[exact], rtol=1e-6)  # 1 − r² loses digits
    if len(data[0]) == len(data[1]):
        t = fg.SCORES["welch_t"](contrast)
        assert torch.allclose(t * t.abs(), f, rtol=1e-9)
    for name in NAMES[1:]:
        assert torch.allclose(fg.SCORES[name](scaled), fg.SCORES[name](contrast), rtol=1e-12)


def test_merged_statistics_score_as_one():
    g = np.random.default_rng(0)
    pos, neg = g.normal(1, 1, (11, 4)).clip(0), g.normal(0, 1, (6, 4)).clip(0)
    merged = contrast_of(pos[:4], neg[:2]) + contrast_of(pos[4:], neg[2:])
    for name in NAMES:
        assert np.allclose(fg.SCORES[name](merged), getattr(reference, name)(pos, neg), rtol=1e-12)


def test_information_never_has_the_sign_of_its_rounding():
    n = 10**8
    up = torch.linspace(1, n - 5, 2000).floor().double()  # shares that differ by 1e-8: about 1e-16 nats
    zero = torch.zeros(2000).double()
    contrast = fg.Contrast(fg.Moments(n, zero, zero, up + 1), fg.Moments(n, zero, zero, up))
    assert bool((fg.SCORES["mutual_information"](contrast) >= 0).all())


def test_too_few_examples_are_named():
    with pytest.raises(fg.SelectionError, match="1 positive and 3 negative"):
        fg.SCORES["welch_t"](contrast_of(np.ones((1, 2)), np.ones((3, 2))))
    with pytest.raises(fg.SelectionError, match="three"):
        fg.SCORES["f_statistic"](contrast_of(np.ones((1, 2)), np.ones((1, 2))))


@pytest.fixture
def case():
    """An SAE with densities, and raw examples whose scores disagree about the best features."""
    g = np.random.default_rng(3)
    pos, neg = (g.exponential(g.uniform(0.2, 3, K), (n, K)) * (g.random((n, K)) < g.random(K)) for n in (40, 25))
    sae = make_sae()
    tokens = torch.full((K,), 5.0).double()
    tokens[:4] = 500
    first = torch.zeros(K).double()
    first[4] = 10
    density = fg.FeatureDensity(tokens, torch.full((K,), 10.0).double(), first, 1000, sae.sha256)
    return sae, density, pos, neg, contrast_of(pos, neg)


@pytest.mark.parametrize("name", NAMES)
def test_selection_takes_the_extremes_of_the_score_and_weights_by_the_difference(case, name):
    sae, density, pos, neg, contrast = case
    weights, how = fg.select_features(contrast, sae, score=name, n_positive=3, n_negative=2, density=density)
    score, difference = getattr(reference, name)(pos, neg), reference.mean_difference(pos, neg)
    free = [j for j in range(K) if j > 4 and score[j] * difference[j] > 0]  # 0 to 3 too dense, 4 peaks on position 0
    up = sorted((j for j in free if score[j] > 0), key=lambda j: (-score[j], j))[:3]
    down = sorted((j for j in free if score[j] < 0), key=lambda j: (score[j], j))[:2]
    assert set(weights.nonzero()[:, 0].tolist()) == {*up, *down}
    assert all(float(weights[j]) == pytest.approx(difference[j], rel=1e-12) for j in (*up, *down))
    assert how["score"] == name
    assert set(how["removed"]["density"]) <= set(range(4))
    assert how["removed"]["bos"] in ([], [4])


def test_the_scores_choose_different_features(case):
    sae, density, *_, contrast = case
    chosen = {
        name: tuple(fg.select_features(contrast, sae, score=name, n_positive=3, density=density)[0].nonzero()[:, 0])
        for name in NAMES
    }
    assert len({tuple(map(int, ids)) for ids in chosen.values()}) >= 3
    assert chosen["f_statistic"] == chosen["pearson"]


def test_a_score_of_the_other_sign_is_no_candidate():
    sae = make_sae()
    pos, neg = np.zeros((4, K)), np.zeros((4, K))
    pos[:3, 0], neg[:1, 0] = 1.0, 8.0  # fires more often on the positive side, more strongly on the negative
    pos[:2, 1] = 1.0
    zeros = torch.zeros(K).double()
    density = fg.FeatureDensity(zeros, zeros, zeros, 1, sae.sha256)
    contrast = contrast_of(pos, neg)
    assert fg.SCORES["frequency"](contrast)[0] == 2
    weights, _ = fg.select_features(contrast, sae, score="frequency", n_negative=5, density=density)
    assert weights.nonzero()[:, 0].tolist() == [1]


def stats_of(sae, contrast):
    return fg.ContrastStatistics({sae.hookpoint: contrast}, {sae.hookpoint: contrast})


def test_fgaa_by_score_name_by_tensor_and_by_build(case):
    sae, density, *_, contrast = case
    stats = stats_of(sae, contrast)
    options = {"density": density, "n_positive": 4, "n_negative": 1}
    named = fg.fgaa(stats, sae, score="welch_t", **options)
    given_score = fg.fgaa(stats, sae, score=fg.SCORES["welch_t"](contrast), **options)
    built = fg.build("fgaa", stats=stats, sae=sae, score="welch_t", **options)
    assert torch.equal(named.direction, given_score.direction)
    assert torch.equal(named.direction, built.direction)
    assert named.features == given_score.features == built.features != fg.fgaa(stats, sae, **options).features
    recorded = [v.provenance["hyperparameters"]["score"] for v in (named, given_score, fg.fgaa(stats, sae, **options))]
    assert recorded == ["welch_t", "given", "mean_difference"]
    only = torch.zeros(K)
    only[[7, 9]] = contrast.difference[[7, 9]].sign().float()  # float32, one feature of each side perhaps
    assert set(fg.fgaa(stats, sae, score=only, density=density, n_positive=9, n_negative=9).features) == {7, 9}


@pytest.mark.parametrize(
    ("score", "match"),
    [
        ("t", "one of mean_difference, amplitude, .*mutual_information"),
        (torch.ones(K + 1), rf"shape \({K},\) without nan, got a tensor of shape \({K + 1},\)"),
        (torch.full((K,), float("nan")), r"got a tensor of shape \(\d+,\) with nan"),
        ([1.0] * K, "got a list"),
        (torch.zeros(K), "got none by the score given"),
    ],
)
def test_scores_that_cannot_select_are_refused(case, score, match):
    sae, density, *_, contrast = case
    with pytest.raises(fg.SelectionError, match=match):
        fg.fgaa(stats_of(sae, contrast), sae, score=score, density=density)


def naive_output_score(model, tokenizer, sae, feature, prompt, coefficient, k):
    """One feature, one forward pass, a hook of its own; the logit lens of its decoder row by the model's modules."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    module, _ = resolve(model, sae.hookpoint)

    def amplify(_, __, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        acts, scale = sae.encode(h[:, -1]), sae.input_scale(h[:, -1])
        h[:, -1] += coefficient * acts.max() * scale * sae.W_dec[feature]
        return (h, *output[1:]) if isinstance(output, tuple) else h

    decoder: Any = decoder_of(model)
    norm = getattr(decoder, "norm", None) or getattr(decoder, "ln_f", None) or decoder.final_layer_norm
    row = sae.W_dec[feature][None]
    with torch.no_grad():
        handle = module.register_forward_hook(amplify)
        try:
            logits = model(ids).logits[0, -1]
        finally:
            handle.remove()
        lens = (norm(row) - norm(torch.zeros_like(row))) @ model.get_output_embeddings().weight.T
    return reference.output_score(logits.tolist(), lens[0].tolist(), k)


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_output_score_is_one_feature_at_a_time(family_model, tokenizer, activation):
    sae = make_sae(activation, input_norm="layer_norm" if activation == "topk" else "none")
    options = {"prompt": "the bride wore", "coefficient": 0.3, "top_tokens": 4}
    got = fg.output_scores(family_model, tokenizer, sae, batch_size=7, **options)
    expected = [
        naive_output_score(family_model, tokenizer, sae, j, options["prompt"], options["coefficient"], 4)
        for j in range(K)
    ]
    assert np.allclose(got, expected, rtol=1e-3, atol=1e-6)  # float32 forward passes of other batch sizes
    assert len({round(s, 3) for s in expected}) > K // 4  # the scores do differ
    some = fg.output_scores(family_model, tokenizer, sae, [5, 2], **options)
    assert some.nonzero()[:, 0].tolist() == [2, 5]
    assert np.allclose(some[[2, 5]], got[[2, 5]], rtol=1e-3, atol=1e-6)


def test_output_score_steers_a_prompt_of_one_token(llama):
    tokenizer, sae = word_tokenizer(bos=False), make_sae()
    got = fg.output_scores(llama, tokenizer, sae, prompt="bride", coefficient=1.0, top_tokens=3)
    expected = [naive_output_score(llama, tokenizer, sae, j, "bride", 1.0, 3) for j in range(K)]
    assert np.allclose(got, expected, rtol=1e-3, atol=1e-6)


def test_a_feature_that_writes_a_token_scores_best_and_plugs_into_fgaa(llama, tokenizer):
    """The decoder row of feature 3 is the head's row of one token, at the last block."""
    sae = make_sae(layer=2)
    W_dec = sae.W_dec.clone()
    W_dec[3] = llama.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("wedding")].detach()
    sae = replace(sae, W_dec=W_dec)
    done = []
    options = {"prompt": "the man", "top_tokens": 1}
    out = fg.output_scores(llama, tokenizer, sae, batch_size=10, coefficient=100.0, progress=done.append, **options)
    assert int(out.argmax()) == 3
    assert out[3] > 2 * fg.output_scores(llama, tokenizer, sae, coefficient=0.0, **options)[3]
    assert done == [10, 20, 24]
    g = np.random.default_rng(1)
    contrast = contrast_of(g.random((6, K)) + 0.5, g.random((5, K)) * 0.5)
    score = contrast.difference * (out >= out[3])
    with pytest.warns(fg.SelectionWarning, match="no density"):
        vector = fg.fgaa(stats_of(sae, contrast), sae, score=score)
    assert 3 in vector.features


def test_output_scores_refuse_what_they_cannot_score(llama, tokenizer):
    sae = make_sae()
    silent = replace(sae, b_enc=torch.full((K,), -1e6))
    for options, match in (
        ({"prompt": " "}, "empty"),
        ({"features": [99]}, "feature 99"),
        ({"top_tokens": 0}, "top_tokens = 0"),
        ({"top_tokens": 10**6}, "from 1 to 80"),
        ({"batch_size": 0}, "batch_size = 0"),
    ):
        with pytest.raises((fg.DataError, fg.SelectionError), match=match):
            fg.output_scores(llama, tokenizer, sae, **options)
    with pytest.raises(fg.DataError, match="no feature fires"):
        fg.output_scores(llama, tokenizer, silent)
    with pytest.raises(fg.PairingError):
        fg.output_scores(llama, tokenizer, make_sae(d_model=16))


@pytest.mark.parametrize(
    "features",
    [[3, 7], (3, 7), {3: 1.0, 7: 1}, torch.tensor([3, 7]), np.array([3, 7]), {np.int64(3): np.float32(1), 7: 1.0}],
)
def test_feature_ids_may_be_any_integers(features):
    sae = make_sae()
    assert fg.from_features(sae, features).features == {3: 1.0, 7: 1.0}
    for one in (3, np.int32(3), torch.tensor(3)):
        assert fg.from_features(sae, one).features == {3: 1.0}


@pytest.mark.parametrize(
    ("features", "match"),
    [
        ({True: 1.0}, r"Expected an integer as a feature id, got True \(bool\)"),
        (False, "bool"),
        ({"3": 1.0}, r"got '3' \(str\)"),
        ("3", "str"),
        ([3.0], r"got 3.0 \(float\)"),
        (torch.tensor([3.0]), "float"),
        (torch.tensor([True]), "bool"),
        ([None], "NoneType"),
        ([1, K], rf"Expected an id from 0 to {K - 1}, the last feature of this SAE, got feature {K}\."),
        ([-1], "feature -1"),
        (10**30, "feature 1000000"),
        ([4, 5, 4], "feature 4 twice"),
        ([], "at least one feature id, got none"),
        ({3: float("nan")}, "as the weight of feature 3, got nan"),
        ({3: "2"}, "as the weight of feature 3, got '2'"),
        ({3: True}, "as the weight of feature 3, got True"),
    ],
)
def test_features_that_are_none_are_refused_by_name(features, match):
    with pytest.raises(fg.SelectionError, match=match):
        fg.from_features(make_sae(), features)
