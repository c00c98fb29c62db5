"""Trained vectors: losses and loops against naive ones, identities of each objective, batches, checkpoints."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import fgsteer as fg
from fgsteer.interventions.kernel import apply
from fgsteer.learning import learner as learning
from fgsteer.learning import losses, response_passes, run
from fgsteer.learning.objectives import Texts
from fgsteer.learning.spaces import FeatureSpace, ResidualSpace, ShiftFeatures
from fgsteer.methods.separable import soft_threshold
from fgsteer.vector.steering_vector import SteeringVector
from tests.helpers.cli import invoke, invoke_on_cpu
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, model_of, tiny_model
from tests.reference import training as reference

AT = fg.Hookpoint(1)
PREFERENCES = [
    ("the man said", "the bride wore a ring", "a dog sat"),
    ("he is", "happy and good", "sad"),
    ("she", "took the queen", "ran in the house ."),
    ("I think", "they was happy on the sea", "no"),
]
OTHERS = [("the king", "sat in the church", "was old"), ("a cat", "ran", "is the new day")]


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, so that what differs from the naive loops is float32 rounding of what we add."""
    return tiny_model("llama", dtype=torch.float64)


def recipe(name, **changes):
    """Published settings, from fixed first values, on all examples in each step, at one strength."""
    fixed: dict[str, Any] = {"batch": 8, "schedule": "linear", "warm_up": 0, "init": 0.02, "epochs": 3}
    return fg.VectorTraining.recipe(name, **{**fixed, **changes})


def token_ids(tokenizer, preferences):
    """(winner, where it begins, loser, where it begins) of each example, in ids."""
    rows = []
    for prompt, *answers in preferences:
        start = len(tokenizer(prompt)["input_ids"])
        rows.append(tuple(part for answer in answers for part in (tokenizer(f"{prompt} {answer}")["input_ids"], start)))
    return rows


# ---------------------------------------------------------------- against naive loops


@pytest.mark.parametrize("space", ["residual", "sae"])
def test_relative_units_are_other_rates_and_first_values(space, wide, tokenizer):
    """Adam moves a number by its rate whatever its unit, so that u times a number at rate r is a number at rate u·r."""
    sae, ids = make_sae("relu"), [3, 11, 17, 20]
    options: Any = {"space": "sae", "sae": sae, "features": ids} if space == "sae" else {"hookpoint": AT}
    norms = []
    for winner, *_ in token_ids(tokenizer, PREFERENCES):  # a start token stands first
        seen: list[torch.Tensor] = []
        handle = wide.model.layers[AT.layer].register_forward_hook(
            lambda _m, _i, out, seen=seen: seen.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        with torch.no_grad():
            wide(torch.tensor([winner]))
        handle.remove()
        norms += [float(row.norm()) for row in seen[0][0][1:]]
    squares = [float(sae.W_dec[j].pow(2).sum()) for j in ids] if space == "sae" else [1.0] * D_MODEL
    unit = sorted(norms)[(len(norms) - 1) // 2] / math.sqrt(sum(squares))
    relative = recipe("lm", relative=True, lr=0.05, init=0.02)
    raw = recipe("lm", relative=False, lr=0.05 * unit, init=0.02 * unit)
    got = fg.train(wide, tokenizer, PREFERENCES, objective=relative, **options)
    expected = fg.train(wide, tokenizer, PREFERENCES, objective=raw, **options)
    # Adam's 1e-8 beside gradients that have another unit here and there
    assert torch.allclose(got.direction, expected.direction, rtol=1e-4, atol=1e-6)
    assert float(got.direction.norm()) > 0


def test_the_default_recipe_is_reps_in_relative_units(wide, tokenizer):
    plain = fg.train(wide, tokenizer, PREFERENCES, hookpoint=AT)
    named = fg.train(wide, tokenizer, PREFERENCES, hookpoint=AT, objective=fg.VectorTraining())
    assert torch.equal(plain.direction, named.direction)
    lm = fg.train(wide, tokenizer, PREFERENCES, hookpoint=AT, objective="lm_relative")
    losses = [loss for _, loss in lm.provenance["training"]["losses"]]
    assert losses[-1] < losses[0]
    with pytest.raises(fg.DataError, match="norm 1"):
        fg.VectorTraining(objective="reft_r1")


@pytest.mark.parametrize("space", ["residual", "sae"])
@pytest.mark.parametrize("name", ["lm", "bipo", "reps", "reft_r1", "simpo"])
def test_training_is_the_naive_loop(name, space, wide, tokenizer):
    """The loss of each of three steps, and the vector after them, by loops over texts and tokens and Adam by hand."""
    settings = recipe(name, factors=(3.0,), lr=0.05, clip=1.0, beta=0.7, margin=0.2, top=2, l1=0.5)
    sae, ids = make_sae("relu"), [3, 11, 17, 20]
    options: Any = {"space": "sae", "sae": sae, "features": ids} if space == "sae" else {"hookpoint": AT}
    vector = fg.train(wide, tokenizer, PREFERENCES, objective=settings, **options)
    found = [loss for _, loss in vector.provenance["training"]["losses"]]
    strengths = [3.0, 3.0, 3.0]
    if name == "bipo":
        strengths = signs_of(settings)
    rows = None if space == "residual" else [sae.W_dec[j].double() for j in ids]
    options = {key: getattr(settings, key) for key in ("lr", "clip", "beta", "margin", "top", "l1", "init")}
    w, expected = reference.train(wide, AT.layer, token_ids(tokenizer, PREFERENCES), name, options, rows, strengths)
    # log-probabilities are taken in float32: 1e-7 of numbers of size 30
    assert found == pytest.approx(expected, rel=1e-5, abs=2e-5)
    if name == "reft_r1":
        w = w / (w if rows is None else sum(x * row for x, row in zip(w, rows, strict=True))).norm()
    got = vector.direction.double() if rows is None else torch.tensor([vector.features[j] for j in ids])
    # Adam divides gradients by their size, and so magnifies the rounding of small ones
    assert torch.allclose(got.double(), w, rtol=1e-3, atol=2e-4)
    assert float((w - settings.init).abs().min()) > 1e-3, "every number was trained"


def signs_of(settings):
    """The signs of three epochs of one batch: of each two one is drawn, after the order of its epoch."""
    g = torch.Generator().manual_seed(settings.seed)
    signs: list[float] = []
    for step in range(3):
        torch.randperm(len(PREFERENCES), generator=g)
        signs.append(-signs[-1] if step % 2 else 1.0 - 2.0 * int(torch.randint(2, (), generator=g)))
    return signs


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_losses_by_arithmetic():
    w, lost, w0, l0 = values(-6.0), values(-4.0), values(-7.0), values(-3.5)
    assert float(losses.bipo_loss(w, lost, w0, l0, 0.5, 1.0)) == pytest.approx(math.log1p(math.exp(-0.5 * 1.5)))
    assert float(losses.bipo_loss(w, lost, w0, l0, 0.5, -1.0)) == pytest.approx(math.log1p(math.exp(0.5 * 1.5)))
    # c = −3.5 + 7 = 3.5, so that the argument is 3.5·(−6)/3 + 4/2 = −5
    assert float(losses.reps_loss(w, lost, w0, l0, values(3.0), values(2.0))) == pytest.approx(math.log1p(math.exp(5)))
    # c is at least 1: the argument is −6/3 + 4/2 = 0
    assert float(losses.reps_loss(w, lost, l0, w0, values(3.0), values(2.0))) == pytest.approx(math.log(2))
    # 2·(−2 + 2) − 0.3
    assert float(losses.simpo_loss(w, lost, values(3.0), values(2.0), 2.0, 0.3)) == pytest.approx(
        math.log1p(math.exp(0.3))
    )


# ---------------------------------------------------------------- what each objective must satisfy


def first_loss(model, tokenizer, preferences, settings, **options):
    return fg.train(model, tokenizer, preferences, objective=settings, **options).provenance["training"]["losses"][0][1]


def test_bipo_begins_at_ln_2_and_its_signs_mirror(wide, tokenizer):
    settings = recipe("bipo", epochs=1, init=0.0)
    assert first_loss(wide, tokenizer, PREFERENCES, settings, hookpoint=AT) == pytest.approx(math.log(2), abs=1e-6)
    moved = recipe("bipo", epochs=1, init=0.3)
    swapped = [(prompt, loser, winner) for prompt, winner, loser in PREFERENCES]
    both = []
    for preferences, init in ((PREFERENCES, 0.3), (swapped, -0.3)):
        texts = []
        for sign in (1.0, -1.0):
            vector = SteeringVector(torch.full((D_MODEL,), init), AT)
            pairs = [[(p, answer) for p, *answers in preferences for answer in [answers[side]]] for side in (0, 1)]
            scores = [fg.log_probabilities(wide, tokenizer, side, [None, vector.add(sign)]).sums for side in pairs]
            (w0, w), (l0, lost) = scores
            texts.append(losses.bipo_loss(w, lost, w0, l0, moved.beta, sign).mean())
        both.append(float(sum(texts)))
    assert both[0] == pytest.approx(both[1], rel=1e-6)  # log-probabilities are float32
    assert abs(both[0] - 2 * math.log(2)) > 1e-4, "the vector does something"


def test_bipo_has_as_many_of_either_sign(wide, tokenizer):
    space = ResidualSpace(AT, D_MODEL)
    passes = response_passes.ResponsePasses(wide, tokenizer, AT, [("the", "man"), ("the", "cat")] * 5)
    rows = [(2 * n, 2 * n + 1) for n in range(5)]
    texts = Texts(torch.ones(10), torch.zeros(10))
    for seed in range(4):
        learner = learning.Learner(
            recipe("bipo", batch=1, epochs=8, seed=seed), space, passes, texts, rows, torch.device("cpu")
        )
        signs = []
        while not learner.done:
            signs.append(learner.begin_step()[0].readings[0].strength)
            learner.end_step(0.0)
        assert sum(signs) == 0


def test_null_out_removes_once(wide):
    h, v = torch.randn(3, 7, D_MODEL), torch.randn(D_MODEL)
    item = learning.null_out(v, 0.5, ResidualSpace(AT, D_MODEL))
    once = apply(h, item.update())
    assert torch.allclose(once @ v + 0.5, (h @ v + 0.5).clamp(max=0), atol=1e-4)  # float32 sums of 32 products
    assert torch.allclose(apply(once, item.update()), once, atol=1e-5)
    assert torch.allclose(once[0].double(), reference.null_out(h[0].double(), v.double(), 0.5), atol=1e-5)
    assert not torch.equal(once, h)


def test_reps_on_equal_answers_is_ln_2(wide, tokenizer):
    same = [(prompt, winner, winner) for prompt, winner, _ in PREFERENCES]
    settings = recipe("reps", factors=(3.0,))  # else the two sides draw strengths of their own
    assert first_loss(wide, tokenizer, same, settings, hookpoint=AT) == pytest.approx(math.log(2), abs=1e-6)


def test_reps_as_published_divides_by_prompts_too_and_trains_an_offset(wide, tokenizer):
    settings = recipe("reps", compat=True, factors=(3.0,), epochs=1)
    found = first_loss(wide, tokenizer, PREFERENCES, settings, hookpoint=AT)
    v = torch.full((D_MODEL,), 0.02, dtype=torch.float64)
    expected = []
    for w, a, lost, b in token_ids(tokenizer, PREFERENCES):

        def score(ids, start, change):
            with torch.no_grad():
                return reference.log_probability(wide, AT.layer, ids, start, change)

        w0, l0 = score(w, a, lambda h: h), score(lost, b, lambda h: h)
        added = [score(ids, start, lambda h: h + 3 * v) for ids, start in ((w, a), (lost, b))]
        gone = [score(ids, start, lambda h: reference.null_out(h, v, 0.0)) for ids, start in ((w, a), (lost, b))]
        expected.append(reference.reps(added[0], added[1], w0, l0, len(w), len(lost)))
        expected.append(reference.reps(gone[1], gone[0], l0, w0, len(lost), len(w)))
    assert found == pytest.approx(float(sum(expected) / len(expected)), rel=1e-5)
    trained = fg.train(wide, tokenizer, PREFERENCES, objective=recipe("reps", compat=True), hookpoint=AT)
    plain = fg.train(wide, tokenizer, PREFERENCES, objective=recipe("reps"), hookpoint=AT)
    assert not torch.equal(trained.direction, plain.direction)


def test_language_modelling_of_one_token_reaches_the_logistic_solution(tokenizer):
    """Where logits are U(h + v) the loss is convex in v: at the minimum Σ p(t) u_t is the mean u of the answers."""
    model = tiny_model("llama")
    model.model.norm = nn.Identity()
    nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 1][:40]  # more than d_model
    answers = [*words, *words[:9], *words[:4]]
    at = fg.Hookpoint(len(model.model.layers) - 1)
    settings = recipe("lm", batch=len(answers), epochs=150, lr=0.1, init=0.0)
    vector = fg.train(model, tokenizer, [("the", word, word) for word in answers], objective=settings, hookpoint=at)
    ids = tokenizer("the", return_tensors="pt")["input_ids"]
    unembedding = model.lm_head.weight
    with torch.no_grad(), fg.steer(model, vector.add(1.0)):
        p = model(ids).logits[0, -1].softmax(-1)
    target = unembedding[[tokenizer(f"the {word}")["input_ids"][-1] for word in answers]].mean(0)
    # Adam's last steps are small, but do not end at the minimum to the last digit
    assert torch.allclose(p @ unembedding, target, atol=2e-3)
    assert float((unembedding.mean(0) - target).detach().abs().max()) > 0.05


def test_reft_strength_of_few_tokens_is_their_mean():
    readings = torch.tensor([0.5, 0.0, 2.0, 1.0])
    assert float(losses.strength_and_rest(readings, 4)[0]) == float(readings.mean())
    assert losses.strength_and_rest(readings, 9) == losses.strength_and_rest(readings, 4)
    assert [float(x) for x in losses.strength_and_rest(readings, 2)] == [1.5, 0.5]


def test_reft_vector_has_norm_1_and_its_largest_reading(wide, tokenizer):
    vector = fg.train(wide, tokenizer, PREFERENCES, objective="reft_r1", hookpoint=AT)
    assert vector.norm == pytest.approx(1.0, abs=1e-6)
    last = fg.train(
        wide, tokenizer, PREFERENCES, objective=fg.VectorTraining.recipe("reft_r1", compat=True), hookpoint=AT
    )
    assert last.norm > 1 + 1e-6, "a step adds what is orthogonal"
    peak = 0.0
    for ids, _ in [pair for w, a, lost, b in token_ids(tokenizer, PREFERENCES) for pair in ((w, a), (lost, b))]:
        h = wide(torch.tensor([ids]), output_hidden_states=True).hidden_states[AT.layer + 1][0, 1:]
        peak = max(peak, float((h @ vector.direction.double()).max()))
    assert vector.provenance["training"]["a_max"] == pytest.approx(peak, rel=1e-5)


# ---------------------------------------------------------------- the space of features


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "gated"])
def test_nonnegative_shifts(activation):
    """Nothing shifted is the identity, a shift upwards is Add, and any other is relu(z + a) − z, a token at a time."""
    sae, h = make_sae(activation), torch.randn(2, 5, D_MODEL)
    z = sae.encode(h)

    def shifted(amounts, ids=()):
        item = ShiftFeatures(sae=sae, ids=ids, amounts=amounts, hookpoint=sae.hookpoint)
        return apply(h, item.update().prepare(h.device, h.dtype))

    assert torch.equal(shifted(torch.zeros(sae.d_sae)), h)
    up = torch.zeros(sae.d_sae)
    up[7] = 1.5
    assert torch.allclose(shifted(up), h + 1.5 * sae.W_dec[7], atol=1e-5)
    assert torch.equal(shifted(torch.tensor([0.0, 1.5]), (3, 7)), shifted(torch.tensor([1.5, 0.0]), (7, 3)))
    ids = tuple(range(0, sae.d_sae, 2))
    amounts = torch.randn(len(ids))
    clamp = fg.ClampFeature(sae=sae, hookpoint=sae.hookpoint, plus=dict(zip(ids, amounts.tolist(), strict=True)))
    expected = torch.stack(
        [
            reference.shift(x, y, amounts, sae.W_dec[list(ids)])
            for x, y in zip(h.view(-1, D_MODEL), z[..., list(ids)].view(-1, len(ids)), strict=True)
        ]
    )
    assert torch.allclose(shifted(amounts, ids).view(-1, D_MODEL), expected, atol=1e-4)  # float32 sums of 12 rows
    assert torch.allclose(apply(h, clamp.update().prepare(h.device, h.dtype)).view(-1, D_MODEL), expected, atol=1e-4)


def test_features_that_are_never_active_are_trained(wide, tokenizer):
    """Where relu has no gradient at z = v = 0 the kernel's maximum has half of one."""
    sae = make_sae("jumprelu")
    quiet = fg.SAE(
        **{**{n: getattr(sae, n) for n in ("W_enc", "W_dec", "b_dec", "hookpoint", "activation", "threshold")}},
        b_enc=torch.full((sae.d_sae,), -1e3),
    )
    options: Any = {"objective": recipe("bipo", init=0.0), "space": "sae", "features": [2, 5]}
    vector = fg.train(wide, tokenizer, PREFERENCES, sae=quiet, nonnegative=True, **options)
    assert all(abs(vector.features[j]) > 1e-5 for j in (2, 5))


def test_the_vector_is_the_sum_of_its_features(llama, tokenizer):
    sae = make_sae("jumprelu", density=None)
    for features, count in ((None, sae.d_sae), (6, 6), ([1, 4, 9], 3)):
        vector = fg.train(
            llama, tokenizer, PREFERENCES, objective=recipe("simpo"), space="sae", sae=sae, features=features
        )
        assert len(vector.features) == count
        total = sum(w * sae.W_dec[j].double() for j, w in vector.features.items())
        assert torch.allclose(vector.direction.double(), total, atol=1e-5)  # float32 sums of 24 rows
        assert vector.provenance["sae"]["sha256"] == sae.sha256
    stats = fg.collect(
        llama,
        tokenizer,
        [fg.ContrastPair(winner, loser, p) for p, winner, loser in PREFERENCES],
        sae=sae,
        tokens="answer",
    )
    largest = stats.at("feature")[1].difference.abs().topk(6).indices
    six = fg.train(llama, tokenizer, PREFERENCES, objective=recipe("lm"), space="sae", sae=sae, features=6)
    assert set(six.features) == set(largest.tolist())


def test_sae_ssv_is_what_gradient_descent_reaches():
    g = torch.Generator().manual_seed(0)
    z_t, z_s = (torch.rand(9, 24, generator=g, dtype=torch.float64) + shift for shift in (0.3, 0.0))
    difference = z_t.mean(0) - z_s.mean(0)
    expected = reference.separable_descent(z_t, z_s, 0.2, 10_000, 0.01)
    # 0.99^10,000 is 2e-44: what is left is rounding
    assert torch.allclose(soft_threshold(2 * difference, 0.2), expected, atol=1e-10)
    assert 0 < int((expected == 0).sum()) < 24
    sae = make_sae()
    residual = fg.Contrast(fg.Moments.of(torch.randn(9, 32)), fg.Moments.of(torch.randn(9, 32)))
    contrast = fg.Contrast(fg.Moments.of(z_t), fg.Moments.of(z_s))
    stats = fg.ContrastStatistics({sae.hookpoint: residual}, {sae.hookpoint: contrast})
    vector = fg.sae_ssv(stats, sae, l1=0.2, normalize=False)
    weights = torch.tensor([vector.features.get(j, 0.0) for j in range(24)], dtype=torch.float64)
    assert torch.allclose(weights, expected, atol=1e-10)
    assert len(fg.sae_ssv(stats, sae, n_features=5, l1=0.0).features) == 5
    short = fg.sae_ssv(stats, sae, l1=0.0, compat=True, normalize=False)
    start = difference / difference.norm()
    share = 1 - 0.99**100  # of the way from the start to the minimum, 63 %
    away = torch.tensor([short.features[j] for j in range(24)], dtype=torch.float64)
    assert torch.allclose(away, start + share * (2 * difference - start), atol=1e-10)
    with pytest.raises(fg.SelectionError):
        fg.sae_ssv(stats, sae, l1=100.0)


# ---------------------------------------------------------------- the loop


def test_gradients_reach_the_vector_alone(tokenizer):
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.model.norm.weight.requires_grad_(False)
    fg.train(model, tokenizer, PREFERENCES, objective=recipe("reps"), hookpoint=AT)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad == (name != "model.norm.weight")
        assert torch.equal(p, before[name])

    def stop(done, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fg.train(model, tokenizer, PREFERENCES, objective=recipe("reps"), hookpoint=AT, progress=stop)
    assert model.lm_head.weight.requires_grad
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


RANDOM: Any = {"factors": (2.0, 4.0, 6.0), "dropout": 0.2, "batch": 3, "epochs": 4, "init": None}


def test_a_seed_decides_everything(llama, tokenizer):
    options: Any = {"hookpoint": AT}
    vectors = [
        fg.train(llama, tokenizer, PREFERENCES, objective=recipe("reps", **RANDOM, seed=seed), **options).direction
        for seed in (0, 0, 1)
    ]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


@pytest.mark.parametrize("stop_at", [1, 5])
@pytest.mark.parametrize("patience", [None, 3])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(stop_at, patience, llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    settings = recipe("reps", **{**RANDOM, "batch": 1}, patience=patience)
    options: Any = {"objective": settings, "hookpoint": AT}
    expected = fg.train(llama, tokenizer, PREFERENCES, **options)
    work = tmp_path / "vector.checkpoint"

    def stop(done, _):
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fg.train(llama, tokenizer, PREFERENCES, work=work, progress=stop, **options)
    steps: list[int] = []
    found = fg.train(llama, tokenizer, PREFERENCES, work=work, progress=lambda done, _: steps.append(done), **options)
    assert steps[0] == stop_at + 1
    assert torch.equal(found.direction, expected.direction)
    assert found.provenance == expected.provenance
    again = fg.train(llama, tokenizer, PREFERENCES, work=work, progress=lambda *_: steps.append(-1), **options)
    assert torch.equal(again.direction, expected.direction)
    assert -1 not in steps
    with pytest.raises(fg.PairingError, match="something else"):
        fg.train(llama, tokenizer, OTHERS * 2, work=work, **options)
    fresh = fg.train(llama, tokenizer, PREFERENCES, work=work, fresh=True, **options)
    assert torch.equal(fresh.direction, expected.direction)
    work.write_bytes(work.read_bytes()[:-20])
    with pytest.raises(fg.FormatError):
        fg.train(llama, tokenizer, PREFERENCES, work=work, **options)


@pytest.mark.parametrize("space", ["residual", "sae"])
@pytest.mark.parametrize("name", ["reps", "reft_r1", "bipo"])
def test_several_vectors_at_once_are_those_of_one_at_a_time(name, space, wide, tokenizer):
    """With other numbers of examples, so that one goes on alone; each has the random numbers that it has alone."""
    settings = fg.VectorTraining.recipe(name, epochs=3, batch=2, init=None if name == "reps" else 0.1)
    options: Any = {"objective": settings, "batch_tokens": 64}
    options |= (
        {"hookpoint": AT} if space == "residual" else {"space": "sae", "sae": make_sae(), "features": [3, 11, 17]}
    )
    many = fg.train_many(wide, tokenizer, {"a": PREFERENCES, "b": OTHERS}, **options)
    for key, data in (("a", PREFERENCES), ("b", OTHERS)):
        alone = fg.train(wide, tokenizer, data, **options)
        # the model is float64, log-probabilities and steering are float32; Adam magnifies rounding of small gradients
        assert torch.allclose(many[key].direction, alone.direction, rtol=1e-3, atol=1e-4)
        assert many[key].provenance["data"] == alone.provenance["data"]
    assert not torch.allclose(many["a"].direction, many["b"].direction, atol=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_the_size_of_passes_changes_rounding_alone(batch_tokens, wide, tokenizer):
    options: Any = {"objective": recipe("reps", factors=(2.0, 5.0)), "hookpoint": AT}
    expected = fg.train(wide, tokenizer, PREFERENCES, batch_tokens=40, **options)
    found = fg.train(wide, tokenizer, PREFERENCES, batch_tokens=batch_tokens, **options)
    assert torch.allclose(found.direction, expected.direction, rtol=1e-3, atol=1e-4)  # as above


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_lower_blocks_run_once_and_change_nothing(family, site, tokenizer, monkeypatch):
    model, at = model_of(family), fg.Hookpoint(1, site)
    options: Any = {"objective": recipe("reft_r1" if site == "mlp_out" else "simpo", epochs=1), "hookpoint": at}
    calls = []
    handle = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    found = fg.train(model, tokenizer, PREFERENCES, **options)
    monkeypatch.setattr(response_passes, "can_skip_blocks", lambda _: False)
    handle.remove()
    expected = fg.train(model, tokenizer, PREFERENCES, **options)
    # float32 activations of other batches; one step of Adam moves every number by the rate, whatever its gradient
    assert torch.allclose(found.direction, expected.direction, atol=2e-3)
    assert float((found.direction - expected.direction).abs().median()) < 1e-5
    assert found.provenance["training"]["losses"] == [
        pytest.approx(p, rel=1e-4) for p in expected.provenance["training"]["losses"]
    ]
    assert calls


def test_lower_blocks_are_not_run_in_steps(tokenizer):
    """A count of what runs: block 0 once for all rows, block 2 in every step."""
    model = tiny_model("llama")
    runs = {0: 0, 2: 0}

    def count(number):
        model.model.layers[number].self_attn.register_forward_hook(lambda *_: runs.update({number: runs[number] + 1}))

    count(0)
    count(2)
    fg.train(model, tokenizer, PREFERENCES, objective=recipe("lm", epochs=7), hookpoint=AT)
    assert runs == {0: 1, 2: 7}


def test_a_float32_vector_of_a_bfloat16_model(tokenizer):
    model = tiny_model("llama", dtype=torch.bfloat16)
    vector = fg.train(model, tokenizer, PREFERENCES, objective=recipe("lm", epochs=20), hookpoint=AT)
    (_, first), *_, (_, last) = vector.provenance["training"]["losses"]
    assert last < first - 0.1
    assert vector.direction.dtype == torch.float32
    assert not torch.equal(vector.direction, vector.direction.bfloat16().float())


def test_early_stopping_returns_the_best(wide, tokenizer):
    """Every second example is held out; its loss after each epoch is that of the vector which is returned."""
    settings = recipe("lm", epochs=40, lr=0.5, patience=2, schedule="constant")
    data = PREFERENCES[:3] + OTHERS
    vector = fg.train(wide, tokenizer, data, objective=settings, hookpoint=AT)
    training = vector.provenance["training"]
    held_out = training["held_out_losses"]
    best = held_out.index(min(held_out))
    assert len(held_out) == best + 3 < 40
    assert training["steps"] == len(held_out)
    pairs = [(prompt, winner) for prompt, winner, _ in data[1::2]]
    loss = fg.cross_entropy(wide, tokenizer, pairs, steering=vector.add(1.0))
    assert loss == pytest.approx(held_out[best], rel=1e-5)


def test_a_held_out_loss_that_is_no_number_ends_the_training(wide, tokenizer, monkeypatch):
    real = run.Run._losses

    def broken(self, batches):
        found = real(self, batches)
        return found if torch.is_grad_enabled() else dict.fromkeys(found, math.nan)

    monkeypatch.setattr(run.Run, "_losses", broken)
    with pytest.raises(fg.DataError, match="nan on the held-out examples of 'vector' after step 1"):
        fg.train(wide, tokenizer, PREFERENCES, objective=recipe("lm", patience=2), hookpoint=AT)


def test_learning_rates():
    """Linear and cosine after a warm-up, by hand."""
    assert [learning.rate("linear", step, 6, 2) for step in range(6)] == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert [learning.rate("constant", step, 3, 0) for step in range(3)] == [1, 1, 1]
    assert [learning.rate("cosine", step, 4, 0) for step in (0, 2)] == pytest.approx([1, 0.5])


def test_scopes_are_those_of_steering(wide, tokenizer):
    """With a scope of generated tokens the loss is that of a pass steered so."""
    settings = recipe("lm", epochs=1, init=0.3)
    vector = SteeringVector(torch.full((D_MODEL,), 0.3), AT)
    pairs = [(prompt, winner) for prompt, winner, _ in PREFERENCES]
    found = set()
    for scope in ("generated", "prompt", "reply"):
        loss = first_loss(wide, tokenizer, PREFERENCES, settings, hookpoint=AT, scope=scope)
        assert loss == pytest.approx(
            fg.cross_entropy(wide, tokenizer, pairs, steering=vector.add(scope=scope)), rel=1e-5
        )
        found.add(round(loss, 5))
    assert len(found) == 3


# ---------------------------------------------------------------- data, files, refusals


def test_contrast_sets_are_preferences(llama, tokenizer):
    settings = recipe("simpo", epochs=1)
    pairs = [fg.ContrastPair(winner, loser, prompt) for prompt, winner, loser in PREFERENCES]
    sides = fg.ContrastSet("x", positives=["the bride", "a ring"], negatives=["a dog", "the old cat"])
    options: Any = {"objective": settings, "hookpoint": AT}
    expected = fg.train(llama, tokenizer, PREFERENCES, **options)
    for data in (pairs, fg.ContrastSet("y", pairs=pairs)):
        assert torch.equal(fg.train(llama, tokenizer, data, **options).direction, expected.direction)
    unpaired = fg.train(llama, tokenizer, sides, **options)
    listed = fg.train(llama, tokenizer, [("", "the bride", "a dog"), ("", "a ring", "the old cat")], **options)
    assert torch.equal(unpaired.direction, listed.direction)
    uneven = fg.ContrastSet("z", positives=["the bride", "a ring"], negatives=["a dog"])
    with pytest.raises(fg.DataError, match="2 positive texts and 1 negative text"):
        fg.train(llama, tokenizer, uneven, **options)
    fg.train(llama, tokenizer, uneven, objective=recipe("lm"), hookpoint=AT)


def test_a_trained_vector_is_a_file(llama, tokenizer, tmp_path):
    vector = fg.train(llama, tokenizer, PREFERENCES, objective=recipe("reps"), space="sae", sae=make_sae(), features=4)
    vector.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(tmp_path / "v.safetensors", llama)
    assert torch.equal(loaded.direction, vector.direction)
    assert loaded.features == pytest.approx(dict(vector.features))
    provenance = json.loads(json.dumps(dict(loaded.provenance)))
    assert provenance["method"] == "reps"
    assert provenance["hyperparameters"]["factors"] == list(fg.VectorTraining.recipe("reps").factors)
    assert provenance["model"]["layers"] == 3
    assert not vector.direction.requires_grad


def test_the_command_writes_the_vector_that_the_function_returns(tmp_path):
    """On the default, in its SAE's space, with the features' weights in the file."""
    rows = [{"prompt": p, "chosen": winner, "rejected": loser} for p, winner, loser in PREFERENCES]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "v.safetensors"
    settings = ["--objective", "simpo", "--set", "epochs=2", "--set", "factors=[4, 8]", "--no-strengths"]
    result = invoke_on_cpu(
        "train", tmp_path / "pairs.jsonl", "-o", out, "--space", "sae", "--features", 5, "--json", *settings
    )
    told = json.loads(result.stdout)
    vector = SteeringVector.load(out)
    model, tokenizer = fg.load_model("default", device="cpu")
    recipe = fg.VectorTraining.recipe("simpo", epochs=2, factors=(4.0, 8.0))
    expected = fg.train(
        model, tokenizer, PREFERENCES, objective=recipe, space="sae", sae=fg.load_sae("default"), features=5
    )
    assert torch.equal(vector.direction, expected.direction)
    assert vector.features == pytest.approx(dict(expected.features))
    assert (told["features"], told["training"]["steps"]) == (5, 2)
    with pytest.raises(fg.DataError, match="one of reps_relative, lm_relative, lm, lm_factors"):
        invoke("train", "love", "-o", out, "--objective", "dpo")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"objective": "dpo"}, fg.DataError, "one of reps_relative, lm_relative, lm, lm_factors, bipo"),
        ({"space": "sae"}, fg.SelectionError, "pass sae="),
        ({"space": "dense"}, fg.DataError, "'residual' or 'sae'"),
        ({"hookpoint": None}, fg.DataError, "pass hookpoint=12"),
        ({"hookpoint": 9}, fg.HookpointError, "layer"),
        ({"nonnegative": True}, fg.DataError, "space='sae'"),
        ({"objective": "reft_r1", "scope": "generated"}, fg.DataError, "reads every token"),
        ({"space": "sae", "sae": make_sae(), "hookpoint": 0}, fg.DataError, "leave hookpoint out"),
        ({"space": "sae", "sae": make_sae(), "features": [99]}, fg.SelectionError, "99"),
        ({"space": "sae", "sae": make_sae(), "features": [1, 1]}, fg.SelectionError, "once"),
        ({"space": "sae", "sae": make_sae(), "features": 0}, fg.DataError, "features = 0"),
        ({"objective": "reps", "space": "sae", "sae": make_sae(), "nonnegative": True}, fg.DataError, "only adds"),
        ({"space": "sae", "sae": make_sae(d_model=16)}, fg.PairingError, "d_model 16"),
        ({"objective": recipe("lm", lr=1e6, factors=(1e6,))}, fg.SteeringError, "smaller strength"),
    ],
)
def test_refusals(options, error, match, llama, tokenizer):
    given: Any = {"hookpoint": None if "sae" in options else AT, **options}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()]
    with pytest.raises(error, match=f"(?i){match}"):
        fg.train(llama, tokenizer, PREFERENCES, **given)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llama.modules()] == hooks


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lr": 0.0}, "lr"),
        ({"epochs": 0}, "epochs"),
        ({"factors": ()}, "at least one strength"),
        ({"factors": (-1.0,)}, "a factor"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": 0.0}, "other than 0"),
        ({"schedule": "step"}, "linear, cosine, constant"),
        ({"batches": 3}, "one of lr, epochs"),
    ],
)
def test_settings_out_of_range(changes, match):
    with pytest.raises((fg.DataError, fg.ArgumentError), match=match):
        fg.VectorTraining.recipe("reps", **changes)


def test_published_constants():
    """The figures of METHODS that a change of a default would silently lose."""
    constants = {
        "lm": (0.01, 3, 6, "linear", None, (1.0,), 0.01),
        "lm_factors": (0.04, 6, 12, "linear", None, tuple(range(2, 21, 2)), 0.01),
        "bipo": (5e-4, 100, 4, "cosine", None, (1.0,), 0.0),
        "reps": (0.04, 18, 6, "linear", 1.0, tuple(range(2, 21, 2)), None),
        "reft_r1": (0.01, 3, 3, "linear", 1.0, (1.0,), None),
    }
    for name, expected in constants.items():
        s = fg.VectorTraining.recipe(name)
        assert (s.lr, s.epochs, s.batch, s.schedule, s.clip, s.factors, s.init) == expected
        assert (s.weight_decay, s.dropout, s.compat) == (0, 0, False)
    bipo, reft = fg.VectorTraining.recipe("bipo"), fg.VectorTraining.recipe("reft_r1")
    assert (bipo.beta, bipo.warm_up, bipo.seed, reft.top, reft.l1) == (0.1, 100, 11, 8, 0.005)


def test_spaces_have_a_size():
    sae = make_sae()
    assert FeatureSpace(sae, None, torch.device("cpu")).size == sae.d_sae
    with pytest.raises(fg.PairingError, match="transcoder"):
        FeatureSpace(make_sae(reads=fg.Hookpoint(1, "mlp_in")), None, torch.device("cpu"))
