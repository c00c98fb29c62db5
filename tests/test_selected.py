"""Some features of a TopK SAE, read without encoding all of them: the same activations, and less work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fgsteer as fg
from fgsteer.saes import selected
from fgsteer.saes.density import FeatureDensity
from fgsteer.saes.sae import SAE
from fgsteer.saes.selected import FREQUENT, LEARNT_FROM, QUICK, SelectedFeatures

WIDTH, WIDE, K = 16, 4096, 8


@pytest.fixture(scope="module")
def topk():
    """A TopK SAE whose first features fire most often, with their density."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(WIDE, WIDTH, generator=g), dim=1)
    bias = torch.linspace(1.0, -1.0, WIDE)
    sae = SAE(rows.T.contiguous(), rows, bias, torch.zeros(WIDTH), fg.Hookpoint(0), "topk", k=K)
    acts = sae.encode(torch.randn(500, WIDTH, generator=g))
    fired = (acts > 0).sum(0).double()
    return replace(sae, density=FeatureDensity(fired, fired, torch.zeros(WIDE), 500, sae.sha256))


@pytest.fixture
def encoded(monkeypatch):
    """How many tokens were encoded by all features, so far."""
    counts = []
    original = SAE.activate

    def activate(self, pre):
        if self.d_sae == WIDE:
            counts.append(pre.reshape(-1, WIDE).shape[0])
        return original(self, pre)

    monkeypatch.setattr(SAE, "activate", activate)
    return counts


@pytest.mark.parametrize("features", [[0], [3, 500, 4095], list(range(0, WIDE, 97))])
@pytest.mark.parametrize("shape", [(1, 1), (2, 50), (7,)])
def test_selected_features_are_those_of_all(topk, features, shape):
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)) * 2
    got, wanted = SelectedFeatures(topk, features).read(x), topk.encode(x)[..., features]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # products of other shapes round differently
    assert torch.equal(got > 0, wanted > 0)


@pytest.mark.parametrize("k", [1, 2, K])
def test_tokens_one_by_one_are_read_as_together(topk, k):
    sae = replace(topk, k=k)
    x = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(4))
    x[7] = torch.nan
    for features in ([0], [5, 900], [3000, 3500, 4000]):
        reader, wanted = SelectedFeatures(sae, features), sae.encode(x)[:, features]
        got = torch.cat([reader.read(token[None]) for token in x])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)  # as above


@pytest.mark.parametrize("has_density", [True, False])
def test_what_is_compared_with_thresholds_is_read_where_it_is_near_them(topk, encoded, has_density):
    sae = topk if has_density else replace(topk, density=None)
    x = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(5))
    x[9] = torch.nan
    features, floors = [0, 3, 500], [1.5, 1.0, 2.0]
    wanted = sae.encode(x)[:, features]
    encoded.clear()
    for got in (
        SelectedFeatures(sae, features, floors).read(x),
        torch.cat([SelectedFeatures(sae, features, floors).read(token[None]) for token in x]),
    ):
        for compare in (torch.gt, torch.ge, torch.lt, torch.le):
            assert torch.equal(compare(got, torch.tensor(floors)), compare(wanted, torch.tensor(floors)))
        near = (wanted >= torch.tensor(floors)).any(1) | wanted.isnan().any(1)
        torch.testing.assert_close(got[near], wanted[near], rtol=1e-5, atol=1e-6, equal_nan=True)  # as above
    assert 0 < sum(encoded) < 0.75 * 2 * len(x)  # both times together


def test_few_tokens_are_encoded_whole(topk, encoded):
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(2))
    quiet = [3000, 3500, 4000]
    acts = topk.encode(x)[..., quiet]
    encoded.clear()
    torch.testing.assert_close(SelectedFeatures(topk, quiet).read(x), acts, rtol=1e-5, atol=1e-6)  # as above
    assert int((acts > 0).any(1).sum()) <= sum(encoded) < len(x) / 2


def test_every_token_is_encoded_whole_where_nothing_says_who_fires(topk, encoded):
    x = torch.randn(5, WIDTH)
    SelectedFeatures(replace(topk, density=None), [3]).read(x)
    SelectedFeatures(topk, [3]).read(x.requires_grad_())
    assert encoded == [5, 5]


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_the_first_tokens_tell_which_rivals_are_above_the_features(topk, encoded, at_once):
    x = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(6))
    features = [20, 900, 4000]
    reader, wanted = SelectedFeatures(replace(topk, density=None), features), topk.encode(x)[:, features]
    encoded.clear()
    got = torch.cat([reader.read(part) for part in x.split(at_once)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # products of other shapes round differently
    assert torch.equal(got > 0, wanted > 0)
    assert int((wanted > 0).any(1).sum()) <= sum(encoded) < 300
    above = dict.fromkeys(range(WIDE), 0)
    first = x.split(at_once)[: -(-LEARNT_FROM[0] // at_once)]
    for token in torch.cat([part[-LEARNT_FROM[1] :] for part in first]):
        pre = topk.pre_activations(token).tolist()
        highest = max(0.0, *(pre[feature] for feature in features))
        for feature in set(above) - set(features):
            above[feature] += pre[feature] > highest
    part = reader.quick
    least = min(above[feature] for feature in _ids(topk, part)[len(features) :])
    assert least >= sorted(above.values(), reverse=True)[QUICK]
    assert _ids(topk, part)[: len(features)] == features


@pytest.mark.parametrize("has_density", [True, False])
def test_what_rivals_left_open_tells_whom_to_look_at_next(topk, encoded, has_density, monkeypatch):
    """Rivals are chosen by how often a feature was above at tokens that were encoded whole, and by densities."""
    monkeypatch.setattr(selected, "LEARNT_AGAIN", (16, 128))
    sae = topk if has_density else replace(topk, density=None)
    x = torch.randn(6000, WIDTH, generator=torch.Generator().manual_seed(8))
    features = [20, 900, 4000]
    reader, opened = SelectedFeatures(sae, features), []
    wanted = topk.encode(x)[:, features]
    encoded.clear()
    for part, expected in zip(x.split(50), wanted.split(50), strict=True):
        before = len(encoded)
        torch.testing.assert_close(reader.read(part), expected, rtol=1e-5, atol=1e-6)  # other shapes round differently
        opened.append(sum(encoded[before:]))
    assert reader.encoded >= 128, "so that they were chosen the last time"
    assert sum(opened[-60:]) < sum(opened[:60]), "fewer are left open than at first"
    above = reader.above.tolist()
    others = sorted((above[feature] for feature in range(WIDE) if feature not in features), reverse=True)
    ids = _ids(sae, reader.rivals)
    assert ids[: len(features)] == features
    assert sorted((above[feature] for feature in ids[len(features) :]), reverse=True) == others[:FREQUENT]


def test_where_nothing_is_active_the_same_zeros_are_given(topk):
    x = torch.randn(3, 40, WIDTH, generator=torch.Generator().manual_seed(9))
    reader = SelectedFeatures(topk, [4000])
    with torch.inference_mode():
        shut = [part for token in x.transpose(0, 1) if not (part := reader.read(token[:, None])).any()]
    assert len(shut) > 5
    assert all(part is shut[0] for part in shut)
    assert not any(reader.read(token[:, None]).is_inference() for token in x.transpose(0, 1)), "which gradients refuse"
    assert reader.read(x[:0]).shape == (0, 40, 1)


def test_a_reader_goes_on_outside_inference_mode(topk):
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(10))
    with torch.inference_mode():
        reader = SelectedFeatures(topk, [3, 500])
        reader.read(x)
    torch.testing.assert_close(reader.read(x), topk.encode(x)[:, [3, 500]], rtol=1e-5, atol=1e-6)  # as above


def _ids(sae, part):
    """Which features of an SAE a part has, by their columns, of which no two are equal."""
    return [int((column == sae.W_enc.T).all(1).nonzero()) for column in part.W_enc.T]


def test_a_feature_that_is_not_above_zero_needs_no_rivals(topk, encoded):
    sae = replace(topk, b_enc=topk.b_enc - 3.0, density=None)  # where few are above 0, fewer than k
    x = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(7))
    wanted = sae.encode(x)[:, [5, 3000]]
    encoded.clear()
    reader = SelectedFeatures(sae, [5, 3000])
    reader.read(x[:20])  # they tell who is larger
    encoded.clear()
    got = torch.cat([reader.read(token[None]) for token in x])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # products of other shapes round differently
    near = (sae.pre_activations(x)[:, [5, 3000]] > -0.01).any(1).sum()  # more than the margin below 0
    assert (wanted > 0).any(1).sum() <= sum(encoded) <= near < 50


def test_equal_pre_activations_are_left_to_the_encoder(topk):
    """Features with the columns of others tie with them; what ``encode`` decides holds."""
    W_enc, b_enc = topk.W_enc.clone(), topk.b_enc.clone()
    W_enc[:, 1000:1100], b_enc[1000:1100] = W_enc[:, :100], b_enc[:100]
    twins = replace(topk, W_enc=W_enc, b_enc=b_enc)
    x = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(3))
    features = list(range(1000, 1100))
    got, wanted = SelectedFeatures(twins, features).read(x), twins.encode(x)[..., features]
    assert torch.equal(got > 0, wanted > 0)


def test_the_shipped_sae_reads_a_quiet_feature_from_few_of_its_tokens(monkeypatch):
    sae = fg.load_sae("default")
    model, tokenizer = fg.load_model("default")
    ids = torch.tensor([tokenizer(" ".join(map(str, fg.load_neutral()[0][:6])))["input_ids"][:200]])
    h = fg.record(model, ids, None, [sae.hookpoint])[sae.hookpoint].float()
    features = list(range(0, sae.d_sae, sae.d_sae // 8))
    wide = sae.to("cpu", torch.float32)
    wanted = wide.encode(h)[..., features]
    reader, whole = SelectedFeatures(wide, features), []
    original = reader._whole
    monkeypatch.setattr(reader, "_whole", lambda x: whole.append(len(x)) or original(x))
    torch.testing.assert_close(reader.read(h), wanted, rtol=1e-4, atol=1e-4)  # float32 sums of 320 in another order
    assert sum(whole) < h.shape[1] / 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_read_as_the_encoder_reads_it(topk, value):
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    x[1, 2], x[2] = value, value
    acts = topk.encode(x)
    largest = acts[1].topk(3).indices.tolist()
    for features in ([3000, 3500], largest, list(range(0, WIDE, 97))):
        torch.testing.assert_close(
            SelectedFeatures(topk, features).read(x), acts[:, features], rtol=1e-5, atol=1e-6, equal_nan=True
        )  # products of other shapes round differently
