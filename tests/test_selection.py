"""Rankings of features: against loops over texts, thresholds, prompts and tokens; planted features; halves; chance."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fgsteer as fg
from fgsteer.learning import masks
from fgsteer.selection.correlation import Correlation
from fgsteer.selection.names import RANKINGS, SCORE_NAMES
from fgsteer.selection.outcomes import change_of
from fgsteer.selection.pooled import FeatureActivations
from fgsteer.selection.separation import auroc, best_f1, calibrated, f1_at
from fgsteer.steering.answers import greedy_answers
from tests.helpers.cli import invoke_on_cpu
from tests.helpers.saes import make_sae
from tests.helpers.tiny import model_of, tiny_model
from tests.reference import selection as reference

TEXTS = ["the bride wore a ring", "a wedding in the church", "the groom took the ring", "she was the bride of the king"]
OTHERS = ["a dog sat on the ship", "the cat ran to the house", "war on the sea", "tea and bread", "the old man said no"]
SET = fg.ContrastSet("wedding", positives=TEXTS, negatives=OTHERS)
PROMPTS = [f"{a} {b}" for a in ("the man", "a dog", "the queen", "she") for b in ("said", "took", "ran to", "and the")]


def activations_of(values, positive, chooses=None, sae=None):
    rows = len(positive)
    half = torch.ones(rows, dtype=torch.bool) if chooses is None else torch.tensor(chooses)
    return FeatureActivations(values, torch.tensor(positive), half, sae or make_sae(d_sae=values.shape[1]), {})


@pytest.fixture(scope="module")
def sae():
    return make_sae("jumprelu")


# ---------------------------------------------------------------- by what features read


tables = st.integers(2, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda labels: 0 < sum(labels) < len(labels)),
    )
)


@settings(deadline=None, max_examples=25)
@given(tables, st.sampled_from([0.5, 0.1, 1e-3]))
def test_auroc_and_f1_are_those_of_loops(table, base_rate):
    rows, positive = table
    values, labels = torch.tensor(rows), torch.tensor([positive, [not side for side in positive]])
    best, thresholds = (found[0] for found in best_f1(values, labels, base_rate))
    at = f1_at(values, labels[0], thresholds.float(), base_rate)
    areas = auroc(values, labels)
    assert torch.allclose(areas[0] + areas[1], torch.ones(3, dtype=torch.float64), atol=1e-12)
    for j, area in enumerate(areas[0].tolist()):
        column = [row[j] for row in rows]
        assert area == pytest.approx(reference.auroc(column, positive), abs=1e-12)  # sums of halves in float64
        assert float(best[j]) == pytest.approx(reference.best_f1(column, positive, base_rate), rel=1e-9)
        assert float(at[j]) == pytest.approx(float(best[j]), rel=1e-9), "what was chosen is what is reported"


def test_calibrated_f1_does_not_depend_on_how_many_are_positive():
    """And is F1 where the share of positives is that of the world; the published example is .1357."""
    for share in (0.001, 0.2, 0.5, 0.9):
        tp, fp, fn = torch.tensor([0.8 * share, 0.01 * (1 - share), 0.2 * share], dtype=torch.float64)
        assert float(calibrated(tp, fp, fn, share, 1e-3)) == pytest.approx(0.1357, abs=5e-5)
    plain = 2 * 0.8 * 1e-3 / (2 * 0.8 * 1e-3 + 0.01 * 0.999 + 0.2 * 1e-3)
    assert reference.f1_of_rates(0.8, 0.01, 1e-3) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_largest_activations_are_those_of_loops(kind, llama, tokenizer):
    sae = make_sae(kind)
    found = fg.max_activations(llama, tokenizer, sae, SET, progress=False)
    texts = [*TEXTS[::2], *OTHERS[::2], *TEXTS[1::2], *OTHERS[1::2]]
    assert found.chooses.tolist() == [True] * 5 + [False] * 4
    assert found.positive.tolist() == [True] * 2 + [False] * 3 + [True] * 2 + [False] * 2
    for row, text in zip(found.values, texts, strict=True):
        states = reference.hidden(llama, tokenizer(text)["input_ids"], sae.hookpoint.layer)[1:]
        # float32, summed in another order
        assert row.tolist() == pytest.approx(reference.largest(sae, states), abs=1e-4)


def test_a_held_out_part_reports_and_pairs_stay_together(llama, tokenizer, sae):
    pairs = [fg.ContrastPair(a, b, "he said") for a, b in zip(TEXTS, OTHERS, strict=False)]
    held_out = fg.ContrastSet("other", positives=["the bride"], negatives=["a dog"])
    one = fg.max_activations(llama, tokenizer, sae, fg.ContrastSet("x", pairs, held_out=held_out), tokens="answer")
    assert (int(one.chooses.sum()), len(one.values)) == (8, 10)
    two = fg.max_activations(llama, tokenizer, sae, pairs, tokens="answer")
    assert torch.equal(two.values[two.chooses & two.positive], one.values[[0, 2]])
    assert torch.equal(two.values[two.chooses & ~two.positive], one.values[[4, 6]])
    every = fg.max_activations(llama, tokenizer, sae, pairs, halves=False)
    assert every.chooses.all()
    assert not every.reports
    with pytest.raises(fg.DataError, match="at least 4"):
        fg.max_activations(llama, tokenizer, sae, {"positive": TEXTS[:3], "negative": OTHERS})


def planted(texts=40, features=60, seed=0):
    """Activations of which feature 7 tells the sides apart, and 11 does so on the half that chooses alone."""
    g = torch.Generator().manual_seed(seed)
    positive = [n % 2 == 0 for n in range(texts)]
    chooses = [n < texts // 2 for n in range(texts)]
    values = torch.randn(texts, features, generator=g).relu()
    values[:, 3] = 0
    for n in range(texts):
        values[n, 7] = 1.0 + positive[n]
        values[n, 11] = 1.0 + (positive[n] if chooses[n] else n % 4 < 2)
    return activations_of(values, positive, chooses)


@pytest.mark.parametrize("rank", [fg.max_auc, lambda a: fg.calibrated_f1(a, min_support=10)])
def test_a_planted_feature_is_found_and_one_of_chance_is_told_by_the_other_half(rank):
    found = rank(planted())
    assert found[:2] == [7, 11], "of equal scores the lower id"
    top = found.top(2)
    assert [row.score for row in top] == [1.0, 1.0]
    assert top[0].held_out == 1.0
    assert top[1].held_out < 0.7
    assert 3 not in found, "a feature that never fires is not compared"
    assert found.compared == len(found) == 59
    assert 0.5 < found.chance < 1.0 or found.by == "calibrated_f1"
    assert rank(planted()).chance == found.chance
    assert "59" in found.about()


def test_chance_is_what_unrelated_features_reach():
    """The best of 200 unrelated features on other data lies near the median of permutations."""
    g = torch.Generator().manual_seed(1)
    positive = [n % 2 == 0 for n in range(30)]
    best = []
    for _ in range(11):
        found = fg.max_auc(activations_of(torch.rand(30, 200, generator=g), positive), permutations=15)
        best.append(float(found.scores[0]))
        assert found.held_out is None
    median = sorted(best)[5]
    assert found.chance == pytest.approx(median, abs=0.04)  # quartiles of the best of 200 are .02 off
    assert median > 0.75


def test_a_ranking_is_a_sequence_of_ids(sae):
    scores = torch.tensor([0.1, torch.nan, 0.4, 0.4, *[0.0] * 20], dtype=torch.float64)
    ranking = fg.FeatureRanking.of("mine", scores, sae)
    assert (ranking[0], ranking[:3], list(ranking)[:3]) == (2, [2, 3, 0], [2, 3, 0])
    assert (2 in ranking, 1 in ranking, len(ranking)) == (True, False, 23)
    assert ranking.pairs()[0] == (2, 0.4)
    assert fg.from_features(sae, ranking[:2]).features == {2: 1.0, 3: 1.0}
    assert ranking.check(sae) is ranking
    with pytest.raises(fg.PairingError, match="ranking of the features"):
        ranking.check(make_sae(seed=5))
    with pytest.raises(fg.SelectionError, match="no feature to rank by mine"):
        fg.FeatureRanking.of("mine", torch.full((24,), torch.nan), sae)
    assert ranking.as_dict(1)["features"] == [{"id": 2, "score": 0.4, "held_out": None, "label": ""}]
    assert "<table" in ranking._repr_html_()


def test_a_ranking_goes_into_training(llama, tokenizer, sae):
    ranking = fg.rank_features(llama, tokenizer, sae, SET)
    quick = fg.VectorTraining.recipe("lm", epochs=1, init=0.5)
    vector = fg.train(llama, tokenizer, SET, objective=quick, space="sae", sae=sae, features=ranking[:3])
    assert set(vector.features) == set(ranking[:3])


def test_what_cannot_be_ranked(sae):
    values = torch.zeros(8, 24)
    with pytest.raises(fg.SelectionError, match="no feature that fires"):
        fg.max_auc(activations_of(values, [True, False] * 4))
    with pytest.raises(fg.SelectionError, match="4 positive texts to choose on"):
        fg.calibrated_f1(activations_of(values + 1, [True, False] * 4))
    with pytest.raises(fg.DataError, match="base_rate"):
        fg.calibrated_f1(activations_of(values + 1, [True, False] * 4), base_rate=0.0)


# ---------------------------------------------------------------- by what features do


def test_the_change_of_confidence_is_that_of_single_passes(llama, tokenizer, sae):
    prompt, k, c = "the old king", 3, 4.0
    ids = tokenizer(prompt)["input_ids"]
    layer = sae.hookpoint.layer
    size = c * max(sae.encode(reference.hidden(llama, ids, layer)[-1]).tolist())
    found = fg.confidence_change(llama, tokenizer, sae, [2, 5, 9], prompt=prompt, coefficient=c, k=k, batch_size=2)
    before = reference.confidence(reference.next_logits(llama, ids), k)
    expected = {
        j: abs(reference.confidence(reference.next_logits(llama, ids, layer, size * sae.W_dec[j]), k) - before)
        for j in (2, 5, 9)
    }
    assert list(found) == sorted(expected, key=lambda j: -expected[j])
    # float32 logits of size 10
    assert dict(found.pairs()) == pytest.approx(expected, abs=1e-4)
    assert found.settings["k"] == k


def test_no_amplification_changes_no_confidence(llama, tokenizer, sae):
    found = fg.confidence_change(llama, tokenizer, sae, prompt="the old king", coefficient=0.0)
    assert found.compared == sae.d_sae
    assert float(found.scores.abs().max()) < 1e-5  # rounding of another batch size
    with pytest.raises(fg.SelectionError, match="k = 0"):
        fg.confidence_change(llama, tokenizer, sae, prompt="the old king", k=0)


def test_the_causal_effect_is_the_row_of_the_effects(sae):
    g = torch.Generator().manual_seed(0)
    effects = fg.EffectApproximator(torch.randn(32, 24, generator=g), torch.zeros(24), sae.hookpoint, sae.sha256)
    found = dict(fg.causal_effect(sae, effects, {3: 1.0, 8: -2.0}).pairs())
    for j in range(sae.d_sae):
        row = [float(x) for x in sae.W_dec[j]]
        norm = math.sqrt(sum(x * x for x in row))
        moved = sum(x / norm * float(effects.M[n, 3] - 2 * effects.M[n, 8]) for n, x in enumerate(row))
        assert found[j] == pytest.approx(moved, rel=1e-5, abs=1e-6)  # M is float32
    with pytest.raises(fg.PairingError):
        fg.causal_effect(make_sae(seed=3), effects, [3])


def test_the_measured_effect_is_the_rise_of_the_target(llama, tokenizer, sae):
    """Against the rollouts of each feature alone; the same prompts and random numbers."""
    from fgsteer.effects.rollouts import Sampling, rollout_features

    prompts, sampling = ["the man", "a queen said"], Sampling(max_new_tokens=4)
    options = {"strength": 30.0, "prompts": prompts, "sampling": sampling, "rollouts": 2}
    found = fg.measured_effect(llama, tokenizer, sae, [4, 1, 9], {2: 1.0}, rows=4, **options)
    ids = tokenizer(prompts, return_tensors="pt", padding=True)
    encoded = ids["input_ids"], ids["attention_mask"]
    for j in (4, 1, 9):
        row = sae.W_dec[j]
        add = fg.Add(direction=30.0 * row / row.norm(), coefficient=1.0, hookpoint=sae.hookpoint, bos=True)
        acts = [rollout_features(llama, encoded, sae, [None, add], sampling, n)[:, 2] for n in (0, 1)]
        rises = [float(a[1] - a[0]) for a in acts]
        row = next(row for row in found.top() if row.id == j)
        assert (row.score, row.held_out) == pytest.approx(rises, abs=1e-5)  # float32 means in other batches
    assert found.compared == 3


@pytest.mark.parametrize("by", RANKINGS)
def test_every_ranking_by_its_name(by, llama, tokenizer, sae):
    effects = fg.EffectApproximator(torch.randn(32, 24), torch.zeros(24), sae.hookpoint, sae.sha256)
    extra = {"min_support": 2} if by == "calibrated_f1" else {"prompt": "the man"} if by == "confidence_change" else {}
    found = fg.rank_features(llama, tokenizer, sae, SET, by=by, effects=effects, **extra)
    assert found.by == by
    assert found.compared == len(set(found)) > 5
    if by in fg.SCORES or by in ("max_auc", "calibrated_f1"):
        assert found.held_out is not None


def test_names_that_rank_nothing(llama, tokenizer, sae):
    assert list(SCORE_NAMES) == list(fg.SCORES)
    with pytest.raises(fg.SelectionError, match="max_auc, calibrated_f1"):
        fg.rank_features(llama, tokenizer, sae, SET, by="fame")
    with pytest.raises(fg.SelectionError, match="Pass effects="):
        fg.rank_features(llama, tokenizer, sae, SET, by="causal_effect")
    with pytest.raises(fg.SelectionError, match="k with by='welch_t'"):
        fg.rank_features(llama, tokenizer, sae, SET, by="welch_t", k=3)
    with pytest.raises(fg.ArgumentError, match="fame"):
        fg.rank_features(llama, tokenizer, sae, SET, fame=3)
    score = fg.rank_features(llama, tokenizer, sae, SET, by="mean_difference")
    half = fg.ContrastSet("half", positives=TEXTS[::2], negatives=OTHERS[::2])
    moments = fg.collect(llama, tokenizer, half, sae=sae).at("feature")[1]
    assert dict(score.pairs())[score[0]] == pytest.approx(float(moments.difference[score[0]]), rel=1e-6)


# ---------------------------------------------------------------- outcomes


rewards = st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=3, max_size=12)


@settings(deadline=None, max_examples=25)
@given(rewards, st.integers(1, 5), st.integers(0, 99))
def test_a_streamed_correlation_is_that_of_loops(y, cut, seed):
    x = torch.randn(len(y), 4, generator=torch.Generator().manual_seed(seed)) * 3 + 100
    x[:, 2] = 5.0  # a feature that does not vary
    found = Correlation.empty(4)
    for start in range(0, len(y), cut):
        found.add(x[start : start + cut], torch.tensor(y[start : start + cut]))
    for j, r in enumerate(found.r().tolist()):
        expected = reference.pearson([float(v) for v in x[:, j].double()], y)
        # deviations of 3 around 100, in float64
        assert math.isnan(r) if expected is None else r == pytest.approx(expected, abs=1e-9), j


def test_a_feature_that_is_the_reward_has_correlation_1():
    y = torch.tensor([0.0, 1, 1, 0, 1, 0])
    found = Correlation.empty(3)
    found.add(torch.stack([y, 1 - y, torch.zeros(6)], 1), y)
    assert found.r()[:2].tolist() == pytest.approx([1.0, -1.0], abs=1e-12)
    assert math.isnan(float(found.r()[2]))


def test_the_largest_correlation_of_chance_is_that_of_simulations():
    """Medians and quartiles of 100 draws; the published ones are .062 to .069 for 16,384 features and 4,000 samples."""
    middle = [fg.largest_chance_correlation(4000, 16384, q) for q in (0.25, 0.5, 0.75)]
    assert middle == sorted(middle)
    assert 0.062 <= middle[0] < middle[2] <= 0.069
    g = torch.Generator().manual_seed(0)
    for samples, columns in ((12, 50), (60, 400)):
        drawn = []
        for _ in range(100):
            x = torch.randn(samples, columns, generator=g, dtype=torch.float64)
            y = torch.randn(samples, generator=g, dtype=torch.float64)
            r = torch.corrcoef(torch.cat([x, y[:, None]], 1).T)[-1, :-1]
            drawn.append(float(r.abs().max()))
        drawn.sort()
        # the median of 100 has a standard error of some 1.25 σ/10, and σ is about .05 and .03
        assert fg.largest_chance_correlation(samples, columns) == pytest.approx(drawn[50], abs=0.02)
    assert fg.largest_chance_correlation(3, 1, 0.5) == pytest.approx(math.sin(math.pi / 4), abs=1e-6)  # θ is uniform


def test_the_ratio_of_side_effects():
    assert change_of([0, 1, 1, 0], [1, 1, 0, 0]).side_effect_ratio == 0.5
    assert change_of([0, 1, 0], [0, 1, 0]).side_effect_ratio is None, "a copy changed nothing"
    assert change_of([1, 1, 0], [0, 0, 1]).side_effect_ratio == pytest.approx(2 / 3)
    with pytest.raises(fg.DataError):
        change_of([1], [1, 2])


def has(word):
    return lambda _, answer: float(word in answer.split())


def frequent_word(model, tokenizer, new):
    """A word that some of the answers have, and others lack."""
    answers = greedy_answers(model, tokenizer, PROMPTS, max_new_tokens=new)
    words = {word for answer in answers for word in answer.text.split()}
    chooses = [answer.text.split() for n, answer in enumerate(answers) if n % 4 < 2]
    return max(sorted(words), key=lambda word: -abs(sum(word in answer for answer in chooses) - len(chooses) / 2))


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_corrsteer_is_the_loop_over_prompts(kind, llama, tokenizer):
    sae, new = make_sae(kind), 4
    word = frequent_word(llama, tokenizer, new)
    found = fg.corrsteer(llama, tokenizer, sae, PROMPTS, has(word), max_new_tokens=new, variant="S", rows=5)
    chosen = [prompt for n, prompt in enumerate(PROMPTS) if n % 4 < 2]
    texts = [reference.greedy(llama, tokenizer(prompt)["input_ids"], new) for prompt in chosen]
    said = [float(word in tokenizer.decode(ids[-new:]).split()) for ids in texts]
    r, coefficients = reference.corrsteer(llama, tokenizer, sae, chosen, said, new)
    got = dict(found.rankings[0].pairs())
    assert set(got) == {j for j, value in enumerate(r) if value is not None}
    for j, value in got.items():
        assert value == pytest.approx(r[j], abs=1e-4)  # of activations in float32
    best = found.rankings[0][0]
    (vector,) = found.vectors
    assert set(vector.features) == {best}
    assert vector.features[best] == pytest.approx(coefficients[best], rel=1e-4)
    assert torch.allclose(vector.direction, vector.features[best] * sae.W_dec[best], rtol=1e-6)
    assert found.compared == len(got)
    assert found.chance == fg.largest_chance_correlation(8, len(got))
    assert found.report.items == 4
    (add,) = found.steering
    assert add.scope == "reply"


def test_steering_acts_from_the_last_token_of_the_prompt_on(llama, tokenizer, sae):
    word = frequent_word(llama, tokenizer, 4)
    found = fg.corrsteer(llama, tokenizer, sae, PROMPTS, has(word), max_new_tokens=4)
    reported = PROMPTS[3::4]
    after = fg.generate(llama, tokenizer, reported, steering=found.steering, max_new_tokens=4, do_sample=False)
    assert found.report.after == pytest.approx(sum(word in text.split() for text in after) / len(after))


def test_variants_and_layers(llama, tokenizer):
    saes = [make_sae(layer=layer, seed=layer) for layer in (0, 1, 2)]
    reward = has(frequent_word(llama, tokenizer, 4))
    one, every = (
        fg.corrsteer(llama, tokenizer, saes, PROMPTS, reward, variant=variant, max_new_tokens=4) for variant in "SA"
    )
    assert [v.hookpoint.layer for v in every.vectors] == [0, 1, 2]
    best = max(every.vectors, key=lambda v: v.provenance["hyperparameters"]["r"])
    assert one.vectors[0].features == best.features
    assert one.compared == sum(ranking.compared for ranking in one.rankings)


def test_a_layer_that_helps_is_kept_by_p(llama, tokenizer, monkeypatch):
    """What validates is decided by a reward that is better wherever anything steers at layer 1 alone."""
    from fgsteer.selection import corrsteer as module

    saes = [make_sae(layer=layer, seed=layer) for layer in (0, 1)]
    word = frequent_word(llama, tokenizer, 4)
    plain = module._Trial.answer

    def answer(self, numbers, steering=None):
        answers, values = plain(self, numbers, steering)
        if steering:
            values = [2.0 if [i.hookpoint.layer for i in steering] == [1] else -1.0 for _ in values]
        return answers, values

    monkeypatch.setattr(module._Trial, "answer", answer)
    found = fg.corrsteer(llama, tokenizer, saes, PROMPTS, has(word), variant="P", max_new_tokens=4)
    assert [v.hookpoint.layer for v in found.vectors] == [1]
    assert [change.after for change in found.validation] == [-1.0, 2.0]
    assert found.report.after == 2.0


@pytest.mark.parametrize("kind", [np.bool_, np.int64, np.float32, torch.tensor])
def test_rewards_of_numpy_and_torch_are_those_of_python(kind, llama, tokenizer, sae):
    def reward(number, answer):
        return float(len(answer) % 2)

    plain = fg.corrsteer(llama, tokenizer, sae, PROMPTS, reward, max_new_tokens=2)
    found = fg.corrsteer(llama, tokenizer, sae, PROMPTS, lambda n, answer: kind(reward(n, answer)), max_new_tokens=2)
    assert (found.report, found.vectors[0].features) == (plain.report, plain.vectors[0].features)


def test_a_reward_that_does_not_vary_selects_nothing(llama, tokenizer, sae):
    with pytest.raises(fg.SelectionError, match="a reward of 1 for all 8 answers"):
        fg.corrsteer(llama, tokenizer, sae, PROMPTS, lambda n, answer: 1.0, max_new_tokens=2)
    with pytest.raises(fg.SelectionError, match=r"no answer with a reward above 0\.5"):
        fg.corrsteer(llama, tokenizer, sae, PROMPTS, lambda n, answer: 0.1 * (n % 2), max_new_tokens=2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": PROMPTS[:9]}, "at least 16 prompts"),
        ({"prompts": "the man"}, "one text"),
        ({"reward": 3}, "3 for reward"),
        ({"reward": lambda n, answer: "good"}, "the reward 'good'"),
        ({"reward": lambda n, answer: math.nan}, "the reward nan"),
        ({"variant": "G"}, "variant='G'"),
        ({"saes": []}, "no SAE"),
        ({"saes": [make_sae(), make_sae(seed=1)]}, "two SAEs"),
    ],
)
def test_outcomes_that_cannot_be(changes, told, llama, tokenizer, sae):
    given = {"saes": sae, "prompts": PROMPTS, "reward": has("the"), "max_new_tokens": 2, **changes}
    with pytest.raises(fg.DataError, match=told):
        fg.corrsteer(llama, tokenizer, given.pop("saes"), given.pop("prompts"), given.pop("reward"), **given)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mamba"])
def test_answers_of_other_families_are_those_of_generate(family, tokenizer):
    model = model_of(family)
    prompts = PROMPTS[:1] if family == "mamba" else PROMPTS[:5]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=5, rows=3)
    assert [answer.text for answer in answers] == [
        fg.generate(model, tokenizer, prompt, max_new_tokens=5, do_sample=False)[0] for prompt in prompts
    ]


def test_an_answer_ends_where_the_model_ends_it(tokenizer):
    """The token that chose the end counts among those that chose."""
    model = tiny_model("llama")
    free = greedy_answers(model, tokenizer, ["the old king"], max_new_tokens=6)[0]
    assert not free.ended
    assert len(free.row(0).selected) == 6
    model.generation_config.eos_token_id = free.ids[2]
    ended = greedy_answers(model, tokenizer, ["the old king", "a"], max_new_tokens=[6, 2])
    first = free.ids.index(free.ids[2])
    assert (ended[0].ids, ended[0].ended) == (free.ids[:first], True)
    row = ended[0].row(0)
    assert list(row.selected) == list(range(len(ended[0].prompt) - 1, len(row.ids)))
    assert len(ended[1].ids) <= 2


# ---------------------------------------------------------------- the learned mask


def test_a_mask_is_learned_as_by_the_loop(tokenizer):
    """Losses and the numbers of the mask after four steps, by loops over texts and tokens and Adam by hand."""
    model, sae, ids = tiny_model("llama", dtype=torch.float64), make_sae(), [3, 8, 15]
    pairs = [fg.ContrastPair(a, b, "he said") for a, b in zip(TEXTS, OTHERS, strict=False)]
    options = {"strength": 0.5, "sparsity": 0.3, "epochs": 2, "batch": 1, "lr": 2e-3, "seed": 1}
    found = fg.learned_mask(model, tokenizer, sae, pairs, features=ids, temperatures=(1e-2, 1e-3), **options)
    half = fg.collect(model, tokenizer, pairs[::2], sae=sae, tokens="answer").at("feature")[1].difference
    rows = []
    for pair in pairs[::2]:
        start = len(tokenizer("he said")["input_ids"])
        rows.append((tokenizer(f"he said {pair.positive}")["input_ids"], start))
    writes = [0.5 * half[j] * sae.W_dec[j].double() for j in ids]
    order = list(masks._order([0, 1], 2, 1, 1))
    m, losses = reference.learn_mask(model, 1, rows, writes, order, lr=2e-3, sparsity=0.3, first=1e-2, last=1e-3)
    # log-probabilities are taken in float32, and Adam magnifies the rounding of small gradients
    assert found.settings["losses"] == pytest.approx(losses, rel=1e-5)
    scores = dict(found.pairs())
    assert [scores[j] for j in ids] == pytest.approx(m, rel=2e-2, abs=2e-5)
    assert found.settings["mask"] == [j for j, value in zip(ids, m, strict=True) if value > 0]


def test_a_mask_takes_what_helps_and_leaves_what_harms(llama, tokenizer):
    without_gradients = [p.grad is None for p in llama.parameters()]  # other tests may leave some
    """One candidate writes what raises the winners' likelihood most, the other its opposite."""
    sae = make_sae()
    vector = fg.train(llama, tokenizer, SET, objective=fg.VectorTraining.recipe("lm", epochs=12, lr=0.05), hookpoint=1)
    stats = fg.collect(llama, tokenizer, fg.ContrastSet("x", positives=TEXTS[::2], negatives=OTHERS[::2]), sae=sae)
    d = stats.at("feature")[1].difference
    W_dec = sae.W_dec.clone()
    good, bad = [int(j) for j in d.abs().topk(2).indices]
    W_dec[good], W_dec[bad] = vector.direction / d[good], -vector.direction / d[bad]
    sae = replace(sae, W_dec=W_dec)
    found = fg.learned_mask(llama, tokenizer, sae, SET, features=[good, bad], sparsity=0.0, epochs=6)
    assert found.settings["mask"] == [good]
    assert found[0] == good
    losses = found.settings["held_out_loss"]
    assert losses["mask"] < losses["none"] == pytest.approx(losses["all"], rel=1e-4), "the two cancel"
    assert [p.grad is None for p in llama.parameters()] == without_gradients


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"features": []}, fg.SelectionError, "each of them once"),
        ({"features": [99]}, fg.SelectionError, "feature 99"),
        ({"temperatures": (1e-2,)}, fg.DataError, "two numbers"),
        ({"lr": -1.0}, fg.DataError, "lr"),
        ({"epochs": 0}, fg.DataError, "epochs"),
    ],
)
def test_masks_that_cannot_be_learned(changes, kind, told, llama, tokenizer, sae):
    with pytest.raises(kind, match=told):
        fg.learned_mask(llama, tokenizer, sae, SET, **changes)


def test_a_loss_that_is_no_number_ends_a_mask(llama, tokenizer, sae, monkeypatch):
    monkeypatch.setattr(masks._MaskLearner, "backward", lambda self, m, temperature, rows: math.nan)
    with pytest.raises(fg.DataError, match="a loss of nan at step 0"):
        fg.learned_mask(llama, tokenizer, sae, SET, features=2)


# ---------------------------------------------------------------- the command line


def test_features_are_ranked_on_the_command_line(tmp_path):
    result = invoke_on_cpu("features", "--rank", "max_auc", "--contrast", "sea", "--top", 3, "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["ranking"]["by"] == "max_auc"
    assert [row["id"] for row in told["features"]] == [row["id"] for row in told["ranking"]["features"]]
    assert told["features"][0]["id"] == 2326, "the shipped feature of the sea"


def test_rewards_are_numbers_of_any_kind():
    from fgsteer.selection.corrsteer import _as_float

    whole = torch.tensor([1.0], requires_grad=True)
    for one in (True, 1, 1.0, np.bool_(True), np.array(True), np.array([1.0]), torch.tensor(True), whole):
        assert _as_float(one) == 1.0
    for none in ("1", None, np.array([1.0, 2.0]), torch.ones(2), np.array(["a"])):
        assert math.isnan(_as_float(none))
