"""Patterns of steering: samples and the closed form, styles, perplexity, slopes by sign, the search for a suffix."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from scipy.stats import binomtest
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.evaluation.metrics.intervals import wilson
from fgsteer.evaluation.patterns.suffix import _Search
from fgsteer.models.hookpoints import blocks_of
from fgsteer.statistics.contrast import Contrast, ContrastStatistics, Pooled
from fgsteer.statistics.moments import Moments
from tests.helpers.cli import app
from tests.helpers.steering import vector
from tests.helpers.tiny import D_MODEL, model_of, tiny_model, word_tokenizer
from tests.reference import patterns as reference

AT = fg.Hookpoint(1)
QUESTIONS = fg.ContrastSet(
    "tea",
    [
        fg.ContrastPair(*answers, prompt=prompt)
        for answers, prompt in (
            (("yes", "no"), "the man said"),
            (("tea", "bread"), "a woman took"),
            (("happy", "sad"), "the king was"),
            (("sea", "war"), "she was in the"),
        )
    ],
)
PROMPTS = ["the man sat", "a dog ran to the house", "she took the ring"]


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, in which identities hold to rounding."""
    return tiny_model("llama", dtype=torch.float64)


def statistics(positive, negative, pairs=0):
    """Statistics of given examples at one hookpoint."""
    contrast = Contrast(Moments.of(positive), Moments.of(negative))
    return ContrastStatistics({AT: contrast}, pooled={AT: Pooled(positive, negative, pairs)})


def without_pooled(stats):
    return ContrastStatistics(stats.residual)


def planted(count, width, spread, seed=0, paired=False):
    """Two sides whose difference is μ = e₁, with tr Σ of the difference ``spread`` and, for pairs, a shared part."""
    g = torch.Generator().manual_seed(seed)
    scale = math.sqrt(spread / (2 * width))
    sides = [torch.randn(count, width, generator=g) * scale for _ in range(2)]
    sides[0][:, 0] += 1
    if paired:
        shared = 0.2 * torch.randn(count, width, generator=g)
        sides = [side + shared for side in sides]
    return statistics(sides[0], sides[1], pairs=count if paired else 0)


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("to", ["population", "full"])
def test_the_closed_form_equals_loops(paired, to):
    stats = planted(9, 5, 2.0, paired=paired)
    pooled = stats.pooled[AT]
    positive, negative = (side.double().tolist() for side in (pooled.positive, pooled.negative))
    naive = reference.expected_cosine(positive, negative, 4, paired=paired, to=to)
    # moments are of float32 rows, summed in float64
    assert fg.expected_cosine(stats, 4, to=to) == pytest.approx(naive, rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_resampled_cosines_are_those_of_the_closed_form(paired):
    """Of 800 texts with tr Σ = 40‖μ‖²; the mean of 20 resamples has a standard error of about 0.006."""
    stats = planted(800, 256, 40.0, paired=paired)
    truth = torch.zeros(256, dtype=torch.float64)
    truth[0] = 1
    for point in fg.sample_curve(stats):
        assert point.cosine == pytest.approx(point.expected, abs=0.02)
        assert point.low <= point.cosine <= point.high
        vectors = fg.resampled_vectors(stats, point.samples, seed=1)
        cosines = [float(v.direction.double() @ truth) / v.norm for v in vectors]
        assert sum(cosines) / len(cosines) == pytest.approx(point.population, abs=0.03)
    assert [point.samples for point in fg.sample_curve(stats)] == [5, 10, 20, 40, 80, 160, 320]


def test_the_numbers_of_texts_is_the_closed_form_solved():
    stats = planted(200, 64, 20.0)
    for cosine in (0.5, 0.9, 0.99):
        n = fg.samples_for(stats, cosine)
        assert fg.expected_cosine(stats, n) >= cosine > fg.expected_cosine(stats, n - 1)
    assert fg.samples_for(stats, 1e-6) == 1


def test_signal_is_estimated_without_bias():
    """Over many small sets ‖Δ‖² − tr Σ/N averages to ‖μ‖² = 1, where ‖Δ‖² alone averages to 1 + 4/8 = 1.5."""
    signals, plain = [], []
    for seed in range(400):
        stats = planted(8, 16, 4.0, seed=seed)
        _, contrast = stats.at("residual")
        plain.append(float(contrast.difference.square().sum()))
        try:
            cosine = fg.expected_cosine(stats, 1)
        except fg.SelectionError:  # the estimate is below 0 in some sets
            continue
        one = float(contrast.positive.variance.sum() + contrast.negative.variance.sum())
        signals.append(one / (cosine**-2 - 1))
    assert sum(plain) / len(plain) == pytest.approx(1.5, abs=0.1)  # standard error 0.03
    assert len(signals) > 380
    assert sum(signals) / len(signals) == pytest.approx(1.0, abs=0.12)  # standard error 0.03; without the sets below 0


def test_pairs_are_drawn_together_and_texts_once():
    """With one-hot examples a vector shows which were drawn: n of either side, a pair's two together."""
    eye = torch.eye(6)
    for pairs, negative in ((6, -eye), (0, torch.zeros(9, 6))):
        stats = statistics(eye, negative, pairs)
        for v in fg.resampled_vectors(stats, 4, resamples=5):
            drawn = v.direction[v.direction > 0]
            assert drawn.tolist() == pytest.approx([0.5 if pairs else 0.25] * 4)
        first, *_ = fg.resampled_vectors(stats, 4, seed=3)
        assert torch.equal(first.direction, fg.resampled_vectors(stats, 4, seed=3)[0].direction)
    whole = fg.resampled_vectors(stats, 6, resamples=1)[0]
    assert torch.allclose(whole.direction, fg.caa(statistics(eye, torch.zeros(6, 6))).direction)


def test_unpaired_moments_alone_are_enough():
    stats = planted(30, 16, 4.0)
    assert fg.expected_cosine(without_pooled(stats), 7) == fg.expected_cosine(stats, 7)
    with pytest.raises(fg.DataError, match="keep_pooled=True"):
        fg.sample_curve(without_pooled(stats))
    paired = planted(30, 16, 4.0, paired=True)
    assert fg.expected_cosine(without_pooled(paired), 7) < fg.expected_cosine(paired, 7), "what pairs share cancels"


def test_what_samples_refuse():
    same = statistics(torch.ones(4, 3) + torch.randn(4, 3), torch.ones(4, 3) + 2 * torch.randn(4, 3))
    chance = statistics(torch.tensor([[1.0], [-1.1]]), torch.tensor([[1.0], [-1.0]]))
    with pytest.raises(fg.SelectionError, match="by more than chance"):
        fg.expected_cosine(chance, 2)
    with pytest.raises(fg.DataError, match="One text has no spread"):
        fg.samples_for(statistics(torch.ones(1, 3), torch.zeros(4, 3)), 0.9)
    for cosine in (0, 1, 1.5):
        with pytest.raises(fg.DataError, match="cosine"):
            fg.samples_for(same, cosine)
    with pytest.raises(fg.DataError, match="from 1 to 4"):
        fg.expected_cosine(same, 5, to="full")
    with pytest.raises(fg.DataError, match="'population' or 'full'"):
        fg.expected_cosine(same, 2, to="all")
    with pytest.raises(fg.DataError, match="at least one of at most 4"):
        fg.sample_curve(same, [5])
    with pytest.raises(fg.DataError, match="samples = 5"):
        fg.resampled_vectors(same, 5)


# ---------------------------------------------------------------- perplexity


@pytest.mark.parametrize("relative", [False, True])
def test_perplexity_equals_plain_hooks(wide, tokenizer, relative):
    v, texts = vector(), ["the man sat", "a dog ran to the house"]
    found = fg.perplexity_curve(wide, tokenizer, v, [0.5, 0.25], texts=texts, relative=relative)
    assert [row.strength for row in found] == [-0.5, -0.25, 0.0, 0.25, 0.5]
    for row in found:
        total, count = 0.0, 0
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            add = reference.adding(v.direction.double(), row.strength, relative)
            total += reference.log_probability(wide, ids[:1], ids[1:], [(blocks_of(wide)[1], "out", add)])
            count += len(ids) - 1
        assert row.cross_entropy == pytest.approx(-total / count, abs=1e-6)  # logits are read in float32
        assert row.perplexity == pytest.approx(math.exp(row.cross_entropy))
    assert found[2].cross_entropy == fg.cross_entropy(wide, tokenizer, texts)


def test_strengths_of_perplexity_are_above_zero(llama, tokenizer):
    for strengths in ([], [0.0], [-1.0], [math.inf]):
        with pytest.raises(fg.DataError, match="numbers above 0"):
            fg.perplexity_curve(llama, tokenizer, vector(), strengths)


# ---------------------------------------------------------------- slopes


def test_layers_at_steps_of_depth():
    assert fg.depth_layers(5) == [0, 1, 2, 3, 4]
    assert fg.depth_layers(1) == [0]
    assert fg.depth_layers(41, 0.25) == [0, 10, 20, 30, 40]
    assert len(fg.depth_layers(80)) == 21
    with pytest.raises(fg.DataError, match="step"):
        fg.depth_layers(8, 0)


@pytest.mark.parametrize("relative", [False, True])
def test_slopes_equal_loops_with_plain_hooks(wide, tokenizer, relative):
    vectors = [vector(seed=layer, layer=layer) for layer in range(2)]
    found = fg.signed_slopes(wide, tokenizer, vectors, QUESTIONS, multipliers=[1, 0.5], relative=relative, share=0.3)
    for row, v in zip(found, vectors, strict=True):
        unit = 0.3 if relative else 1.0
        for sign, measured in ((1, row.positive), (-1, row.negative)):
            slopes = []
            for pair in QUESTIONS.pairs:
                points = []
                for m in (0.0, 0.5, 1.0):
                    change = reference.adding(v.direction.double(), sign * m * unit, relative)
                    hooks = [(blocks_of(wide)[v.hookpoint.layer], "out", change)]
                    values = []
                    for text in (pair.positive, pair.negative):
                        prompt_ids, ids = answer_ids(tokenizer, pair.prompt, text)
                        values.append(reference.log_probability(wide, prompt_ids, ids, hooks))
                    points.append((sign * m * unit, values[0] - values[1]))
                slopes.append(reference.slope(points))
            # log-probabilities are read in float32, and divided by strengths of about 0.1
            assert measured.mean == pytest.approx(sum(slopes) / len(slopes), abs=1e-4)
        assert row.difference.mean == pytest.approx(row.negative.mean - row.positive.mean)
        assert row.unit == "nats an answer"


def answer_ids(tokenizer, prompt, answer):
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    return ids[:-1], ids[-1:]


@pytest.mark.parametrize("relative", [False, True])
def test_both_signs_have_one_slope_where_the_output_is_linear(tokenizer, relative):
    """Without the final norm, logits are linear in the last block's output; probabilities would still saturate."""
    model = tiny_model("llama", dtype=torch.float64)
    model.model.norm = torch.nn.Identity()
    last = len(blocks_of(model)) - 1
    v = vector(layer=last)
    (row,) = fg.signed_slopes(model, tokenizer, [v], QUESTIONS, relative=relative, share=0.5)
    assert row.positive.mean == pytest.approx(row.negative.mean, rel=1e-4)  # log-probabilities are read in float32
    assert abs(row.positive.mean) > 1e-2
    assert row.depth == 1.0
    if not relative:
        head = model.get_output_embeddings().weight.detach().double()
        rows = [[head[tokenizer(text)["input_ids"][-1]] for text in (p.positive, p.negative)] for p in QUESTIONS.pairs]
        expected = [float((positive - negative) @ v.direction.double()) for positive, negative in rows]
        assert row.positive.mean == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        low, base, high = fg.answer_probabilities(
            model, tokenizer, QUESTIONS, [v.add(c) for c in (0.0, 1.0, 2.0)]
        ).share
        assert float((high + low - 2 * base).abs().max()) > 0.05, "from p = .9 one sign looks stronger by probabilities"


def test_what_slopes_refuse(llama, tokenizer):
    for multipliers in ([], [0.0], [-0.5]):
        with pytest.raises(fg.DataError, match="multipliers"):
            fg.signed_slopes(llama, tokenizer, [vector()], QUESTIONS, multipliers=multipliers)
    with pytest.raises(fg.SteeringError, match="norm 0"):
        fg.signed_slopes(llama, tokenizer, [vector() * 0.0], QUESTIONS)


# ---------------------------------------------------------------- styles


class Length:
    """A judge by the number of words."""

    name = "length"

    def score(self, texts, concept):
        return torch.tensor([min(1.0, len(text.split()) / 8) for text in texts])


def test_styles_equal_the_difference_of_two_passes(llama, tokenizer):
    steering = vector().add(2.0)
    rows = fg.measure_styles(
        llama,
        tokenizer,
        steering,
        {
            "own": QUESTIONS,
            "plain": fg.plain_questions(QUESTIONS),
            "open": fg.OpenStyle(PROMPTS, Length(), "tea", 6),
        },
    )
    for row, contrast in zip(rows, (QUESTIONS, fg.plain_questions(QUESTIONS)), strict=False):
        answers = fg.answer_probabilities(llama, tokenizer, contrast, [None, steering])
        change = answers.difference[1] - answers.difference[0]
        assert row.effect.mean == pytest.approx(float(change.mean()))
        assert row.moved.mean == float((change > 0).double().mean())
        assert row.unit == "nats an answer"
    texts = [
        fg.generate(llama, tokenizer, PROMPTS, steering=entry, max_new_tokens=6, do_sample=False)
        for entry in (None, steering)
    ]
    scores = [Length().score(side, "") for side in texts]
    assert rows[2].effect.mean == pytest.approx(float((scores[1] - scores[0]).mean()))
    assert (rows[2].unit, rows[2].effect.units) == ("score", 3)
    assert rows[0].gap is None
    for row in rows[1:]:
        naive = reference.newcombe(rows[0].moved.mean, 4, row.moved.mean, row.moved.units)
        assert list(row.gap) == pytest.approx(list(naive))


def test_no_strength_moves_half_of_the_items(llama, tokenizer):
    rows = fg.measure_styles(
        llama,
        tokenizer,
        vector().add(0.0),
        {"own": QUESTIONS, "open": fg.OpenStyle(PROMPTS, Length(), "tea", 4)},
    )
    assert [tuple(row.effect)[:3] for row in rows] == [(0.0, 0.0, 0.0)] * 2
    assert [row.moved.mean for row in rows] == [0.5, 0.5]
    assert rows[1].gap.mean == 0


def test_intervals_of_shares():
    for successes, trials in ((0, 5), (3, 7), (20, 20)):
        expected = binomtest(successes, trials).proportion_ci(method="wilson")
        assert list(wilson(successes, trials)) == pytest.approx([successes / trials, expected.low, expected.high])
    # 56 of 70 against 48 of 80, an example of Newcombe's paper
    assert reference.newcombe(0.8, 70, 0.6, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def said(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def test_questions_of_a_or_b_do_not_give_the_answer_away():
    replies = fg.load_contrast("cheerful")
    for chats in (True, False):
        made = fg.ab_questions(replies, chat=chats)
        assert [pair.positive for pair in made.pairs[:2]] == ["A", "B"]
        assert Counter(pair.positive for pair in made.pairs) == {"A": 20, "B": 20}
        for pair, reply in zip(made.pairs, replies.pairs, strict=True):
            text = said(pair.prompt)
            assert isinstance(pair.prompt, str) is not chats
            assert f"({pair.positive}) {reply.positive}\n" in text
            assert f"({pair.negative}) {reply.negative}\n" in text
        assert len(made.held_out.pairs) == 20


def test_questions_in_other_styles():
    replies = fg.load_contrast("cheerful")
    plain = fg.plain_questions(replies)
    asked = said(replies.pairs[0].prompt)
    assert plain.pairs[0].prompt == f"Question: {asked}\nAnswer:"
    assert plain.pairs[0].positive == replies.pairs[0].positive
    assert len(plain.held_out.pairs) == 20
    with pytest.raises(fg.DataError, match="pairs alone"):
        fg.ab_questions(fg.load_contrast("love"))
    with pytest.raises(fg.DataError, match="at least two prompts"):
        fg.OpenStyle(["one"], Length(), "tea")


def test_what_styles_refuse(llama, tokenizer):
    for styles in ({}, [QUESTIONS]):
        with pytest.raises(fg.DataError, match="at least one style"):
            fg.measure_styles(llama, tokenizer, vector().add(1.0), styles)
    with pytest.raises(fg.DataError, match="pairs alone"):
        fg.measure_styles(llama, tokenizer, vector().add(1.0), {"love": fg.load_contrast("love")})


# ---------------------------------------------------------------- suffixes


def rows_with(search, suffix):
    return [[*head, *suffix, *search.tail] for head in search.heads]


def search_of(model, tokenizer, v=None, prompts=PROMPTS):
    v = v or vector()
    return _Search(model, tokenizer, v.hookpoint, v.direction / v.direction.norm(), prompts, None)


def test_a_step_finds_the_best_token_where_all_are_tried(llama, tokenizer):
    v = vector()
    search = search_of(llama, tokenizer, v)
    vocabulary = len(tokenizer)
    found = fg.find_suffix(
        llama, tokenizer, v, PROMPTS, length=1, steps=1, candidates=vocabulary, top=vocabulary, threshold=-100.0
    )
    unit = v.direction / v.direction.norm()
    naive = {
        token: reference.mean_projection(llama, rows_with(search, [token]), blocks_of(llama)[1], unit)
        for token in search.allowed.tolist()
    }
    assert found.ids == (min(naive, key=naive.get),)
    assert found.history[-1] == pytest.approx(min(naive.values()), abs=1e-5)  # float32
    assert found.history[0] in [pytest.approx(value, abs=1e-5) for value in naive.values()]
    assert tokenizer(found.suffix)["input_ids"][-1] == found.ids[0]
    assert float(found.changed.mean()) == pytest.approx(found.history[-1], abs=1e-5), "the text is read as its tokens"


def test_the_gradient_is_that_of_one_hot_rows(llama, tokenizer):
    before = [parameter.grad for parameter in llama.parameters()]
    search = search_of(llama, tokenizer)
    suffix = search.allowed[[3, 11]].tolist()
    places = [[len(head), len(head) + 1] for head in search.heads]
    unit = vector().direction / vector().direction.norm()
    rows = rows_with(search, suffix)
    size = llama.get_input_embeddings().num_embeddings
    naive = reference.one_hot_gradient(llama, rows, places, blocks_of(llama)[1], unit, size)
    assert torch.allclose(search.gradient(suffix), naive, atol=1e-5 * float(naive.abs().max()))  # float32
    assert all(p.grad is grad for p, grad in zip(llama.parameters(), before, strict=True))


def test_a_suffix_is_searched_on_some_prompts_and_reported_on_others(llama, tokenizer):
    v = vector()
    others = ["the queen was happy", "a cat sat on the bread", "he said it", "they ran"]
    found = fg.find_suffix(
        llama, tokenizer, v, PROMPTS, held_out=others, coefficient=0.01, length=3, steps=6, randoms=4, seed=2
    )
    assert len(found.history) == 7
    assert list(found.history) == sorted(found.history, reverse=True)
    assert found.history[-1] < found.history[0]
    assert found.random.shape == (4, 4)
    assert found.added == pytest.approx(0.01 * v.norm)
    assert found.threshold == pytest.approx(float(found.plain.mean()))
    counted = [n for n in range(4) if found.plain[n] + found.added > found.threshold]
    flipped = sum(float(found.changed[n]) + found.added < found.threshold for n in counted)
    assert tuple(found.flips)[:2] == tuple(wilson(flipped, len(counted)))[:2]
    unit = v.direction / v.direction.norm()
    for text, projection in zip(others, found.changed, strict=True):
        ids = tokenizer(text + found.suffix)["input_ids"]
        naive = reference.mean_projection(llama, [ids], blocks_of(llama)[1], unit)
        assert float(projection) == pytest.approx(naive, abs=1e-5)
    same = fg.find_suffix(
        llama, tokenizer, v, PROMPTS, held_out=others, coefficient=0.01, length=3, steps=6, randoms=4, seed=2
    )
    assert same.ids == found.ids
    longer = found.append_to(QUESTIONS)
    assert longer.pairs[0].prompt == "the man said" + found.suffix
    assert longer.pairs[0].positive == "yes"


def test_no_step_keeps_a_random_suffix(llama, tokenizer):
    found = fg.find_suffix(llama, tokenizer, vector(), PROMPTS, length=4, steps=0, threshold=-100.0)
    assert len(found.history) == 1
    assert torch.equal(found.changed, found.random[0])


def test_a_chat_model_gets_the_suffix_in_the_users_message(llama):
    chatty = word_tokenizer()
    chatty.chat_template = (
        "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}a cat {% endif %}"
    )
    search = search_of(llama, chatty)
    assert chatty.decode(search.tail).split() == ["</s>", "a", "cat"]
    (row, *_) = rows_with(search, [chatty.convert_tokens_to_ids("king")])
    assert chatty.decode(row).split()[-6:] == ["man", "sat", "king", "</s>", "a", "cat"]
    found = fg.find_suffix(llama, chatty, vector(), PROMPTS, length=2, steps=2, threshold=-100.0)
    asked = [{"role": "user", "content": "the man sat" + found.suffix}]
    text = chatty.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    unit = vector().direction / vector().direction.norm()
    naive = reference.mean_projection(
        llama, [chatty(text, add_special_tokens=False)["input_ids"]], blocks_of(llama)[1], unit
    )
    assert float(found.changed[0]) == pytest.approx(naive, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "qwen2"])
@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_suffixes_of_other_families(family, site, tokenizer):
    model = model_of(family)
    found = fg.find_suffix(
        model, tokenizer, vector(site=site), PROMPTS, length=2, steps=3, candidates=8, threshold=-100.0
    )
    assert found.history[-1] < found.history[0]


def test_hooks_are_gone_after_an_exception(tokenizer, monkeypatch):
    model = tiny_model("llama")
    search = search_of(model, tokenizer)
    suffix = search.allowed[:2].tolist()

    def fail(*_, **__):
        raise RuntimeError("no pass")

    monkeypatch.setattr(blocks_of(model)[0], "forward", fail)
    with pytest.raises(RuntimeError, match="no pass"):
        search.gradient(suffix)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_search_refuses(llama, tokenizer):
    with pytest.raises(fg.DataError, match="of which 0 is on the vector's side"):
        fg.find_suffix(llama, tokenizer, vector(), PROMPTS, threshold=1e6)
    with pytest.raises(fg.DataError, match="does not chat"):
        fg.find_suffix(llama, tokenizer, vector(), [[{"role": "user", "content": "the man"}]] * 2, threshold=-100.0)
    with pytest.raises(fg.PairingError):
        fg.find_suffix(llama, tokenizer, fg.SteeringVector(torch.ones(D_MODEL + 1), AT), PROMPTS)
    with pytest.raises(fg.SteeringError, match="norm 0"):
        fg.find_suffix(llama, tokenizer, vector() * 0.0, PROMPTS)
    with pytest.raises(fg.DataError, match="length"):
        fg.find_suffix(llama, tokenizer, vector(), PROMPTS, length=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_twin_of_the_search(dtype, tokenizer):
    found = [
        fg.find_suffix(
            tiny_model("llama", dtype=dtype).to(device), tokenizer, vector(), PROMPTS, steps=0, threshold=-1e3
        )
        for device in ("cpu", "cuda")
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05  # bfloat16 keeps 8 bits
    assert torch.allclose(found[0].changed, found[1].changed, atol=tolerance)
    model = tiny_model("llama", dtype=dtype).to("cuda")
    searched = fg.find_suffix(model, tokenizer, vector(), PROMPTS, length=2, steps=3, threshold=-1e3)
    assert searched.history[-1] < searched.history[0]


# ---------------------------------------------------------------- the command line


def test_the_command_measures_what_it_is_asked():
    result = CliRunner().invoke(
        app, ["patterns", "love", "--only", "samples", "--only", "perplexity", "--layer", "1", "--json"]
    )
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout.splitlines()[-1])
    assert (output["contrast"], output["layer"], output["coefficient"]) == ("love", 1, None)
    stats = fg.collect(*fg.load_model("default"), "love", hookpoints=1, keep_pooled=True)
    assert [row["cosine"] for row in output["samples"]] == pytest.approx([p.cosine for p in fg.sample_curve(stats)])
    assert [row["strength"] for row in output["perplexity"]] == [-0.4, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.4]
    shown = CliRunner().invoke(app, ["patterns", "love", "--only", "samples"])
    assert "texts a side" in shown.output
    for arguments, message in ((["love", "--only", "styles"], "no pairs"), (["love", "--only", "x"], "one of samples")):
        with pytest.raises(fg.DataError, match=message):
            CliRunner().invoke(app, ["patterns", *arguments], catch_exceptions=False)
