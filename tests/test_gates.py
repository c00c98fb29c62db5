"""Gates: what opens them, for which rows and tokens, and that a shut one changes nothing at all."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import operator

import pytest
import torch

import fgsteer as fg
from fgsteer.evaluation.metrics.gate_scores import gate_decisions
from fgsteer.interventions import kernel
from fgsteer.models.hookpoints import resolve
from fgsteer.steering import groups
from tests.helpers.saes import make_sae
from tests.helpers.steering import NEW, PROMPTS, batch, direction, naive_change, run, vector
from tests.helpers.tiny import D_MODEL, LAYERS
from tests.reference import apply as reference

LOW, HIGH = fg.Hookpoint(0), fg.Hookpoint(1)


def gates():
    """Gates that are open for some tokens or prompts of the tiny model and shut for others."""
    sae = make_sae("topk", layer=0)
    first, other = vector(1, layer=0), vector(2, layer=0)
    return {
        "projection": fg.Projection(first) > 0.0,
        "projection below, where it acts": fg.Projection(vector(1)) < 0.0,
        "cosine": fg.Cosine(first) > 0.02,
        "feature": fg.Feature(sae, 3) > 0.1,
        "probe": fg.Probe(direction(3), 0, bias=-0.5) > 0.0,
        "both": (fg.Projection(first) > -1.0) & (fg.Projection(other) > 0.0),
        "either, not": (fg.Projection(first) > 1.0) | ~(fg.Projection(other) > 0.0),
        "last": fg.Projection(first).last() > 0.0,
        "mean": fg.Cosine(other).mean() > 0.0,
        "max": fg.Feature(sae, 0).max() > 0.5,
        "prompt and token": (fg.Projection(other).mean() > -0.5) & (fg.Projection(first) > 0.0),
    }


def naive_value(reading, h):
    """One number from one activation, in float64."""
    if isinstance(reading, fg.Feature):
        return float(reading.sae.encode(h.float()[None])[0, reading.feature])
    if isinstance(reading, fg.Probe):
        return float(h.double() @ reading.weight.double()) + reading.bias
    v = reading.direction.double()
    projection = float(h.double() @ v / v.norm())
    return projection / float(h.double().norm()) if isinstance(reading, fg.Cosine) else projection


def naive_met(condition, states, token, prompt_length):
    """Whether a condition is met at a token, by the hidden states of the whole text at its hookpoint."""
    reading = condition.reading
    of_prompt = [naive_value(reading, h) for h in states[1:prompt_length]]  # BOS left out
    value = {
        "": lambda: naive_value(reading, states[token]),
        "last": lambda: of_prompt[-1],
        "mean": lambda: sum(of_prompt) / len(of_prompt),
        "max": lambda: max(of_prompt),
    }[reading.pooling]()
    return value > condition.threshold if condition.fires_above else value < condition.threshold


def naive_open(gate, states, token, prompt_length):
    """The gate's logic by plain Python."""
    kind = type(gate).__name__
    if kind == "Both":
        return naive_open(gate.first, states, token, prompt_length) and naive_open(
            gate.second, states, token, prompt_length
        )
    if kind == "Either":
        return naive_open(gate.first, states, token, prompt_length) or naive_open(
            gate.second, states, token, prompt_length
        )
    if kind == "Not":
        return not naive_open(gate.gate, states, token, prompt_length)
    return naive_met(gate, states[gate.reading.hookpoint], token, prompt_length)


@torch.no_grad()
def naive_greedy(model, ids, item, new=NEW):
    """Greedy tokens of one unpadded row, all of it recomputed at every step, the gate decided token by token."""
    prompt_length, ids = len(ids), list(ids)
    hooked, opened = {}, []
    places = {item.hookpoint, *(c.reading.hookpoint for c in item.when.conditions)}
    for _ in range(new):
        handles = []

        def hook(_, __, out, at=None):
            h = out[0] if isinstance(out, tuple) else out
            hooked[at] = h.reshape(-1, D_MODEL).clone()
            if at != item.hookpoint:
                return out
            where = reference.positions(item.scope, len(ids), prompt_length, 0, bos=item.bos)
            where = [token for token in where if naive_open(item.when, hooked, token, prompt_length)]
            opened.append(where)
            changed = naive_change(hooked[at], item, where).view_as(h).to(h.dtype)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        for at in sorted(places):
            module, _ = resolve(model, at)
            handles.append(module.register_forward_hook(lambda m, i, o, at=at: hook(m, i, o, at)))
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        ids.append(int(logits.argmax()))
    return ids[prompt_length:], opened


@pytest.mark.parametrize("scope", ["all", "reply", "prompt"])
@pytest.mark.parametrize("name", gates())
def test_a_gate_acts_as_the_recompute_says(llama, tokenizer, name, scope):
    item = vector().add(2.0, when=gates()[name], scope=scope)
    naive = [naive_greedy(llama, tokenizer(prompt)["input_ids"], item) for prompt in PROMPTS]
    expected = [tokens for tokens, _ in naive]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert run(llama, batch(tokenizer), item, **options) == expected, options
    if scope == "all":
        counts = [len(where) for _, opened in naive for where in opened]
        lengths = [len(tokenizer(p)["input_ids"]) + n - 1 for p in PROMPTS for n in range(NEW)]
        assert 0 < sum(counts) < sum(lengths), "the gate opens for some tokens and not for others"


def test_rows_have_gates_of_their_own(llama, tokenizer):
    made = gates()
    entries = [
        vector().add(2.0, when=made["mean"]),
        [vector(4).clamp(at_most=1.0), vector(5).add(1.0, when=made["projection"])],
        None,
    ]
    alone = []
    for prompt, entry in zip(PROMPTS, entries, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        alone += run(llama, ids, entry, per_row=False if isinstance(entry, list) else None)
    assert run(llama, batch(tokenizer), entries) == alone


def test_beams_and_sequences_keep_their_prompts_decision(llama, tokenizer):
    item = vector().add(2.0, when=gates()["mean"])
    inputs, options = batch(tokenizer), {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2}
    with fg.steer(llama, item):
        together = llama.generate(**inputs, **options, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for number, prompt in enumerate(PROMPTS):
        single = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with fg.steer(llama, item):
            one = llama.generate(**single, **options, do_sample=False)[:, single["input_ids"].shape[1] :]
        assert together[2 * number : 2 * number + 2].tolist() == one.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shut_gate_keeps_every_bit(models, tokenizer, dtype):
    model = copy.deepcopy(models["llama"]).to(dtype)
    inputs = batch(tokenizer)
    plain = model(**inputs).logits
    readings = [fg.Projection(vector(1, 0)), fg.Projection(vector(1)), fg.Cosine(vector(1, 0)).mean()]
    for reading in readings:
        for operation in ("add", "ablate", "add_keeping_norm"):
            with fg.steer(model, getattr(vector(), operation)(when=reading > 1e9)):
                assert torch.equal(model(**inputs).logits, plain)
    with fg.steer(model, vector().add(2.0, when=fg.Projection(vector(1, 0)) > -1e9)):
        opened = model(**inputs).logits
    with fg.steer(model, vector().add(2.0)):
        assert torch.equal(model(**inputs).logits, opened), "and an open one takes nothing away"


def test_where_a_gate_is_open_nowhere_no_change_is_computed(llama, monkeypatch):
    """Of a gate on features of a TopK SAE that others shut; where gradients may be wanted, it is computed as ever."""
    sae, changes = make_sae("topk", d_sae=4096, layer=0), []
    monkeypatch.setattr(groups, "apply", lambda *args: changes.append(True) or kernel.apply(*args))
    v, texts = vector(1, layer=1), list(torch.arange(3, 63)[:, None])
    acts = torch.cat([sae.encode(fg.record(llama, ids[None], None, [LOW])[LOW].float()) for ids in texts])[:, 0]
    often = (acts > 0.1).sum(0).argsort(descending=True)
    features = [int(often[0]), int(often[4095])]
    fired = (acts[:, features] > 0.1).any(1).tolist()
    fires = (fg.Feature(sae, features[0]) > 0.1) | (fg.Feature(sae, features[1]) > 0.1)
    always = fg.Projection(v) > -1e9
    for gate, is_open in (
        (fires, fired),
        (fires & always, fired),
        (fires | always, [True] * 60),
        (~fires, [True] * 60),
    ):
        with fg.steer(llama, v.add(5.0, when=gate, bos=True)):
            computed = []
            with torch.no_grad():
                for ids in texts:
                    changes.clear()
                    llama(ids[None])
                    computed.append(bool(changes))
            assert all(one >= other for one, other in zip(computed, is_open, strict=True))
            assert sum(is_open) <= sum(computed) <= sum(is_open) + 25, "but the first, which tell who shuts it"
            changes.clear()
            llama(texts[fired.index(False)][None])
            assert changes
    assert 2 < sum(fired) < 30


def test_a_gate_that_was_shut_opens_for_the_next_prompt(llama):
    """Also where one pass of the block is for training, and the one that goes on from it is not."""
    first, other = torch.tensor([[3, 4, 5]]), torch.tensor([[9, 14, 25]])
    axis = vector(2, layer=0).direction
    means = [float((fg.record(llama, ids, None, [LOW])[LOW][0, 1:].float() @ axis).mean()) for ids in (first, other)]
    sign = 1.0 if means[1] > means[0] else -1.0
    gate = fg.Projection(fg.SteeringVector(sign * axis, LOW)).mean() > sign * sum(means) / 2 / float(axis.norm())

    def go(has_passed):
        with fg.steer(llama, vector(1).add(8.0, when=gate, bos=True)):
            if has_passed:
                with torch.no_grad():
                    llama(first)
            cache = llama(other, use_cache=True).past_key_values
            with torch.no_grad():
                return llama(torch.tensor([[5]]), past_key_values=cache).logits

    with torch.no_grad():
        cache = llama(other, use_cache=True).past_key_values
        plain = llama(torch.tensor([[5]]), past_key_values=cache).logits
    assert torch.equal(go(True), go(False))
    assert not torch.allclose(go(True), plain)


def test_passes_run_in_turn_as_they_are_and_compiled_are_one_graph(llama):
    """What an eager pass keeps of its gate is nothing that a compiled pass looks at."""
    graphs = []
    gate = fg.Projection(vector(2, layer=0)) > 0.0
    texts = [torch.tensor([[3, 4, 5]]), torch.tensor([[9, 14, 25]])]
    torch._dynamo.reset()
    with torch.no_grad(), fg.steer(llama, vector(1).add(5.0, when=gate, bos=True)):
        compiled = torch.compile(llama, backend=lambda module, _: graphs.append(module) or module.forward)
        for model in (compiled, llama, compiled, compiled, llama, compiled):
            for ids in texts:
                model(ids, use_cache=False)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["clamp", "gate"])
@pytest.mark.parametrize("mode", ["autocast", "inference"])
def test_features_of_a_topk_sae_are_read_in_every_mode(llama, tokenizer, kind, mode):
    """Under autocast, and outside inference mode after passes inside it."""
    sae, inputs = make_sae("topk", d_sae=4096, layer=1), batch(tokenizer)
    read = fg.Feature(make_sae("topk", d_sae=4096, layer=0), 3) > 0.1
    clamp = fg.ClampFeature(sae=sae, hookpoint=sae.hookpoint, targets={3: 5.0})
    item = clamp if kind == "clamp" else vector(1, layer=1).add(5.0, when=read)
    options = {"max_new_tokens": 30, "do_sample": False}
    with fg.steer(llama, item):
        expected = llama.generate(**inputs, **options)
        inside = torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else torch.inference_mode()
        with inside:
            assert llama.generate(**inputs, **options).shape[0] == len(expected)
        assert torch.equal(llama.generate(**inputs, **options), expected)
        assert llama(**inputs).logits.requires_grad


def test_interventions_that_share_a_gate_go_by_one_decision(llama, tokenizer):
    """Read before either acts, also where the first removes what the gate reads, and kept for what is generated."""
    inputs = batch(tokenizer)
    for reading in (fg.Projection(vector(1)), fg.Projection(vector(1)).mean(), fg.Projection(vector(1, 0)).last()):
        shared = reading > -0.1
        own = [vector(2).add(2.0, when=shared)]
        expected = run(llama, inputs, [vector(1).ablate(when=copy.copy(shared)), *own], per_row=False)
        assert run(llama, inputs, [vector(1).ablate(when=shared), *own], per_row=False) == expected
        idle = [*own, vector(1).add(0.0, when=shared)]
        assert run(llama, inputs, idle, per_row=False) == run(llama, inputs, own[0])


def test_a_decision_on_a_prompt_is_not_taken_for_another(llama, tokenizer):
    item = vector().add(2.0, when=fg.Projection(vector(1, 0)).mean() > 0.0)
    first, second = (tokenizer(p, return_tensors="pt")["input_ids"] for p in (PROMPTS[0], "a dog"))
    token = torch.tensor([[5]])
    with torch.no_grad(), fg.steer(llama, item):
        caches = [llama(ids, use_cache=True).past_key_values for ids in (first, second)]
        llama(token, past_key_values=caches[1])
        with pytest.raises(fg.SteeringError, match="another prompt than the last one"):
            llama(token, past_key_values=caches[0])
    outside = llama(first, use_cache=True).past_key_values
    with pytest.raises(fg.SteeringError, match="another prompt"), fg.steer(llama, item):
        llama(token, past_key_values=outside)
    pair = batch(tokenizer)["input_ids"][:2]
    with fg.steer(llama, item):
        cache = llama(pair, use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 1, 2]))
        with pytest.raises(fg.SteeringError, match=r"3 rows, after prompts of 2 rows"):
            llama(token.expand(3, 1), past_key_values=cache)


@pytest.mark.parametrize("pooled", [False, True])
def test_gradients_with_checkpointing_know_each_passes_gates(models, tokenizer, pooled):
    """Two passes before the backward of the first: what is computed again goes by what its own pass read."""
    model = models["llama"]
    texts = [tokenizer(t, return_tensors="pt")["input_ids"] for t in ("a dog sat on the bread", "the king was he")]
    at = fg.Hookpoint(0, "resid_pre")
    means = [fg.record(model, ids, torch.ones_like(ids), [at])[at][0, 1:].mean(0) for ids in texts]
    toward = fg.SteeringVector(means[0] - means[1], at)
    middle = float(fg.Projection(toward).values((means[0] + means[1])[None, None] / 2))
    reading = fg.Projection(toward)
    gate = (reading.mean() if pooled else reading) > middle  # open for the first text, shut for the second
    found = []
    for checkpointed in (False, True):
        model = copy.deepcopy(models["llama"])
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        c = torch.tensor(2.0, requires_grad=True)
        with fg.steer(model, vector(2, 1, "mlp_out").add(c, when=gate)):
            loss = model(texts[0], labels=texts[0], use_cache=False).loss
            model(texts[1], use_cache=False)
            loss.backward()
        found.append(float(c.grad))
    assert found[0] != 0
    assert found[1] == pytest.approx(found[0], rel=1e-4)  # float32, summed in another order


def everything(condition):
    """Gates of one condition and another that is open, with whether each is open where the condition reads nan."""
    known = fg.Projection(vector(2, layer=0)) > -1e9
    return [
        (condition, False),
        (~condition, False),
        (~~condition, False),
        (condition | known, True),
        (~condition | known, True),
        (~(condition | known), False),
        (~(condition & known), False),
        (~(condition & ~known), True),
        (~condition & known, False),
    ]


@pytest.mark.parametrize("above", [True, False])
def test_a_condition_that_reads_nan_is_shut_negated_or_not(llama, above):
    """Read nan: a feature of a damaged SAE, token by token, and the mean of a prompt without a token but BOS."""
    sae = make_sae("jumprelu", layer=0)
    damaged = dataclasses.replace(sae, b_enc=torch.full_like(sae.b_enc, torch.nan))
    ids = {False: torch.tensor([[0, 5, 9, 11]]), True: torch.tensor([[0]])}
    for reading in (fg.Feature(damaged, 3), fg.Feature(damaged, 3).max(), fg.Projection(vector(1, layer=0)).mean()):
        none = isinstance(reading, fg.Projection)
        condition = reading > -1.0 if above else reading < 1.0
        for gate, is_open in everything(condition):
            with torch.no_grad():
                plain = llama(ids[none]).logits
                with fg.steer(llama, vector().add(4.0, when=gate, bos=True)):
                    steered = llama(ids[none]).logits
            assert torch.equal(steered, plain) != is_open, gate


@pytest.mark.parametrize("kind", ["jumprelu", "gated"])
def test_two_features_that_read_nan_are_shut_negated_or_not(llama, kind):
    sae = make_sae(kind, layer=0)
    damaged = dataclasses.replace(sae, b_enc=torch.full_like(sae.b_enc, torch.nan))
    one, two = fg.Feature(damaged, 3) > 0.1, fg.Feature(damaged, 5) > 0.1
    ids = torch.tensor([[0, 5, 9, 11]])
    with torch.no_grad():
        plain = llama(ids).logits
        for gate in (one | two, one & two, ~(one | two), ~(one & two)):
            with fg.steer(llama, vector().add(4.0, when=gate)):
                assert torch.equal(llama(ids).logits, plain), gate


def test_scored_decisions_go_by_the_same_rule(llama, tokenizer):
    sae = make_sae("jumprelu", layer=0)
    damaged = dataclasses.replace(sae, b_enc=torch.full_like(sae.b_enc, torch.nan))
    for gate, is_open in everything(fg.Feature(damaged, 3) > 0.1):
        assert gate_decisions(llama, tokenizer, gate, PROMPTS).tolist() == [is_open] * len(PROMPTS), gate


def test_a_signed_cosine_does_not_depend_on_scale():
    (h,) = [torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(0))]
    gate, mirrored = fg.Cosine(vector(1)) > 0.05, fg.Cosine(-vector(1)) > 0.05
    opened = gate.compare(gate.reading.values(h))
    assert torch.equal(opened, gate.compare(gate.reading.values(h / 2)))
    assert not torch.equal(opened, mirrored.compare(mirrored.reading.values(h))), "a vector's opposite is another gate"
    assert torch.equal(gate.reading.values(h * 0), torch.zeros(2, 3))


def test_scores_of_texts_see_gates(llama, tokenizer):
    """Blocks below what a gate reads are not skipped over, and the prompt's decision holds for the completion."""
    pairs = [("the man", "sat on the ship"), ("a dog sat on the bread", "and ran")]
    for name in ("projection", "mean", "feature"):
        item = vector(layer=LAYERS - 1).add(2.0, when=gates()[name])
        together = fg.log_probabilities(llama, tokenizer, pairs, [None, item, vector().add(1.0)]).sums[1]
        alone = [fg.log_probabilities(llama, tokenizer, [pair], [item]).sums[0, 0] for pair in pairs]
        torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-5)  # float32 in other batches
    shut = vector(layer=LAYERS - 1).add(2.0, when=fg.Projection(vector(1, 0)) > 1e9)
    plain, closed = fg.log_probabilities(llama, tokenizer, pairs, [None, shut]).sums
    assert torch.equal(plain, closed)


# ---------------------------------------------------------------- fitting


WORDS = ["the man", "a dog", "she", "the king", "the old ship", "he"]
ACT_ON = [f"{word} sat on the bread" for word in WORDS]
LEAVE = [f"{word} was happy and ran to the sea" for word in WORDS]


def naive_fit(model, tokenizer, readings):
    """The best F1 by brute force over readings, sides and thresholds, on every other prompt, one prompt at a time."""

    def extreme(reading, prompt, above):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        states = fg.record(model, ids, torch.ones_like(ids), [reading.hookpoint])[reading.hookpoint][0]
        values = [naive_value(reading, h) for h in states[1:]]
        pooled = {"mean": sum(values) / len(values), "last": values[-1], "max": max(values)}
        return pooled.get(reading.pooling, max(values) if above else min(values))

    best = 0.0
    for reading in readings:
        for above in (True, False):
            sides = [[extreme(reading, prompt, above) for prompt in kind[::2]] for kind in (ACT_ON, LEAVE)]
            marks = sorted({*sides[0], *sides[1]})
            thresholds = [marks[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(marks)), marks[-1] + 1]
            for threshold in thresholds:
                hit, wrong = (sum(v > threshold if above else v < threshold for v in side) for side in sides)
                best = max(best, 2 * hit / (hit + wrong + len(sides[0])))
    return best


@pytest.mark.parametrize("pooled", ["last", "mean", "max", ""])
def test_a_fitted_gate_is_the_best_of_brute_force(llama, tokenizer, pooled):
    made = [fg.Projection(vector(5, layer)) for layer in (0, 1)]
    readings = [getattr(reading, pooled)() if pooled else reading for reading in made]
    fit = fg.fit_gate(llama, tokenizer, readings, ACT_ON, LEAVE)
    assert fit.fitted.f1 == pytest.approx(naive_fit(llama, tokenizer, readings))
    assert fit.gate.reading in readings
    assert fit.fitted.prompts == fit.held_out.prompts == (3, 3)
    for scores in (fit.fitted, fit.held_out):
        assert 0 <= scores.recall <= 1
        if scores.recall:
            harmonic = 2 * scores.precision * scores.recall / (scores.precision + scores.recall)
            assert scores.f1 == pytest.approx(harmonic)


def test_a_fitted_gate_opens_on_what_it_was_fitted_to(llama, tokenizer):
    """A probe that is planted: the difference of what one word does to the stream at the prompt's end."""
    with torch.no_grad():
        states = []
        for text in ("the man sat on the bread", "the man was happy and ran to the sea"):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            states.append(fg.record(llama, ids, torch.ones_like(ids), [LOW])[LOW][0, -1])
    reading = fg.Probe(states[0] - states[1], LOW).last()
    fit = fg.fit_gate(llama, tokenizer, reading, ACT_ON, LEAVE)
    assert (fit.held_out.precision, fit.held_out.recall, fit.held_out.auroc) == (1.0, 1.0, 1.0)
    item = vector().add(3.0, when=fit.gate)
    prompts = [*ACT_ON, *LEAVE]
    plain, steered = (fg.generate(llama, tokenizer, prompts, steering=s, max_new_tokens=4) for s in (None, item))
    always = fg.generate(llama, tokenizer, prompts, steering=vector().add(3.0), max_new_tokens=4)
    assert steered == [*always[: len(ACT_ON)], *plain[len(ACT_ON) :]]
    assert always != plain
    with pytest.raises(fg.DataError, match="4 prompts of each kind"):
        fg.fit_gate(llama, tokenizer, reading, ACT_ON[:3], LEAVE)


def test_what_is_refused(llama, tokenizer, tmp_path):
    above = fg.Projection(vector(1, layer=2)) > 0.0
    with pytest.raises(fg.PairingError, match=r"read at blocks\.2\.hook_resid_post"):
        vector(1, layer=1).add(1.0, when=above)
    with pytest.raises(fg.SteeringError, match="combined by &"):
        bool(above and above)
    with pytest.raises(fg.SteeringError, match="parentheses"):
        _ = above & 3.0  # type: ignore[operator]
    with pytest.raises(fg.SteeringError, match="when = "):
        vector().add(1.0, when=lambda h: h)
    with pytest.raises(fg.SteeringError, match="without a hookpoint"):
        fg.Projection(direction(1))
    with pytest.raises(fg.SelectionError):
        fg.Feature(make_sae(), 99)
    with pytest.raises(fg.PairingError), fg.steer(llama, vector().add(1.0, when=fg.Probe(torch.ones(3), 0) > 0.0)):
        pass
    gated = vector().add(1.0, bos=True, when=gates()["mean"])
    with pytest.raises(fg.SteeringError, match=r"read in parts.*prefill_chunk_size"):
        run(llama, batch(tokenizer), gated, prefill_chunk_size=3)
    for write in (
        lambda: fg.export.gguf.write(gated, tmp_path / "x.gguf"),
        lambda: fg.export.easysteer.write(gated, tmp_path / "x.json"),
        lambda: fg.fold(llama, gated),
    ):
        with pytest.raises(fg.SteeringError, match="with a gate"):
            write()
    assert list(tmp_path.iterdir()) == []

    class Mine(fg.Gate):
        conditions = ()

        def evaluate(self, met):
            raise NotImplementedError

    for use in (
        lambda item: run(llama, batch(tokenizer), item),
        lambda item: fg.save_steering(tmp_path / "mine", item),
    ):
        with pytest.raises(fg.SteeringError, match="a gate of the class Mine"):
            use(vector().add(1.0, when=Mine()))


def test_long_gates_are_kept_in_files(tmp_path):
    reading = fg.Projection(vector(1, 0))
    gate = functools.reduce(operator.or_, [reading > float(n) for n in range(200)])
    fg.save_steering(tmp_path / "s", vector().add(1.0, when=gate & ~gate))
    (item,) = fg.load_steering(tmp_path / "s")
    assert isinstance(item, fg.Intervention)
    assert [c.threshold for c in item.when.conditions] == [float(n) for n in range(200)] * 2
