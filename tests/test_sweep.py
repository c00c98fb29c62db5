"""The sweep: against loops, against a model whose answer is planted, and its rules on hand-made curves."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from transformers import AutoModelForCausalLM

import fgsteer as fg
from fgsteer.cli import printing
from fgsteer.errors import DataError, HookpointError, SelectionError
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.sweep import plots as sweep_plots
from fgsteer.evaluation.sweep.answers import Curve, best_layer, fade, in_words, sign_differences
from fgsteer.evaluation.sweep.layers import around, thinned
from fgsteer.evaluation.sweep.measuring import random_like
from fgsteer.evaluation.sweep.page import write_page
from fgsteer.models.hookpoints import blocks_of
from tests.helpers.cli import invoke_on_cpu
from tests.helpers.examples import naive_examples
from tests.helpers.tiny import D_MODEL, FAMILIES, LAYERS, tiny_model
from tests.reference import methods, tables
from tests.reference import sweep as reference

NEUTRAL = ["the dog sat on the house", "a man took the tea", "it is a new day and the cat ran"]
SIDES = fg.ContrastSet(
    "wed",
    positives=["the bride wore a ring", "the groom said yes in church", "a happy wedding"],
    negatives=["a cat ran", "the old king was sad"],
    held_out=fg.ContrastSet(
        "wed:held_out",
        positives=["the groom took a ring", "she was happy with the bride", "a wedding in the church"],
        negatives=["the ship was old", "a dog ran to the sea and sat"],
    ),
)
LETTERS = [
    fg.ContrastPair("A", "B", prompt="is the king happy ? ("),
    fg.ContrastPair("yes", "no", prompt="the man said"),
    fg.ContrastPair("tea", "bread", prompt="I think"),
]
UNEQUAL = [*LETTERS, fg.ContrastPair("yes and no", "bad", prompt="he said")]
# float32 forward passes at other batch shapes, log-probabilities of some tens of nats, differences of them
CLOSE: dict[str, Any] = {"rel": 1e-3, "abs": 2e-4}


def whole(tokenizer, texts):
    return [(tokenizer(text)["input_ids"], 1) for text in texts]


def answers(tokenizer, pairs, side):
    found = []
    for pair in pairs:
        ids = tokenizer(f"{pair.prompt} {getattr(pair, side)}")["input_ids"]
        found.append((ids, len(tokenizer(pair.prompt)["input_ids"])))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cells_equal_the_loop_over_texts_and_layers(models, tokenizer, family):
    model = models[family]
    sizes = (0.25, 1.0)
    for batch_tokens in (24, 16384):
        found = fg.sweep(
            model, tokenizer, SIDES, coefficients=sizes, neutral=NEUTRAL, controls=0, batch_tokens=batch_tokens
        )
        cells = {(cell.layer, cell.coefficient): cell for cell in found.cells}
        assert list(cells) == [(layer, s * c) for layer in range(LAYERS) for s in (1, -1) for c in sizes]
        up, down = whole(tokenizer, SIDES.held_out.positives), whole(tokenizer, SIDES.held_out.negatives)
        plain = whole(tokenizer, NEUTRAL)
        base_up, base_down = reference.per_token(model, up), reference.per_token(model, down)
        assert found.propensity.mean == pytest.approx(reference.propensity(base_up, base_down), **CLOSE)
        assert found.cross_entropy == pytest.approx(reference.cross_entropy(model, plain), **CLOSE)
        for layer, block in enumerate(blocks_of(model)):
            examples = [naive_examples(model, tokenizer, side, fg.Hookpoint(layer)) for side in sides(SIDES)]
            direction = torch.tensor(methods.caa(*examples)).float()
            assert found.norms[layer] == pytest.approx(float(direction.norm()), rel=1e-4)
            for coefficient in (0.25, -1.0):
                cell, shift = cells[layer, coefficient], coefficient * direction
                rise_up = np.subtract(reference.per_token(model, up, block, shift), base_up).tolist()
                rise_down = np.subtract(reference.per_token(model, down, block, shift), base_down).tolist()
                assert cell.effect.mean == pytest.approx(reference.propensity(rise_up, rise_down), **CLOSE)
                cost = reference.cross_entropy(model, plain, block, shift) - reference.cross_entropy(model, plain)
                assert cell.cost == pytest.approx(cost, **CLOSE)
                # single positives are one stratum, negatives the other: Welch's interval; the mean is of two strata
                strata = [dict(enumerate(rise_up)), {n: -x for n, x in enumerate(rise_down, 3)}]
                ends = [2 * end for end in tables.interval(strata, lambda unit: unit)[1:]]
                assert (cell.effect.low, cell.effect.high) == pytest.approx(ends, **CLOSE)


def sides(contrast):
    return contrast.positives, contrast.negatives


@pytest.mark.parametrize("pairs", [LETTERS, UNEQUAL], ids=["letters", "unequal"])
def test_answers_are_scored_after_their_prompt(llama, tokenizer, pairs):
    vector = fg.SteeringVector(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)), fg.Hookpoint(1))
    found = fg.sweep(llama, tokenizer, pairs, vectors=[vector], coefficients=[1.0], neutral=NEUTRAL, controls=0)
    rule = reference.sums if pairs is LETTERS else reference.per_token
    assert found.unit == ("nats an answer" if pairs is LETTERS else "nats a token")
    assert found.texts == {"positives": len(pairs), "negatives": len(pairs), "pairs": len(pairs)}
    block = blocks_of(llama)[1]
    up, down = answers(tokenizer, pairs, "positive"), answers(tokenizer, pairs, "negative")
    for cell in found.cells:
        shift = cell.coefficient * vector.direction
        effects = [
            rule(llama, [a], block, shift)[0]
            - rule(llama, [b], block, shift)[0]
            - (rule(llama, [a])[0] - rule(llama, [b])[0])
            for a, b in zip(up, down, strict=True)
        ]
        assert cell.effect.mean == pytest.approx(sum(effects) / len(effects), **CLOSE)
        ends = tables.interval([dict(enumerate(effects))], lambda pair: pair)[1:]  # a pair counts as one
        assert (cell.effect.low, cell.effect.high) == pytest.approx(ends, **CLOSE)
    if pairs is LETTERS:
        steering = [None, vector.add(1.0)]
        differences = fg.answer_probabilities(llama, tokenizer, pairs, steering).difference
        assert found.cells[0].effect.mean == pytest.approx(float((differences[1] - differences[0]).mean()), **CLOSE)


def test_pairs_and_single_texts_together(llama, tokenizer):
    single = fg.ContrastSet("x", pairs=LETTERS, positives=["a happy wedding", "the bride"], negatives=())
    found = fg.sweep(llama, tokenizer, single, layers=[1], coefficients=[0.5], neutral=NEUTRAL, controls=0)
    up = fg.log_probabilities(llama, tokenizer, list(single.side(True)))
    down = fg.log_probabilities(llama, tokenizer, list(single.side(False)))
    expected = float(-up.cross_entropy.mean() + down.cross_entropy.mean())
    assert found.propensity.mean == pytest.approx(expected, **CLOSE)
    assert found.texts == {"positives": 5, "negatives": 3, "pairs": 3}


def test_nothing_added_does_nothing(llama, tokenizer):
    found = fg.sweep(llama, tokenizer, SIDES, coefficients=[0.0, 0.5], neutral=NEUTRAL, controls=0)
    zero = [cell for cell in found.cells if cell.coefficient == 0]
    assert len(zero) == 2 * LAYERS
    null = [fg.SteeringVector(torch.zeros(D_MODEL), fg.Hookpoint(layer)) for layer in range(LAYERS)]
    zero += fg.sweep(llama, tokenizer, SIDES, vectors=null, coefficients=[1.0], neutral=NEUTRAL, controls=0).cells
    # rows that are the same but for their place in a batch: on some processors products round by their place
    assert all(abs(value) < 1e-5 for cell in zero for value in (cell.cost, *cell.effect))
    assert all(cell.effect.mean != 0 for cell in found.cells if cell.coefficient)
    asleep = fg.sweep(llama, tokenizer, SIDES, vectors=null[:1], ce_rises=[0.1, 0.2], neutral=NEUTRAL, controls=0)
    assert not asleep.cells
    assert any("layer 0 (-1) does not reach 0.1, 0.2, or is not finite there" in note for note in asleep.notes)
    assert "no layer reaches this cost" in asleep.answers[0]
    with pytest.raises(DataError, match="without cells"):
        sweep_plots.pictures(asleep)


@pytest.fixture(scope="module")
def own(llama, tokenizer):
    """What the model itself writes: it has a cost of every size, and random text need not."""
    return fg.generate(llama, tokenizer, ["the", "I", "king"], max_new_tokens=12)


def test_strengths_cost_the_same_everywhere(llama, tokenizer, own):
    rises, ticks = (0.02, 0.05, 0.2), []
    found = fg.sweep(llama, tokenizer, SIDES, ce_rises=rises, neutral=own, progress=lambda *done: ticks.append(done))
    assert ticks == [(n + 1, LAYERS) for n in range(LAYERS)]
    assert (found.matched, found.steps) == (0.2, rises)
    stats = fg.collect(llama, tokenizer, SIDES, hookpoints=[fg.Hookpoint(layer) for layer in range(LAYERS)])
    base = fg.cross_entropy(llama, tokenizer, own)
    for layer in range(LAYERS):
        vector = fg.caa(stats, hookpoint=fg.Hookpoint(layer))
        for sign in (1, -1):
            row = [cell for cell in found.cells if (cell.layer, cell.sign) == (layer, sign)]
            assert [cell.target for cell in row] == list(rises)
            sizes = [sign * cell.coefficient for cell in row]
            assert sizes == sorted(sizes)
            assert sizes[0] > 0
            for cell in row:
                steering = vector.add(cell.coefficient)
                cost = fg.cross_entropy(llama, tokenizer, own, steering=steering) - base
                assert cost == pytest.approx(cell.cost, abs=1e-4)
                assert cost == pytest.approx(cell.target, rel=0.021)  # calibration's tolerance is 2 %
    assert {best.sign for best in found.best} == {1, -1}
    assert len(found.fades) == 2 * LAYERS
    assert [row.layer for row in found.signs] == [0, 1, 2, None]


def test_random_directions_show_what_any_change_does(llama, tokenizer, own):
    rise = 0.05
    found = fg.sweep(llama, tokenizer, SIDES, ce_rises=[rise], neutral=own, controls=2)
    stats = fg.collect(llama, tokenizer, SIDES, hookpoints=[fg.Hookpoint(layer) for layer in range(LAYERS)])
    built = [fg.caa(stats, hookpoint=fg.Hookpoint(layer)) for layer in range(LAYERS)]
    random = [random_like(vector, number) for vector in built for number in range(2)]
    assert [v.norm for v in random] == pytest.approx([v.norm for v in built for _ in range(2)])
    assert abs(float(random[0].unit().direction @ random[1].unit().direction)) < 0.9
    sizes = fg.calibrate_many(llama, tokenizer, [v.add for v in random], own, target_ce_rise=rise)
    up, down = whole(tokenizer, SIDES.held_out.positives), whole(tokenizer, SIDES.held_out.negatives)
    before = reference.propensity(reference.per_token(llama, up), reference.per_token(llama, down))
    layer, block = 1, blocks_of(llama)[1]
    after = []
    for vector, size in zip(random[2:4], sizes[2:4], strict=True):
        shift = size * vector.direction
        after.append(
            reference.propensity(
                reference.per_token(llama, up, block, shift), reference.per_token(llama, down, block, shift)
            )
        )
    assert found.damage[layer].mean == pytest.approx(sum(after) / 2 - before, **CLOSE)
    row = found.signs[layer]
    assert row.net.mean == pytest.approx(row.difference.mean + 2 * found.damage[layer].mean, **CLOSE)
    without = fg.sweep(llama, tokenizer, SIDES, layers=[1], ce_rises=[rise], neutral=own, controls=0)
    assert (without.damage, without.signs[0].net) == ({}, None)


@pytest.fixture(scope="module")
def planted():
    """A model whose blocks pass the stream on as it is."""
    model = tiny_model("llama", seed=3)
    block: Any
    for block in blocks_of(model):
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return model


def test_a_planted_layer_is_found(planted, tokenizer):
    """Only the last layer's vector points at the answer alone: half of layer 1's is beside it, layer 0's is erased."""
    words = tokenizer(["yes", "no"], add_special_tokens=False)["input_ids"]
    yes, no = ((planted.lm_head.weight * planted.model.norm.weight)[ids[0]].detach() for ids in words)
    place, other = int((yes - no).abs().argmax()), int((yes - no).abs().argmin())
    aim, beside = torch.zeros(2, D_MODEL)
    aim[place], beside[other] = (yes - no)[place].sign(), 1.0
    vectors = [fg.SteeringVector(v, fg.Hookpoint(n)) for n, v in enumerate((aim, aim + beside, aim))]
    prompts = ["the man said", "I think", "she was old and", "is it good ?", "he ran to the sea and said"]
    questions = [fg.ContrastPair("yes", "no", prompt=prompt) for prompt in prompts]

    def erase(_, args, kwargs):
        h = (args[0] if args else kwargs["hidden_states"]).clone()
        h[..., place] = 0
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    handle = blocks_of(planted)[1].register_forward_pre_hook(erase, with_kwargs=True)
    try:
        plain = fg.generate(planted, tokenizer, prompts, max_new_tokens=8)
        found = fg.sweep(planted, tokenizer, questions, vectors=vectors, ce_rises=[0.05, 0.2], neutral=plain)
    finally:
        handle.remove()
    up, down = found.best
    assert (up.sign, up.layer, up.runner_up) == (1, 2, 1)
    assert (down.sign, down.layer, down.runner_up) == (-1, 2, 1)
    for best in found.best:
        assert best.push.low > 0
        assert best.lead.low > 0
        assert best.level_with == ()
    assert {cell.layer for cell in found.cells} == {1, 2}
    assert "layer 0 (+1) does not reach 0.05, 0.2, or is not finite there" in found.notes
    assert "layer 0 (-1) does not reach 0.2 nats and is not compared" in found.notes
    assert [row.layer for row in found.signs] == [1, 2, None]


def exact(pushes):
    """An interval without width."""
    total = float(pushes.sum())
    return Interval(total, total, total)


def made(layer, sign, totals, costs=(0.25, 0.5, 1.0)):
    """A curve of two units that share alike."""
    coefficients = tuple(sign * c for c in (1.0, 2.0, 4.0)[: len(totals)])
    return Curve(layer, sign, coefficients, costs, costs, np.array([[t / 2, t / 2] for t in totals]))


def test_rules_by_arithmetic():
    curves = [
        made(0, 1, (1.0, 2.0, 3.0)),
        made(0, -1, (2.0, 3.5, 3.0)),
        made(1, 1, (2.0, 2.5, 1.0)),
        made(1, -1, (0.5, -1.0, -2.0)),
    ]
    best = best_layer(curves, 1, 0.5, exact)
    assert (best.layer, best.coefficient, best.runner_up, best.level_with) == (1, 2.0, 0, ())
    assert (best.push.mean, best.lead.mean) == (2.5, 0.5)
    between = best_layer(curves, 1, 0.75, exact)  # halfway: 2.5 and 1.75
    assert (between.layer, between.coefficient, between.push.mean, between.lead.mean) == (0, 3.0, 2.5, 0.75)
    assert best_layer(curves, -1, 0.125, exact).push.mean == 1.0  # halfway from no steering
    assert best_layer(curves, 1, 1.5, exact) is None
    alone = best_layer(curves[:1], 1, 0.5, exact)
    assert (alone.runner_up, alone.lead) == (None, None)
    wide = best_layer(curves, 1, 0.5, lambda p: Interval(p.sum(), p.sum() - 1, p.sum() + 1))
    assert wide.level_with == (0,)

    fades = [fade(curve, exact) for curve in curves]
    assert [one.per_nat for one in fades[:2]] == [(4.0, 4.0, 3.0), (8.0, 7.0, 3.0)]
    assert [(one.peak_cost, one.peak) for one in fades] == [(1.0, 3.0), (0.5, 3.5), (0.5, 2.5), (0.25, 0.5)]
    assert [one.fall and one.fall.mean for one in fades] == [None, 0.5, 1.5, 2.5]
    assert [one.falls for one in fades] == [False, True, True, True]
    assert not fade(curves[1], lambda p: Interval(p.sum(), -1, 2)).falls

    damage = {0: np.array([-0.5, -0.5]), 1: np.array([0.25, 0.0])}
    signs = sign_differences(curves, 0.5, exact, damage)
    assert [(row.layer, row.difference.mean) for row in signs] == [(0, 1.5), (1, -3.5), (None, -1.0)]
    assert [row.net.mean for row in signs] == [-0.5, -3.0, -1.75]
    half = sign_differences(curves, 0.5, exact, {1: damage[1]})
    assert [row.net and row.net.mean for row in half] == [None, -3.0, None]
    assert sign_differences(curves[:1], 0.5, exact, damage) == ()

    where, fading, sign = in_words([best], fades, signs, 0.5, "nats a token")
    assert "works best at layer 1 with coefficient 2, 2.5 [2.5, 2.5] nats a token, 0.5 [0.5, 0.5] ahead" in where
    assert "3 of 4 curves peak and clearly fall after: layer 0 (-1, peak at 0.5 nats)" in fading
    assert "buys 6 at the cheapest step and 2 at the dearest" in fading  # medians of 4 8 8 2 and 3 3 1 -2
    assert (
        "negative is stronger at layer 0; positive is stronger at layer 1. On average negative less positive is -1 "
        in sign
    )
    assert "equal cost do: positive is stronger at layers 0 and 1; on average -1.75 [" in sign


def test_what_steering_that_costs_nothing_buys():
    curve = made(0, 1, (1.0, 2.0, 3.0), costs=(-0.1, 0.0, 0.5))
    one = fade(curve, exact)
    assert [math.isnan(value) for value in one.per_nat] == [True, True, False]
    assert curve.at(0.25)[0] == 3.0  # between 0 nats at c = 2 and 0.5 at c = 4
    assert made(0, 1, (1.0,), costs=(-0.1,)).at(0.1) is None


def test_held_out_texts_are_used_where_there_are_any(llama, tokenizer):
    options = {"layers": [1], "coefficients": [0.5], "neutral": NEUTRAL, "controls": 0}
    bare = replace(SIDES, held_out=None)
    on_itself = fg.sweep(llama, tokenizer, bare, **options)
    assert (on_itself.measured_on, on_itself.contrast) == ("wed", "wed")
    assert any("no held-out texts" in note for note in on_itself.notes)
    held = fg.sweep(llama, tokenizer, SIDES, **options)
    given = fg.sweep(llama, tokenizer, bare, held_out=SIDES.held_out, **options)
    assert held.measured_on == "wed:held_out"
    assert not any("no held-out" in note for note in held.notes)
    assert held.cells == given.cells
    assert held.cells[0].effect != on_itself.cells[0].effect
    assert held.cells[0].cost == on_itself.cells[0].cost


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"ce_rises": [0.1], "coefficients": [1.0]}, DataError, "either ce_rises or coefficients"),
        ({"ce_rises": [0.5, 0.1]}, DataError, "rising"),
        ({"ce_rises": [0.0, 0.1]}, DataError, "rising"),
        ({"ce_rises": []}, DataError, "nothing"),
        ({"coefficients": [-1.0, 1.0]}, DataError, "rising"),
        ({"coefficients": [1.0, math.inf]}, DataError, "rising"),
        ({"ce_rises": [0.1], "matched": 0.2}, DataError, "at most 0.1"),
        ({"coefficients": [1.0], "matched": math.nan}, DataError, "matched"),
        ({"vectors": "fgaa"}, DataError, "caa, ace, pca"),
        ({"vectors": []}, DataError, "one for each layer"),
        ({"vectors": [fg.SteeringVector(torch.ones(D_MODEL), fg.Hookpoint(1))] * 2}, DataError, "one for each layer"),
        ({"layers": []}, DataError, "no layers"),
        ({"layers": [LAYERS]}, HookpointError, "layer 3"),
        ({"held_out": fg.ContrastSet("one", positives=["a"], negatives=["the", "it"])}, DataError, "at least two"),
        ({"held_out": LETTERS[:1]}, DataError, "at least two"),
    ],
)
def test_what_cannot_be_swept_is_refused(llama, tokenizer, options, error, told):
    with pytest.raises(error, match=told):
        fg.sweep(llama, tokenizer, SIDES, neutral=NEUTRAL, **options)


def test_equal_sides_have_no_vector(llama, tokenizer):
    same = fg.ContrastSet("same", positives=["a cat", "the dog"], negatives=["a cat", "the dog"])
    with pytest.raises(SelectionError, match="whose mean activations differ"):
        fg.sweep(llama, tokenizer, same, neutral=NEUTRAL)


def test_pictures_show_the_cells(llama, tokenizer, own, tmp_path):
    found = fg.sweep(llama, tokenizer, SIDES, ce_rises=[0.05, 0.2], neutral=own)
    figure = sweep_plots.push_map(found)
    shown = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert shown == [
        sweep_plots._in_two_digits(cell.push) for sign in (1, -1) for cell in found.cells if cell.sign == sign
    ]
    for axis, best in zip(figure.axes, found.best, strict=True):
        (frame,) = axis.patches
        assert isinstance(frame, Rectangle)
        assert frame.get_xy() == (1, best.layer)
    curves = sweep_plots.fading_curves(found).axes
    assert [axis.get_title() for axis in curves] == ["layer 0", "layer 1", "layer 2"]
    row = [cell for cell in found.cells if (cell.layer, cell.sign) == (1, -1)]
    line = next(line for line in curves[1].lines if line.get_linestyle() == "--")
    assert np.asarray(line.get_xydata()).tolist() == [[0, 0], *([cell.cost, cell.push] for cell in row)]
    names = [path.name for path in sweep_plots.save_pictures(found, tmp_path)]
    assert names == ["sweep-map.png", "sweep-map.svg", "sweep-fading.png", "sweep-fading.svg"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    given = fg.sweep(llama, tokenizer, SIDES, layers=[1], coefficients=[0.5, 20.0], neutral=NEUTRAL, controls=0)
    assert not any(axis.patches for axis in sweep_plots.push_map(given).axes)
    assert [sweep_plots._in_two_digits(v) for v in (0.05, -0.126, 1.0, -3.14, 9.96, 120.0)] == [
        ".05", "−.13", "1.0", "−3.1", "10", "120",
    ]  # fmt: skip


def test_layers_are_thinned_then_refined():
    assert thinned(30) == [1, 5, 9, 13, 17, 21, 25, 29]
    assert thinned(10) == list(range(10))
    assert thinned(12) == [1, 3, 5, 7, 9, 11]
    for layers in (11, 24, 30, 32, 80):
        for peak in range(layers):
            visited = set(thinned(layers))
            assert max(visited) == layers - 1
            while more := around(min(visited, key=lambda layer: (abs(layer - peak), layer)), visited, layers):
                visited |= set(more)
            assert peak in visited  # of a push with one peak
            assert len(visited) < 12 + layers / 5


@pytest.fixture(scope="module")
def deep():
    """A model of twelve layers."""
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 12
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_thinned_sweep_measures_what_the_full_one_does(deep, tokenizer):
    """The same cells as in the full sweep, within calibration's tolerance, and the best of those that were measured."""
    plain = fg.generate(deep, tokenizer, ["the", "I"], max_new_tokens=12)
    options = {"ce_rises": [0.02, 0.05], "neutral": plain, "controls": 1}
    ticks = []
    told: list[float] = []
    found = fg.sweep(deep, tokenizer, SIDES, progress=lambda *done: ticks.append(done), announce=told.append, **options)
    full = fg.sweep(deep, tokenizer, SIDES, layers=sorted(found.hookpoints), **options)
    assert (len(told), told[0] > 0) == (1, True)
    assert ticks[-1][0] == ticks[-1][1]
    assert [done for done, _ in ticks] == sorted(done for done, _ in ticks)
    expected = {(cell.layer, cell.sign, cell.target): cell for cell in full.cells}
    assert 6 <= len(found.hookpoints) < 12
    assert 0 < len(found.cells) < 0.8 * len(full.cells)
    for cell in found.cells:
        twin = expected[cell.layer, cell.sign, cell.target]
        assert cell.coefficient == pytest.approx(twin.coefficient, rel=0.05)  # two costs within 2 % of the target
        assert cell.effect.mean == pytest.approx(twin.effect.mean, rel=0.1, abs=2e-3)
    for best in found.best:
        pushes = {c.layer: c.push for c in found.cells if (c.sign, c.target) == (best.sign, 0.05)}
        assert best.layer == max(pushes, key=pushes.__getitem__)
        assert {c.target for c in found.cells if c.layer == best.layer} == {0.02, 0.05}
        assert best.layer in found.damage
    assert {one.layer for one in found.fades} == {best.layer for best in found.best}
    assert any("of 12 layers were measured" in note and "--full" in note for note in found.notes)
    assert not full.notes


@pytest.mark.slow
@pytest.mark.parametrize("concept", ["wedding", "sea"])
def test_the_thinned_sweep_finds_the_full_ones_layers(concept, monkeypatch):
    """On the embedded default, as if its layers were many: the best layers are the full sweep's, or level with them."""
    model, tokenizer = fg.load_model("default")
    options = {"controls": 0, "ce_rises": [0.25, 0.5]}
    full = fg.sweep(model, tokenizer, concept, full=True, **options)
    monkeypatch.setattr("fgsteer.evaluation.sweep.layers.FEW_LAYERS", 2)
    monkeypatch.setattr("fgsteer.evaluation.sweep.layers.COARSE_LAYERS", 2)
    found = fg.sweep(model, tokenizer, concept, **options)
    assert len(found.cells) < len(full.cells)
    for best, twin in zip(found.best, full.best, strict=True):
        assert best.layer in (twin.layer, *twin.level_with)
        expected = next(c for c in full.cells if (c.layer, c.sign, c.target) == (best.layer, best.sign, 0.5))
        assert best.push.mean == pytest.approx(expected.push, rel=0.05)  # two costs within 2 % of the target
        assert best.coefficient == pytest.approx(expected.coefficient, rel=0.05)


def test_a_killed_sweep_goes_on(deep, tokenizer, tmp_path):
    plain = fg.generate(deep, tokenizer, ["the", "I"], max_new_tokens=12)
    options: dict[str, Any] = {"neutral": plain, "controls": 0, "work": tmp_path, "layers": [1, 4, 7]}
    options["ce_rises"] = [0.05]
    whole = fg.sweep(deep, tokenizer, SIDES, **{**options, "work": None})

    def kill(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fg.sweep(deep, tokenizer, SIDES, progress=kill, **options)
    kept = json.loads((tmp_path / "sweep-parts.json").read_text())["cells"]
    assert {name.split("/")[0] for name in kept} == {"1", "4"}
    with pytest.raises(fg.PairingError, match="controls"):
        fg.sweep(deep, tokenizer, SIDES, **{**options, "controls": 1})
    marked = {**kept["1/+1/0.05"], "cost": 0.0505}
    parts = json.loads((tmp_path / "sweep-parts.json").read_text())
    parts["cells"]["1/+1/0.05"] = marked
    (tmp_path / "sweep-parts.json").write_text(json.dumps(parts))
    gone_on = fg.sweep(deep, tokenizer, SIDES, **options)
    assert gone_on.cells[0].cost == 0.0505  # it was not measured again
    for cell, twin in zip(gone_on.cells, whole.cells, strict=True):
        assert (cell.layer, cell.sign) == (twin.layer, twin.sign)
        assert cell.coefficient == pytest.approx(twin.coefficient, rel=1e-3)
    fresh = fg.sweep(deep, tokenizer, SIDES, fresh=True, **options)
    assert fresh.cells[0].cost != 0.0505
    (tmp_path / "sweep-parts.json").write_text("[]")
    with pytest.raises(fg.FormatError, match="without cells"):
        fg.sweep(deep, tokenizer, SIDES, **options)


def test_the_page_stands_alone(llama, tokenizer, own, tmp_path):
    hostile = '<script>alert("x")</script>'
    found = replace(fg.sweep(llama, tokenizer, SIDES, ce_rises=[0.05], neutral=own, controls=1), contrast=hostile)
    write_page(found, tmp_path / "sweep.html", command=hostile)
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'@import|url\((?!#)|(href|src)="(?!#)|https?://(?!www\.w3\.org/)', page)
    for cell in found.cells:
        assert f"{cell.effect.mean:.3f}".replace("-", "−") in page
    for answer in found.answers:
        assert answer[:20] in page
    assert page.count("<figure>") == 2


def test_progress_in_lines(monkeypatch, capsys):
    now = iter((0.0, 5.0, 20.0, 21.0, 130.0))
    monkeypatch.setattr("fgsteer.cli.printing.time.monotonic", lambda: next(now))
    with printing.progress_lines("sweeping", as_json=True) as report:
        for done in (1, 2, 3, 4):
            report(done, 8)
    assert capsys.readouterr().err.splitlines() == [
        "sweeping: 2 of 8, about 60 s left",
        "sweeping: 4 of 8, about 2 min left",
    ]
    assert [printing.duration(seconds) for seconds in (0.2, 89, 100, 3 * 3600)] == ["1 s", "89 s", "2 min", "3.0 h"]


def invoke(*arguments):
    return invoke_on_cpu("sweep", *arguments).stdout


def test_command_line_sweeps(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("The clock on the wall showed half past three.\nHe put the box on the shelf.\n")
    held = tmp_path / "held.json"
    held.write_text(json.dumps({"positive": ["The bride.", "A wedding."], "negative": ["The shop.", "A long road."]}))
    common = ("wedding", "--layer", 1, "--neutral", plain, "--held-out", held)
    told = json.loads(invoke(*common, "--ce-rise", 0.2, "--ce-rise", 0.1, "--json", "--out", tmp_path / "out"))
    assert told == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(cell["layer"], cell["sign"], cell["target"]) for cell in told["cells"]] == [
        (1, 1, 0.1), (1, 1, 0.2), (1, -1, 0.1), (1, -1, 0.2),
    ]  # fmt: skip
    assert set(told["cells"][0]["effect"]) == {"mean", "low", "high", "clusters", "units", "effective"}
    assert (told["fgsteer"], told["method"], told["measured_on"]) == ("sweep", "caa", "held")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"sweep.json", "sweep.html", *(f"sweep-{n}.{k}" for n in ("map", "fading") for k in ("png", "svg"))}
    shown = invoke(*common, "--coefficient", 0.5, "--coefficient", 1)
    assert all(word in shown for word in ("Where, at a cost of 0.5", "Fading:", "Sign,", "coefficient (cost"))
    stats = fg.collect(*fg.load_model("default"), "wedding", hookpoints=fg.Hookpoint(1))
    fg.caa(stats).save(tmp_path / "v.safetensors")
    again = json.loads(invoke("wedding", "--vector", tmp_path / "v.safetensors", *common[3:], "-c", 1, "--json"))
    same = json.loads(invoke(*common, "-c", 1, "--json"))
    assert again["cells"] == same["cells"]
    with pytest.raises(DataError, match="either --vector or --method pca, got both"):
        invoke("wedding", "--vector", tmp_path / "v.safetensors", "--method", "pca")
    with pytest.raises(fg.FormatError, match="Cannot write"):
        invoke("wedding", "--out", plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_twin_of_the_sweep(dtype, tokenizer):
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", dtype=dtype).to(device)
        found = fg.sweep(model, tokenizer, SIDES, coefficients=[0.5], neutral=NEUTRAL)
        results.append(torch.tensor([value for cell in found.cells for value in (cell.cost, *cell.effect)]))
    # bfloat16 keeps 8 bits, and these logits spread over some tens of nats
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    cpu, cuda = results
    assert torch.allclose(cpu, cuda, rtol=tolerance, atol=tolerance)
