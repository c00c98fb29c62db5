"""Refusal directions by gradient, concept cones, representational independence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.directions.cones import orthant_weights, orthonormal, tangent
from fgsteer.directions.removal import ablate_everywhere
from fgsteer.directions.targets import first_sentence, reply_logits, write_targets
from fgsteer.interventions import apply
from fgsteer.models.gradients import frozen
from tests.helpers.steering import vector
from tests.helpers.tiny import D_MODEL, tiny_model
from tests.reference import cones as reference
from tests.reference.directions import removal_hooks

REFUSED = ["the man sat", "the king was a dog", "a dog"]
ANSWERED = ["a cat", "the queen and the king", "a day was"]
LAYER, TOKENS = 1, 4
OPTIONS: Any = {"reply_tokens": TOKENS, "batch_size": 2, "epochs": 2}


@pytest.fixture(scope="module")
def wide():
    """A tiny Llama in float64, in which only directions are rounded."""
    return tiny_model("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def r():
    return fg.SteeringVector(2 * vector(1, LAYER).direction, fg.Hookpoint(LAYER, "resid_pre"))


def naive_targets(model, tokenizer, r):
    """The five parts of each example, decoded by loops; a reply ends with the end-of-text token, 2."""

    def reply(ids, tokens, hooks=()):
        found = reference.greedy(model, ids, tokens, hooks)
        return found[: found.index(2) + 1] if 2 in found else found

    rows = []
    for refused, answered in zip(REFUSED, ANSWERED, strict=True):
        a, b = (list(tokenizer(text)["input_ids"]) for text in (refused, answered))
        added = reply(b, TOKENS, reference.adding_hooks(model, r.direction, LAYER))
        dot = tokenizer.convert_tokens_to_ids(".")
        added = added[: added.index(dot) + 1] if dot in added else added
        rows.append((a, reply(a, TOKENS, removal_hooks(model, r.direction)), b, added, reply(b, TOKENS - 1)))
    return rows


def test_targets_are_what_the_model_writes(wide, tokenizer, r):
    found = write_targets(wide, tokenizer, REFUSED, ANSWERED, r, TOKENS)
    for n, (refused, ablated, answered, added, retained) in enumerate(naive_targets(wide, tokenizer, r)):
        assert (found.ablated[n].prompt, found.ablated[n].reply) == (refused, ablated)
        assert (found.added[n].prompt, found.added[n].reply) == (answered, added)
        assert (found.retained[n].prompt, found.retained[n].reply) == (answered, retained)
    ids = tokenizer("the man . a cat .", add_special_tokens=False)["input_ids"]
    assert first_sentence(tokenizer, ids) == ids[:3]
    assert first_sentence(tokenizer, ids[:2]) == ids[:2]


def test_at_r_the_most_likely_tokens_are_the_target(wide, tokenizer, r):
    """The target was decoded greedily under r, so that it is the argmax at every position where v = r."""
    targets = write_targets(wide, tokenizer, REFUSED, ANSWERED, r, 8)
    logits = reply_logits(wide, targets.ablated, ablate_everywhere(wide, r))
    for rows, one in zip(logits, targets.ablated, strict=True):
        assert rows.shape[0] == len(one.reply) + 1
        assert rows[:-1].argmax(-1).tolist() == one.reply
    plain = reply_logits(wide, targets.ablated)
    assert any(p[:-1].argmax(-1).tolist() != one.reply for p, one in zip(plain, targets.ablated, strict=True))


@pytest.mark.parametrize("kl_of", ["ablated", "base"])
def test_a_direction_is_trained_as_by_loops(wide, tokenizer, r, kl_of):
    other = vector(5)
    options: Any = {**OPTIONS, "kl_of": kl_of}
    independent = kl_of == "base"
    if independent:
        options["independent_of"] = [other]
    cone = fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=1, **options)
    start = (r.direction / r.direction.norm()).double()[None]
    losses, bases = reference.train(
        wide,
        naive_targets(wide, tokenizer, r),
        start,
        LAYER,
        r.norm,
        (),
        batch=2,
        epochs=2,
        of=kl_of,
        other=other.direction if independent else None,
        blocks=2,
    )
    # rows are float32, of 7 digits, and Adam's first steps are as large whatever the gradient's size
    assert cone.losses == pytest.approx(losses, rel=1e-4)
    assert torch.allclose(cone.basis.double(), bases[losses.index(min(losses))], atol=1e-4)
    assert losses.index(min(losses)) > 0, "a later step is better than the start"
    single = fg.train_refusal_direction(wide, tokenizer, REFUSED, ANSWERED, r, **options)
    assert torch.equal(single.direction, cone.vector().direction)
    assert (single.hookpoint, single.norm) == (r.hookpoint, pytest.approx(r.norm))
    assert single.provenance["hyperparameters"]["kl_of"] == kl_of


def test_a_cone_is_trained_as_by_loops(wide, tokenizer, r):
    """A row is drawn for each dimension, then each step's mixtures, from one generator."""
    first = fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=1, **OPTIONS)
    cone = fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=2, samples=2, **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(D_MODEL, generator=generator).double() for _ in range(2)]
    start = reference.gram_schmidt([first.basis[0].double(), drawn[1]])
    draws = []
    for _ in range(4):
        g = torch.randn(2, 2, generator=generator, dtype=torch.float64).abs()
        draws.append([row / row.norm() for row in g])
    losses, bases = reference.train(
        wide, naive_targets(wide, tokenizer, r), start, LAYER, r.norm, draws, batch=2, epochs=2
    )
    assert cone.losses[:4] == first.losses
    assert cone.losses[4:] == pytest.approx(losses, rel=1e-4)  # as above
    assert torch.allclose(cone.basis.double(), bases[losses.index(min(losses))], atol=2e-4)
    further = fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=2, samples=2, start=first, **OPTIONS)
    assert further.losses == pytest.approx(cone.losses[4:], rel=1e-5)


def test_rows_stay_orthonormal_and_gradients_tangent():
    generator = torch.Generator().manual_seed(3)
    rows, against = torch.randn(3, 8, generator=generator), torch.randn(2, 8, generator=generator)
    fixed = orthonormal(against, torch.empty(0, 8))
    basis = orthonormal(rows, fixed)
    assert torch.allclose(basis, reference.gram_schmidt(list(rows.double()), list(fixed)), atol=1e-12)
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert float((basis @ fixed.T).abs().max()) < 1e-14
    gradient = tangent(basis, torch.randn(3, 8, generator=generator).double())
    assert float((gradient * basis).sum(1).abs().max()) < 1e-14
    nearly = torch.stack([rows[0], rows[0] + 1e-4 * rows[1]])  # Gram–Schmidt once would leave 1e-4 of the first
    again = orthonormal(nearly.double(), torch.empty(0, 8))
    assert abs(float(again[0] @ again[1])) < 1e-14
    with pytest.raises(fg.SelectionError, match="lies in the space"):
        orthonormal(fixed[:1] * 3, fixed)


def test_a_cone_goes_on_with_one_seed(wide, tokenizer, r):
    """The row that is added is another than those that an earlier training drew, which moved none of them."""
    options: Any = {"samples": 1, **OPTIONS, "epochs": 1, "batch_size": 3, "learning_rate": 0.0}
    two = fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=2, **options)
    three = fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=3, start=two, **options)
    assert torch.allclose(three.basis[:2], two.basis, atol=1e-6), "rounding of float32"
    assert len(three.losses) == 1


def test_every_row_is_orthogonal_to_what_is_named(wide, tokenizer, r):
    others = [r, vector(7)]
    cone = fg.train_cone(
        wide, tokenizer, REFUSED, ANSWERED, r, dimension=2, samples=1, start="random", orthogonal_to=others, **OPTIONS
    )
    # float32 rows
    assert all(float((cone.basis @ one.direction).abs().max()) < 1e-6 * max(1, one.norm) for one in others)
    assert torch.allclose(cone.basis @ cone.basis.T, torch.eye(2), atol=1e-6)
    with pytest.raises(fg.SelectionError, match='start="random"'):
        fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, orthogonal_to=[r], **OPTIONS)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_draws_are_uniform_on_the_orthant(dimension):
    """The mean of a coordinate is Γ(k/2) / (√π Γ((k+1)/2)), and that of its square 1/k."""
    n = 200_000
    weights = orthant_weights(n, dimension, torch.Generator().manual_seed(0))
    mean = math.gamma(dimension / 2) / (math.sqrt(math.pi) * math.gamma((dimension + 1) / 2))
    # five standard errors of a number of variance below 1/k
    assert weights.mean(0).tolist() == pytest.approx([mean] * dimension, abs=5 * (1 / dimension / n) ** 0.5)
    assert weights.square().mean(0).tolist() == pytest.approx([1 / dimension] * dimension, abs=5 * (1 / n) ** 0.5)
    assert float(weights.min()) >= 0
    assert torch.allclose(weights.norm(dim=1), torch.ones(n, dtype=torch.float64))


def test_a_cone_samples_ablates_and_is_a_file(llama, tokenizer, tmp_path):
    basis = orthonormal(torch.stack([vector(1).direction, vector(2).direction]), torch.empty(0, D_MODEL)).float()
    cone = fg.ConceptCone(basis, "blocks.1.hook_resid_pre", 3.0, (2.0, 1.0), {"method": "rdo"})
    drawn = cone.sample(5, seed=1)
    for one in drawn:
        weights = basis @ one.direction / 3.0
        assert float(weights.min()) >= 0
        assert float(weights.norm()) == pytest.approx(1, rel=1e-5)
        assert one.hookpoint == cone.hookpoint
    assert torch.equal(cone.sample(5, seed=1)[4].direction, drawn[4].direction)
    removed = cone.ablation(llama)
    hidden = torch.randn(1, 2, D_MODEL)
    gone = apply(hidden, removed[0].update())
    assert float((gone @ basis.T).abs().max()) < 1e-5, "rounding of float32"
    cone.save(tmp_path / "cone.safetensors")
    loaded = fg.ConceptCone.load(tmp_path / "cone.safetensors", llama)
    assert torch.equal(loaded.basis, basis)
    assert (loaded.hookpoint, loaded.norm, loaded.losses) == (cone.hookpoint, 3.0, (2.0, 1.0))
    assert loaded.provenance == {"method": "rdo"}
    assert "float32 (2, 32)" in repr(cone)
    with pytest.raises(fg.FormatError, match="vector file"):
        fg.SteeringVector.load(tmp_path / "cone.safetensors")
    drawn[0].save(tmp_path / "vector.safetensors")
    with pytest.raises(fg.FormatError, match="cone file"):
        fg.ConceptCone.load(tmp_path / "vector.safetensors")
    with pytest.raises(fg.PairingError, match="orthonormal"):
        fg.ConceptCone(2 * basis, 1, 3.0)
    with pytest.raises(fg.SelectionError, match="from 0 to 1"):
        cone.vector(2)
    with pytest.raises(fg.DataError, match="n = 0"):
        cone.sample(0)


def test_independence_equals_loops(wide, tokenizer):
    v, w, prompts = vector(1), vector(2), [*REFUSED, *ANSWERED]
    found = fg.representational_independence(wide, tokenizer, v, w, prompts, depth=1.0, batch_tokens=12)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for prompt in prompts:
        rows = reference.dependence(wide, list(tokenizer(prompt)["input_ids"]), v.direction, w.direction, 3)
        total += torch.tensor([[float(x.detach()) for x in row] for row in rows])
    total /= len(prompts)
    # directions are float32; what is compared are squares of differences of numbers near 1
    assert torch.allclose(torch.stack([found.first, found.second]), total, rtol=1e-5, atol=1e-12)
    assert found.total == pytest.approx(float(total.sum(0).mean()), rel=1e-5)
    exchanged = fg.representational_independence(wide, tokenizer, w, v, prompts, depth=1.0)
    assert torch.allclose(exchanged.first, found.second, rtol=1e-9)
    assert len(fg.representational_independence(wide, tokenizer, v, w, prompts, depth=0.5).first) == 1
    with pytest.raises(fg.DataError, match="depth"):
        fg.representational_independence(wide, tokenizer, v, w, prompts, depth=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_families_train_a_direction_and_keep_their_weights(models, tokenizer, r, family):
    model = models[family]
    before = {name: p.clone() for name, p in model.named_parameters()}
    options: Any = {**OPTIONS, "epochs": 4}
    cone = fg.train_cone(model, tokenizer, REFUSED, ANSWERED, r, dimension=1, **options)
    assert min(cone.losses) < cone.losses[0]
    assert all(
        torch.equal(before[name], p) and p.grad is None and p.requires_grad for name, p in model.named_parameters()
    )


def test_bfloat16_and_no_step(tokenizer, r):
    model = tiny_model("llama", dtype=torch.bfloat16)
    still = fg.train_refusal_direction(model, tokenizer, REFUSED, ANSWERED, r, learning_rate=0.0, **OPTIONS)
    assert torch.allclose(still.direction, r.direction, atol=1e-6), "a rate of 0 moves nothing but rounding"
    moved = fg.train_refusal_direction(model, tokenizer, REFUSED, ANSWERED, r, **{**OPTIONS, "epochs": 4})
    assert torch.isfinite(moved.direction).all()


def test_patience_ends_training(wide, tokenizer, r):
    """A rate of 0 never finds a lower loss on one batch: rates fall twice, and the third time training ends."""
    options: Any = {**OPTIONS, "batch_size": 3, "epochs": 50, "patience": 2, "learning_rate": 0.0}
    cone = fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=1, **options)
    # sums over a batch in another order may differ in the last digits, and count as lower
    assert 7 <= len(cone.losses) < 50


def test_parameters_are_free_again_after_an_error(wide, tokenizer, r):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fg.train_cone(wide, tokenizer, REFUSED, ANSWERED, r, dimension=1, progress=stop, **OPTIONS)
    assert all(p.requires_grad for p in wide.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wide.modules())
    with frozen(wide):
        assert not any(p.requires_grad for p in wide.parameters())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"dimension": 0}, fg.DataError, "dimension"),
        ({"dimension": D_MODEL + 1}, fg.DataError, "dimension"),
        ({"samples": 0}, fg.DataError, "samples"),
        ({"answered": ["a cat"]}, fg.DataError, "as many of one kind"),
        ({"answered": []}, fg.DataError, "as many of one kind"),
        ({"refused": "the man"}, fg.DataError, "as many of one kind|a list of texts"),
        ({"direction": fg.SteeringVector(torch.zeros(D_MODEL), 1)}, fg.SelectionError, "norm 0"),
        ({"direction": fg.SteeringVector(torch.ones(8), 1)}, fg.PairingError, "width|8"),
        ({"kl_of": "both"}, fg.DataError, "kl_of"),
        ({"start": "nowhere"}, fg.DataError, "start"),
        ({"start": fg.ConceptCone(torch.eye(8)[:1], 1, 1.0)}, fg.PairingError, "a cone at"),
        ({"orthogonal_to": 3}, fg.DataError, "orthogonal_to"),
        ({"independent_of": [3]}, fg.DataError, "independent_of"),
        ({"orthogonal_to": [fg.SteeringVector(torch.ones(8), 1)]}, fg.PairingError, "width 8"),
        ({"addition": -1.0}, fg.DataError, "addition"),
        ({"retain": math.nan}, fg.DataError, "retain"),
        ({"learning_rate": "1"}, fg.ArgumentError, "learning_rate"),
        ({"epochs": 0}, fg.DataError, "epochs"),
        ({"patience": 1.5}, fg.ArgumentError, "patience"),
        ({"lr": 0.1}, fg.ArgumentError, "an argument 'lr'"),
    ],
)
def test_what_cannot_be_trained_is_refused(wide, tokenizer, r, change, error, match):
    arguments: Any = {"refused": REFUSED, "answered": ANSWERED, "direction": r, **OPTIONS, **change}
    with pytest.raises(error, match=match):
        fg.train_cone(wide, tokenizer, **arguments)


def test_a_direction_takes_no_dimension(wide, tokenizer, r):
    options: Any = {"dimension": 2}
    with pytest.raises(fg.ArgumentError, match="an argument 'dimension'"):
        fg.train_refusal_direction(wide, tokenizer, REFUSED, ANSWERED, r, **options)
