"""Conditional defences: each rule against loops, what opens for whom, and that shut is bit for bit unsteered."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.conditional.recipe import Conditional
from fgsteer.steering.splicing import splice
from tests.helpers.steering import NEW, PROMPTS, batch, direction, run, vector
from tests.helpers.tiny import D_MODEL, LAYERS
from tests.reference import conditional as reference

WORDS = ["the man", "a dog", "she", "the king", "the old ship", "he", "a cat", "the queen"]
HARMFUL = [f"{word} sat on the bread" for word in WORDS]
HARMLESS = [f"{word} was happy and ran to the sea" for word in WORDS]
# Float32 passes are compared with float64 arithmetic on their hidden states, of size about one.
CLOSE = 1e-5


def ids_of(tokenizer, prompt):
    return tokenizer(prompt)["input_ids"]


def outputs(model, tokenizer, prompts):
    return [reference.states(model, ids_of(tokenizer, p))[1] for p in prompts]


def last_means(model, tokenizer, prompts, layer):
    return reference.mean([out[layer][-1] for out in outputs(model, tokenizer, prompts)])


def as_batch(tokenizer, prompts, side="left"):
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False)


def middle(values):
    low, high = sorted(values)[len(values) // 2 - 1 : len(values) // 2 + 1]
    return (low + high) / 2


# ---------------------------------------------------------------- readings of prompts


def test_the_reading_of_a_mean_is_no_mean_of_readings(llama, tokenizer):
    reading = fg.Cosine(direction(2), 1)
    ids = torch.tensor([ids_of(tokenizer, PROMPTS[1])])
    h = fg.record(llama, ids, torch.ones_like(ids), [fg.Hookpoint(1)])[fg.Hookpoint(1)]
    prompt = torch.ones_like(ids, dtype=torch.bool)
    prompt[0, 0] = False
    rows = h[0, 1:].double().numpy()
    found = float(reading.of_mean().of_prompt(h, prompt))
    assert found == pytest.approx(reference.cosine(reference.mean(list(rows)), direction(2)), abs=CLOSE)
    assert found != pytest.approx(float(reading.mean().of_prompt(h, prompt)), abs=1e-3)
    projection = fg.Projection(direction(2), 1)  # a linear reading is the same either way, but for rounding
    pair = [getattr(projection, name)().of_prompt(h, prompt) for name in ("mean", "of_mean")]
    torch.testing.assert_close(*pair, rtol=CLOSE, atol=CLOSE)
    assert bool(reading.of_mean().of_prompt(h, ~(prompt | True)).isnan())


def test_the_published_similarity_has_no_sign_and_depends_on_scale():
    h = torch.randn(1, 5, D_MODEL, generator=torch.Generator().manual_seed(0))
    reading = fg.TanhCosine(direction(1), 1)
    for factor in (1.0, 20.0):
        found = reading.values(factor * h)[0].tolist()
        naive = [reference.published_similarity((factor * row).tolist(), direction(1).tolist()) for row in h[0]]
        assert found == pytest.approx(naive, abs=CLOSE)
    assert torch.equal(reading.values(h), reading.values(-h))
    assert torch.equal(reading.values(h), fg.TanhCosine(-direction(1), 1).values(h))
    cosines = fg.Cosine(direction(1), 1).values(h)
    # tanh x = x − x³/3: for projections of 1e-2 entries differ by 1e-4 of themselves at most
    torch.testing.assert_close(reading.values(h / 100), cosines.abs(), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(reading.values(20 * h), cosines.abs(), rtol=1e-2)
    assert torch.equal(reading.values(h * 0), torch.zeros(1, 5))


# ---------------------------------------------------------------- reading ahead


def preview():
    """A reading of the last block for steering of the first, which one pass cannot have."""
    return fg.Preview([fg.Cosine(direction(2), 2), fg.Projection(direction(3), 1)], appended=[5, 6])


def naive_preview(model, ids):
    _, out = reference.states(model, [*ids, 5, 6])
    u = {layer: out[layer][len(ids) - 1] - out[layer][-1] for layer in (1, 2)}
    unit = direction(3).double().numpy() / float(direction(3).double().norm())
    return (reference.cosine(u[2], direction(2)) + reference.dot(u[1], unit)) / 2


def test_a_prompt_is_read_ahead_and_each_row_decides(llama, tokenizer):
    values = [naive_preview(llama, ids_of(tokenizer, p)) for p in PROMPTS]
    threshold = middle([*values, min(values)])  # opens for some rows and not for others
    item = vector(1, layer=0).add(2.0, when=preview() > threshold)
    expected = []
    for prompt, value in zip(PROMPTS, values, strict=True):

        def change(layer, h, _, value=value):
            h = h.copy()
            if layer == 0 and value > threshold:
                h[1:] += 2 * direction(1).double().numpy()  # BOS left alone
            return h

        expected.append(reference.greedy(llama, ids_of(tokenizer, prompt), change, NEW))
    assert 0 < sum(value > threshold for value in values) < 3
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert run(llama, batch(tokenizer), item, **options) == expected, options
    beams = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    with fg.steer(llama, item):
        together = llama.generate(**batch(tokenizer), **beams)[:, -NEW:].tolist()
        assert together == [llama.generate(**as_batch(tokenizer, [p]), **beams)[0, -NEW:].tolist() for p in PROMPTS]


def test_the_strength_follows_the_prompt(llama, tokenizer):
    values = [naive_preview(llama, ids_of(tokenizer, p)) for p in PROMPTS]
    bounds = {"at_least": -1.5, "at_most": 1.0}
    item = fg.AddByPrompt(
        direction=direction(1), reading=preview(), hookpoint=0, coefficient=3.0, bias=-middle(values), **bounds
    )
    strengths = [reference.clip(3 * (v - middle(values)), -1.5, 1.0) for v in values]
    assert len(set(strengths)) == 3
    inputs = as_batch(tokenizer, PROMPTS, "right")
    with torch.no_grad(), fg.steer(llama, item):
        together = llama(**inputs).logits
    for row, (prompt, strength) in enumerate(zip(PROMPTS, strengths, strict=True)):
        single = as_batch(tokenizer, [prompt])
        with torch.no_grad(), fg.steer(llama, vector(1, layer=0).add(strength)):
            alone = llama(**single).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)  # strengths to 1e-6
    in_one_pass = fg.Projection(direction(2), 0).last()
    low = fg.AddByPrompt(direction=direction(1), reading=in_one_pass, hookpoint=1, coefficient=0.5)
    expected = []
    for prompt in PROMPTS:
        out = reference.states(llama, ids_of(tokenizer, prompt))[1]
        unit = direction(2).double().numpy() / float(direction(2).double().norm())
        strength = 0.5 * reference.dot(out[0][-1], unit)

        def change(layer, h, _, strength=strength):
            h = h.copy()
            if layer == 1:
                h[1:] += strength * direction(1).double().numpy()
            return h

        expected.append(reference.greedy(llama, ids_of(tokenizer, prompt), change, NEW))
    assert run(llama, batch(tokenizer), low) == expected
    assert run(llama, batch(tokenizer), [low, None, vector(1).add(0.3)])[0] == expected[0]


def fail(*_):
    raise RuntimeError("mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shut_keeps_every_bit_and_hooks_go(models, tokenizer, dtype):
    model = copy.deepcopy(models["llama"]).to(dtype)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    inputs = batch(tokenizer)
    plain = model(**inputs).logits
    never = fg.AddByPrompt(direction=direction(1), reading=preview(), hookpoint=0, at_least=0.0, at_most=0.0)
    for item in (vector(1, layer=0).add(2.0, when=preview() > 1e9), never):
        with fg.steer(model, item):
            assert torch.equal(model(**inputs).logits, plain)
    failing = model.model.layers[2].register_forward_pre_hook(fail)
    with fg.steer(model, vector(1, layer=0).add(2.0, when=preview() > -9.0)), pytest.raises(RuntimeError, match="mine"):
        model(**inputs)
    failing.remove()
    assert torch.equal(model(**inputs).logits, plain)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_nothing_steers_what_is_read_ahead(llama, tokenizer):
    """Neither the block itself nor one around it, and the pass is not taken for one of theirs."""
    value = naive_preview(llama, ids_of(tokenizer, PROMPTS[1]))
    inner = vector(1, layer=0).add(2.0, when=preview() > value - 0.01)
    outer = vector(3, layer=0).add(5.0)
    ids = torch.tensor([ids_of(tokenizer, PROMPTS[1])])
    with torch.no_grad(), fg.steer(llama, [inner, outer]):
        together = llama(ids).logits
    with torch.no_grad(), fg.steer(llama, outer), fg.steer(llama, inner):
        torch.testing.assert_close(llama(ids).logits, together, atol=1e-5, rtol=1e-5)  # added in another order
    with (
        torch.no_grad(),
        fg.steer(llama, outer),
        fg.steer(llama, vector(1, layer=0).add(2.0, when=preview() > value + 0.01)),
    ):
        shut = llama(ids).logits
    with torch.no_grad(), fg.steer(llama, outer):
        assert torch.equal(llama(ids).logits, shut)


def test_scores_and_other_families_read_ahead(models, tokenizer):
    pairs = [("the man", "sat on the ship"), ("a dog sat on the bread", "and ran")]
    item = vector(1, layer=0).add(2.0, when=preview() > 0.0)
    llama = models["llama"]
    together = fg.log_probabilities(llama, tokenizer, pairs, [None, item, vector().add(1.0)]).sums[1]
    alone = [fg.log_probabilities(llama, tokenizer, [pair], [item]).sums[0, 0] for pair in pairs]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-5)  # float32 in other batches
    for name in ("gpt2", "gemma2", "gpt_neox"):
        model = models[name]
        gate = preview() > 0.0
        decided = fg.gate_decisions(model, tokenizer, gate, PROMPTS)
        plain = run(model, batch(tokenizer), None)
        always = run(model, batch(tokenizer), vector(1, layer=0).add(2.0))
        gated = run(model, batch(tokenizer), vector(1, layer=0).add(2.0, when=gate))
        assert gated == [a if opened else p for a, p, opened in zip(always, plain, decided.tolist(), strict=True)]


def test_what_cannot_be_read_ahead_is_refused(llama, tokenizer):
    item = vector(1, layer=0).add(2.0, when=preview() > 0.0)
    inputs = batch(tokenizer)
    embeddings = llama.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(fg.SteeringError, match="of embeddings"), fg.steer(llama, item):
        llama(inputs_embeds=embeddings)
    with pytest.raises(fg.SteeringError, match="read in parts"):
        run(llama, inputs, item, prefill_chunk_size=3)
    for wrong in (
        lambda: fg.Preview([]),
        lambda: fg.Preview(fg.Projection(direction(1), 0).last()),
        lambda: fg.Preview(fg.Preview(fg.Projection(direction(1), 0))),
        lambda: fg.Preview(fg.Projection(direction(1), 0), position=0),
        lambda: fg.Preview(fg.Projection(direction(1), 0), appended=[-3]),
        lambda: fg.AddByPrompt(direction=direction(1), reading=fg.Projection(direction(1), 0), hookpoint=1),
        lambda: fg.AddByPrompt(direction=direction(1), reading=preview(), hookpoint=1, at_least=2.0, at_most=1.0),
    ):
        with pytest.raises(fg.SteeringError):
            wrong()
    with pytest.raises(fg.PairingError, match="widths"):
        fg.Preview([fg.Projection(direction(1), 0), fg.Projection(torch.ones(3), 0)])
    with pytest.raises(fg.PairingError, match=r"fg\.Preview\(reading\)"):
        fg.AddByPrompt(direction=direction(1), reading=fg.Projection(direction(1), 2).last(), hookpoint=1)


def test_recipes_are_kept_in_files(llama, tokenizer, tmp_path):
    shared = preview()
    items = [
        vector(1, layer=0).add(2.0, when=~(shared < 0.1)),
        fg.AddByPrompt(direction=direction(4), reading=shared, hookpoint=1, coefficient=0.5, at_most=1.0),
        vector(1).add(1.0, when=fg.TanhCosine(direction(2), 0).of_mean() > 0.01),
    ]
    fg.save_steering(tmp_path / "guard", items)
    loaded = fg.load_steering(tmp_path / "guard")
    expected = run(llama, batch(tokenizer), items, per_row=False)
    assert run(llama, batch(tokenizer), loaded, per_row=False) == expected
    by_prompt: Any = loaded[1]
    assert by_prompt.reading.appended == (5, 6)
    from safetensors import safe_open

    with safe_open(tmp_path / "guard", "pt") as file:
        assert len(file.keys()) == 6, "what the two share is in the file once"


# ---------------------------------------------------------------- CAST


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("similarity", ["cosine", "published"])
def test_cast_is_its_loops(llama, tokenizer, pooling, similarity):
    guard = fg.cast(
        llama,
        tokenizer,
        HARMFUL,
        HARMLESS,
        [vector(1, layer=1), vector(4, layer=2)],
        coefficient=2.0,
        pooling=pooling,
        similarity=similarity,
    )

    def pooled(prompt, layer):
        h = reference.states(llama, ids_of(tokenizer, prompt))[0][layer]
        return reference.mean(list(h[1:])) if pooling == "mean" else h[-1]

    compare = reference.cosine if similarity == "cosine" else reference.published_similarity
    best, conditions = 0.0, {}
    for layer in (0, 1):  # block 1's output is steered: its input is the last place before
        halves = [(pooled(a, layer) - pooled(b, layer)) / 2 for a, b in zip(HARMFUL[::2], HARMLESS[::2], strict=True)]
        c = conditions[layer] = reference.first_component(halves)
        values = [[compare(pooled(p, layer), c) for p in side[::2]] for side in (HARMFUL, HARMLESS)]
        best = max(best, reference.best_f1(*values))
    assert guard.fitted.f1 == pytest.approx(best)
    assert guard.fitted.prompts == guard.held_out.prompts == (4, 4)
    gate: Any = guard.gate
    layer = gate.reading.hookpoint.layer
    assert reference.cosine(gate.reading.direction, conditions[layer]) == pytest.approx(1.0, abs=CLOSE)
    prompts = [HARMFUL[1], HARMLESS[1], HARMFUL[3]]
    expected = []
    for prompt in prompts:
        value = compare(pooled(prompt, layer), conditions[layer])
        met = value > gate.threshold if gate.fires_above else value < gate.threshold

        def change(number, h, _, met=met):
            h = h.copy()
            if met and number in (1, 2):
                h[1:] += 2 * direction({1: 1, 2: 4}[number]).double().numpy()
            return h

        expected.append(reference.greedy(llama, ids_of(tokenizer, prompt), change, NEW))
    assert run(llama, as_batch(tokenizer, prompts), guard, per_row=False) == expected


def test_prompts_that_end_alike_are_told_apart_above_the_embeddings(llama, tokenizer):
    """As all do under a chat template: the last token's embedding is the same for all of them."""
    act_on, leave = ([f"{prompt} yes" for prompt in side] for side in (HARMFUL, HARMLESS))
    guard: Any = fg.cast(llama, tokenizer, act_on, leave, vector(1, layer=1), pooling="last")
    assert guard.gate.reading.hookpoint == fg.Hookpoint(1, "resid_pre")


def test_a_condition_keeps_the_mean_that_centring_loses():
    """Differences that are one vector and noise: uncentred, the vector is found."""
    from fgsteer.conditional.cast import condition_vector

    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(64, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 40, 64, generator=generator, dtype=torch.float64)
    noise[:, :, 0] *= 4.0  # a loud direction that is not the signal
    first, second = signal + noise[0], noise[1]
    found = condition_vector(first, second)
    halves = (first - second) / 2
    centred = torch.linalg.svd(halves - halves.mean(0), full_matrices=False).Vh[0]
    assert reference.cosine(found, signal) > 0.9
    assert abs(reference.cosine(centred, signal)) < 0.3
    assert reference.cosine(condition_vector(second, first), signal) < -0.9


# ---------------------------------------------------------------- SCANS


def test_scans_is_its_loops(llama, tokenizer):
    appended, read, steered = ids_of(tokenizer, "yes")[1:], [1, 2], [0, 1]
    guard = fg.scans(
        llama,
        tokenizer,
        HARMFUL,
        HARMLESS,
        strength=1.5,
        threshold=None,
        layers=steered,
        read_layers=read,
        appended="yes",
    )
    anchors = reference.anchors(llama, [ids_of(tokenizer, p) for p in HARMFUL[::2]], appended, read)

    def sigma(prompt):
        return reference.sigma(llama, ids_of(tokenizer, prompt), appended, anchors, read)

    values = [[sigma(p) for p in side] for side in (HARMFUL, HARMLESS)]
    gate: Any = guard.gate
    threshold = math.nextafter(gate.threshold, math.inf)  # open from here on
    for scores, start in ((guard.fitted, 0), (guard.held_out, 1)):
        opened = [sum(v >= threshold for v in side[start::2]) for side in values]
        assert scores.recall == opened[0] / 4
        assert scores.f1 == pytest.approx(2 * opened[0] / (sum(opened) + 4))
    vectors = {}
    for layer in steered:
        means = [last_means(llama, tokenizer, side[::2], layer) for side in (HARMFUL, HARMLESS)]
        vectors[layer] = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
    prompts = [HARMFUL[1], HARMLESS[3], HARMLESS[5]]
    expected = []
    for prompt in prompts:
        sign = 1 if sigma(prompt) >= threshold else -1

        def change(number, h, length, sign=sign):
            h = h.copy()
            if number in vectors:
                h[length - 1 :] += sign * 1.5 * vectors[number]  # from the prompt's last token on
            return h

        expected.append(reference.greedy(llama, ids_of(tokenizer, prompt), change, NEW))
    assert run(llama, as_batch(tokenizer, prompts), guard, per_row=False) == expected
    wide = fg.scans(
        llama, tokenizer, HARMFUL, HARMLESS, threshold=9.0, neutral=2.0, layers=[0], read_layers=[1], appended="yes"
    )
    inputs = as_batch(tokenizer, prompts)
    assert run(llama, inputs, wide[:1], per_row=False) == run(llama, inputs, None), "no σ reaches 9"
    assert [type(item).__name__ for item in wide] == ["Add", "Add"]
    against: Any = wide[1].when
    assert against.threshold == 7.0


def test_sigma_is_of_directions_and_one_at_the_anchor():
    """Scaling all u leaves σ, and an anchor's own mean gives 1."""
    made = [direction(n) for n in (1, 2)]
    reading = fg.Preview([fg.Cosine(v, n) for n, v in enumerate(made)], appended=[4])
    u = torch.randn(3, 2, D_MODEL, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reading.values(u), reading.values(7 * u), atol=1e-6, rtol=1e-6)  # float32 rounding
    own = reading.values(torch.stack(made)[None]).mean()
    assert float(own) == pytest.approx(1.0, abs=1e-6)


# ---------------------------------------------------------------- AdaSteer


def two_statistics(llama, tokenizer):
    other = [f"{word} said yes" for word in WORDS]
    return (
        fg.prompt_statistics(llama, tokenizer, HARMFUL, HARMLESS),
        fg.prompt_statistics(llama, tokenizer, HARMFUL, other),
        other,
    )


@pytest.mark.parametrize("project", [True, False])
def test_adasteer_is_its_loops(llama, tokenizer, project):
    rejection, harmfulness, other = two_statistics(llama, tokenizer)
    rules = (fg.AdaSteerRule(1, 0.02, -40.0, -0.5, 0.8), fg.AdaSteerRule(2, -0.01, -50.0, -0.4, None))
    steering = fg.adasteer(rejection, harmfulness, rules=rules, project=project)
    assert len(steering) == 2 * LAYERS
    mean = {
        (name, layer): last_means(llama, tokenizer, side, layer)
        for name, side in (("a", HARMFUL), ("r", HARMLESS), ("h", other))
        for layer in range(LAYERS)
    }
    prompts, expected, strengths = [HARMFUL[1], HARMLESS[3], other[5]], [], []
    for prompt in prompts:
        _, out = reference.states(llama, ids_of(tokenizer, prompt))
        t_r = reference.coordinate(out[1][-1], mean["a", 1], mean["r", 1])
        t_h = reference.coordinate(out[2][-1], mean["a", 2], mean["h", 2])
        alpha, beta = reference.clip(0.02 * (t_r - 40), -0.5, 0.8), reference.clip(-0.01 * (t_h - 50), -0.4, None)
        strengths.append((alpha, beta))

        def change(layer, h, length, alpha=alpha, beta=beta):
            v_r, v_h = (mean["a", layer] - mean[name, layer] for name in ("r", "h"))
            if project:
                v_h = reference.dot(v_h, v_r) / reference.dot(v_r, v_r) * v_r
            h = h.copy()
            h[1:length] += alpha * v_r + beta * v_h
            return h

        expected.append(reference.greedy(llama, ids_of(tokenizer, prompt), change, NEW))
    assert len(set(strengths)) == 3
    assert run(llama, as_batch(tokenizer, prompts), steering, per_row=False) == expected
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert run(llama, as_batch(tokenizer, [prompt]), steering, per_row=False) == [tokens]


def test_adasteers_anchors_are_0_and_100(llama, tokenizer):
    rejection, harmfulness, _ = two_statistics(llama, tokenizer)
    reading = fg.adasteer_coordinate(rejection, 1)
    contrast = rejection.residual[fg.Hookpoint(1)]
    for mean, t in ((contrast.positive.mean, 0.0), (contrast.negative.mean, 100.0)):
        assert float(reading.values(mean.float()[None, None])) == pytest.approx(t, abs=1e-3)  # of 100, in float32
    rules = (fg.AdaSteerRule(1, 0.1, -200.0, 0.0, 1.0), fg.AdaSteerRule(1, 0.1, -200.0, 0.0, 1.0))
    steering = fg.adasteer(rejection, harmfulness, rules=rules)
    inputs = as_batch(tokenizer, HARMFUL)
    plain = llama(**inputs).logits
    with fg.steer(llama, steering, per_row=False):
        assert torch.equal(llama(**inputs).logits, plain), "strengths of 0"
    for item in steering:
        line = rejection.residual[item.hookpoint].difference
        assert abs(reference.cosine(item.direction, line)) == pytest.approx(1.0, abs=CLOSE)


def test_published_rules_give_published_strengths():
    """The published constants, at t of 0 and 100."""
    formulas = {
        "Llama-3.1-8B-Instruct": (
            lambda t: min(max(0.02 * (t + 60), -0.22), -0.08),
            lambda t: max(-0.05 * (t + 5) - 0.5, -0.75),
        ),
        "gemma-2-9b-it": (
            lambda t: min(max(0.004 * (t - 35), -0.02), 0.06),
            lambda t: min(max(0.01 * (t - 50), -0.06), 0.02),
        ),
        "Qwen2.5-7B-Instruct": (
            lambda t: min(max(0.1 * (t - 140), -0.2), 0.0),
            lambda t: min(max(-0.06 * (t - 50), -0.6), 0.4),
        ),
    }
    assert set(formulas) == set(fg.ADASTEER_RULES)
    for name, pair in formulas.items():
        for rule, formula in zip(fg.ADASTEER_RULES[name], pair, strict=True):
            for t in (-200.0, -70.0, 0.0, 45.0, 100.0, 141.0):
                strength = reference.clip(rule.slope * (t + rule.offset), rule.at_least, rule.at_most)
                assert strength == pytest.approx(formula(t), abs=1e-12)


# ---------------------------------------------------------------- InferAligner


def test_infer_aligner_is_its_loops(models, llama, tokenizer):
    aligned_model = copy.deepcopy(llama)
    with torch.no_grad():
        for block in aligned_model.model.layers:
            block.mlp.down_proj.weight.mul_(1.5)
    own, aligned = (fg.prompt_statistics(m, tokenizer, HARMFUL, HARMLESS) for m in (llama, aligned_model))
    steering = fg.infer_aligner(own, aligned, coefficient=0.7, layers=[0, 2])
    s, theta, middles = {}, {}, {}
    for layer in (0, 2):
        means = [last_means(llama, tokenizer, side, layer) for side in (HARMFUL, HARMLESS)]
        s[layer], middles[layer] = means[0] - means[1], (means[0] + means[1]) / 2
        others = [last_means(aligned_model, tokenizer, side, layer) for side in (HARMFUL, HARMLESS)]
        theta[layer] = others[0] - others[1]
    prompts, expected, opened = [HARMFUL[1], HARMLESS[3], PROMPTS[2]], [], []
    for prompt in prompts:
        decisions = {}

        def change(layer, h, length, decisions=decisions):
            if layer not in s:
                return h
            score = reference.dot(s[layer], h[length - 1] - middles[layer])
            met = decisions.setdefault(layer, score > 0)  # of the prompt, and then kept
            h = h.copy()
            if met:
                h[1:] += 0.7 * theta[layer]
            return h

        expected.append(reference.greedy(llama, ids_of(tokenizer, prompt), change, NEW))
        opened.append(tuple(decisions.values()))
    assert run(llama, as_batch(tokenizer, prompts), steering, per_row=False) == expected
    assert opened[0] == (True, True)
    assert opened[1] == (False, False)
    shut = fg.infer_aligner(own, aligned, bias=-1e9)
    inputs = as_batch(tokenizer, prompts)
    with fg.steer(llama, shut, per_row=False):
        steered = llama(**inputs).logits
    assert torch.equal(steered, llama(**inputs).logits)


def test_statistics_that_do_not_fit_are_refused(llama, tokenizer):
    from fgsteer.statistics.contrast import Contrast, ContrastStatistics
    from fgsteer.statistics.moments import Moments

    own = fg.prompt_statistics(llama, tokenizer, HARMFUL, HARMLESS, hookpoints=[1])
    rows = torch.randn(3, 16)
    narrow = ContrastStatistics({fg.Hookpoint(1): Contrast(Moments.of(rows), Moments.of(-rows))})
    with pytest.raises(fg.PairingError, match="widths 32 and 16"):
        fg.infer_aligner(own, narrow)
    with pytest.raises(fg.PairingError, match="same blocks"):
        fg.infer_aligner(own, fg.prompt_statistics(llama, tokenizer, HARMFUL, HARMLESS, hookpoints=[2]))
    with pytest.raises(fg.PairingError, match="without statistics"):
        fg.infer_aligner(own, own, layers=[0])
    with pytest.raises(fg.PairingError):
        fg.adasteer(own, own, rules=fg.ADASTEER_RULES["gemma-2-9b-it"])
    with pytest.raises(fg.DataError, match="4 prompts of each kind"):
        fg.cast(llama, tokenizer, HARMFUL[:3], HARMLESS, vector())
    with pytest.raises(fg.PairingError, match="lower layers"):
        fg.cast(llama, tokenizer, HARMFUL, HARMLESS, vector(layer=1), layers=[2])
    with pytest.raises(fg.SelectionError, match="equal means"):
        fg.scans(llama, tokenizer, HARMFUL, HARMFUL, appended="yes")
    with pytest.raises(fg.SelectionError, match="equal activations"):
        fg.cast(llama, tokenizer, HARMFUL, HARMFUL, vector(layer=2))
    with pytest.raises(fg.SelectionError, match="same mean"):
        fg.adasteer_coordinate(fg.prompt_statistics(llama, tokenizer, HARMFUL, HARMFUL), 1)


def test_prompt_statistics_are_means_of_last_tokens(llama, tokenizer, tmp_path):
    stats = fg.prompt_statistics(llama, tokenizer, HARMFUL, HARMLESS[:3])
    for layer in range(LAYERS):
        contrast = stats.residual[fg.Hookpoint(layer)]
        naive = last_means(llama, tokenizer, HARMLESS[:3], layer)
        assert np.allclose(contrast.negative.mean.numpy(), naive, atol=CLOSE)
        assert contrast.positive.count == 8
    stats.save(tmp_path / "stats")
    again = fg.ContrastStatistics.load(tmp_path / "stats")
    assert torch.equal(fg.caa(again, hookpoint=1).direction, fg.caa(stats, hookpoint=1).direction)


# ---------------------------------------------------------------- scores of gates


def test_scores_of_combined_gates_are_counts(llama, tokenizer):
    first, other = fg.Projection(vector(5, 0)), fg.Cosine(vector(6, 1)).of_mean()
    gates = {
        "token": first > 0.5,
        "pooled": other > 0.0,
        "not": ~(other > 0.0),
        "both": (first > 0.5) & ~(other > 0.0),
        "either": (first.max() > 1.0) | (other < -0.1),
        "ahead": preview() > 0.0,
    }
    for name, gate in gates.items():
        decided = []
        for side in (HARMFUL, HARMLESS):
            naive = []
            for prompt in side:
                inputs = as_batch(tokenizer, [prompt])
                plain = llama(**inputs).logits
                with fg.steer(llama, vector(9, 2).add(30.0, when=gate)):
                    naive.append(not torch.equal(llama(**inputs).logits, plain))
            assert fg.gate_decisions(llama, tokenizer, gate, side).tolist() == naive, name
            decided.append(naive)
        scores = fg.score_gate(llama, tokenizer, gate, HARMFUL, HARMLESS)
        hit, wrong = map(sum, decided)
        assert scores.recall == hit / 8
        if hit + wrong:
            assert scores.precision == hit / (hit + wrong)
        assert scores.prompts == (8, 8)
        effect = fg.gate_effect(llama, tokenizer, vector(9, 2).add(30.0, when=gate), HARMFUL, HARMLESS)
        assert effect.unchanged_act_on == 1 - hit / 8
        assert effect.unchanged_leave == 1 - wrong / 8
        assert (effect.kl_leave > 0) == (wrong > 0) or name == "token"  # a token's change may stay where it is
    assert fg.score_gate(llama, tokenizer, gates["pooled"], HARMFUL, HARMLESS).auroc == pytest.approx(
        1 - fg.score_gate(llama, tokenizer, other < 0.0, HARMFUL, HARMLESS).auroc
    )
    with pytest.raises(fg.DataError, match="prompt"):
        fg.score_gate(llama, tokenizer, gates["pooled"], HARMFUL, [])


@torch.no_grad()
def test_the_effect_is_the_divergence_of_the_next_token(llama, tokenizer):
    item = vector(1, 1).add(2.0)
    effect = fg.gate_effect(llama, tokenizer, item, HARMFUL[:3], HARMLESS[:1])
    total = 0.0
    for prompt in HARMFUL[:3]:
        inputs = as_batch(tokenizer, [prompt])
        p = llama(**inputs).logits[0, -1].double().softmax(-1)
        with fg.steer(llama, item):
            q = llama(**inputs).logits[0, -1].double().softmax(-1)
        total += sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True))
    assert effect.kl_act_on == pytest.approx(total / 3, rel=1e-3)  # float32 logits
    assert effect.unchanged_act_on == 0


# ---------------------------------------------------------------- a pass that reads ahead, inside others


def _ahead(llama, tokenizer):
    vector = fg.SteeringVector(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)), fg.Hookpoint(0))
    weight = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    seen = []

    class Noted(fg.Probe):
        def values(self, h):
            value = super().values(h)
            seen.append(value.flatten().tolist())
            return value

    ids = tokenizer("the king said a", return_tensors="pt")["input_ids"]
    return vector.add(30.0, when=fg.Preview(Noted(weight, 2)) > 0.0), ids, seen


@torch.no_grad()
def test_no_other_hook_acts_on_a_pass_that_reads_ahead(llama, tokenizer):
    steering, ids, seen = _ahead(llama, tokenizer)
    with fg.steer(llama, steering):
        llama(ids)
    with splice(llama, fg.Hookpoint(1), lambda h: h * 0.5), fg.steer(llama, steering):
        llama(ids)
    assert seen[0] == seen[1]


@torch.no_grad()
def test_recording_holds_the_steered_pass_and_not_the_one_before_it(llama, tokenizer):
    steering, ids, _ = _ahead(llama, tokenizer)
    at = fg.Hookpoint(1)
    with fg.steer(llama, steering):
        got = fg.record(llama, ids, torch.ones_like(ids), [at])[at]
        wanted = llama(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(got, wanted)


def test_what_reads_ahead_is_not_attributed(llama, tokenizer):
    steering, _, _ = _ahead(llama, tokenizer)
    with pytest.raises(fg.SteeringError, match="reads prompts ahead"):
        fg.attribute_steering(llama, tokenizer, ["the king said"], steering, max_new_tokens=2)


def test_a_conditional_is_one_entry_for_as_many_prompts(llama, tokenizer):
    gate = fg.Projection(torch.ones(D_MODEL), 0).last() > -1e9
    v = fg.SteeringVector(torch.ones(D_MODEL), fg.Hookpoint(1))
    scores: Any = None
    guard = Conditional([v.add(3.0, when=gate), v.add(2.0, when=gate)], gate=gate, fitted=scores, held_out=scores)
    prompts = ["the king said", "a dog ran"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    got = fg.generate(llama, tokenizer, prompts, steering=guard, **options)
    assert got == fg.generate(llama, tokenizer, prompts, steering=list(guard), per_row=False, **options)


def test_what_is_no_reading_is_not_read_ahead():
    with pytest.raises(fg.SteeringError, match="reading"):
        fg.Preview(3)
    with pytest.raises(fg.SteeringError, match="one token of each prompt"):
        preview().mean()
