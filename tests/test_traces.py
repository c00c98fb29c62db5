"""Traces: each number against two plain passes with hand-written hooks, and pages that hold no one's markup."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.display.tables import Table
from fgsteer.effects.rollouts import rollout
from fgsteer.models.hookpoints import blocks_of, resolve
from fgsteer.steering.watching import watch
from tests.helpers.cli import invoke, invoke_on_cpu
from tests.helpers.pages import MARKS, Checker
from tests.helpers.saes import make_sae
from tests.helpers.steering import direction, vector
from tests.helpers.tiny import model_of
from tests.reference import sparse
from tests.reference import traces as reference

PROMPTS = ["the man", "a dog sat on the bread"]
COMPLETIONS = [" took the ring of the king", " she said the bride"]
NEW = {"max_new_tokens": 6}
FAMILIES = ["llama", "gemma2", "gpt2", "opt, post-norm", "mamba", "mllama", "gpt_oss"]


def encode(sae, row):
    """The features of one activation by the loop encoder."""
    return sparse.encode(
        row, sae.W_enc.numpy(), sae.b_enc.numpy(), sae.W_dec.numpy(), sae.b_dec.numpy(), activation=sae.activation,
        k=sae.k, apply_b_dec_to_input=False,
    )  # fmt: skip


def check_numbers(token, n, ids, sae, passes, blocks):
    """Doses, features, log-probabilities and divergences of one token against those of two plain passes."""
    before, after = passes
    rough = {"rel": 2e-3, "abs": 2e-4}  # float32 activations, against the same ones whose edits are in float64
    doses = [reference.dose(after[1][id(block)][n], after[0][id(block)][n]) for block in blocks]
    assert token.dose == pytest.approx(max(doses), **rough)
    for values, one in ((token.features_before, before), (token.features_after, after)):
        expected = encode(sae, one[0][id(blocks[1])][n])
        assert list(values) == pytest.approx([expected[j] for j in (3, 0, 7)], **rough)
    if not n:
        assert token.log_probability_before is token.kl_steered_unsteered is None
        return
    log_q, log_p = (reference.log_softmax(one[2][n - 1]) for one in (before, after))
    assert token.log_probability_before == pytest.approx(log_q[ids[n]], **rough)
    assert token.log_probability_after == pytest.approx(log_p[ids[n]], **rough)
    assert token.kl_steered_unsteered == pytest.approx(reference.kl(log_p, log_q), **rough)
    assert token.kl_unsteered_steered == pytest.approx(reference.kl(log_q, log_p), **rough)
    assert [t.id for t in token.top_before] == reference.likeliest(log_q, 5)
    assert [t.log_probability for t in token.top_after] == pytest.approx(sorted(log_p)[:-6:-1], **rough)


def projections(model, tokenizer, item, side):
    """The projections at layer 1, under an intervention, of each completion's tokens and of the one before."""
    values = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
        with fg.steer(model, item):
            h = fg.record(model, ids, None, [fg.Hookpoint(1)])[fg.Hookpoint(1)][0]
        values += (h @ side)[len(tokenizer(prompt)["input_ids"]) - 1 :].tolist()
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_is_that_of_two_plain_passes(family, tokenizer):
    model, sae = model_of(family), make_sae("relu")
    v, low = direction(1), direction(2)
    side = direction(9) / direction(9).norm()
    lower = fg.Add(hookpoint=0, direction=low, coefficient=-0.25)
    middle = float(np.median(projections(model, tokenizer, lower, side)))  # so that the gate is open here, shut there
    gate = fg.Projection(fg.SteeringVector(side, fg.Hookpoint(1))) > middle
    items = [
        fg.Add(hookpoint=1, direction=v, coefficient=0.5, scope="reply", when=gate),
        lower,
        fg.Ablate(hookpoint=1, direction=low, scope="generated"),
    ]
    found = fg.trace(model, tokenizer, PROMPTS, items, sae=sae, completions=COMPLETIONS, features=[3, 0, 7])
    first, second = resolve(model, fg.Hookpoint(0))[0], resolve(model, fg.Hookpoint(1))[0]
    opened = 0
    for text, prompt, completion in zip(found.texts, PROMPTS, COMPLETIONS, strict=True):
        ids = tokenizer(prompt + completion)["input_ids"]
        start, count = len(tokenizer(prompt)["input_ids"]), len(ids)
        assert [token.id for token in text.tokens] == ids
        assert text.prompt_tokens == start
        assert [t.kind for t in text.tokens] == ["special"] + ["prompt"] * (start - 1) + ["generated"] * (count - start)
        where = []

        def is_open(row):
            return float(side.double().numpy() @ row) > middle

        def steer_low(rows, count=count):
            return reference.add_where(rows, low, -0.25, range(1, count))

        def steer_gated(rows, start=start, count=count, where=where):
            where[:] = [n for n in range(start - 1, count) if is_open(rows[n])]
            return reference.add_where(rows, v, 0.5, where)

        def steer_last(rows, start=start, count=count):
            changed = rows.copy()
            unit = np.asarray(low, dtype=np.float64) / float(low.norm())
            for n in range(start, count):
                changed[n] = rows[n] - float(unit @ rows[n]) * unit
            return changed

        edits = [(first, steer_low), (second, steer_gated), (second, steer_last)]
        passes = reference.two_passes(model, ids, edits)
        opened += len(where)
        for n, token in enumerate(text.tokens):
            gate_open = is_open(passes[1][1][id(second)][n])
            assert [(a.acts, a.gate, a.strength) for a in token.actions[:2]] == [
                (n in where, gate_open, 0.5 if n in where else 0.0),
                (n > 0, None, -0.25 if n else 0.0),
            ]
            assert (token.actions[2].acts, token.actions[2].gate) == (n >= start, None)
            check_numbers(token, n, ids, sae, passes, (first, second))
    assert 0 < opened < sum(len(text.written) + 1 for text in found.texts)


def test_a_strength_is_what_the_direction_is_multiplied_by(llama, tokenizer):
    v = vector()
    clamp, two = v.clamp(2.0), fg.ClampSubspace(hookpoint=1, directions=torch.stack([direction(3), direction(4)]))
    found = fg.trace(llama, tokenizer, PROMPTS[:1], [clamp, v.add(0.0), two], completions=COMPLETIONS[:1])
    with watch(llama) as steps, fg.steer(llama, [clamp, v.add(0.0), two]), torch.no_grad():
        llama(torch.tensor([[token.id for token in found.texts[0].tokens]]))
    for n, token in enumerate(found.texts[0].tokens[1:], 1):
        read = float(steps[0].before[0, n].double() @ v.direction.double() / v.direction.double().norm())
        assert token.actions[0].strength == pytest.approx(2.0 - read, abs=1e-4)  # a dot product in float32
        assert token.actions[1].strength == token.actions[1].dose == 0.0
        assert token.actions[1].acts
        moved = (steps[2].after - steps[2].before)[0, n].double().norm()
        assert token.actions[2].strength > 0
        assert token.actions[2].dose == pytest.approx(float(moved / steps[2].before[0, n].double().norm()), rel=1e-6)


@pytest.mark.parametrize("nothing", [None, [], "zero"])
def test_steering_that_changes_nothing_leaves_every_number(llama, tokenizer, sae, nothing):
    items = [vector().add(0.0)] if nothing == "zero" else nothing
    found = fg.trace(llama, tokenizer, PROMPTS, items, sae=sae, top=4, **NEW)
    assert [f.mean_before for f in found.features] == [f.mean_after for f in found.features]
    for steered, unsteered in zip(found.texts[::2], found.texts[1::2], strict=True):
        assert steered == replace(unsteered, source="steered")
        for token in steered.tokens:
            assert token.log_probability_before == token.log_probability_after
            assert token.top_before == token.top_after
            assert token.features_before == token.features_after
            assert token.dose == 0.0
            assert token.kl_steered_unsteered in (None, 0.0)
            assert token.kl_unsteered_steered in (None, 0.0)


def test_texts_are_those_of_generate(llama, tokenizer):
    how = {"do_sample": True, "temperature": 1.5, **NEW}
    steering = [vector().add(1.0), vector(2).ablate()]
    torch.manual_seed(99)
    expected_next = torch.rand(3)
    torch.manual_seed(99)
    found = fg.trace(llama, tokenizer, PROMPTS, steering, seed=7, **how)
    assert torch.equal(torch.rand(3), expected_next)  # the caller's random numbers go on
    for source, entry in (("steered", steering), ("unsteered", None)):
        torch.manual_seed(7)
        texts = fg.generate(llama, tokenizer, PROMPTS, steering=entry, per_row=False if entry else None, **how)
        assert [text.completion for text in found.texts if text.source == source] == texts
    assert all(len(text.written) == 6 for text in found.texts)
    # what the model wrote is what it found likely: greedy texts have the likeliest token in every place
    greedy = fg.trace(llama, tokenizer, PROMPTS, steering, **NEW)
    assert all(t.id == t.top_after[0].id for text in greedy.texts[::2] for t in text.written)
    assert all(t.id == t.top_before[0].id for text in greedy.texts[1::2] for t in text.written)


def test_a_text_ends_with_its_end_token(llama, tokenizer):
    model = copy.deepcopy(llama)
    whole = fg.trace(model, tokenizer, PROMPTS, None, **NEW).texts
    end = whole[0].written[2].id
    cut = fg.trace(model, tokenizer, PROMPTS, None, eos_token_id=end, **NEW).texts
    ids = [token.id for token in whole[0].written]
    assert [token.id for token in cut[0].written] == ids[: ids.index(end) + 1]
    others = [token.id for token in whole[2].written]
    assert [t.id for t in cut[2].written] == (others[: others.index(end) + 1] if end in others else others)


def test_a_conversation(llama, tokenizer):
    asked = [[{"role": "user", "content": "the man"}]]
    found = fg.trace(llama, tokenizer, asked, vector().add(1.0, scope="generated"), completions=["took a ring"])
    text = found.texts[0]
    assert found.prompts == ("the man",)
    assert [token.text.strip() for token in text.written] == ["took", "a", "ring"]
    assert [token.actions[0].acts for token in text.tokens] == [
        n >= text.prompt_tokens for n in range(len(text.tokens))
    ]


def test_features_are_those_that_change_most(llama, tokenizer, sae):
    steering = vector().add(0.5)
    every = fg.trace(llama, tokenizer, PROMPTS, steering, sae=sae, completions=COMPLETIONS, features=range(sae.d_sae))
    words = [token for text in every.texts for token in text.tokens if token.kind != "special"]
    changes = [sum(abs(t.features_after[j] - t.features_before[j]) for t in words) for j in range(sae.d_sae)]
    largest = sorted(range(sae.d_sae), key=lambda j: -changes[j])[:4]
    top = fg.trace(llama, tokenizer, PROMPTS, steering, sae=sae, completions=COMPLETIONS, top=4)
    assert [feature.id for feature in top.features] == largest
    assert top.features[0].mean_after == pytest.approx(
        sum(t.features_after[largest[0]] for t in words) / len(words), rel=1e-6
    )
    assert [t.features_after[0] for t in top.texts[0].tokens] == [
        t.features_after[largest[0]] for t in every.texts[0].tokens
    ]


def test_half_precision_and_hooks(llama, tokenizer, sae):
    half = model_of("llama", dtype=torch.bfloat16)
    found = fg.trace(half, tokenizer, PROMPTS, vector().add(1.0), sae=sae, **NEW)
    assert json.dumps(found.as_dict(), allow_nan=False)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]

    def fail(*_):
        raise RuntimeError("no pass")

    handle = blocks_of(llama)[2].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no pass"):
            fg.trace(llama, tokenizer, PROMPTS, vector().add(1.0), sae=sae, completions=COMPLETIONS)
    finally:
        handle.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()] == hooks
    with watch(llama) as steps:
        llama(torch.tensor([[4, 5]]))
    assert steps == []


def test_what_cannot_be_traced(llama, tokenizer, sae):
    def traced(*args, **options):
        return fg.trace(llama, tokenizer, *args, **options)

    cache = fg.CacheSteering(layers=[1], keys=torch.zeros(1, 2, 8), values=torch.zeros(1, 2, 8), d_model=32)
    with pytest.raises(fg.SteeringError, match="CacheSteering"):
        traced(PROMPTS, cache, **NEW)
    with pytest.raises(fg.SteeringError):
        traced(PROMPTS, [None, vector().add(1.0)], **NEW)
    with pytest.raises(fg.DataError, match="one completion for each"):
        traced(PROMPTS, completions=COMPLETIONS[:1])
    with pytest.raises(fg.DataError, match="one text"):
        traced(PROMPTS, completions="the king")
    with pytest.raises(fg.DataError, match="completion 1"):
        traced(PROMPTS, completions=["the", ""])
    with pytest.raises(fg.DataError, match="max_new_tokens"):
        traced(PROMPTS, completions=COMPLETIONS, **NEW)
    with pytest.raises(fg.DataError, match="no prompts"):
        traced([], **NEW)
    with pytest.raises(fg.DataError, match="at most 8,192"):
        traced(PROMPTS * 1000, max_new_tokens=8)
    with pytest.raises(fg.DataError, match="num_return_sequences"):
        traced(PROMPTS, num_return_sequences=2, do_sample=True, **NEW)
    with pytest.raises(fg.SelectionError, match="no SAE"):
        traced(PROMPTS, features=[1], **NEW)
    with pytest.raises(fg.SelectionError, match="from 0 to 23"):
        traced(PROMPTS, None, sae=sae, features=[24], **NEW)
    with pytest.raises(fg.DataError, match="top"):
        traced(PROMPTS, None, sae=sae, top=65, **NEW)
    with pytest.raises(fg.PairingError):
        traced(PROMPTS, None, sae=make_sae(d_model=16), **NEW)


def test_page_shows_texts_and_runs_nothing(llama, tokenizer, sae, tmp_path):
    hostile = replace(sae, labels={j: MARKS[j % len(MARKS)] + "<img src=x onerror=alert(1)>" for j in range(sae.d_sae)})
    found = fg.trace(llama, tokenizer, PROMPTS, vector().add(0.5, when=fg.Feature(sae, 3) > 0.5), sae=hostile, **NEW)
    tokens = found.texts[0].tokens
    evil = tuple(
        replace(t, text=MARKS[n % len(MARKS)], top_after=(fg.NextToken(1, "</span><script>x</script>", -1.0),) * 5)
        for n, t in enumerate(tokens)
    )
    texts = (replace(found.texts[0], tokens=evil, completion="<script>"), *found.texts[1:])
    found = replace(found, prompts=("<script>alert(2)</script>", *MARKS[2:3]), texts=texts)
    page = found.page()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not {"script", "img", "iframe", "link", "a", "object"} & set(checker.tags)
    assert not [name for name, _ in checker.attributes if name.startswith("on")]
    assert "http" not in page.replace("http://evil.example", "").replace("http://b.c", "")
    assert checker.tags.count("input") == 4 + len(found.features)
    for text in found.texts[1:]:
        assert all(f"“{token.text}”" in checker.text for token in text.tokens)
    found.write(tmp_path / "trace.html")
    assert (tmp_path / "trace.html").read_text(encoding="utf-8") == page
    found.write(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == found.as_dict()
    with pytest.raises(fg.FormatError, match="html or"):
        found.write(tmp_path / "trace.txt")
    assert "<script" not in found._repr_html_()
    assert str(found)


def test_infinite_numbers_become_none(llama, tokenizer):
    found = fg.trace(llama, tokenizer, "the man", completions=["took"])
    token = replace(found.texts[0].tokens[-1], log_probability_after=-math.inf, kl_unsteered_steered=math.inf)
    found = replace(found, texts=(replace(found.texts[0], tokens=(token,)),))
    plain = found.as_dict()["texts"][0]["tokens"][0]
    assert plain["log_probability_after"] is plain["kl_unsteered_steered"] is None
    assert found.page()


HOW = fg.Sampling(max_new_tokens=5, top_p=1.0, temperature=2.0)
FOUR = ["the man", "a dog sat", "she took the ring", "a cat"]


def test_feature_changes_are_those_of_the_texts(llama, tokenizer, sae):
    """Changes and intervals by loops over the texts of both models, read by the unsteered one."""
    item = vector().add(2.0)
    every = fg.feature_changes(
        llama, tokenizer, sae, FOUR, item, features=range(sae.d_sae), rollouts=2, sampling=HOW
    )  # fmt: skip
    prompts = encode_prompts(tokenizer, FOUR)
    means = np.zeros((2, 4, sae.d_sae))  # unsteered and steered, by prompt
    for number in range(2):
        ids, mask = rollout(llama, prompts, [None, item], HOW, number)
        for text in range(8):
            real = ids[text][mask[text].bool()]
            block = blocks_of(llama)[1]
            states = reference.two_passes(llama, real.tolist(), [(block, lambda rows: rows)])[0][0][id(block)]
            acts = np.mean([encode(sae, state) for state in states[-5:]], axis=0)
            means[text // 4, text % 4] += acts / 2
    changes = means[1] - means[0]
    for found in every.asked:
        own = changes[:, found.id]
        half = 3.182446305284263 * own.std(ddof=1) / 2  # t of 3 degrees of freedom at 97.5 %, over √4
        # float32 activations
        assert [found.change, found.low, found.high] == pytest.approx(
            [own.mean(), own.mean() - half, own.mean() + half], abs=1e-4
        )
        assert found.steered == pytest.approx(means[1, :, found.id].mean(), abs=1e-4)
    chosen = fg.feature_changes(llama, tokenizer, sae, FOUR, item, top=3, rollouts=2, sampling=HOW)
    order = changes[::2].mean(0)
    assert [row.id for row in chosen.rose] == sorted(range(sae.d_sae), key=lambda j: -order[j])[:3]
    assert [row.id for row in chosen.fell] == sorted(range(sae.d_sae), key=lambda j: order[j])[:3]
    assert chosen.rose[0].change == pytest.approx(changes[1::2, chosen.rose[0].id].mean(), abs=1e-4)
    assert (chosen.chosen_on, chosen.measured_on, chosen.over) == (2, 2, "prompts")
    expected = np.corrcoef(changes[::2].mean(0), changes[1::2].mean(0))[0, 1]
    assert chosen.split_half == pytest.approx(expected, abs=1e-3)


def test_predicted_changes(llama, tokenizer, sae):
    v = vector()
    effects = fg.EffectApproximator(torch.randn(32, 24), torch.randn(24), sae.hookpoint, sae.sha256)
    options = {"effects": effects, "features": range(24), "rollouts": 1, "sampling": HOW}
    found = fg.feature_changes(llama, tokenizer, sae, FOUR, [v.add(2.0), vector(2).add(-1.0)], **options)
    expected = effects.predict(2.0 * v.direction - vector(2).direction)
    assert [row.predicted for row in found.asked] == pytest.approx(expected.tolist(), rel=1e-5)
    observed = [row.change for row in found.asked]
    assert found.correlation == pytest.approx(np.corrcoef(observed, expected.numpy())[0, 1], abs=1e-6)
    assert "correlate" in str(found)
    assert found.note == ""
    for item, why in (
        (v.ablate(), "not Ablate"),
        (vector(layer=0).add(1.0), "acts at"),
        (v.add(1.0, scope="prompt"), "every token"),
    ):
        other = fg.feature_changes(llama, tokenizer, sae, FOUR, item, **options)
        assert other.correlation is None
        assert why in other.note
        assert other.asked[0].predicted is None
    other = fg.feature_changes(llama, tokenizer, sae, FOUR, v.add(1.0, scope="reply"), **options)
    assert other.correlation is not None
    assert "scope='all'" in other.note


def test_nothing_changes_without_steering(llama, tokenizer, sae):
    found = fg.feature_changes(llama, tokenizer, sae, "the man", vector().add(0.0), sampling=HOW)
    assert found.rose == found.fell == found.asked == Table()
    assert found.over == "seeds"
    assert math.isnan(found.split_half)
    assert json.dumps(found.as_dict(), allow_nan=False)
    assert found._repr_html_()
    with pytest.raises(fg.DataError, match="at least 4"):
        fg.feature_changes(llama, tokenizer, sae, FOUR[:3], None, rollouts=3)
    with pytest.raises(fg.DataError, match="rollouts"):
        fg.feature_changes(llama, tokenizer, sae, FOUR, None, rollouts=0)


def test_what_rounding_makes_is_no_change(llama, tokenizer, sae, monkeypatch):
    acts = torch.rand(2, 4, 1, sae.d_sae, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    after = acts * (1 + 1e-7 * torch.linspace(-1, 1, sae.d_sae).double())  # of float32's size
    after[..., 5] += 1e-3
    after[..., 9] -= 1e-3
    monkeypatch.setattr("fgsteer.traces.changes._activations", lambda *_: torch.cat([acts, after], 2))
    found = fg.feature_changes(llama, tokenizer, sae, FOUR, vector().add(1.0), rollouts=2, sampling=HOW)
    assert ([row.id for row in found.rose], [row.id for row in found.fell]) == ([5], [9])


def test_command_line(tmp_path):
    vec = fg.from_features(fg.load_sae("default"), [232]).unit()
    vec.save(tmp_path / "sea.safetensors")
    page, numbers = tmp_path / "trace.html", tmp_path / "trace.json"
    steer = ("generate", "The sea", "-v", tmp_path / "sea.safetensors", "-c", "90", "--max-new-tokens", "6", "--json")
    plain = json.loads(invoke_on_cpu(*steer).stdout)
    for path in (page, numbers):
        traced = json.loads(invoke_on_cpu(*steer, "--trace", path).stdout)
        assert traced.pop("trace") == str(path)
        assert traced == plain
    held = json.loads(numbers.read_text())
    assert [text["source"] for text in held["texts"]] == ["steered", "unsteered"]
    assert held["features"][0]["id"] == 232
    assert "What steering did" in page.read_text()
    for arguments, why in (
        ((*steer, "--trace", tmp_path / "trace.txt"), "html or"),
        ((*steer[:5], "1,2", "--trace", page), "one strength"),
        ((*steer, "--trace-features", "3"), "--trace"),
        ((*steer, "--trace", page, "--trace-features", "x"), "whole numbers"),
    ):
        with pytest.raises(fg.FgsteerError, match=why):
            invoke(*arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("prompt", 99), ("prompt", -1), ("prompt_tokens", -5), ("prompt_tokens", 999)]
)
def test_a_text_of_no_prompt_is_no_trace(llama, tokenizer, name, value):
    plain = fg.trace(llama, tokenizer, PROMPTS[0], vector().add(1.0), max_new_tokens=2).as_dict()
    assert fg.Trace.from_dict(plain).as_dict() == plain
    plain["texts"][0][name] = value
    with pytest.raises(fg.FormatError, match="prompt"):
        fg.Trace.from_dict(plain)


def test_numbers_whose_sums_are_not_finite_are_no_trace(llama, tokenizer):
    plain = fg.trace(llama, tokenizer, PROMPTS[0], vector().add(1.0), max_new_tokens=2).as_dict()
    plain["texts"][0]["tokens"][-1]["kl_steered_unsteered"] = 1.7e308
    with pytest.raises(fg.FormatError, match="kl_steered_unsteered"):
        fg.Trace.from_dict(plain)
