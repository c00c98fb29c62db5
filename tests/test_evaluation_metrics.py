"""Evaluation: scores of text, A/B answers, steerability, coherence and diagnosis, against naive loops."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.data.shipped import SHIPPED
from fgsteer.evaluation.metrics.coherence import distinct_share
from fgsteer.models.hookpoints import resolve
from tests.helpers.cli import invoke_on_cpu
from tests.helpers.examples import naive_examples
from tests.helpers.saes import make_sae
from tests.helpers.tiny import tiny_model, word_tokenizer
from tests.reference import evaluation as reference

AT = fg.Hookpoint(1)
TEXTS = ["the bride wore a ring", "a cat ran", "the king of the old sea ship was sad and the man is good", "tea"]
QUESTIONS = [
    fg.ContrastPair("yes", "no", prompt="the man said"),
    fg.ContrastPair("A", "( B ) bad", prompt="is the old king happy ? ("),
    fg.ContrastPair("tea and bread", "no", prompt="I think"),
]
# float32 forward passes at other batch shapes, sums of up to a dozen tokens
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def vector():
    return fg.SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(5)), AT)


def distributions(model, ids, vector=None, coefficient=0.0):
    block = resolve(model, AT)[0]
    shift = None if vector is None else coefficient * vector.direction
    return reference.next_token_log_probabilities(model, ids, block, shift)


def answer(model, tokenizer, prompt, completion, *steering):
    """Log-probability of the completion, and its tokens, from one row."""
    ids = tokenizer(f"{prompt} {completion}")["input_ids"] if prompt else tokenizer(completion)["input_ids"]
    first = len(tokenizer(prompt)["input_ids"]) if prompt else 1
    return reference.log_probability(distributions(model, ids, *steering), ids, first), len(ids) - first


def test_log_probabilities_equal_one_text_at_a_time(family_model, tokenizer, vector):
    pairs = [("", TEXTS[0]), ("the man said", "yes and no"), ("", TEXTS[2]), ("a dog", "ran")]
    steering = [None, vector.add(0.5), [vector.add(0.2), vector.add(-1.0)], vector.add(2.0)]
    expected = [
        [answer(family_model, tokenizer, *pair, *steer) for pair in pairs]
        for steer in ((), (vector, 0.5), (vector, -0.8), (vector, 2.0))
    ]
    for batch_tokens in (1, 40, 100_000):
        found = fg.log_probabilities(family_model, tokenizer, pairs, steering, batch_tokens=batch_tokens)
        assert np.allclose(found.sums, [[total for total, _ in row] for row in expected], **CLOSE)
        assert found.counts.tolist() == [count for _, count in expected[0]]


def test_cross_entropy_by_text(llama, tokenizer):
    expected = [-total / count for total, count in (answer(llama, tokenizer, "", text) for text in TEXTS)]
    assert np.allclose(fg.text_cross_entropies(llama, tokenizer, TEXTS), expected, **CLOSE)
    assert np.allclose(fg.perplexities(llama, tokenizer, TEXTS), np.exp(expected), rtol=1e-3)
    prompts = ["the man said", "", "I think", "a"]
    given = [-total / n for total, n in (answer(llama, tokenizer, p, t) for p, t in zip(prompts, TEXTS, strict=True))]
    assert np.allclose(fg.text_cross_entropies(llama, tokenizer, TEXTS, prompts=prompts), given, **CLOSE)
    whole = fg.cross_entropy(llama, tokenizer, TEXTS)  # every token alike
    sums = [answer(llama, tokenizer, "", text) for text in TEXTS]
    assert whole == pytest.approx(-sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-5)


def test_texts_with_nothing_to_score(llama, tokenizer):
    found = fg.text_cross_entropies(llama, tokenizer, ["", "the man", "", ""], prompts=["", "", "a dog", "sat"])
    assert found.isnan().tolist() == [True, False, True, True]
    assert found[1] == pytest.approx(fg.cross_entropy(llama, tokenizer, ["the man"]), rel=1e-5)
    assert fg.text_cross_entropies(llama, tokenizer, []).shape == (0,)
    bare = word_tokenizer(bos=False)  # of one token nothing is predicted, and an empty text has none
    assert fg.text_cross_entropies(llama, bare, ["the", "", "the man"]).isnan().tolist() == [True, True, False]
    with pytest.raises(fg.DataError, match="selects none of the"):
        fg.cross_entropy(llama, tokenizer, ["the man", ""])
    with pytest.raises(fg.DataError, match="2 prompts for 1 text\\."):
        fg.text_cross_entropies(llama, tokenizer, ["the man"], prompts=["a", "b"])
    for wrong in ("the man", []):
        with pytest.raises(fg.DataError, match="list of at least one"):
            fg.cross_entropy(llama, tokenizer, wrong)


def test_joint_stands_between_prompt_and_continuation(llama):
    """Sub-word continuations are scored as they were generated."""
    _, tokenizer = fg.load_model("default")
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    for joint, text in (("", "The kings"), (None, "The king s")):
        ids = tokenizer(text)["input_ids"]
        pieces = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        first = next(i for i, (_, end) in enumerate(pieces) if end > len("The king") + (joint is None))
        expected = reference.log_probability(distributions(model, ids), ids, first)
        found = fg.log_probabilities(model, tokenizer, [("The king", "s")], joint=joint)
        assert float(found.sums) == pytest.approx(expected, rel=1e-4)
        assert int(found.counts) == len(ids) - first


def test_kl_equals_the_loop(llama, tokenizer, vector):
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    count = sum(len(ids) - 1 for ids in rows)
    for c in (0.3, 2.0):
        both = [(distributions(llama, ids), distributions(llama, ids, vector, c), len(ids)) for ids in rows]
        forward = sum(reference.kl(p, q, n) for p, q, n in both) / count
        backward = sum(reference.kl(q, p, n) for p, q, n in both) / count
        assert abs(forward / backward - 1) > 0.01  # ten times the tolerance below: the directions are told apart
        for batch_tokens in (1, 4096):
            steering = [vector.add(c), None]
            found = fg.kl_divergences(llama, tokenizer, TEXTS, steering, batch_tokens=batch_tokens)
            assert found == pytest.approx([forward, 0.0], rel=1e-3, abs=1e-6)
            found = fg.kl_divergences(llama, tokenizer, TEXTS, steering, under="steered", batch_tokens=batch_tokens)
            assert found == pytest.approx([backward, 0.0], rel=1e-3, abs=1e-6)
    with pytest.raises(fg.DataError, match="'unsteered' or 'steered'"):
        fg.kl_divergences(llama, tokenizer, TEXTS, [None], under="both")
    with pytest.raises(fg.DataError, match="'mean' or 'last'"):
        fg.kl_divergences(llama, tokenizer, TEXTS, [None], at="first")


def test_kl_at_the_last_position_is_that_of_what_comes_next(llama, tokenizer, vector):
    """Row by row, the distributions after each text's last token, whatever the padding of its batch."""
    forward = backward = 0.0
    for ids in (tokenizer(text)["input_ids"] for text in TEXTS):
        plain, moved = distributions(llama, ids)[-1:], distributions(llama, ids, vector, 1.5)[-1:]
        forward += reference.kl(plain, moved, 2) / len(TEXTS)
        backward += reference.kl(moved, plain, 2) / len(TEXTS)
    for batch_tokens in (1, 4096):
        options = {"at": "last", "batch_tokens": batch_tokens}
        found = fg.kl_divergences(llama, tokenizer, TEXTS, [vector.add(1.5), None], **options)
        assert found == pytest.approx([forward, 0.0], rel=1e-3, abs=1e-6)  # as for the mean, above
        found = fg.kl_divergences(llama, tokenizer, TEXTS, [None, vector.add(1.5)], under="steered", **options)
        assert found == pytest.approx([0.0, backward], rel=1e-3, abs=1e-6)
    mean = fg.kl_divergences(llama, tokenizer, TEXTS, [vector.add(1.5)])[0]
    assert abs(forward / mean - 1) > 0.01  # ten times the tolerance: the two are told apart


def test_strengths_cost_the_target_kl(llama, tokenizer, vector):
    makes = [vector.add, (vector * 7.0).add, (-vector).add]
    found = fg.calibrate_many(llama, tokenizer, makes, TEXTS, target_kl=0.03)
    for make, c in zip(makes, found, strict=True):
        assert fg.kl_divergences(llama, tokenizer, TEXTS, [make(c)])[0] == pytest.approx(0.03, rel=0.021)
    assert found[1] == pytest.approx(found[0] / 7, rel=0.05)  # 2 % tolerance each
    assert fg.calibrate(llama, tokenizer, vector.add, TEXTS, target_kl=0.03) == pytest.approx(found[0], rel=0.05)
    null = fg.SteeringVector(torch.zeros(32), AT).add
    assert math.isnan(fg.calibrate_many(llama, tokenizer, [null], TEXTS, target_kl=0.03)[0])
    with pytest.raises(fg.SteeringError, match="changes what the model says"):
        fg.calibrate(llama, tokenizer, null, TEXTS, target_kl=0.03)
    for calibrate, make in ((fg.calibrate, vector.add), (fg.calibrate_many, [vector.add])):
        with pytest.raises(fg.SteeringError, match=r"either target_ce_rise = 0\.5 or target_kl"):
            calibrate(llama, tokenizer, make, TEXTS, target_ce_rise=0.5, target_kl=0.5)
        for target in (math.nan, math.inf, 0.0, -1.0):
            with pytest.raises(fg.SteeringError, match="target_kl"):
                calibrate(llama, tokenizer, make, TEXTS, target_kl=target)
    with pytest.raises(fg.SteeringError, match=r"a rise below 0\.5 nats"):  # the target when none is given
        fg.calibrate(llama, tokenizer, null, TEXTS)


def test_answer_probabilities_equal_the_loop(llama, tokenizer, vector):
    found = fg.answer_probabilities(llama, tokenizer, QUESTIONS, [None, vector.add(1.5)])
    for row, steer in enumerate(((), (vector, 1.5))):
        for column, pair in enumerate(QUESTIONS):
            up, _ = answer(llama, tokenizer, pair.prompt, pair.positive, *steer)
            down, _ = answer(llama, tokenizer, pair.prompt, pair.negative, *steer)
            assert float(found.probability[row, column]) == pytest.approx(math.exp(up), rel=1e-3)
            assert float(found.difference[row, column]) == pytest.approx(up - down, rel=1e-3, abs=1e-4)
            share = math.exp(up) / (math.exp(up) + math.exp(down))
            assert float(found.share[row, column]) == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(
    ("positive", "negative", "prompt"),
    [
        ("( A )", "( B )", "the man said"),  # the same first token
        ("yes", "yes", "the man said"),
        ("yes", "yes and no", "the man said"),  # one begins the other
    ],
)
def test_answers_must_part_at_their_first_token(llama, tokenizer, positive, negative, prompt):
    good = fg.ContrastPair("yes", "no", prompt="I think")
    with pytest.raises(fg.DataError, match="question 1, whose answers"):
        fg.answer_probabilities(llama, tokenizer, [good, fg.ContrastPair(positive, negative, prompt)])


def test_answers_need_a_context(llama, tokenizer):
    assert fg.answer_probabilities(llama, tokenizer, [fg.ContrastPair("yes", "no")]).share.shape == (1, 1)
    with pytest.raises(
        fg.DataError, match="part at token 0 but are scored from tokens 1"
    ):  # the first token is not predicted
        fg.answer_probabilities(llama, word_tokenizer(bos=False), [fg.ContrastPair("yes or", "no or")])
    with pytest.raises(fg.DataError, match="without pairs"):
        fg.answer_probabilities(llama, tokenizer, fg.ContrastSet("x", positives=["yes"], negatives=["no"]))


def test_slopes_equal_the_loop():
    g = np.random.default_rng(0)
    coefficients, differences = g.normal(size=7).tolist(), g.normal(size=(7, 20))
    found = fg.steerability(coefficients, torch.tensor(differences))
    expected = [reference.slope(coefficients, differences[:, i].tolist()) for i in range(20)]
    assert np.allclose(found.slopes, expected, rtol=1e-10)  # float64 on both sides
    assert found.anti_steerable == sum(s < 0 for s in expected) / 20 not in (0, 1)
    assert found.mean == pytest.approx(sum(expected) / 20)
    planted = torch.tensor([-2.0, 0.0, 3.0])
    lines = 5 + torch.tensor(coefficients)[:, None] * planted
    found = fg.steerability(coefficients, lines)
    assert torch.allclose(found.slopes, planted.double(), atol=1e-5)  # lines in float32


@pytest.mark.parametrize(
    ("coefficients", "differences"),
    [
        ([1.0], torch.zeros(1, 3)),
        ([2.0, 2.0], torch.zeros(2, 3)),
        ([1.0, math.nan], torch.zeros(2, 3)),
        ([1.0, 2.0], torch.zeros(3, 3)),
        ([1.0, 2.0], torch.zeros(2)),
        ([1.0, 2.0], torch.zeros(2, 0)),
        ([1.0, 2.0], torch.tensor([[0.0], [-math.inf]])),
    ],
)
def test_slopes_that_do_not_exist_are_refused(coefficients, differences):
    with pytest.raises(fg.DataError):
        fg.steerability(coefficients, differences)


def test_measured_steerability_is_that_of_the_loop(llama, tokenizer, vector):
    coefficients = [-1.0, 0.0, 0.5, 2.0]
    found = fg.measure_steerability(llama, tokenizer, vector.add, QUESTIONS, coefficients)
    for slope, pair in zip(found.slopes.tolist(), QUESTIONS, strict=True):
        sides = [
            [answer(llama, tokenizer, pair.prompt, side, vector, c)[0] for c in coefficients]
            for side in (pair.positive, pair.negative)
        ]
        expected = reference.slope(coefficients, [a - b for a, b in zip(*sides, strict=True)])
        assert slope == pytest.approx(expected, rel=1e-3, abs=1e-3)
    reverse = fg.measure_steerability(llama, tokenizer, (-vector).add, QUESTIONS, coefficients)
    assert torch.allclose(reverse.slopes[0].sign(), -found.slopes[0].sign())


def test_distinct_share_equals_the_windows():
    draw = random.Random(3)
    for length in (1, 2, 9, 30):
        tokens = [draw.randrange(4) for _ in range(length + 1)]
        bigrams = reference.bigrams(tokens)
        for window in range(1, length + 1):
            assert distinct_share(bigrams, window) == pytest.approx(reference.distinct_share(bigrams, window))


def test_coherence_equals_the_loop(llama, tokenizer):
    samples = [*TEXTS[:3], "the dog sat on the dog and the dog"]
    texts = ["the cat was sad", "the man the man the man the man the man the man the man", "war"]
    judge = fg.Coherence.fit(llama, tokenizer, samples)
    assert len(judge.distinct) == 4  # bigrams of five, three, thirteen and nine words: 4, 2, 12, 8, the lower median
    ces = fg.text_cross_entropies(llama, tokenizer, samples).tolist()
    found = judge.measure(texts)
    assert torch.equal(found.coherence, judge.score(texts))
    for index in range(2):
        expected = reference.coherence(
            float(found.cross_entropy[index]), texts[index].split(), ces, [sample.split() for sample in samples]
        )
        assert float(found.coherence[index]) == pytest.approx(expected, rel=1e-6)
    assert float(found.repetition[2]) == 1.0
    silent = judge.measure(["", "the man"])
    assert (float(silent.coherence[0]), bool(silent.cross_entropy[0].isnan())) == (0.0, True)
    assert judge.score(["and the dog"], prompts=["the cat sat"]) != judge.score(["and the dog"])
    with pytest.raises(fg.DataError, match="without two tokens to score"):
        fg.Coherence.fit(llama, tokenizer, ["", "tea"])


@pytest.fixture(scope="module")
def story():
    """The embedded default, a coherence judge of it, and fresh unsteered samples of other prompts' order."""
    model, tokenizer = fg.load_model("default")
    prompts = fg.load_neutral()[1][:8] * 3

    def sample(seed, tokens):
        torch.manual_seed(seed)
        return fg.generate(model, tokenizer, prompts, max_new_tokens=tokens, do_sample=True, top_k=0)

    judge = fg.Coherence.fit(model, tokenizer, sample(0, 32), prompts=prompts)
    return judge, prompts, sample(1, 32)


def test_fresh_unsteered_samples_are_coherent(story):
    judge, prompts, fresh = story
    # half of them are below the mean cross-entropy and score 1, the others lose a standard deviation of 0.4 nats
    assert float(judge.score(fresh, prompts).mean()) > 0.8
    shorter = [" ".join(text.split(" ")[:12]) for text in fresh]
    longer = [a + b for a, b in zip(fresh, fresh[1:] + fresh[:1], strict=True)]
    for texts in (shorter, longer):  # length alone is not repetition
        assert float(judge.measure(texts, prompts).repetition.mean()) > 0.9


def test_shuffled_text_and_loops_are_not_coherent(story):
    judge, prompts, fresh = story
    draw = random.Random(0)
    shuffled = [" " + " ".join(draw.sample(text.split(), len(text.split()))) for text in fresh]
    assert float(judge.score(shuffled, prompts).mean()) < 0.3
    for period in (1, 2, 4, 8):
        loops = [" " + " ".join((text.split()[:period] * 32)[:28]) for text in fresh]
        assert float(judge.score(loops, prompts).max()) < 0.3, period


def test_coherence_of_one_loop_among_good_texts_is_its_own(story):
    """A text's score does not depend on those beside it."""
    judge, prompts, fresh = story
    alone = judge.score(fresh[:1], prompts[:1])
    assert torch.allclose(judge.score([*fresh[:3], " and" * 40], prompts[:4])[:1], alone, rtol=1e-4)


UP = ["the bride wore a ring", "the groom took the bride in the church", "wedding ring", "she said yes"]
DOWN = ["the dog sat on bread", "a cat ran", "the king of the old sea ship was sad", "no"]
PAIRED = fg.ContrastSet("pairs", pairs=[fg.ContrastPair(a, b) for a, b in zip(UP, DOWN, strict=True)])
SIDES = fg.ContrastSet("sides", positives=UP, negatives=DOWN[:3])


@pytest.mark.parametrize("contrast", [PAIRED, SIDES], ids=["pairs", "sides"])
def test_diagnosis_equals_the_loop(llama, tokenizer, contrast, vector):
    stats = fg.collect(llama, tokenizer, contrast, hookpoints=AT, keep_pooled=True, batch_tokens=16)
    paired = bool(contrast.pairs)
    pos = naive_examples(llama, tokenizer, UP, AT)
    neg = naive_examples(llama, tokenizer, DOWN if paired else DOWN[:3], AT)
    assert np.allclose(stats.pooled[AT].positive, pos, rtol=1e-4, atol=1e-4)
    for given in (None, vector):
        found = fg.diagnose(stats, given)
        v = np.mean(pos, 0) - np.mean(neg, 0) if given is None else vector.direction.numpy()
        assert (found.positives, found.negatives, found.pairs) == (4, len(neg), 4 if paired else 0)
        # float32 activations at other batch shapes
        assert found.agreement == pytest.approx(reference.agreement(pos, neg, v, paired), rel=1e-3, abs=1e-4)
        assert found.rms_agreement == pytest.approx(reference.rms_agreement(pos, neg, v), rel=1e-3, abs=1e-4)
        assert found.d_prime == pytest.approx(reference.d_prime(pos, neg, v), rel=1e-3, abs=1e-3)
    # any hyperplane separates a bare vector's opposite the other way round
    assert fg.diagnose(stats, -vector).d_prime == pytest.approx(-fg.diagnose(stats, vector).d_prime)


def test_pooled_examples_merge_and_survive_a_file(llama, tokenizer, tmp_path):
    def read(contrast, keep=True):
        return fg.collect(llama, tokenizer, contrast, hookpoints=AT, keep_pooled=keep)

    halves = [fg.ContrastSet("h", pairs=PAIRED.pairs[i : i + 2], positives=[UP[i]]) for i in (0, 2)]
    whole = read(fg.ContrastSet("w", pairs=PAIRED.pairs, positives=[UP[0], UP[2]]))
    (merged := read(halves[0]) + read(halves[1])).save(tmp_path / "s.safetensors")
    back = fg.ContrastStatistics.load(tmp_path / "s.safetensors")
    for stats in (merged, back):
        got, expected = stats.pooled[AT], whole.pooled[AT]
        assert got.pairs == expected.pairs == 4
        assert torch.allclose(got.positive, expected.positive, atol=1e-5)  # float32 at other batch shapes
        assert torch.allclose(got.negative, expected.negative, atol=1e-5)
        assert fg.diagnose(stats).agreement == pytest.approx(fg.diagnose(whole).agreement, rel=1e-4)
    without = read(halves[0], keep=False)
    assert not (without + read(halves[1])).pooled
    found = fg.diagnose(without)
    assert math.isnan(found.agreement)
    assert found.as_dict()["d_prime"] is None
    assert found.rms_agreement == pytest.approx(fg.diagnose(read(halves[0])).rms_agreement)


def test_diagnosis_refuses_what_it_cannot_place(llama, tokenizer):
    stats = fg.collect(llama, tokenizer, SIDES, hookpoints=AT, keep_pooled=True)
    with pytest.raises(fg.PairingError, match="resid_pre"):
        fg.diagnose(stats, hookpoint="blocks.0.hook_resid_pre")
    with pytest.raises(fg.PairingError, match="width 5"):
        fg.diagnose(stats, fg.SteeringVector(torch.ones(5), AT))
    same = fg.collect(llama, tokenizer, fg.ContrastSet("x", positives=UP, negatives=UP), hookpoints=AT)
    with pytest.raises(fg.SelectionError, match="norm 0"):
        fg.diagnose(same)
    single = fg.ContrastSet("x", positives=UP[:1], negatives=DOWN)
    assert math.isnan(fg.diagnose(fg.collect(llama, tokenizer, single, hookpoints=AT, keep_pooled=True)).d_prime)


def invoke(*arguments):
    return invoke_on_cpu(*arguments).stdout


def test_command_line_diagnoses(tmp_path):
    stats, vec = tmp_path / "s.safetensors", tmp_path / "v.safetensors"
    told = json.loads(invoke("diagnose", "wedding", "--json"))
    layers = [row["hookpoint"] for row in told["rows"] if row["texts"] == "training"]
    assert layers[:2] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert [row["hookpoint"] for row in told["rows"] if row["texts"] == "held out"] == layers
    at = layers[1]
    own = tmp_path / "own.json"
    own.write_bytes((SHIPPED / "wedding.json").read_bytes())
    assert json.loads(invoke("diagnose", own, "--json"))["rows"] == told["rows"]
    invoke("collect", "wedding", "--no-sae", "--hookpoint", at, "-o", stats)
    (row,) = json.loads(invoke("diagnose", stats, "--json"))["rows"]
    assert row == {**next(r for r in told["rows"] if r["hookpoint"] == at), "texts": "collected"}
    fg.caa(fg.ContrastStatistics.load(stats)).save(vec)
    held = json.loads(invoke("diagnose", "wedding", "--vector", vec, "--json"))["rows"][1]
    assert held["d_prime"] == pytest.approx(next(r for r in told["rows"][1::2] if r["hookpoint"] == at)["d_prime"])
    assert 0 < held["agreement"] < 1
    shown = invoke("diagnose", stats)
    assert f"{row['d_prime']:.3f}" in shown
    assert "20 + 20" in invoke("diagnose", "wedding", "--hookpoint", at)
    invoke("collect", "wedding", "--no-sae", "--hookpoint", at, "--no-pooled", "-o", stats)
    (bare,) = json.loads(invoke("diagnose", stats, "--json"))["rows"]
    assert (bare["agreement"], bare["rms_agreement"]) == (None, pytest.approx(row["rms_agreement"]))
    assert "--no-pooled" in invoke("diagnose", stats)
    with pytest.raises(fg.DataError, match="either --vector or --hookpoint, got both"):
        invoke("diagnose", stats, "--vector", vec, "--hookpoint", at)
    with pytest.raises(fg.PairingError, match=r"blocks\.0"):
        invoke("diagnose", stats, "--hookpoint", "blocks.0.hook_resid_post")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_twin_of_evaluation(dtype, tokenizer, vector):
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", dtype=dtype).to(device)
        stats = fg.collect(model, tokenizer, SIDES, sae=make_sae(), keep_pooled=True)
        found = fg.diagnose(stats)
        answers = fg.answer_probabilities(model, tokenizer, QUESTIONS, [None, vector.add(0.5)])
        kl = fg.kl_divergences(model, tokenizer, TEXTS, [vector.add(0.5)])
        coherence = fg.Coherence.fit(model, tokenizer, TEXTS).measure(TEXTS)
        results.append(torch.tensor([found.agreement, found.rms_agreement, *kl]))
        results[-1] = torch.cat([results[-1], answers.share.flatten(), coherence.cross_entropy])
    # bfloat16 keeps 8 bits, and these logits spread over some tens of nats
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    cpu, cuda = (result.double() for result in results)
    assert torch.allclose(cpu, cuda, rtol=tolerance, atol=tolerance)
