"""Components of a shift: what they resemble, what acts on them, what projections come from, trigger words."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.directions.relevance import words_of
from fgsteer.interventions import apply
from fgsteer.interventions.projecting import SubtractProjection
from tests.helpers.saes import make_sae
from tests.helpers.steering import direction, vector
from tests.helpers.tiny import D_MODEL, tiny_model
from tests.reference import shift as reference

PROMPTS = ["the man sat", "the king was a dog", "a cat", "the queen and the king"]


@pytest.fixture(scope="module")
def wide():
    return tiny_model("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def tuned(wide):
    """The same with a vector added after block 0: the shift of later layers follows from it."""
    other = copy.deepcopy(wide)
    v = direction(4).double()
    other.model.layers[0].register_forward_hook(lambda _, __, output: output + v)
    return other


@pytest.fixture(scope="module")
def shifts(wide, tuned, tokenizer):
    return fg.residual_shift(wide, tuned, tokenizer, PROMPTS)


# ---------------------------------------------------------------- reading


def test_components_are_read_through_tokens_and_features(llama, tokenizer, shifts):
    sae = dataclasses.replace(make_sae(), labels={5: "planted"})
    shift = shifts[1]
    planted = sae.direction(5) / sae.direction(5).norm()
    components = shift.components.clone()
    components[0] = -planted.double()
    shift = dataclasses.replace(shift, components=components)
    rows = fg.describe_components(llama, tokenizer, shift, sae=sae, components=2, tokens=3)
    assert [row.component for row in rows] == [0, 1]
    assert rows[0].features[0] == (5, pytest.approx(-1.0, abs=1e-6))
    assert rows[0].labels[0] == "planted"
    logits = fg.logit_lens(llama, -planted[None])[0]
    assert rows[0].raised == tuple(tokenizer.decode([int(i)]) for i in logits.topk(3).indices)
    assert rows[0].lowered == tuple(tokenizer.decode([int(i)]) for i in (-logits).topk(3).indices)
    assert rows[0].share == pytest.approx(float(shift.shares[0]))
    cosines = [float(components[1] @ row.double() / row.double().norm()) for row in sae.W_dec]
    best = sorted(range(len(cosines)), key=lambda j: -abs(cosines[j]))[:3]
    assert [feature for feature, _ in rows[1].features] == best
    assert [cosine for _, cosine in rows[1].features] == pytest.approx([cosines[j] for j in best], abs=1e-6)
    assert "planted" in str(rows)
    assert fg.describe_components(llama, tokenizer, shift)[0].features == ()
    with pytest.raises(fg.PairingError, match="hookpoints="):
        fg.describe_components(llama, tokenizer, shifts[0], sae=sae)
    with pytest.raises(fg.DataError, match="components = 0"):
        fg.describe_components(llama, tokenizer, shift, components=0)


# ---------------------------------------------------------------- interventions


@pytest.mark.parametrize(("strength", "limit"), [(1.0, math.inf), (4.5, 0.5), (-1.0, 0.2), (0.0, math.inf), (2.0, 0.0)])
def test_subtracted_projections_equal_loops(strength, limit):
    h, v = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(0)), 0.3 * direction(2)
    item = SubtractProjection(direction=v, strength=strength, limit=limit, hookpoint=1)
    found = apply(h, item.update())
    for row, own in zip(h.reshape(-1, D_MODEL), found.reshape(-1, D_MODEL), strict=True):
        assert torch.allclose(own, reference.subtract(row, v, strength, limit), atol=1e-5)  # float32
    if not strength or not limit:
        assert torch.equal(found, h)
    if limit == math.inf and strength == 1:
        assert torch.allclose(found, apply(h, fg.Ablate(direction=v, hookpoint=1).update()), atol=1e-6)


def test_subtracted_projections_in_a_file(tmp_path):
    """With and without a bound, as files of JSON hold no infinity."""
    h = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(0))
    items = [
        SubtractProjection(direction=direction(2), strength=1.5, limit=limit, hookpoint=1, scope="reply", bos=True)
        for limit in (None, math.inf, 0.25, 0.0)
    ]
    fg.save_steering(tmp_path / "s.safetensors", items)
    for item, loaded in zip(items, fg.load_steering(tmp_path / "s.safetensors"), strict=True):
        assert isinstance(loaded, SubtractProjection)
        assert (loaded.strength, loaded.limit, loaded.scope, loaded.bos) == (1.5, item.limit, "reply", True)
        assert torch.equal(apply(h, loaded.update()), apply(h, item.update()))


@pytest.mark.parametrize("options", [{"strength": 1.5, "limit": 0.4}, {"strength": -1.0, "kind": "constant"}])
def test_component_interventions_act_at_every_block(wide, tokenizer, shifts, options):
    shift, numbers = shifts[1], [0, 2]
    steering = fg.component_interventions(wide, shift, numbers, **options)
    assert [i.hookpoint.layer for i in steering] == [0, 0, 1, 1, 2, 2]

    def change(h):
        for number in numbers:
            v = shift.components[number].float().double()
            if "kind" in options:
                h = h - options["strength"] * v
            else:
                h = reference.subtract(h, v, options["strength"], options["limit"])
        return h

    for prompt in PROMPTS[:2]:
        expected = reference.subtracted_replies(wide, list(tokenizer(prompt)["input_ids"]), 5, change)
        text = fg.generate(wide, tokenizer, [prompt], steering=[steering], max_new_tokens=5, do_sample=False)[0]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    one = fg.component_interventions(wide, shift, layers=[shift.hookpoint.layer])
    assert [str(i.hookpoint) for i in one] == ["blocks.1.hook_resid_post"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wide.modules())


def test_an_amount_of_zero_changes_no_bit(wide, tokenizer, shifts):
    ids = tokenizer("the man sat", return_tensors="pt")["input_ids"]
    plain = wide(ids).logits
    for options in ({"strength": 0.0}, {"limit": 0.0}, {"strength": 0.0, "kind": "constant"}):
        with fg.steer(wide, fg.component_interventions(wide, shifts[1], [0], **options)):
            assert torch.equal(wide(ids).logits, plain)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"components": [99]}, fg.SelectionError, "a number from 0"),
        ({"components": []}, fg.DataError, "no components"),
        ({"kind": "both"}, fg.DataError, "kind"),
        ({"kind": "constant", "limit": 1.0}, fg.DataError, "a limit of a constant"),
        ({"limit": -1.0}, fg.DataError, "limit"),
        ({"strength": math.nan}, fg.SteeringError, "strength"),
    ],
)
def test_other_interventions_are_refused(wide, shifts, change, error, match):
    with pytest.raises(error, match=match):
        fg.component_interventions(wide, shifts[1], **change)


# ---------------------------------------------------------------- relevance


@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_token_relevance_equals_loops_and_adds_up(wide, tokenizer, baseline):
    v, steps = vector(3, layer=1), 7
    found = fg.token_relevance(wide, tokenizer, v, PROMPTS, baseline=baseline, steps=steps, batch_tokens=12)
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = list(tokenizer(prompt)["input_ids"])
        e = reference.embedded(wide, ids)
        begin = e.mean(0).expand_as(e) if baseline == "mean" else torch.zeros_like(e)
        mean = reference.integrated(wide, ids, v.direction, 1, -1, begin, e, steps)
        # float64; the direction is normalised in float32
        assert torch.allclose(one.values, ((e - begin) * mean).sum(1), rtol=1e-5, atol=1e-8)
        ends = [
            float(reference.projection(wide, ids, v.direction, 1, reference.replacing_embeddings(wide, h)).detach())
            for h in (begin, e)
        ]
        assert one.difference == pytest.approx(ends[1] - ends[0], rel=1e-5)
        assert one.tokens == tuple(tokenizer.convert_ids_to_tokens(ids))
        assert one.words == ("", *prompt.split())
    # the midpoint rule converges with the square of its steps
    many = fg.token_relevance(wide, tokenizer, v, PROMPTS[:1], steps=400)[0]
    assert float(many.values.sum()) == pytest.approx(many.difference, rel=1e-3, abs=1e-3)


def test_component_effects_equal_loops_and_add_up(tuned, tokenizer, shifts):
    low, v, steps = shifts[0], shifts[2].vector(), 6
    found = fg.component_effects(tuned, tokenizer, low, v, PROMPTS, components=3, steps=steps)
    many = fg.component_effects(tuned, tokenizer, low, v, PROMPTS[:1], components=3, steps=400)[0]
    u = low.components[:3]
    for prompt, effects in zip(PROMPTS, found, strict=True):
        ids = list(tokenizer(prompt)["input_ids"])
        h = reference.output_of(tuned, ids, 0)
        rest = h - (h @ u.T) @ u
        mean = reference.integrated(tuned, ids, v.direction, 2, 0, rest, h, steps)
        expected = [sum(float(h[t] @ u[k]) * float(mean[t] @ u[k]) for t in range(len(ids))) for k in range(3)]
        assert effects.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)
        if prompt == PROMPTS[0]:
            ends = []
            for x in (rest, h):
                hooks = reference.replacing_output(tuned, 0, x)
                ends.append(float(reference.projection(tuned, ids, v.direction, 2, hooks).detach()))
            assert float(many.sum()) == pytest.approx(ends[1] - ends[0], rel=1e-3, abs=1e-3)
    with pytest.raises(fg.PairingError, match="a lower layer"):
        fg.component_effects(tuned, tokenizer, shifts[2], shifts[1].vector(), PROMPTS)
    with pytest.raises(fg.DataError, match="components"):
        fg.component_effects(tuned, tokenizer, low, v, PROMPTS, components=0)


def test_of_a_direct_path_the_effect_is_the_coefficient(tokenizer):
    """Where later blocks add nothing, the projection is linear in the coefficients: one step is exact."""
    model = tiny_model("llama", dtype=torch.float64)
    for block in model.model.layers[1:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    other = copy.deepcopy(model)
    v = direction(4).double()
    other.model.layers[0].register_forward_hook(lambda _, __, output: output + v)
    shift = fg.residual_shift(model, other, tokenizer, PROMPTS, hookpoints=[0])[0]
    effects = fg.component_effects(
        other, tokenizer, shift, fg.SteeringVector(v.float(), 2), PROMPTS, components=1, steps=1
    )
    for prompt, effect in zip(PROMPTS, effects[:, 0].tolist(), strict=True):
        last = reference.output_of(other, list(tokenizer(prompt)["input_ids"]), 0)[-1]
        assert effect == pytest.approx(float(last @ shift.components[0]), rel=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_families_have_relevances_that_add_up(models, tokenizer, family):
    found = fg.token_relevance(models[family], tokenizer, vector(3, layer=1), PROMPTS[:1], steps=200)[0]
    # an integral by 200 points, in float32
    assert float(found.values.sum()) == pytest.approx(found.difference, rel=0.02, abs=0.02)
    assert all(p.requires_grad and p.grad is None for p in models[family].parameters())


def test_what_has_no_relevance_is_refused(wide, tokenizer):
    for change, error, match in (
        ({"baseline": "pad"}, fg.DataError, "baseline"),
        ({"steps": 0}, fg.DataError, "steps"),
        ({"vector": fg.SteeringVector(torch.zeros(D_MODEL), 1)}, fg.SelectionError, "norm"),
        ({"vector": fg.SteeringVector(torch.ones(8), 1)}, fg.PairingError, "8"),
        ({"prompts": []}, fg.DataError, "no prompts"),
    ):
        arguments: Any = {"vector": vector(1), "prompts": PROMPTS, **change}
        with pytest.raises(error, match=match):
            fg.token_relevance(wide, tokenizer, **arguments)


# ---------------------------------------------------------------- trigger words


def test_trigger_words_are_the_most_relevant(wide, tokenizer):
    v = vector(3, layer=1)
    rows = fg.find_triggers(wide, tokenizer, v, PROMPTS, per_prompt=2, min_characters=3)
    counted: dict[str, list[float]] = {}
    for one in fg.token_relevance(wide, tokenizer, v, PROMPTS):
        sums: dict[str, float] = {}
        for word, value in zip(one.words, one.values.tolist(), strict=True):
            if len(word) >= 3:
                sums[word] = sums.get(word, 0) + value
        order = sorted((word for word in sums if sums[word] > 0), key=lambda word: -sums[word])[:2]
        for word in order:
            counted.setdefault(word, []).append(sums[word] / sums[order[0]])
    assert {row.word: (row.prompts, row.relevance) for row in rows} == {
        word: (len(own), pytest.approx(sum(own) / len(own))) for word, own in counted.items()
    }
    assert [row.prompts for row in rows] == sorted((row.prompts for row in rows), reverse=True)
    assert "relevance" in str(rows)
    with pytest.raises(fg.DataError, match="per_prompt"):
        fg.find_triggers(wide, tokenizer, v, PROMPTS, per_prompt=0)


def test_words_are_removed_whole(tokenizer):
    prompts = ["The man's cat sat on a Cat.", "catalogue", [{"role": "user", "content": "A cat ran"}]]
    assert fg.remove_words(prompts, ["cat"]) == [
        "The man's sat on a .",
        "catalogue",
        [{"role": "user", "content": "A ran"}],
    ]
    assert fg.remove_words(prompts[:1], ["cat", "man's"], "dog") == ["The dog dog sat on a dog."]
    assert fg.remove_words(prompts, []) == prompts
    chat = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "cat"}]
    assert fg.remove_words([chat], ["cat"], "dog")[0][1]["content"] == "cat"  # type: ignore[index]
    for words, match in (([""], "at least one character"), (["cat"], "nothing is left")):
        with pytest.raises(fg.DataError, match=match):
            fg.remove_words(["cat"], words)
    with pytest.raises(fg.DataError, match="a list of texts"):
        fg.remove_words(["cat"], "cat")


def test_words_of_a_conversation(tokenizer):
    ids = list(tokenizer("user the man sat . assistant")["input_ids"])
    assert words_of(tokenizer, ids, [{"role": "user", "content": "the man sat"}]) == [
        "",
        "",
        "the",
        "man",
        "sat",
        "",
        "",
    ]
    assert words_of(tokenizer, ids, "The MAN")[2:4] == ["the", "man"], "a text that is not found: all words"
