"""KL on own text against enumeration, the least that a behavior costs, and every part of a receipt against loops."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fgsteer as fg
from fgsteer.effects.rollouts import Sampling, choose
from fgsteer.errors.escaping import escape_markdown
from fgsteer.evaluation.metrics import own_text
from fgsteer.evaluation.metrics.own_text import check_untruncated, distinct_grams, own_texts, token_divergences
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.hub import card
from fgsteer.receipts import drift, rerouting
from fgsteer.receipts.inputs import moves
from fgsteer.receipts.record import Receipt, parse_receipt
from tests.helpers.tiny import model_of
from tests.reference import receipts as reference

PROMPTS = ["the man sat", "a cat"]
CHOICES = [("the man", ["sat", "a ring"], 0), ("a cat", ["ran", "sat on"], 1), ("the king", ["was old", "is"], 0)]
END, WORDS, LENGTH = 3, 4, 3  # of a model whose texts can all be written down


@pytest.fixture(scope="module")
def small():
    """A model of four tokens, one of which ends a text, in float64."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=WORDS, eos_token_id=END, bos_token_id=0, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="module")
def push():
    return fg.SteeringVector(torch.randn(16, generator=torch.Generator().manual_seed(1)), 0)


@pytest.fixture(scope="module")
def vector():
    return fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(1)), 1)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------- KL on own text


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_sum_over_tokens_is_the_divergence_of_whole_texts(small, push, strength):
    prompt, change = [1, 2], strength * push.direction.double()
    texts = list(reference.all_texts(WORDS, LENGTH, {END}))
    steered = [reference.text_probability(small, prompt, text, change, 0) for text in texts]
    plain = [reference.text_probability(small, prompt, text) for text in texts]
    assert sum(steered) == pytest.approx(1, abs=1e-12)
    whole = sum(p * math.log(p / q) for p, q in zip(steered, plain, strict=True))
    tails = torch.tensor([[*text, *[0] * (LENGTH - len(text))] for text in texts])
    kept = own_text._until_end(tails, [END])
    assert kept.sum(1).tolist() == [len(text) for text in texts]
    rows = [prompt] * len(texts)
    found = token_divergences(small, rows, rows, tails, [push.add(strength)] * len(texts))
    expected = float((found * kept).sum(1) @ torch.tensor(steered, dtype=torch.float64))
    # the direction is a float32 tensor, which the kernel turns to float64 as the reference does: only rounding is left
    assert expected == pytest.approx(whole, abs=1e-10)
    assert whole > 0.01


def test_no_steering_shows_an_event_for_less_and_the_tilt_attains_it(small, push):
    texts = list(reference.all_texts(WORDS, LENGTH, {END}))
    plain = torch.tensor([reference.text_probability(small, [1], text) for text in texts], dtype=torch.float64)
    event = torch.tensor([2 in text for text in texts])
    p = float(plain[event].sum())
    for q in (0.9 * p, p, 0.5 * (1 + p), 1.0):
        tilted = torch.where(event, plain * q / p, plain * (1 - q) / (1 - p))
        nats = float(torch.special.xlogy(tilted, tilted / plain).sum())
        assert nats == pytest.approx(fg.least_kl(p, q), abs=1e-12)
    for strength in (1.0, 3.0):
        change = strength * push.direction.double()
        steered = torch.tensor(
            [reference.text_probability(small, [1], text, change, 0) for text in texts], dtype=torch.float64
        )
        nats = float((steered * (steered / plain).log()).sum())
        assert nats > fg.least_kl(p, float(steered[event].sum()))
    scores = torch.tensor([text.count(2) / LENGTH for text in texts], dtype=torch.float64)
    weights = plain * (2.0 * scores).exp()
    weights /= weights.sum()
    mean = float(weights @ scores)
    nats = float((weights * (weights / plain).log()).sum())
    assert nats >= fg.least_kl(float(plain @ scores), mean), "a score's mean has the bound of an event"


def test_known_values_of_the_least_kl():
    assert fg.least_kl(0.25, 0.5) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert fg.least_kl(0.3, 0.3) == 0
    assert fg.least_kl(0.0, 0.1) == math.inf
    assert fg.least_kl(0.5, 1.0) == pytest.approx(math.log(2))
    scores = [0.1, 0.2, 0.5, 0.9]
    x, t = torch.tensor(scores, dtype=torch.float64), 1.7
    weights = (t * x).softmax(0)
    expected = float((weights * (weights * 4).log()).sum())  # of the tilt from four equal texts
    mean = float(weights @ x)
    assert fg.least_kl_of_scores(scores, mean) == pytest.approx(expected, abs=1e-12)
    assert fg.least_kl_of_scores(scores, mean) > fg.least_kl(float(x.mean()), mean)
    events = [0.0] * 3 + [1.0]
    assert fg.least_kl_of_scores(events, 0.6) == pytest.approx(fg.least_kl(0.25, 0.6), abs=1e-12)
    assert fg.least_kl_of_scores(events, 1.0) == pytest.approx(math.log(4))
    assert fg.least_kl_of_scores(scores, 0.95) == math.inf
    assert fg.least_kl_of_scores(scores, float(x.mean())) == pytest.approx(0, abs=1e-12)


def test_divergences_against_loops_with_padding_and_other_plain_prompts(small, push):
    prompts, plain = [[1, 2, 3], [2], [2, 1]], [[2, 2], [2], [1, 2, 1]]
    tails = torch.tensor([[1, 2, 3], [3, 3, 0], [0, 1, 2]])
    for excluded in ((), (END,)):
        entries = [push.add(2.0), None, [push.add(1.0), push.add(0.5)]]
        found = token_divergences(small, prompts, plain, tails, entries, excluded=excluded, batch_tokens=7)
        for row, amount in enumerate((2.0, None, 1.5)):
            change = None if amount is None else amount * push.direction.double()
            expected = reference.token_divergences(
                small, prompts[row], plain[row], tails[row].tolist(), change, 0, excluded
            )
            assert found[row].tolist() == pytest.approx(expected, abs=1e-10)


def test_steering_that_does_nothing_costs_nothing_and_one_token_needs_no_sample(llama, tokenizer, vector):
    for nothing in (None, vector.add(0.0), []):
        assert fg.own_text_kl(llama, tokenizer, PROMPTS, nothing, max_new_tokens=4).nats.abs().max() == 0
    own = fg.own_text_kl(llama, tokenizer, PROMPTS, vector.add(4.0), max_new_tokens=1, samples=2)
    for place, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        expected = reference.divergence(
            reference.next_distribution(llama, ids, 4.0 * vector.direction, 1), reference.next_distribution(llama, ids)
        )
        # float32 logits, whose rounding sums over the vocabulary
        assert own.nats[:, place].tolist() == pytest.approx([expected] * 2, abs=1e-5)
    assert own.kl.mean == pytest.approx(float(own.nats.mean()))
    assert own.kl.clusters == len(PROMPTS)


def test_a_text_ends_at_its_end_and_what_follows_costs_nothing(llama, tokenizer, vector, monkeypatch):
    end = llama.config.eos_token_id
    tails = torch.tensor([[5, 6, end, 7], [8, 9, 10, 11]])
    monkeypatch.setattr(own_text, "rollout", lambda model, prompts, *_, **__: (torch.cat([prompts[0], tails], 1), None))
    own = fg.own_text_kl(llama, tokenizer, PROMPTS, vector.add(2.0), max_new_tokens=4)
    assert own.lengths.tolist() == [[3, 4]]
    for place, length in enumerate((3, 4)):
        ids = tokenizer(PROMPTS[place])["input_ids"]
        tail = tails[place, :length].tolist()
        expected = sum(reference.token_divergences(llama, ids, ids, tail, 2.0 * vector.direction, 1))
        assert float(own.nats[0, place]) == pytest.approx(expected, abs=1e-5)


def test_texts_that_may_not_end_have_every_token(llama, tokenizer, vector):
    end = llama.config.eos_token_id
    one = fg.own_text_kl(llama, tokenizer, PROMPTS, vector.add(2.0), max_new_tokens=1, may_end=False)
    for place, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        (expected,) = reference.token_divergences(llama, ids, ids, [5], 2.0 * vector.direction, 1, excluded=[end])
        assert float(one.nats[0, place]) == pytest.approx(expected, abs=1e-5)
    own = fg.own_text_kl(llama, tokenizer, PROMPTS, vector.add(2.0), max_new_tokens=24, samples=3, may_end=False)
    assert own.lengths.eq(24).all()
    assert [[len(texts) for texts in own.texts]] == [[2, 2, 2]]


def test_every_family_has_the_cost_of_its_own_passes(family_model, tokenizer):
    vector = fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(2)), 1)
    own = own_texts(family_model, tokenizer, PROMPTS, PROMPTS, [vector.add(3.0)], Sampling(3, 1.0, 10**6, 1.0))
    again = fg.own_text_kl(family_model, tokenizer, PROMPTS, vector.add(3.0), max_new_tokens=3, may_end=False)
    assert again.nats[0].tolist() == own.nats.tolist()
    for place, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        row = tokenizer(own.texts[place], add_special_tokens=False)["input_ids"]
        if len(row) < 3:
            continue  # it drew a word that the tokenizer lacks
        total = 0.0
        for n in range(3):
            context = torch.tensor([[*ids, *row[:n]]])
            with torch.no_grad():
                plain = family_model(context).logits[0, -1].double()
                with fg.steer(family_model, vector.add(3.0)):
                    steered = family_model(context).logits[0, -1].double()
            plain[2] = steered[2] = -math.inf  # end-of-text
            p, q = steered.softmax(0).tolist(), plain.softmax(0).tolist()
            total += reference.divergence(p, q)
        assert float(own.nats[place]) == pytest.approx(total, abs=1e-4)  # float32, and padding on another side


def test_drawing_from_everything_is_an_argmax_over_the_vocabulary():
    logits, sampling = torch.randn(4, 50), Sampling(1, 1.0, 50, 1.0)
    noise = sampling.noise(0, 0, 2, 50)
    chosen = choose(logits, noise, sampling).tolist()
    for row in range(4):
        values = [float(logits[row, v]) + float(noise[row % 2, v]) for v in range(50)]
        assert chosen[row] == max(range(50), key=values.__getitem__)
    assert sampling.truncates(51)
    assert not sampling.truncates(50)
    assert Sampling(1, 1.0, 50, 0.9).truncates(50)


def test_distinct_grams():
    for ids in ([1, 2, 3, 1, 2, 3, 1, 2, 3], [1, 2], [1] * 9, list(range(9))):
        assert distinct_grams(ids) == reference.distinct_grams(ids)
    assert distinct_grams([1] * 9) == 1 / 7


def test_own_texts_that_cannot_be_measured_are_refused(llama, tokenizer, vector):
    for sampling in (Sampling(4, 1.0, 50, 1.0), Sampling(4, 1.0, 80, 0.9), Sampling(4, 0.7, 80, 1.0)):
        with pytest.raises(fg.DataError, match="cut nothing off"):
            check_untruncated(sampling, 80)
    check_untruncated(Sampling(4, 1.0, 80, 1.0), 80)
    with pytest.raises(fg.DataError, match="at least two prompts"):
        fg.own_text_kl(llama, tokenizer, ["the man"], None)
    with pytest.raises(fg.DataError, match="one for each prompt"):
        fg.own_text_kl(llama, tokenizer, PROMPTS, None, plain_prompts=["a"])
    moved = {"keys": torch.zeros(1, 2, 8), "values": torch.ones(1, 2, 8)}
    cached = fg.CacheSteering(layers=[1], **moved, key_coefficient=0.0, value_coefficient=1.0, d_model=32)
    with pytest.raises(fg.SteeringError, match="CacheSteering"):
        fg.own_text_kl(llama, tokenizer, PROMPTS, cached)
    with pytest.raises(fg.DataError):
        fg.least_kl(0.5, 1.5)
    with pytest.raises(fg.DataError):
        fg.least_kl_of_scores([], 0.5)
    with pytest.raises(fg.DataError, match="cut nothing off"):
        fg.BenchPlan(concepts=("love",), methods=("unsteered",), kls=(1.0,), matched=None)


def test_hooks_are_gone_after_an_exception(llama, tokenizer, vector, monkeypatch):
    before = hooks(llama)

    def fail(*_, **__):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(llama.lm_head, "forward", fail)
        for call in (
            lambda: fg.own_text_kl(llama, tokenizer, PROMPTS, vector.add(1.0)),
            lambda: fg.receipt(llama, tokenizer, vector, 1.0, parts=["retention"]),
        ):
            with pytest.raises(RuntimeError):
                call()
    assert hooks(llama) == before


# ---------------------------------------------------------------- dose, inputs, retention


def test_the_dose_against_a_loop(llama, tokenizer, vector):
    texts = ["the man sat on a ship", "the cat ran"]
    dose = fg.measure_dose(llama, tokenizer, vector.add(-2.0), texts=texts[:1], context=12, last=4)
    ids = tokenizer(" ".join(texts[:1] * 3))["input_ids"][:12]
    with torch.no_grad():
        hidden = llama(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    norms = [math.sqrt(sum(x * x for x in row)) for row in hidden.tolist()]
    assert dose.mean_norm == pytest.approx(sum(norms[-4:]) / 4, rel=1e-5)
    assert dose.short_norm == pytest.approx(sum(norms[:4]) / 4, rel=1e-5)
    assert dose.relative == pytest.approx(2 * vector.norm / dose.mean_norm, rel=1e-5)
    assert fg.measure_dose(llama, tokenizer, vector.add(0.0), texts=texts, context=12, last=4).relative == 0
    relative = fg.measure_dose(llama, tokenizer, vector.add_relative(0.25), texts=texts, context=12, last=4)
    assert relative.relative == pytest.approx(0.25, rel=1e-5), "an intervention in units of norms has that dose"
    zones = [fg.Dose(x, 1.0, 1.0, 12, 4).zone for x in (0.1, 0.7, 1.5, 1.9)]
    assert zones == ["below working", "working", "warn", "collapse"]
    with pytest.raises(fg.DataError, match="at most 6"):
        fg.measure_dose(llama, tokenizer, vector.add(1.0), texts=texts, context=12, last=7)
    with pytest.raises(fg.DataError, match="no texts"):
        fg.measure_dose(llama, tokenizer, vector.add(1.0), texts=[" "])
    with pytest.raises(fg.DataError, match="one text"):
        fg.measure_dose(llama, tokenizer, vector.add(1.0), texts="the man sat")


def test_inputs_that_move_the_wrong_way_against_a_loop(llama, tokenizer, vector):
    pairs = [fg.ContrastPair("sat", "ran", prompt=p) for p in ("the man", "a cat", "the old king")]
    contrast = fg.ContrastSet("x", pairs, ["the bride", "a ring was new"], ["a dog", "the sea", "he said yes"])
    values, _ = Propensity(contrast).values(llama, tokenizer, [None, vector.add(2.0)])
    change = (values[1] - values[0]).tolist()
    positive, negative = change[:5], change[5:]
    expected = [positive[n] - negative[n] for n in range(3)]
    expected += [value - sum(negative) / 6 for value in positive[3:]]
    expected += [sum(positive) / 5 - value for value in negative[3:]]
    assert moves(values[1] - values[0], 5, 3).tolist() == pytest.approx(expected, abs=1e-12)
    found = fg.wrong_way(llama, tokenizer, vector.add(2.0), contrast)
    assert found.mean == sum(value < 0 for value in expected) / 8
    assert found.units == 8
    assert fg.wrong_way(llama, tokenizer, vector.add(0.0), contrast).mean == 0


def test_right_answers_against_a_loop(llama, tokenizer, vector):
    found = fg.answered_rightly(llama, tokenizer, [None, vector.add(3.0)], CHOICES)
    for row, change in enumerate((None, 3.0 * vector.direction)):
        for place, (question, answers, right) in enumerate(CHOICES):
            prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
            sums = []
            for answer in answers:
                ids, total = list(prompt), 0.0
                for token in tokenizer(answer, add_special_tokens=False)["input_ids"]:
                    total += math.log(reference.next_distribution(llama, ids, change, 1)[token])
                    ids.append(token)
                sums.append(total)
            assert bool(found[row, place]) == (sums[right] == max(sums))
    kept = fg.measure_retention(llama, tokenizer, vector.add(0.0), texts=PROMPTS, choices=CHOICES)
    assert tuple(kept.cross_entropy.difference) == tuple(kept.choices.difference) == (0, 0, 0)
    assert kept.perplexity[0] == pytest.approx(math.exp(kept.cross_entropy.unsteered.mean))
    for wrong in (CHOICES[:1], [("q", ["a"], 0)] * 2, [("q", ["a", "b"], 2)] * 2, ["text"] * 2):
        with pytest.raises(fg.DataError):
            fg.answered_rightly(llama, tokenizer, choices=wrong)


def test_shipped_questions_have_four_different_answers():
    from fgsteer.data.shipped import load_choices

    choices = load_choices()
    assert len(choices) == len({question for question, _, _ in choices}) == 48
    assert all(len(set(answers)) == 4 and 0 <= right < 4 for _, answers, right in choices)
    assert [sum(right == n for _, _, right in choices) for n in range(4)] == [12] * 4


def test_tasks_are_scored_without_and_with_steering(llama, tokenizer, vector, monkeypatch):
    calls = []

    def run(model, tokenizer, tasks, *, steering, limit):
        calls.append((steering, limit))
        return {"results": {"arc": {"acc,none": 0.5 if steering is None else 0.25}}}

    monkeypatch.setattr("fgsteer.receipts.retention.run_tasks", run)
    kept = fg.measure_retention(
        llama, tokenizer, vector.add(1.0), texts=PROMPTS, choices=CHOICES, tasks=["arc"], limit=3
    )
    assert kept.tasks == {"arc": (0.5, 0.25)}
    assert [steering is None for steering, _ in calls] == [True, False]
    assert [limit for _, limit in calls] == [3, 3]


# ---------------------------------------------------------------- drift and rerouting


def test_projections_of_replies_against_a_loop(llama, tokenizer, vector):
    texts = [("the man", "sat on a ship"), ("a", "cat")]
    for entry, change in ((None, 0.0), (vector.add(2.0), 2.0)):
        found = drift.mean_projections(llama, tokenizer, vector, entry, texts)
        for place, (prompt, completion) in enumerate(texts):
            before = len(tokenizer(prompt)["input_ids"])
            ids = tokenizer(f"{prompt} {completion}")["input_ids"]
            with torch.no_grad():
                hidden = llama(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0].double()
            hidden = hidden + change * vector.direction.double()
            along = [float(row @ vector.direction.double()) / vector.norm for row in hidden[before:]]
            assert float(found[place]) == pytest.approx(sum(along) / len(along), rel=1e-4, abs=1e-5)


def test_slopes_by_turn():
    rows = ((1.0, 2.0, 4.0, 3.0), (0.5, None, 1.5, 2.5))
    slopes = [np.polyfit([0, 1, 2, 3], rows[0], 1)[0], np.polyfit([0, 2, 3], [0.5, 1.5, 2.5], 1)[0]]
    assert drift._slopes(rows).mean == pytest.approx(sum(slopes) / 2)
    with pytest.raises(fg.DataError, match="empty replies"):
        drift._slopes(((1.0, None), (1.0, 2.0)))


def test_risks_of_heads():
    generator = torch.Generator().manual_seed(0)
    weight, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 16), (16,)))
    half = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    sigma = half @ half.T
    expected = reference.head_risk(weight.tolist(), sigma.tolist(), v.tolist())
    assert rerouting.head_risk(weight, sigma, v) == pytest.approx(expected, rel=1e-12)
    assert rerouting.head_risk(weight, torch.eye(4, dtype=torch.float64), v) == pytest.approx(1, rel=1e-12)
    unseen = v - torch.linalg.pinv(weight) @ (weight @ v)
    assert rerouting.head_risk(weight, sigma, unseen) == 0


def test_the_focus_is_the_smallest_set():
    generator = torch.Generator().manual_seed(0)
    for share in (0.3, 0.8, 1.0):
        for _ in range(5):
            weights = torch.rand(7, generator=generator, dtype=torch.float64).softmax(0)
            order, size = rerouting.focus_keys(weights, share)
            assert size == reference.smallest_focus(weights.tolist(), share)
            assert order.tolist() == sorted(range(7), key=lambda k: -float(weights[k]))
    order, size = rerouting.focus_keys(torch.tensor([0.0, 0.75, 0.25]), 0.8)
    assert (order.tolist(), size) == ([1, 2], 2), "a key without attention is none that could be read"


def test_rerouting_against_loops(tokenizer):
    model = model_of("llama")
    model.set_attn_implementation("eager")
    vector = fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(3)), 1)
    prompts = ["the man sat on a ship and the cat ran to the house", "a bride wore a ring in the church with the king"]
    found = fg.measure_rerouting(model, tokenizer, vector, prompts=prompts, pairs=5, seed=4, top=1.0)
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    generator = torch.Generator().manual_seed(4)
    sigmas = reference.second_moments(model, rows, 2, 5, 0.8, 0.25, generator)
    block = model.model.layers[2]
    seen = (block.input_layernorm.weight.double() * vector.direction.double()).tolist()
    by_head = {head: (risk, relative) for _, head, risk, relative in found.top}
    assert found.layers == (2,)
    assert sorted(by_head) == [0, 1, 2, 3]
    for head, sigma in enumerate(sigmas):
        weight = block.self_attn.q_proj.weight[head * 8 : head * 8 + 8].double().tolist()
        expected = reference.head_risk(weight, sigma.tolist(), seen)
        # keys of one pass in float32, and a norm's gain that is read at a large scale
        assert by_head[head][0] == pytest.approx(expected, rel=1e-4)
        assert by_head[head][1] == pytest.approx(expected / (float(sigma.trace()) / 8), rel=1e-4)
    assert found.risk == pytest.approx(sum(risk for risk, _ in by_head.values()) / 4)


def test_queries_that_cannot_be_read_are_refused(tokenizer, llama):
    from tests.helpers.tiny import tiny_model

    vector = fg.SteeringVector(torch.randn(32), 1)
    with pytest.raises(fg.HookpointError, match="norm"):
        fg.measure_rerouting(tiny_model("qwen3"), tokenizer, vector)
    last = fg.SteeringVector(torch.randn(32), 2)
    with pytest.raises(fg.HookpointError, match="later block"):
        fg.measure_rerouting(llama, tokenizer, last)
    with pytest.raises(fg.HookpointError, match="residual stream"):
        fg.measure_rerouting(llama, tokenizer, fg.SteeringVector(torch.randn(32), "blocks.1.attn.hook_z"))
    with pytest.raises(fg.DataError, match="at least eight"):
        fg.measure_rerouting(llama, tokenizer, vector, prompts=["the man"])


# ---------------------------------------------------------------- the receipt


@pytest.fixture(scope="module")
def slip(llama, tokenizer, vector):
    contrast = fg.ContrastSet("x", [], ["the bride", "a ring was new"], ["a dog", "the sea"])
    return fg.receipt(
        llama,
        tokenizer,
        vector,
        0.5,
        contrast=contrast,
        prompts=PROMPTS,
        max_new_tokens=4,
        choices=CHOICES,
        context=16,
    )


def test_a_receipt_has_every_part_or_the_reason(slip, tmp_path, llama, tokenizer, vector):
    assert slip.dose is not None
    assert slip.own_text is not None
    assert slip.wrong_way is not None
    assert slip.retention is not None
    assert set(slip.left_out) == {"refusals", "drift"} | ({"rerouting"} if slip.rerouting is None else set())
    assert "does not chat" in slip.left_out["drift"]
    assert "\n" not in repr(slip)
    assert len(repr(slip)) < 240
    assert parse_receipt(json.loads(json.dumps(slip.as_dict()))) == slip
    slip.save(tmp_path / "receipt.json")
    assert fg.load_receipt(tmp_path / "receipt.json") == slip
    assert slip.facts()["drift (left out)"] == slip.left_out["drift"]
    again = fg.receipt(llama, tokenizer, vector, 0.5, prompts=PROMPTS, max_new_tokens=4, parts=["own_text"])
    assert again.own_text == slip.own_text
    assert again.dose is None
    assert not again.left_out
    with pytest.raises(fg.DataError, match="parts"):
        fg.receipt(llama, tokenizer, vector, 0.5, parts=["taste"])


def test_a_receipt_is_stored_when_asked_and_stands_on_the_card(slip, vector, tmp_path):
    assert "receipt" not in vector.provenance
    assert "## Receipt" not in card(vector)
    stored = slip.stored_in(vector)
    stored.save(tmp_path / "vector.safetensors")
    loaded = fg.SteeringVector.load(tmp_path / "vector.safetensors")
    assert parse_receipt(loaded.provenance["receipt"]) == slip
    text = card(loaded)
    assert "## Receipt" in text
    assert all(escape_markdown(fact) in text for fact in slip.facts().values())
    assert "## Receipt" not in card(2.0 * loaded), "a receipt is of the vector as it was measured"
    broken = {**slip.as_dict(), "dose": {"relative": "much"}}
    assert "## Receipt" not in card(fg.SteeringVector(vector.direction, 1, provenance={"receipt": broken}))


def test_what_is_no_receipt_is_refused(slip, tmp_path):
    for value in (
        [],
        {},
        {**slip.as_dict(), "norm": "1"},
        {**slip.as_dict(), "norm": True},
        {**slip.as_dict(), "left_out": {"dose": 1}},
        {**slip.as_dict(), "wrong_way": [1, 2, 3]},
    ):
        path = tmp_path / "receipt.json"
        path.write_text(json.dumps(value))
        with pytest.raises(fg.FormatError, match="no receipt"):
            fg.load_receipt(path)


def test_numbers_that_are_not_finite_leave_a_part_out(llama, tokenizer, vector, monkeypatch):
    dose = fg.Dose(math.inf, 0.0, 0.0, 12, 4)
    monkeypatch.setattr("fgsteer.receipts.receipt.measure_dose", lambda *_, **__: dose)
    found = fg.receipt(llama, tokenizer, vector, 1.0, parts=["dose"])
    assert found.dose is None
    assert "finite" in found.left_out["dose"]
    assert isinstance(found, Receipt)
