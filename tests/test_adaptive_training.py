"""Trained strengths that depend on the token (PSR): both objectives against loops, recovery, several layers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.interventions.kernel import apply
from fgsteer.learning import adaptive
from fgsteer.learning.changes import answer_changes
from tests.helpers.steering import direction
from tests.helpers.tiny import D_MODEL, tiny_model
from tests.reference import adaptive as reference

AT, ABOVE = fg.Hookpoint(1), fg.Hookpoint(2)
TRIPLES = [
    ("the man said", "happy happy the man said", "the bride wore a ring"),
    ("he is", "happy happy he is", "happy and good"),
    ("she", "happy happy she", "took the queen"),
    ("I think", "happy happy I think", "they was happy on the sea"),
]


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, so that what differs from the naive loops is float32 rounding of what we add."""
    return tiny_model("llama", dtype=torch.float64)


def answer_states(model, tokenizer, side, layer):
    """By plain passes: activations (tokens, d) of each answer after block ``layer``, after prompt 0 or prompt 1."""
    found = []
    for prompts in TRIPLES:
        start = len(tokenizer(prompts[side])["input_ids"])
        ids = tokenizer(f"{prompts[side]} {prompts[2]}", return_tensors="pt")["input_ids"]
        outputs = []
        handle = model.model.layers[layer].register_forward_hook(lambda *a, o=outputs: o.append(a[2]))
        with torch.no_grad():
            model(ids)
        handle.remove()
        h = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        found.append(h[0, start:].float().double())
    return found


def test_changes_are_those_of_plain_passes(wide, tokenizer):
    """Local changes too, which add up to what has accumulated at the last hookpoint."""
    places = [fg.Hookpoint(0), AT, ABOVE]
    texts = [(x, instructed, y) for x, instructed, y in TRIPLES]
    found = answer_changes(wide, tokenizer, texts, places)
    for n in range(len(TRIPLES)):
        total: Any = 0.0
        for at in places:
            plain, instructed = (answer_states(wide, tokenizer, side, at.layer)[n] for side in (0, 1))
            assert torch.allclose(found.activations[at][n].double(), plain, atol=1e-5)  # float32 copies
            total = total + found.changes[at][n].double()
            assert torch.allclose(total, instructed - plain, atol=1e-5)
        assert float(total.norm()) > 0.01


def planted(activations, c=2.5):
    """Changes c·relu(a·h + b)·u of activations, with about half of the tokens at 0; u has norm 1."""
    tokens = torch.cat(activations)
    a, u = direction(3) / 9 / tokens.std(0), direction(4) / direction(4).norm()
    b = -float((tokens @ a).median())
    return [c * (h @ a + b).relu()[:, None] * u for h in activations], a, b, u


def trainer_of(settings, activations, changes, scores=None):
    flat = torch.cat(changes).mean(0)
    strength = adaptive.TokenStrength(torch.cat(activations), flat, float(flat.norm()))
    scores = scores or [1.0] * len(changes)
    return strength, adaptive._Trainer(settings, {AT: strength}, {AT: activations}, {AT: changes}, scores, None, "all")


def test_a_planted_strength_is_recovered_exactly():
    """METHODS: targets that are c·relu(a·h + b)·u give a, b and u back, with c in a and b, as ‖u‖ is 1."""
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 1, D_MODEL)  # entries of very different size, as in language models
    activations = [torch.randn(12, D_MODEL, generator=g) * spread + 3 for _ in range(24)]
    changes, a, b, u = planted(activations)
    strength, trainer = trainer_of(fg.AdaptiveTraining("mse", steps=500, penalty=0.0), activations, changes)
    trainer.run(lambda *_, **__: None)
    assert trainer.losses[0] > 0.3
    assert trainer.losses[-1] < 1e-10  # of the squared change: what is left is float32 rounding
    assert torch.allclose(strength.read, 2.5 * a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    assert float(strength.bias.detach()) == pytest.approx(2.5 * b, rel=1e-4)
    assert torch.allclose(strength.direction, u, atol=1e-5)
    share = float((strength(torch.cat(activations)) > 0).float().mean())
    assert share == pytest.approx(0.5, abs=0.05)


def test_no_slope_is_add(llama, tokenizer):
    """METHODS: a = 0 and b = 1 is Add; and training begins there."""
    h, u = torch.randn(2, 5, D_MODEL), direction(1)
    item = fg.AdaptiveAdd(direction=u, read=torch.zeros(D_MODEL), bias=1.0, coefficient=0.7, hookpoint=AT)
    assert torch.equal(apply(h, item.update()), apply(h, fg.Add(direction=u, coefficient=0.7, hookpoint=AT).update()))
    strength = adaptive.TokenStrength(h.flatten(0, 1), u, 3.0)
    assert torch.equal(strength.read, torch.zeros(D_MODEL))
    assert torch.allclose(strength(h.flatten(0, 1)), torch.full((10,), 3.0))
    (first,) = fg.train_adaptive(
        llama, tokenizer, TRIPLES, hookpoints=AT, objective=fg.AdaptiveTraining("mse", steps=1, lr=1e-9)
    )
    mean = torch.cat(answer_changes(llama, tokenizer, TRIPLES, [AT]).changes[AT]).mean(0)
    assert torch.allclose(first.direction * first.bias, mean, atol=1e-6)


@pytest.mark.parametrize("places", [[AT], [AT, ABOVE]], ids=["one", "several"])
def test_squared_error_is_the_naive_loop(places, wide, tokenizer):
    scores = [1.0, 0.5, 2.0, 0.0]
    settings = fg.AdaptiveTraining("mse", steps=3, batch=4, penalty=2.0)
    vectors = fg.train_adaptive(wide, tokenizer, TRIPLES, hookpoints=places, objective=settings, scores=scores)
    expected = [0.0] * 3
    below: Any = [0.0] * len(TRIPLES)
    for at, vector in zip(places, vectors, strict=True):
        plain, instructed = (answer_states(wide, tokenizer, side, at.layer) for side in (0, 1))
        accumulated = [b - a for a, b in zip(plain, instructed, strict=True)]
        changes = [own - other for own, other in zip(accumulated, below, strict=True)]
        below = accumulated
        mean, spread = reference.entry_units(plain)
        first = reference.mean_change(changes)
        tau = reference.norm(first)

        def loss(w, s, c, plain=plain, changes=changes, tau=tau, mean=mean, spread=spread):
            u, a, b = reference.values(w, s, c, tau, mean, spread)
            error = reference.squared_error(plain, changes, scores, u, a, b)
            return error + reference.penalty(plain, a, b, settings.penalty)

        start = [first / tau, torch.zeros(D_MODEL), torch.ones(())]
        now, losses = reference.train(start, loss, settings.lr, settings.steps)
        expected = [x + y for x, y in zip(expected, losses, strict=True)]
        w, s, c = now
        u, a, b = reference.values(w, s, c, tau, mean, spread)
        # float32 values; Adam divides gradients by their size, and so magnifies the rounding of small ones
        assert torch.allclose(vector.direction.double(), u, atol=1e-4)
        assert torch.allclose(vector.read.double(), a, rtol=1e-2, atol=1e-3 * float(a.abs().max()))
        assert vector.bias == pytest.approx(float(b), rel=1e-3, abs=1e-4)
        assert float(a.norm()) > 0
    found = [loss for _, loss in vectors[0].provenance["training"]["losses"]]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("places", [[AT], [AT, ABOVE]], ids=["one", "several"])
def test_likelihood_is_the_naive_loop(places, wide, tokenizer):
    settings = fg.AdaptiveTraining("ll", steps=3, batch=4, penalty=2.0)
    vectors = fg.train_adaptive(wide, tokenizer, TRIPLES, hookpoints=places, objective=settings)
    plain = {at: answer_states(wide, tokenizer, 0, at.layer) for at in places}
    instructed = {at: answer_states(wide, tokenizer, 1, at.layer) for at in places}
    firsts, below = [], None
    for at in places:
        change = [b - a for a, b in zip(plain[at], instructed[at], strict=True)]
        local = change if below is None else [x - y for x, y in zip(change, below, strict=True)]
        below = change
        firsts.append(reference.mean_change(local))
    units = [(reference.norm(x), *reference.entry_units(plain[at])) for x, at in zip(firsts, places, strict=True)]
    rows = []
    for x, _, y in TRIPLES:
        start = len(tokenizer(x)["input_ids"])
        rows.append((tokenizer(f"{x} {y}")["input_ids"], start))

    def loss(*leaves):
        made = [reference.values(*leaves[3 * n : 3 * n + 3], *units[n]) for n in range(len(places))]
        changes = {
            at.layer: (lambda h, u=u, a=a, b=b: h + reference.strength(h, a, b) * u)
            for at, (u, a, b) in zip(places, made, strict=True)
        }
        total = sum(-reference.log_probability(wide, ids, start, changes) for ids, start in rows)
        short = sum(
            reference.penalty(plain[at], a, b, settings.penalty) for at, (_, a, b) in zip(places, made, strict=True)
        )
        return total / sum(len(ids) - start for ids, start in rows) + short

    begin = [t for first, (tau, _, _) in zip(firsts, units, strict=True)
             for t in (first / tau, torch.zeros(D_MODEL), torch.ones(()))]  # fmt: skip
    now, losses = reference.train(begin, loss, settings.lr, settings.steps)
    found = [value for _, value in vectors[0].provenance["training"]["losses"]]
    assert found == pytest.approx(losses, rel=1e-5)  # log-probabilities are taken in float32
    for n, vector in enumerate(vectors):
        u, a, b = reference.values(*now[3 * n : 3 * n + 3], *units[n])
        assert torch.allclose(vector.direction.double(), u, atol=2e-3)  # as above
        assert torch.allclose(vector.read.double(), a, rtol=1e-2, atol=2e-2 * float(a.abs().max()))
        assert vector.bias == pytest.approx(float(b), rel=1e-2, abs=1e-3)


def test_the_penalty_by_arithmetic():
    """Two texts of strengths 0.2 + 0.3 and 2 + 0: the mean of 1 − 0.5 and 0."""
    texts = [torch.tensor([[0.2, 0.0], [0.3, 0.0]]), torch.tensor([[2.0, 0.0], [-1.0, 0.0]])]
    a = torch.tensor([1.0, 0.0])
    assert float(reference.penalty(texts, a, 0.0, 3.0)) == pytest.approx(0.75)
    strength, trainer = trainer_of(fg.AdaptiveTraining("mse", penalty=3.0), texts, [torch.ones(2, 2)] * 2)
    without = trainer_of(fg.AdaptiveTraining("mse", penalty=0.0), texts, [torch.ones(2, 2)] * 2)[1]
    for one in (trainer.strengths[AT], without.strengths[AT]):
        with torch.no_grad():  # a = (1, 0) and b = 0
            one.slope.copy_(one.spread / one.first * a)
            one.offset.copy_(one.slope @ (one.mean / one.spread))
    assert trainer._loss([0, 1]) - without._loss([0, 1]) == pytest.approx(0.75, abs=1e-5)
    assert strength.slope.grad is not None


def test_likelihood_without_instructed_prompts_begins_at_the_gradient(wide, tokenizer):
    pairs = [(x, y) for x, _, y in TRIPLES]
    settings = fg.AdaptiveTraining(steps=1, lr=1e-9)
    (vector,) = fg.train_adaptive(wide, tokenizer, pairs, hookpoints=AT, objective=settings)
    v = torch.zeros(D_MODEL, dtype=torch.float64, requires_grad=True)
    for x, y in pairs:
        start, ids = len(tokenizer(x)["input_ids"]), tokenizer(f"{x} {y}")["input_ids"]
        reference.log_probability(wide, ids, start, {1: lambda h: h + v}).backward()
    assert v.grad is not None
    assert torch.allclose(vector.direction.double(), v.grad / v.grad.norm(), atol=1e-5)
    norms = torch.cat(answer_states(wide, tokenizer, 0, 1)).norm(dim=1)
    assert vector.bias == pytest.approx(0.1 * float(norms.mean()), rel=1e-5)


def test_training_lowers_what_it_minimises(llama, tokenizer):
    for objective in (fg.AdaptiveTraining("ll", steps=40), fg.AdaptiveTraining("mse", steps=40)):
        vectors = fg.train_adaptive(llama, tokenizer, TRIPLES, hookpoints=[AT, ABOVE], objective=objective)
        losses = [loss for _, loss in vectors[0].provenance["training"]["losses"]]
        assert losses[-1] < 0.95 * losses[0]
        assert all(0 < v.provenance["training"]["active_share"] <= 1 for v in vectors)
        assert all(v.norm == pytest.approx(1.0, abs=1e-6) for v in vectors)


def test_the_share_of_tokens_that_are_steered(llama, tokenizer, monkeypatch):
    """At the second hookpoint it is read where the first one acts; a strength that is never above 0 is warned of."""
    first = fg.SteeringVector(direction(1), AT, read=torch.zeros(D_MODEL), bias=2.0)
    h = torch.cat(answer_changes(llama, tokenizer, TRIPLES, [ABOVE]).activations[ABOVE])
    middle = -float((h @ direction(2)).median())
    second = fg.SteeringVector(direction(3), ABOVE, read=direction(2), bias=middle)
    pairs = [(x, y) for x, _, y in TRIPLES]
    alone = adaptive.active_shares(llama, tokenizer, pairs, [second])[0]
    assert alone == pytest.approx(float((h @ direction(2) + middle > 0).double().mean()))
    assert 0.4 < alone < 0.6
    both = adaptive.active_shares(llama, tokenizer, pairs, [first, second])
    assert both[0] == 1.0
    assert both[1] != alone

    def kill(trainer, _):
        with torch.no_grad():
            trainer.strengths[AT].offset.fill_(-1e4)

    monkeypatch.setattr(adaptive._Trainer, "run", kill)
    with pytest.warns(fg.FgsteerWarning, match="0 for every token"):
        (vector,) = fg.train_adaptive(llama, tokenizer, TRIPLES, hookpoints=AT)
    assert vector.provenance["training"]["active_share"] == 0.0


def test_several_layers_in_a_file(llama, tokenizer, tmp_path):
    settings = fg.AdaptiveTraining("mse", steps=5)
    vectors = fg.train_adaptive(llama, tokenizer, TRIPLES, hookpoints=[2, 0], objective=settings)
    assert [v.hookpoint.layer for v in vectors] == [0, 2]
    steering = [v.adaptive_add(1.5, scope="reply") for v in vectors]
    fg.save_steering(tmp_path / "s.safetensors", steering)
    loaded = fg.load_steering(tmp_path / "s.safetensors")
    ids = tokenizer("the man sat", return_tensors="pt")["input_ids"]
    with fg.steer(llama, steering):
        expected = llama(ids).logits
    with fg.steer(llama, loaded):
        assert torch.equal(llama(ids).logits, expected)
    assert not torch.allclose(llama(ids).logits, expected, atol=1e-3)
    vectors[0].save(tmp_path / "v.safetensors")
    one = fg.SteeringVector.load(tmp_path / "v.safetensors")
    assert torch.equal(one.read, vectors[0].read)
    assert one.bias == vectors[0].bias
    assert one.provenance["method"] == "psr_mse"


def test_half_is_held_out(llama, tokenizer):
    settings = fg.AdaptiveTraining("mse", steps=60, hold_out=True, penalty=0.0)
    (vector,) = fg.train_adaptive(llama, tokenizer, TRIPLES, hookpoints=AT, objective=settings)
    held_out = vector.provenance["training"]["held_out_losses"]
    assert len(held_out) == 20
    found = answer_changes(llama, tokenizer, TRIPLES, [AT])
    error = [0.0, 0.0]
    sizes = float(torch.cat(found.changes[AT]).square().sum(1).mean())
    for n in (1, 3):
        for h, delta in zip(found.activations[AT][n], found.changes[AT][n], strict=True):
            added = float((h @ vector.read + vector.bias).relu()) * vector.direction
            error = [error[0] + float((added - delta).square().sum()), error[1] + 1]
    assert error[0] / error[1] / sizes == pytest.approx(min(held_out), rel=1e-4)


def test_a_seed_decides_everything_and_passes_change_rounding_alone(wide, tokenizer):
    settings = fg.AdaptiveTraining("ll", steps=4, batch=2)
    trained = [
        fg.train_adaptive(wide, tokenizer, TRIPLES, hookpoints=AT, objective=settings, batch_tokens=size)[0]
        for size in (None, None, 1)
    ]
    assert torch.equal(trained[0].read, trained[1].read)
    assert torch.allclose(trained[0].read, trained[2].read, rtol=1e-2, atol=1e-4)  # Adam magnifies rounding
    other = fg.train_adaptive(
        wide, tokenizer, TRIPLES, hookpoints=AT, objective=fg.AdaptiveTraining("ll", steps=4, batch=2, seed=5)
    )[0]
    assert not torch.equal(other.read, trained[0].read)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_families_and_sites(family, models, tokenizer):
    model = models[family]
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for objective in ("ll", "mse"):
        settings = fg.AdaptiveTraining(objective, steps=2)
        vectors = fg.train_adaptive(
            model, tokenizer, TRIPLES, hookpoints=[fg.Hookpoint(1, "mlp_out"), 1, 0], objective=settings
        )
        assert [str(v.hookpoint) for v in vectors] == [
            "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"
        ]  # fmt: skip
        assert all(v.read.norm() > 0 for v in vectors)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_a_bfloat16_model(tokenizer):
    model = tiny_model("llama", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fg.FgsteerWarning)
        (vector,) = fg.train_adaptive(model, tokenizer, TRIPLES, hookpoints=AT, objective=fg.AdaptiveTraining(steps=30))
    losses = [loss for _, loss in vector.provenance["training"]["losses"]]
    assert vector.read.dtype == vector.direction.dtype == torch.float32
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("examples", "options", "error", "match"),
    [
        ([], {}, fg.DataError, "no examples"),
        ([("a", "b")], {"objective": "mse"}, fg.DataError, "instructed prompt, answer"),
        (["a b c"], {}, fg.DataError, "example 0"),
        (TRIPLES, {"objective": "mle"}, fg.DataError, "'ll', 'mse'"),
        (TRIPLES, {"hookpoints": []}, fg.DataError, "no hookpoint"),
        (TRIPLES, {"hookpoints": 9}, fg.HookpointError, "layer"),
        (TRIPLES, {"objective": "mse", "scores": [1.0]}, fg.DataError, "1 scores for 4"),
        (TRIPLES, {"scores": [1.0] * 4}, fg.DataError, "for 'mse'"),
        ([(x, x, y) for x, _, y in TRIPLES], {"objective": "mse"}, fg.SelectionError, "norm 0"),
        ([("the man", "a dog", "")], {}, fg.DataError, "selects none|empty"),
        (TRIPLES[:1], {"objective": fg.AdaptiveTraining(hold_out=True)}, fg.DataError, "at least 2"),
    ],
)
def test_refusals(examples, options, error, match, llama, tokenizer):
    with pytest.raises(error, match=match):
        fg.train_adaptive(llama, tokenizer, examples, **{"hookpoints": AT, **options})


def test_settings_out_of_range():
    for changes in ({"lr": 0.0}, {"steps": 0}, {"batch": 0}, {"penalty": -1.0}, {"objective": "x"}, {"seed": -1}):
        with pytest.raises(fg.DataError):
            fg.AdaptiveTraining(**changes)
