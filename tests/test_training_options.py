"""What training can be asked for besides objectives: selected features, gradient checkpointing, passes, notes."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.learning import running_cost
from fgsteer.learning.response_passes import ResponsePasses
from fgsteer.learning.selections import parse_selection, selected_features
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, tiny_model
from tests.reference import selections as reference

AT = fg.Hookpoint(0)
PAIRS = [
    fg.ContrastPair("the bride wore a ring", "a dog sat", "the man said"),
    fg.ContrastPair("happy and good", "sad", "he is"),
    fg.ContrastPair("took the queen", "ran in the house .", "she"),
    fg.ContrastPair("they was happy on the sea", "no", "I think"),
    fg.ContrastPair("sat in the church", "was old", "the king"),
]
CONTRAST = fg.ContrastSet("pairs", pairs=PAIRS)


# ---------------------------------------------------------------- which features


@pytest.fixture(scope="module")
def sae():
    return make_sae("relu", d_sae=40)


@pytest.fixture(scope="module")
def read(models, tokenizer, sae):
    """By plain passes, (largest activations, mean activations, whether positive) of every answer."""
    largest, means, positive = [], [], []
    for side in (True, False):
        for pair in PAIRS:
            answer = pair.positive if side else pair.negative
            start = len(tokenizer(pair.prompt)["input_ids"])
            ids = tokenizer(f"{pair.prompt} {answer}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states = models["llama"](ids, output_hidden_states=True).hidden_states
            z = sae.encode(states[sae.hookpoint.layer + 1][0, start:].float())
            largest.append(z.max(0).values.tolist())
            means.append(z.double().mean(0).tolist())
            positive.append(side)
    return largest, means, positive


def chosen(llama, tokenizer, sae, text):
    return selected_features(llama, tokenizer, CONTRAST, sae, parse_selection(text))


def column(rows, j):
    return [row[j] for row in rows]


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_spare_is_a_share_of_the_mutual_information(share, llama, tokenizer, sae, read):
    _, means, positive = read
    values = [reference.mutual_information([x > 0 for x in column(means, j)], positive) for j in range(sae.d_sae)]
    # a feature that fires equally often on both sides has none, and rounding may leave it just above
    values = [0.0 if value < 1e-12 else value for value in values]
    found = chosen(llama, tokenizer, sae, f"spare:{share}")
    expected = reference.up_to_share(values, share * (1 + 1e-9))
    assert sorted(found) == sorted(expected)
    assert [values[j] for j in found] == pytest.approx(sorted((values[j] for j in found), reverse=True))
    assert len(found) < sae.d_sae or share == 1.0


def test_corrsteer_is_the_correlation_of_maxima(llama, tokenizer, sae, read):
    largest, _, positive = read
    r = [reference.pearson(column(largest, j), positive) for j in range(sae.d_sae)]
    best = sorted((j for j in range(sae.d_sae) if r[j] > 0), key=lambda j: -r[j])
    assert chosen(llama, tokenizer, sae, "corrsteer:6") == best[:6]
    assert chosen(llama, tokenizer, sae, "corrsteer:1000") == best
    assert 6 < len(best) < sae.d_sae


def test_ssv_is_what_the_closed_form_weights(llama, tokenizer, sae, read):
    _, means, positive = read
    scores = [reference.f_statistic(column(means, j), positive) for j in range(sae.d_sae)]
    first = sorted(range(sae.d_sae), key=lambda j: -scores[j])[:9]

    def difference(j):
        sides = [[x for x, p in zip(column(means, j), positive, strict=True) if p == s] for s in (True, False)]
        return sum(sides[0]) / len(sides[0]) - sum(sides[1]) / len(sides[1])

    weighted = {j: abs(2 * difference(j)) - 0.01 for j in first if abs(2 * difference(j)) > 0.01}
    assert chosen(llama, tokenizer, sae, "ssv:9") == sorted(weighted, key=lambda j: -weighted[j])


def test_difference_is_the_number(llama, tokenizer, sae, read):
    settings = fg.VectorTraining.recipe("lm", epochs=1, init=0.05)
    options: Any = {"objective": settings, "space": "sae", "sae": sae}
    by_number = fg.train(llama, tokenizer, CONTRAST, features=7, **options)
    by_name = fg.train(llama, tokenizer, CONTRAST, features="difference:7", **options)
    assert by_name.features == by_number.features
    assert len(by_name.features) == 7
    assert by_name.provenance["hyperparameters"]["selection"] == "difference:7"


@pytest.mark.parametrize("name", ["difference", "spare", "corrsteer", "ssv"])
def test_selections_are_trained(name, llama, tokenizer, sae):
    settings = fg.VectorTraining.recipe("lm", epochs=1, init=0.05)
    vector = fg.train(llama, tokenizer, CONTRAST, objective=settings, space="sae", sae=sae, features=name)
    assert set(vector.features) == set(chosen(llama, tokenizer, sae, name))
    assert vector.provenance["hyperparameters"]["selection"] == str(parse_selection(name))


@pytest.mark.parametrize(
    ("features", "error", "match"),
    [
        ("sparse", fg.SelectionError, "difference:256, spare:0.07, corrsteer:32, ssv:128"),
        ("ssv:1.5", fg.SelectionError, "whole number"),
        ("ssv:0", fg.DataError, "the number of ssv"),
        ("spare:1.5", fg.DataError, "the share of spare"),
        ("spare:1.2.3", fg.SelectionError, "a share"),
        ("spare:nan", fg.SelectionError, "a selection such as"),
        ([1.5], fg.SelectionError, "ids"),
        (0, fg.DataError, "features = 0"),
    ],
)
def test_other_selections_are_refused(features, error, match, llama, tokenizer, sae):
    with pytest.raises(error, match=match):
        fg.train(llama, tokenizer, CONTRAST, space="sae", sae=sae, features=features)


def test_sides_that_are_alike_select_nothing(llama, tokenizer, sae):
    same = fg.ContrastSet("same", pairs=[fg.ContrastPair(p.positive, p.positive, p.prompt) for p in PAIRS])
    for name in ("difference", "spare", "corrsteer"):
        with pytest.raises(fg.SelectionError, match="features=None"):
            selected_features(llama, tokenizer, same, sae, parse_selection(name))


# ---------------------------------------------------------------- passes


def log_probabilities(model, tokenizer, at, v, **options):
    """Log-probabilities of all answers with v added at a hookpoint, as one pass after another, and v's gradient."""
    pairs = [(pair.prompt, answer) for pair in PAIRS for answer in (pair.positive, pair.negative)]
    passes = ResponsePasses(model, tokenizer, at, pairs, **options)
    values = []
    for part in passes.split(range(len(pairs)), lambda n: [n]):
        entry = fg.Add(direction=v, hookpoint=at, coefficient=2.0)
        values.append(passes.log_probabilities(part, [entry] * len(part)))
        values[-1].sum().backward()
    gradient, v.grad = v.grad.clone(), None
    return torch.cat(values), gradient


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_checkpointing_changes_no_gradient(family, site, tokenizer):
    model, at = tiny_model(family).requires_grad_(False), fg.Hookpoint(0, site)
    v = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = log_probabilities(model, tokenizer, at, v)
    found = log_probabilities(model, tokenizer, at, v, checkpointing=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)  # the same operations on the same numbers
    assert not any("forward" in vars(m) for m in model.modules())


def test_blocks_are_computed_again(tokenizer):
    """By a count: blocks above the hookpoint's run twice, and what a pass keeps for gradients is less."""
    model = tiny_model("llama").requires_grad_(False)
    v = torch.randn(D_MODEL).requires_grad_()
    counts: list[int] = []
    kept: list[int] = []
    for checkpointing in (False, True):
        runs = []
        handles = [
            layer.self_attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
            for layer in model.model.layers[1:]
        ]
        sizes: list[int] = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        if checkpointing:  # which keeps what goes into a block beside what it tells autograd
            handles += [
                layer.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(args[0].numel()))
                for layer in model.model.layers[1:]
            ]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            log_probabilities(model, tokenizer, AT, v, checkpointing=checkpointing, batch_tokens=4096)
        counts.append(len(runs))
        kept.append(sum(sizes))
        for handle in handles:
            handle.remove()
    blocks = len(model.model.layers) - 1
    assert counts == [blocks, 2 * blocks]
    assert kept[1] < 0.7 * kept[0]


def test_checkpointing_trains_the_same_vector(llama, tokenizer):
    options: Any = {"epochs": 2, "init": 0.02}
    vectors = [
        fg.train(
            llama, tokenizer, CONTRAST, objective=fg.VectorTraining.recipe("reps", checkpointing=on, **options),
            hookpoint=0,
        )
        for on in (False, True)
    ]  # fmt: skip
    assert torch.equal(vectors[0].direction, vectors[1].direction)
    assert vectors[1].provenance["hyperparameters"]["checkpointing"] is True


@pytest.mark.parametrize("batch_tokens", [1, 20, 60, 4096])
def test_passes_hold_so_many_tokens_and_give_the_same_gradients(batch_tokens, tokenizer):
    """Padding counts; a row that does not fit is a pass of its own; every row comes once."""
    model = tiny_model("llama", dtype=torch.float64).requires_grad_(False)
    pairs = [(pair.prompt, answer) for pair in PAIRS for answer in (pair.positive, pair.negative)]
    passes = ResponsePasses(model, tokenizer, AT, pairs, batch_tokens)
    parts = passes.split(range(len(pairs)), lambda n: [n])
    assert sorted(n for part in parts for n in part) == list(range(len(pairs)))
    for part in parts:
        assert len(part) * max(passes.tokens(n) for n in part) <= batch_tokens or len(part) == 1
    lengths = [passes.tokens(n) for part in parts for n in part]
    assert lengths == sorted(lengths, reverse=True)
    assert len(parts) == {1: 10, 4096: 1}.get(batch_tokens, len(parts))
    v = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    _, expected = log_probabilities(model, tokenizer, AT, v, batch_tokens=33)
    _, found = log_probabilities(model, tokenizer, AT, v, batch_tokens=batch_tokens)
    # log-probabilities and what steers are float32: sums of ten rows' gradients in another order
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.norm()) > 0.1


# ---------------------------------------------------------------- what is shown


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self):
        return True


def test_a_bar_shows_loss_and_cost(llama, tokenizer, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RANK", raising=False)
    settings = fg.VectorTraining.recipe("simpo", epochs=2, init=0.3)
    vector = fg.train(llama, tokenizer, CONTRAST, objective=settings, hookpoint=1)
    last = vector.provenance["training"]["losses"][-1][1]
    assert re.search(rf"loss {last:.3f}, neutral text [+-]\d+\.\d{{3}} nats a token", terminal.getvalue())
    terminal.truncate(0)
    quiet = fg.train(llama, tokenizer, CONTRAST, objective=settings, hookpoint=1, progress=False)
    assert terminal.getvalue() == ""
    assert torch.equal(quiet.direction, vector.direction), "what is shown changes nothing"
    done: list[Any] = []
    fg.train(llama, tokenizer, CONTRAST, objective=settings, hookpoint=1, progress=lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]


def test_the_cost_is_the_rise_of_the_cross_entropy(llama, tokenizer, monkeypatch):
    """At the median strength, measured seldom: the second call waits for nineteen times as long as the first took."""
    notes: list[Any] = []

    class Spy(running_cost.TrainingNote):
        def __call__(self, learners):
            notes.append((super().__call__(learners), self.rise, learners["vector"].weights.detach().clone(), self.due))
            return ""

    monkeypatch.setattr("fgsteer.learning.train.TrainingNote", Spy)
    monkeypatch.setattr("fgsteer.display.progress._without_note", lambda _, *__, note: note())
    settings = fg.VectorTraining.recipe("simpo", epochs=2, init=0.3, factors=(2.0, 4.0, 9.0))
    fg.train(llama, tokenizer, CONTRAST, objective=settings, hookpoint=1, progress=lambda *_: None)
    (said, rise, weights, due), (_, later, _, still) = notes
    texts = fg.load_neutral()[0][:8]
    base = fg.cross_entropy(llama, tokenizer, texts)
    steered = fg.cross_entropy(llama, tokenizer, texts, steering=fg.SteeringVector(weights, 1).add(4.0))
    assert rise == pytest.approx(steered - base, abs=1e-5)
    assert f"{rise:+.3f}" in said
    assert (later, still) == (rise, due), "it was not yet due again"


def test_the_cost_is_that_of_the_vector_in_its_units(llama, tokenizer, monkeypatch):
    """What the recipes in units of the activations return at their last step, of which the note is measured too."""
    rises: list[Any] = []

    class Spy(running_cost.TrainingNote):
        def __call__(self, learners):
            rises.append(self.measure(learners))
            return ""

    monkeypatch.setattr("fgsteer.learning.train.TrainingNote", Spy)
    monkeypatch.setattr("fgsteer.display.progress._without_note", lambda _, *__, note: note())
    settings = fg.VectorTraining.recipe("lm_relative", epochs=2)
    vector = fg.train(llama, tokenizer, CONTRAST, objective=settings, hookpoint=1, progress=lambda *_: None)
    texts = fg.load_neutral()[0][:8]
    base = fg.cross_entropy(llama, tokenizer, texts)
    steered = fg.cross_entropy(llama, tokenizer, texts, steering=vector.add(1.0))
    assert rises[-1] == pytest.approx(steered - base, abs=1e-5)  # rounding of float32
    assert abs(rises[-1]) > 1e-4, "the vector does something"


def test_a_checkpoint_knows_its_vectors_by_name(llama, tokenizer, tmp_path):
    data = {"one": PAIRS[:3], "other": PAIRS[2:]}
    options: Any = {"objective": "lm_relative", "hookpoint": 1, "work": tmp_path / "work", "progress": False}
    first = fg.train_many(llama, tokenizer, data, **options)
    again = fg.train_many(llama, tokenizer, dict(reversed(data.items())), **options)
    assert {name: vector.direction.tolist() for name, vector in again.items()} == {
        name: vector.direction.tolist() for name, vector in first.items()
    }
    assert not torch.equal(first["one"].direction, first["other"].direction)


def test_what_would_be_left_unread_is_refused(llama, tokenizer, tmp_path):
    with pytest.raises(fg.DataError, match="for space 'residual'"):
        fg.train(llama, tokenizer, CONTRAST, hookpoint=1, features=[1, 2])
    with pytest.raises(fg.DataError, match="objective"):
        fg.train(llama, tokenizer, CONTRAST, hookpoint=1, objective=["reps"])
    with pytest.raises(fg.FormatError):
        fg.train(llama, tokenizer, CONTRAST, hookpoint=1, work=tmp_path, fresh=True, progress=False)
    with pytest.raises(fg.ArgumentError, match="features"):
        fg.AxBenchPlan(settings={"reps": {"features": 8}})
