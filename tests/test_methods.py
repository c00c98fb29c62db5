"""Every method against the naive loops of tests/reference, and its filters and refusals."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import encode_prompts
from fgsteer.methods.denoising import reconstruction_error
from tests.helpers.saes import make_sae
from tests.reference import methods as reference

PAPER: Any = {"bias_weight": 1.0, "mu": np.inf, "unit_effects": False, "decoder_weight": 0.0}  # through effects
D, K = 32, 24


def examples(seed, n, shift=0.0):
    """n example vectors (K,), sparse and non-negative, exact in binary so that ties cannot differ."""
    g = np.random.default_rng(seed)
    z = np.round(g.normal(shift, 1.0, (n, K)).clip(0) * 64) / 64
    return z * (g.random((n, K)) < 0.6)


def build_stats(sae, up, down, h_up, h_down):
    def contrast(a, b):
        return fg.Contrast(fg.Moments.of(torch.as_tensor(a)), fg.Moments.of(torch.as_tensor(b)))

    at = sae.hookpoint
    return fg.ContrastStatistics({at: contrast(h_up, h_down)}, {at: contrast(up, down)})


@pytest.fixture
def case():
    sae = make_sae()
    g = np.random.default_rng(5)
    up, down = examples(1, 90, 0.4), examples(2, 90)
    h_up, h_down = g.normal(0.3, 1, (90, D)), g.normal(0, 1, (90, D))
    return sae, up, down, h_up, h_down, build_stats(sae, up, down, h_up, h_down)


def close(got, expected):
    # directions are stored in float32; the references sum in float64
    assert np.allclose(got.double().numpy(), expected, rtol=2e-6, atol=1e-6)


def test_caa_and_ace(case):
    *_, h_up, h_down, stats = case
    expected = reference.caa(list(h_up), list(h_down))
    close(fg.caa(stats).direction, expected)
    close(fg.ace(stats).direction, expected)
    close(fg.ace(stats).reference, h_down.mean(0))
    assert fg.caa(stats).reference is None


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("mode", ["act_and_freq", "act", "freq"])
@pytest.mark.parametrize("atoms", ["signed", "positive"])
@pytest.mark.parametrize("p", [0.1, 0.35, 0.9])
def test_sta(case, compat, mode, atoms, p):
    sae, up, down, h_up, h_down, stats = case
    options = {"p": p, "mode": mode, "atoms": atoms, "compat": compat}
    direction, weights = reference.sta(
        list(up), list(down), sae.W_dec.double().numpy(), reference.caa(list(h_up), list(h_down)), **options
    )
    got = fg.sta(stats, sae, **options)
    close(got.direction, direction)
    weights = {j: w for j, w in weights.items() if w != 0}
    assert set(got.features) == set(weights)
    assert all(abs(got.features[j] - w) < 1e-12 for j, w in weights.items())  # float64 on both sides


@pytest.mark.parametrize(
    ("shrinkage", "threshold"),
    [("soft", 1.0), ("soft", 2.0), ("hard", 2.0), ("hard", 1e9), ("soft", 0.0), ("hard", 0.0)],
)
def test_caa_denoised(case, shrinkage, threshold):
    sae, up, down, h_up, h_down, _ = case
    up, h_up = up[:12], h_up[:12]  # unequal sides
    up[:, 4], down[:, 4] = 0.25, 0.0  # neither side varies, and they differ
    up[:, 5] = down[:, 5] = 0.0  # never fires
    stats = build_stats(sae, up, down, h_up, h_down)
    direction, weights = reference.caa_denoised(
        list(up), list(down), list(h_up), list(h_down), sae.W_dec.numpy(), shrinkage=shrinkage, threshold=threshold
    )
    got = fg.caa_denoised(stats, sae, shrinkage=shrinkage, threshold=threshold)
    close(got.direction, direction)
    assert got.features == pytest.approx(weights)
    assert got.provenance["hyperparameters"] == {"shrinkage": shrinkage, "threshold": threshold}
    if threshold == 0:
        close(got.direction, fg.caa(stats).direction.numpy())


def test_the_reconstruction_error_is_kept(case):
    sae, up, down, h_up, h_down, stats = case
    W_dec = sae.W_dec.numpy()
    error = reference.reconstruction_error(up, down, h_up, h_down, W_dec, sae.b_dec.numpy())
    options = {"n_positive": 3, "n_negative": 2, "density": density_of(sae, np.zeros(K))}
    plain = fg.fgaa(stats, sae, normalize=False, **options)
    kept = fg.fgaa(stats, sae, keep_error=True, normalize=False, **options)
    close(kept.direction, plain.direction.numpy() + error)
    assert kept.features == plain.features
    assert kept.provenance["hyperparameters"]["keep_error"] is True
    atoms = fg.sta(stats, sae, keep_error=True, norm_match=False)
    close(atoms.direction, fg.sta(stats, sae, norm_match=False).direction.numpy() + error)
    # all features and the error together are the whole difference
    every = fg.fgaa(stats, sae, keep_error=True, normalize=False, **{**options, "n_positive": K, "n_negative": K})
    close(every.direction, fg.caa(stats).direction.numpy())
    assert fg.METHODS["fgaa"](stats, sae, keep_error=True, **options).norm == pytest.approx(1)


def test_the_reconstruction_error_has_a_part_in_a_mixture_with_effects(case):
    sae, stats = case[0], case[-1]
    g = torch.Generator().manual_seed(3)
    effects = fg.EffectApproximator(
        torch.randn(D, K, generator=g), torch.randn(K, generator=g), sae.hookpoint, sae.sha256
    )
    options = {"n_positive": 4, "density": density_of(sae, np.zeros(K))}
    p = fg.fgaa(stats, sae, effects, **options, **PAPER).direction.numpy()
    u = fg.fgaa(stats, sae, keep_error=True, **options).direction.numpy()
    mixed = fg.fgaa(stats, sae, effects, keep_error=True, **options, **{**PAPER, "decoder_weight": 0.25})
    close(mixed.direction, reference.unit(0.75 * p + 0.25 * u))
    with pytest.raises(fg.SelectionError, match=r"decoder_weight=0.*Pass decoder_weight=0.5"):
        fg.fgaa(stats, sae, effects, keep_error=True, **options, **PAPER)


def test_what_the_reconstruction_error_cannot_be_told_of(case):
    sae, *_, stats = case
    normalising = dataclasses.replace(sae, input_norm="layer_norm", fingerprint=sae.sha256)
    fgaa = partial(fg.fgaa, keep_error=True, density=density_of(sae, np.zeros(K)))
    for make in (fg.caa_denoised, partial(fg.sta, keep_error=True), fgaa):
        with pytest.raises(fg.PairingError, match=r"scale of every token.*input_norm='layer_norm'"):
            make(stats, normalising)
    for options, error, message in (
        ({"shrinkage": "medium"}, fg.SelectionError, "one of soft, hard"),
        ({"threshold": -1.0}, fg.DataError, "from 0"),
    ):
        with pytest.raises(error, match=message):
            fg.caa_denoised(stats, sae, **options)


def test_the_reconstruction_error_of_a_real_pass():
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default", "layer_2")
    texts = {"positive": ["I love you, my dear.", "She kissed him."], "negative": ["The bus is late.", "Two doors."]}
    stats = fg.collect(model, tokenizer, fg.load_contrast(texts), sae=sae)
    means = []
    for side in texts.values():
        errors = []
        for text in side:
            ids, mask = encode_prompts(tokenizer, [text], prepend_bos=True)
            h = record(model, ids, mask, [sae.hookpoint])[sae.hookpoint][0, 1:]  # BOS is not read
            errors.append((h - sae.reconstruct(h)).mean(0))
        means.append(torch.stack(errors).mean(0))
    error = reconstruction_error(stats, sae, stats.at("feature")[1])
    assert torch.allclose(error.float(), means[0] - means[1], atol=1e-4)


def test_sta_counts_are_comparable_for_unequal_sides(case):
    sae, up, down, h_up, h_down, _ = case
    doubled = build_stats(sae, np.concatenate([up, up]), down, np.concatenate([h_up, h_up]), h_down)
    assert set(fg.sta(doubled, sae).features) == set(fg.sta(case[-1], sae).features)


def density_of(sae, shares, first=None, **extra):
    shares = torch.as_tensor(shares, dtype=torch.float64)
    first = torch.zeros(K, dtype=torch.float64) if first is None else first
    return fg.FeatureDensity(shares * 1000, torch.full((K,), 100.0).double(), first, 1000, sae.sha256, **extra)


@pytest.mark.parametrize(("n_positive", "n_negative"), [(3, 0), (5, 2), (0, 4), (64, 64)])
@pytest.mark.parametrize("through", ["decoder", "effects"])
def test_fgaa(case, n_positive, n_negative, through):
    sae, up, down, *_, stats = case
    shares = np.linspace(0, 0.03, K)
    first = torch.zeros(K, dtype=torch.float64)
    first[[2, 5]] = torch.tensor([100.0, 99.0]).double()
    first[6] = 98
    effects = None
    g = torch.Generator().manual_seed(3)
    if through == "effects":
        M, b = torch.randn(D, K, generator=g), torch.randn(K, generator=g)
        effects = fg.EffectApproximator(M, b, sae.hookpoint, sae.sha256)
    target = reference.fgaa_target(
        list(up),
        list(down),
        density=shares,
        max_density=0.02,
        bos_features=[2, 5],
        n_positive=n_positive,
        n_negative=n_negative,
    )
    expected = (
        reference.project_decoder(target, sae.W_dec.double().numpy())
        if effects is None
        else reference.project_effects(target, M.double().numpy(), b.double().numpy())
    )
    options = {"n_positive": n_positive, "n_negative": n_negative, "max_density": 0.02, **PAPER}
    got = fg.fgaa(stats, sae, effects, density=density_of(sae, shares, first), **options)
    close(got.direction, reference.unit(expected))
    assert got.features == pytest.approx({j: t for j, t in enumerate(target) if t})
    assert got.provenance["hyperparameters"]["projection"] == through


def test_fgaa_refuses_when_everything_is_filtered_and_warns_without_density(case):
    sae, *_, stats = case
    with pytest.raises(fg.SelectionError, match="Raise max_density"):
        fg.fgaa(stats, sae, density=density_of(sae, np.full(K, 0.5)))
    with pytest.warns(fg.SelectionWarning, match="no density"):
        fg.fgaa(stats, sae)
    tuned = density_of(sae, np.full(K, 0.5), max_density=0.6)
    assert fg.fgaa(stats, sae, density=tuned).provenance["hyperparameters"]["max_density"] == 0.6


def test_given_features(case):
    sae = case[0]
    given = {3: 2.0, 7: -1.0}
    target = np.zeros(K)
    target[[3, 7]] = [2.0, -1.0]
    expected = reference.project_decoder(target, sae.W_dec.double().numpy())
    close(fg.from_features(sae, given, normalize=False).direction, expected)
    close(fg.from_features(sae, given).direction, reference.unit(expected))
    close(fg.from_features(sae, 3, normalize=False).direction, sae.W_dec[3].numpy())
    g = torch.Generator().manual_seed(3)
    M, b = torch.randn(D, K, generator=g), torch.randn(K, generator=g)
    effects = fg.EffectApproximator(M, b, sae.hookpoint, sae.sha256)
    expected = reference.project_effects(target, M.double().numpy(), b.double().numpy(), 0.5)
    close(fg.sae_ts(sae, given, effects, bias_weight=0.5).direction, reference.unit(expected))
    decoded = reference.project_decoder(target, sae.W_dec.double().numpy())
    mixed = 0.3 * reference.unit(decoded) + 0.7 * reference.unit(expected)
    close(fg.sae_ts(sae, given, effects, bias_weight=0.5, decoder_weight=0.3, normalize=False).direction, mixed)
    for wrong in ({}, [99], {1: float("nan")}):
        with pytest.raises(fg.SelectionError):
            fg.from_features(sae, wrong)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(fg.SelectionError, match="decoder_weight"):
            fg.sae_ts(sae, given, effects, decoder_weight=share)


def test_build_is_the_method_by_name(case):
    sae, *_, stats = case
    for name, arguments in (("caa", (stats,)), ("ace", (stats,)), ("sta", (stats, sae))):
        built, called = fg.build(name, stats=stats, sae=sae), fg.METHODS[name](*arguments)
        assert torch.equal(built.direction, called.direction)
        assert built.provenance["method"] == name
    assert torch.equal(fg.build("sta", stats=stats, sae=sae, p=0.5).direction, fg.sta(stats, sae, p=0.5).direction)
    for message, name, inputs in (
        ("Expected one of caa, ace, .*got the method 'steer'", "steer", {}),
        ("Expected stats= .* for the method 'caa', got none", "caa", {}),
        ("Expected the parameters of 'caa': stats, hookpoint, got p", "caa", {"stats": stats, "p": 1}),
    ):
        with pytest.raises(fg.SelectionError, match=message):
            fg.build(name, **inputs)


def test_defaults_of_the_methods_are_those_of_the_papers():
    """Written out: a default that changes changes what users get. The papers name no number of features."""
    selection = {"score": "mean_difference", "n_positive": 64, "n_negative": 0}
    selection |= {"density": None, "max_density": None, "bos_share": 0.99}
    projection = {"bias_weight": 1.0, "mu": np.inf, "unit_effects": False, "decoder_weight": 0.0, "normalize": True}
    chosen = {"bias_weight": 0.0, "mu": 0.1, "unit_effects": True, "decoder_weight": 0.5}  # by the benchmarks
    for method, expected in (
        (fg.fgaa, {"effects": None, **selection, "keep_error": False, **projection, **chosen}),
        (fg.caa_denoised, {"shrinkage": "soft", "threshold": 1.0}),
        (fg.select_features, selection),
        (fg.sae_ts, projection),
        (fg.from_features, {"normalize": True}),
    ):
        defaults = {name: p.default for name, p in inspect.signature(method).parameters.items()}
        assert {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty} == expected


def test_statistics_and_effects_of_another_sae_are_refused(case):
    sae, *_, stats = case
    other = make_sae(seed=9)
    bound = fg.ContrastStatistics(stats.residual, stats.feature, {"sae": {"sha256": other.sha256, "source": "other"}})
    with pytest.raises(fg.PairingError, match="other"):
        fg.sta(bound, sae)
    effects = fg.EffectApproximator(torch.ones(D, K), torch.ones(K), sae.hookpoint, other.sha256)
    with pytest.raises(fg.PairingError, match="measured on the SAE"):
        fg.sae_ts(sae, [1], effects)


def test_ridge_equals_the_loop_and_recovers_a_planted_map(tmp_path):
    g = torch.Generator().manual_seed(0)
    X, M = torch.randn(400, 8, generator=g), torch.randn(8, 5, generator=g)
    Y = X @ M + torch.randn(400, 5, generator=g) * M.norm(dim=0)  # signal-to-noise about 1
    fit = fg.EffectApproximator.fit(X, Y, hookpoint="blocks.1.hook_resid_post", sae_sha256="x", ridge=3.0)
    M_ref, b_ref = reference.ridge(X.double().numpy(), Y.double().numpy(), 3.0)
    close(fit.M, M_ref)
    close(fit.b, b_ref)
    assert float(torch.cosine_similarity(fit.M, M, dim=0).min()) > 0.9
    fit.save(tmp_path / "e.safetensors")
    back = fg.load_effects(tmp_path / "e.safetensors")
    assert torch.equal(back.M, fit.M)
    assert back.hookpoint == fit.hookpoint
