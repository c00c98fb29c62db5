"""Effects: measured against one row at a time, fitted against the normal equations, resumed after kills."""

from __future__ import annotations

import copy
import json
import math
import random
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.effects import measuring
from fgsteer.effects.fitting import Agreement, fit_shards
from fgsteer.effects.measuring import EffectPlan, EffectShard, decoder_directions
from fgsteer.effects.ridge import LinearMoments, best_ridge, ridge_path
from fgsteer.effects.rollouts import Sampling, choose, rollout, rollout_features
from fgsteer.likelihood.calibration import calibrate_many
from fgsteer.likelihood.scoring import mean_cross_entropies
from fgsteer.models.hookpoints import blocks_of
from fgsteer.storage.files import read_tensors, write_tensors
from tests.helpers.saes import make_sae
from tests.helpers.tiny import tiny_model, word_tokenizer
from tests.reference import effects as reference

PROMPTS = ["the man sat", "a queen", "the old king took the ship"]
HOW = Sampling(max_new_tokens=5, top_k=12, top_p=0.8, seed=3)


def own_texts(model, tokenizer):
    """Texts that the random model finds likely, so that steering makes them less so."""
    return fg.generate(model, tokenizer, PROMPTS, max_new_tokens=12)


@pytest.fixture(scope="module")
def texts(models, tokenizer):
    return own_texts(models["llama"], tokenizer)


def plan(sae, texts, count=40, **options):
    given = {"prompts": PROMPTS, "texts": texts, "rollouts": 2, "sampling": HOW, "rows": 24, **options}
    return EffectPlan(decoder_directions(sae, count), **given)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_measured_effects_equal_one_row_at_a_time(family, models, tokenizer, sae, tmp_path):
    model = models[family]
    part = next(plan(sae, own_texts(model, tokenizer)).measure_shards(model, tokenizer, sae, tmp_path))
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for number in range(3):
        for half, rollouts in ((part.even, [0]), (part.odd, [1])):
            expected = reference.effect(
                model,
                blocks_of(model)[sae.hookpoint.layer],
                sae.encode,
                ids,
                part.vectors[number],
                lambda rollout, step: HOW.noise(rollout, step, len(PROMPTS), model.config.vocab_size),
                HOW,
                rollouts,
            )
            # float32 sums over 15 tokens; a token chosen differently would show as about 0.1
            assert np.allclose(half[number].numpy(), expected, atol=2e-5)
    assert part.even.abs().max() > 0.1
    assert torch.allclose(part.vectors, decoder_directions(sae, 40)[: len(part.vectors)] * part.strengths[:, None])


def test_without_change_there_is_no_effect(llama, tokenizer, sae):
    prompts = encode_prompts(tokenizer, PROMPTS)
    v = fg.SteeringVector(sae.direction(0), sae.hookpoint)
    acts = rollout_features(llama, prompts, sae, [None, v.add(0.0), v.add(30.0)], HOW, 1)
    assert torch.equal(acts[0], acts[1])
    assert not torch.allclose(acts[0], acts[2])


def test_the_models_generation_settings_do_not_act(llama, tokenizer):
    prompts = encode_prompts(tokenizer, PROMPTS)
    expected = rollout(llama, prompts, [None], HOW)[0]
    model = copy.deepcopy(llama)
    words = list(range(4, 60))
    for setting in ({"suppress_tokens": words}, {"no_repeat_ngram_size": 1}, {"forced_eos_token_id": 2},
                    {"sequence_bias": [[[5], 30.0]]}, {"return_dict_in_generate": True},
                    {"max_time": 1e-9}):  # fmt: skip
        own = model.generation_config = GenerationConfig(**setting)
        assert torch.equal(rollout(model, prompts, [None], HOW)[0], expected), setting
        assert model.generation_config is own
    model.generation_config = GenerationConfig(eos_token_id=expected[:, -1].unique().tolist())
    without = rollout(model, prompts, [None], HOW)[0]
    assert without.shape == expected.shape
    assert not torch.isin(without[:, -HOW.max_new_tokens :], expected[:, -1].unique()).any()


def test_choose_samples_from_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    how = Sampling(top_k=4, top_p=0.9, temperature=0.7, seed=1)
    draws = 4000
    noise = torch.cat([how.noise(r, 0, 100, 5) for r in range(draws // 100)])
    counts = torch.bincount(choose(logits.expand(draws, -1), noise, how), minlength=5) / draws
    kept = torch.tensor([0, 4, 1])  # these hold 0.96 of the top four's probability, the first two 0.84
    p = torch.zeros(5)
    p[kept] = (logits[kept] / 0.7).softmax(0)
    assert (counts - p).abs().max() < 4 * math.sqrt(0.25 / draws)  # four standard errors at most
    assert counts[2] == counts[3] == 0
    assert torch.equal(how.noise(2, 3, 4, 9), how.noise(2, 3, 4, 9))
    assert not torch.equal(how.noise(2, 3, 4, 9), how.noise(3, 2, 4, 9))


def test_strengths_cost_the_target(llama, tokenizer, sae, texts):
    directions = decoder_directions(sae, 5)
    makes = [fg.SteeringVector(d, sae.hookpoint).add for d in directions]
    found = calibrate_many(llama, tokenizer, makes, texts, target_ce_rise=0.2, start=4.0, tolerance=0.05)
    base = fg.cross_entropy(llama, tokenizer, texts)
    for make, c in zip(makes, found, strict=True):
        rise = fg.cross_entropy(llama, tokenizer, texts, steering=make(c)) - base
        assert rise == pytest.approx(0.2, rel=0.051)  # the tolerance asked for, and float32 sums
    null = fg.SteeringVector(torch.zeros(32), sae.hookpoint).add
    assert math.isnan(calibrate_many(llama, tokenizer, [null], texts, target_ce_rise=0.2)[0])
    for target in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(fg.SteeringError, match="target"):
            fg.calibrate(llama, tokenizer, makes[0], texts, target_ce_rise=target)
        with pytest.raises(fg.SteeringError, match="target_ce_rise"):
            calibrate_many(llama, tokenizer, makes, texts, target_ce_rise=target)


def test_a_grid_of_costs_is_met_with_fewer_passes(llama, tokenizer, texts, monkeypatch):
    """Each target within its tolerance, for every vector; the passes are fewer than for one target at a time."""
    from fgsteer.likelihood import calibration

    targets = (0.4, 0.1, 0.2)  # in no order
    makes = [
        fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(n)), fg.Hookpoint(1)).unit().add
        for n in range(3)
    ]
    makes.append(fg.SteeringVector(torch.zeros(32), fg.Hookpoint(1)).add)  # no cost, whatever the coefficient
    asked = []
    measured = mean_cross_entropies

    def counted(passes, texts, given):
        asked.append(len(given))
        return measured(passes, texts, given)

    monkeypatch.setattr(calibration, "mean_cross_entropies", counted)
    grid = fg.calibrate_grid(llama, tokenizer, makes, texts, target_ce_rises=targets)
    together = sum(asked)
    asked.clear()
    alone = [calibration.calibrate_many(llama, tokenizer, makes, texts, target_ce_rise=t) for t in targets]
    assert together < 0.7 * sum(asked)
    base = fg.cross_entropy(llama, tokenizer, texts)
    for number, target in enumerate(targets):
        for make, found, single in zip(makes[:-1], grid[:-1], alone[number][:-1], strict=True):
            with fg.steer(llama, make(found[number])):
                rise = fg.cross_entropy(llama, tokenizer, texts) - base
            assert rise == pytest.approx(target, rel=0.021)  # the solver's 2 %, and float32 sums in another order
            assert found[number] == pytest.approx(single, rel=0.05)  # two roots within 2 % of a slope near 1
    assert all(math.isnan(value) for value in grid[-1])
    assert fg.calibrate_grid(llama, tokenizer, [], texts, target_ce_rises=targets) == []
    for wrong in ((), (0.1, 0.0), (math.nan,)):
        with pytest.raises(fg.SteeringError, match="target_ce_rise"):
            fg.calibrate_grid(llama, tokenizer, makes, texts, target_ce_rises=wrong)


def planted(seed=0, n=600, d=12, k=30, noise=1.0):
    """Anisotropic inputs and noisy linear effects: noise of the signal's own standard deviation times ``noise``."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, d)) * np.geomspace(1, 0.2, d)
    M = g.normal(size=(d, k)) * (g.random(k) < 0.5)
    signal = x @ M + g.normal(size=k)
    return x, M, signal + noise * signal.std(0) * g.normal(size=(n, k))


def test_ridge_equals_the_normal_equations():
    x, _, y = planted(n=80)
    halves = LinearMoments.of(torch.tensor(x[:33]), torch.tensor(y[:33])) + LinearMoments.of(
        torch.tensor(x[33:]), torch.tensor(y[33:])
    )
    for penalty in (0.0, 0.5, 300.0):
        M, b = halves.fit(penalty)
        expected_M, expected_b = reference.ridge(x, y, penalty)
        assert np.allclose(M, expected_M, atol=1e-9)  # float64, condition number below 100
        assert np.allclose(b, expected_b, atol=1e-9)
    x2, _, y2 = planted(seed=1, n=40)
    other = LinearMoments.of(torch.tensor(x2), torch.tensor(y2))
    for penalty, score in zip((0.1, 50.0), ridge_path(halves, other, (0.1, 50.0)), strict=True):
        M, b = reference.ridge(x, y, penalty)
        assert score == pytest.approx(reference.r2(x2, y2, M, b, y.mean(0)), abs=1e-9)
        mean = torch.tensor(y.mean(0))
        total = other.about(torch.zeros_like(other.x), mean).yy
        error = other.squared_error(torch.tensor(M), torch.tensor(b))
        assert 1 - error / total == pytest.approx(score, abs=1e-9)


def test_planted_effects_are_recovered_at_signal_to_noise_one():
    x, M, y = planted()
    effects = fg.EffectApproximator.fit(
        torch.tensor(x), torch.tensor(y), hookpoint="blocks.1.hook_resid_post", sae_sha256="x"
    )
    real = np.abs(M).sum(0) > 0
    got = effects.M.double().numpy()
    cosines = (got * M).sum(0)[real] / np.linalg.norm(got, axis=0)[real] / np.linalg.norm(M, axis=0)[real]
    assert cosines.min() > 0.9
    assert torch.allclose(
        effects.predict(torch.tensor(x[:2])), torch.tensor(x[:2] @ got).float() + effects.b, atol=1e-4
    )
    with pytest.raises(fg.PairingError, match="one output per input"):
        fg.EffectApproximator.fit(torch.ones(3, 2), torch.ones(2, 2), hookpoint="blocks.0", sae_sha256="x", ridge=1.0)


def test_validation_shrinks_noise_and_keeps_signal():
    for noise, low, high in ((0.05, 0.0, 0.1), (20.0, 1.0, math.inf)):
        x, _, y = planted(noise=noise)
        train, rest = (LinearMoments.of(torch.tensor(x[s]), torch.tensor(y[s])) for s in (slice(400), slice(400, 600)))
        assert low <= best_ridge(train, rest) <= high


def test_figures_tell_effect_from_noise():
    """A tenth of the variance is noise in one run, all of it in the other."""
    for noise, r2, ceiling in ((0.3, 0.85, 0.9), (None, 0.0, 0.0)):
        x, _, clean = planted(noise=0.0, n=2000)
        if noise is None:
            clean = clean * 0 + clean.mean(0)
        g = np.random.default_rng(7)
        scale = (noise or 1.0) * planted()[2].std(0)
        even, odd = (torch.tensor(clean + math.sqrt(2) * scale * g.normal(size=clean.shape)).float() for _ in range(2))
        strengths = torch.ones(len(x))
        strengths[::7] = torch.nan
        parts = [
            EffectShard(
                torch.tensor(x[i : i + 100]).float(), strengths[i : i + 100], even[i : i + 100], odd[i : i + 100], i
            )
            for i in range(0, len(x), 100)
        ]
        _, _, figures = fit_shards(parts)
        assert figures["skipped"] == len(strengths[::7])
        assert figures["vectors"] + figures["skipped"] == 2000
        assert figures["ceiling"] == pytest.approx(ceiling, abs=0.06)
        assert figures["r2"] <= figures["ceiling"] + 0.03  # 170 held-out vectors of 30 features each
        assert figures["r2"] >= r2 - 0.02
        assert figures["shuffled"] < 0.05
        assert figures["explained"] >= figures["explained_by_bias"] - 0.02


@pytest.mark.parametrize("size", [1, 3, 100])
def test_effects_are_dealt_to_other_vectors_in_parts_of_any_size(size):
    x, _, y = (torch.tensor(a) for a in planted(noise=0.0))
    parts = [
        EffectShard(x[i : i + size], torch.ones(len(x[i : i + size])), y[i : i + size], y[i : i + size], i)
        for i in range(0, len(x), size)
    ]
    figures = fit_shards(parts)[2]
    assert figures["r2"] > 0.99
    assert figures["shuffled"] < 0.3  # of 20 dealt at random one stays in its place


def test_agreement_adds_up():
    g = torch.Generator().manual_seed(0)
    even, odd = torch.randn(20, 3, generator=g), torch.randn(20, 3, generator=g)
    whole, sum_ = Agreement.of(even, odd), Agreement.of(even[:6], odd[:6]) + Agreement.of(even[6:], odd[6:])
    assert sum_.ceiling == pytest.approx(whole.ceiling, abs=1e-12)
    covariance = sum(np.cov(even[:, j], odd[:, j])[0, 1] for j in range(3))
    variance = sum(np.var(((even + odd) / 2)[:, j].double().numpy(), ddof=1) for j in range(3))
    assert whole.ceiling == pytest.approx(covariance / variance, rel=1e-5)  # float32 inputs


def measure(llama, tokenizer, sae, texts, work, **options):
    return fg.EffectApproximator.measure(
        llama, tokenizer, sae, prompts=PROMPTS, texts=texts, rollouts=2, sampling=HOW, rows=9, work=work, **options
    )


def test_processes_that_share_the_vectors_measure_the_same(llama, tokenizer, texts, tmp_path, monkeypatch):
    sae, waited = make_sae(d_sae=24), []
    measure(llama, tokenizer, sae, texts, None).save(tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def other(path, maker):  # the other process, when this one waits for it
        waited.append(maker)
        if not path.exists():
            monkeypatch.setenv("RANK", "1")
            monkeypatch.setattr("fgsteer.storage.shards.wait_for_file", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                measure(llama, tokenizer, sae, texts, tmp_path / "parts")
            monkeypatch.setattr("fgsteer.storage.shards.wait_for_file", other)

    monkeypatch.setattr("fgsteer.storage.shards.wait_for_file", other)
    monkeypatch.setenv("RANK", "0")
    measure(llama, tokenizer, sae, texts, tmp_path / "parts").save(tmp_path / "shared")
    assert waited[:3] == [0, 1, 0]
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()


def test_killed_at_any_write_it_ends_the_same(llama, tokenizer, texts, tmp_path, monkeypatch):
    sae = make_sae(d_sae=24)
    unbroken = measure(llama, tokenizer, sae, texts, None)
    unbroken.save(tmp_path / "whole.safetensors")
    lottery, kills, original = random.Random(1), 0, write_tensors

    def write(path, *args, **kwargs):
        if lottery.random() < 0.5:
            raise KeyboardInterrupt
        original(path, *args, **kwargs)
        if lottery.random() < 0.5:
            raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "write_tensors", write)
    monkeypatch.setattr("fgsteer.storage.shards.write_tensors", write)
    for _ in range(100):
        try:
            broken = measure(llama, tokenizer, sae, texts, tmp_path / "parts")
            break
        except KeyboardInterrupt:
            kills += 1
    broken.save(tmp_path / "broken.safetensors")
    assert kills >= 4  # of eight parts and a baseline
    assert (tmp_path / "broken.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not llama._forward_hooks
    with pytest.raises(fg.PairingError, match="sampling"):
        fg.EffectApproximator.measure(
            llama, tokenizer, sae, prompts=PROMPTS, texts=texts, rollouts=2, rows=9, work=tmp_path / "parts"
        )


@pytest.mark.slow
def test_the_command_killed_ten_times_ends_with_the_same_file(tmp_path):
    """On the embedded default: kill -9 at random moments, ten times, then let it end."""
    options = shlex.split("--vectors 160 --rollouts 2 --max-new-tokens 4 --n-texts 2 --rows 128 --device cpu --json")
    lottery = random.Random(0)

    def start(out):
        command = [sys.executable, "-c", "from fgsteer.cli import main; main()", "effects", "-o", str(out), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def parts():
        return len(list((tmp_path / "broken.safetensors.parts").glob("part-*.safetensors")))

    assert start(tmp_path / "whole.safetensors").wait() == 0
    for _ in range(10):
        seen, run = parts(), start(tmp_path / "broken.safetensors")
        while parts() == seen and run.poll() is None:  # into its first new part, or beyond
            time.sleep(0.01)
        time.sleep(lottery.random() * 0.3)
        assert run.poll() is None
        run.kill()
        run.wait()
    assert parts() < 20
    run = start(tmp_path / "broken.safetensors")
    assert json.loads(run.communicate()[0])["vectors"] == 160
    assert (tmp_path / "broken.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_folder_of_another_run_is_refused(llama, tokenizer, texts, tmp_path):
    """Nothing measured on other weights, token ids or plans, or damaged, gets into a result."""
    sae = make_sae()
    measure(llama, tokenizer, sae, texts, tmp_path)
    part, next_ = (tmp_path / f"part-00000{n}.safetensors" for n in (1, 2))
    note, kept = tmp_path / "plan.json", part.read_bytes()
    for model, words, differing in ((tiny_model("llama", seed=1), tokenizer, "model.weights"),
                                    (llama, word_tokenizer(bos=False), "tokenizer")):  # fmt: skip
        with pytest.raises(fg.PairingError, match=rf"{differing} was [0-9a-f]{{12}} and is"):
            measure(model, words, sae, texts, tmp_path)
    part.write_bytes(next_.read_bytes())
    with pytest.raises(fg.PairingError, match="another shard"):
        measure(llama, tokenizer, sae, texts, tmp_path)
    tensors, header = read_tensors(next_, kind="effects part")
    for wrong in ({"odd": tensors["odd"][:2]}, {"more": torch.ones(1)}):
        write_tensors(part, tensors | wrong, kind="effects part", header={**header, "part": 1, "of": "3"})
        with pytest.raises(fg.FormatError, match="damaged"):
            measure(llama, tokenizer, sae, texts, tmp_path)
    part.write_bytes(kept[:-9])
    with pytest.raises(fg.FormatError, match="not a readable"):
        measure(llama, tokenizer, sae, texts, tmp_path)
    part.write_bytes(kept)
    note.write_text(note.read_text()[:40])
    with pytest.raises(fg.FormatError, match=r"plan\.json"):
        measure(llama, tokenizer, sae, texts, tmp_path)
    note.unlink()
    with pytest.raises(fg.PairingError, match="another run"):
        measure(llama, tokenizer, sae, texts, tmp_path, target_ce_rise=0.3)


def test_measure_reports_and_serves_the_methods(llama, tokenizer, texts):
    sae = make_sae(d_sae=24)
    done = []
    effects = measure(llama, tokenizer, sae, texts, None, progress=done.append)
    assert done == list(range(3, 25, 3))
    assert set(effects.about) >= {"r2", "ceiling", "shuffled", "explained", "explained_by_bias", "cosine_to_decoder"}
    vec = fg.sae_ts(sae, [3], effects)
    assert vec.norm == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(fg.PairingError, match="Measure again with fgsteer effects"):
        fg.sae_ts(make_sae(d_sae=24, seed=5), [3], effects)


@pytest.mark.parametrize("mu", [0.0, 0.3, 10.0])
def test_projection_that_minds_other_features(mu):
    g = np.random.default_rng(2)
    M, b, t = g.normal(size=(6, 15)), g.normal(size=15), np.zeros(15)
    t[[2, 9]] = 1.0, -0.5
    effects = fg.EffectApproximator(torch.tensor(M).float(), torch.tensor(b).float(), "blocks.0.hook_resid_post", "x")
    gram = M @ M.T
    inverse = np.linalg.inv(gram + mu * np.trace(gram) / 6 * np.eye(6))
    s, always = inverse @ (M @ t), inverse @ (M @ b)
    expected = s / np.linalg.norm(s) - 0.7 * always / np.linalg.norm(always)
    got = effects.project(torch.tensor(t), bias_weight=0.7, mu=mu)
    assert np.allclose(got, expected, atol=1e-5)  # M is stored in float32
    if mu == 0:  # the pseudo-inverse: no other direction fits t better
        best = np.linalg.lstsq(M.T, t, rcond=None)[0]
        plain = effects.project(torch.tensor(t), bias_weight=0.0, mu=0.0)
        assert np.allclose(plain, best / np.linalg.norm(best), atol=1e-5)
    columns = inverse @ M
    own = sum(t[j] * columns[:, j] / np.linalg.norm(columns[:, j]) for j in (2, 9))  # SAE-TS vectors of norm 1
    got = effects.project(torch.tensor(t), bias_weight=0.0, mu=mu, unit_effects=True)
    assert np.allclose(got, own / np.linalg.norm(own), atol=1e-5)
    one = torch.tensor(np.eye(15)[2])
    same = effects.project(one, mu=mu), effects.project(one, mu=mu, unit_effects=True)
    assert torch.allclose(*same, atol=1e-12)  # of one feature there is nothing to weigh; float64
    far = effects.project(torch.tensor(t), mu=1e9)
    assert torch.allclose(far, effects.project(torch.tensor(t)), atol=1e-6)  # mu → inf is SAE-TS


def test_refusals(llama, tokenizer, sae, texts):
    effects = fg.EffectApproximator(torch.ones(3, 4), torch.ones(4), "blocks.0.hook_resid_post", "x")
    with pytest.raises(fg.SelectionError, match="mu = -1"):
        effects.project(torch.ones(4), mu=-1)
    with pytest.raises(fg.PairingError, match=r"target of shape \(5,\)"):
        effects.project(torch.ones(5))
    for target, weight in ((torch.full((4,), torch.nan), 1.0), (torch.ones(4), math.nan)):
        with pytest.raises(fg.SelectionError, match="nan"):
            effects.project(target, bias_weight=weight)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(fg.DataError, match="finite"):
        fg.EffectApproximator.fit(x, x.clone().fill_(math.inf), hookpoint=effects.hookpoint, sae_sha256="x", ridge=1.0)
    for options, message in (
        ({"rollouts": 3}, "even number"),
        ({"vectors": torch.ones(4)}, r"\(n, d_model\)"),
        ({"target_ce_rise": 0.0}, "nats"),
        ({"prompts": []}, "0 prompts"),
        ({"texts": []}, "0 texts"),
        ({"vectors": -2}, "number of vectors, at least one, got -2"),
        ({"vectors": 5}, "too few vectors"),
    ):
        given = {"prompts": PROMPTS, "texts": texts, "sampling": HOW, "rows": 6, "rollouts": 2, **options}
        with pytest.raises(fg.DataError, match=message):
            fg.EffectApproximator.measure(llama, tokenizer, sae, **given)
    for wrong in ({"top_p": 0.0}, {"top_k": 0}, {"temperature": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(fg.DataError, match=f"{next(iter(wrong))} = 0"):
            Sampling(**wrong)
    with pytest.raises(fg.PairingError, match="d_model 8"):
        fg.EffectApproximator.measure(llama, tokenizer, make_sae(d_model=8), prompts=PROMPTS, texts=texts)
