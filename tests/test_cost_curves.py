"""Calibration: against doubling and bisection, and on curves of every shape."""

from __future__ import annotations

import math

import pytest
import torch

import fgsteer as fg
from fgsteer.likelihood.calibration import CostMeter
from fgsteer.likelihood.cost_curves import CostCurve
from tests.helpers.tiny import D_MODEL
from tests.reference import calibration as reference

TEXTS = ["the dog sat on the house", "a man took the tea", "it is a new day and the cat ran"]


def solved(cost, targets, start=1.0, tolerance=0.02):
    """The curve of a cost function, and the strengths that were measured."""
    curve = CostCurve(targets, start, tolerance)
    while curve.open:
        for strength in curve.guesses():
            curve.learn(strength, cost(strength))
    return curve


@pytest.mark.parametrize("start", [0.001, 1.0, 300.0])
@pytest.mark.parametrize(
    "cost",
    [
        lambda c: c * c / 400,
        lambda c: c / 30,
        lambda c: -c / 30 + c * c / 400,  # texts become likelier at first
        lambda c: (c / 20) ** 4,
        lambda c: math.log1p(c / 5),
        lambda c: 3 * math.expm1(c / 50),
        lambda c: 6 / (1 + math.exp(4 - c / 9)) - 6 / (1 + math.exp(4)),
    ],
)
def test_every_target_is_met(cost, start):
    targets = (0.5, 0.05, 0.25, 1.0)
    curve = solved(cost, targets, start)
    for target, strength in zip(targets, curve.coefficients, strict=True):
        assert abs(cost(strength) - target) <= 0.02 * target
        assert curve.cost(strength) == cost(strength)  # measured, not interpolated
    assert curve.solved == 4
    assert math.isnan(curve.cost(-1.0))
    plain = []
    for target in targets:
        reference.coefficient(lambda c: plain.append(c) or cost(c), target, start)
    assert len(curve.points) < 0.7 * len(plain)


def test_parabolas_need_three_measurements_and_the_targets():
    curve = solved(lambda c: 0.1 * c + 0.01 * c * c, (0.5, 0.25), start=3.0)
    assert len(curve.points) <= 5


def test_curves_that_meet_no_target():
    for cost in (lambda c: 0.0, lambda c: -c, lambda c: math.nan if c > 1e-9 else 0.0):
        curve = solved(cost, (0.2, 0.1))
        assert not any(abs(cost(c) - 0.1) <= 0.1 for c in curve.coefficients if math.isfinite(c) and c > 1e-6)
    assert all(math.isnan(c) for c in solved(lambda c: 0.0, (0.2, 0.1)).coefficients)
    passed = solved(lambda c: 5.0 + c, (0.25, 0.5))  # as of an intervention that does something at strength 0
    assert all(math.isnan(c) for c in passed.coefficients)
    assert len(passed.points) <= 20  # forty halvings, of two targets
    low, high = solved(lambda c: 1 - math.exp(-c / 50), (0.5, 1.5)).coefficients
    assert low == pytest.approx(50 * math.log(2), rel=0.03)
    assert math.isnan(high)
    jump = solved(lambda c: 0.0 if c < 7 else 5.0, (0.2,))
    assert jump.coefficients[0] == pytest.approx(7.0)
    broken = solved(lambda c: math.nan if c > 3 else c * c / 100, (0.05,))
    assert broken.coefficients[0] == pytest.approx(math.sqrt(5), rel=0.02)


def test_a_known_point_is_used():
    curve = CostCurve((0.5,), 1.0, 0.02)
    curve.learn(7.0, 0.5)
    assert not curve.open
    assert curve.coefficients == [7.0]


def test_strengths_are_those_of_doubling_and_bisection(llama, tokenizer):
    texts = fg.generate(llama, tokenizer, ["the", "I", "king"], max_new_tokens=12)  # it has a cost of every size
    makes = []
    for number, layer in enumerate((0, 2)):
        direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(number))
        makes.append(fg.SteeringVector(direction, fg.Hookpoint(layer)).unit().add)
    rises = (0.1, 0.3)
    found = fg.calibrate_grid(llama, tokenizer, makes, texts, target_ce_rises=rises)
    base = fg.cross_entropy(llama, tokenizer, texts)
    for make, row in zip(makes, found, strict=True):
        for rise, strength in zip(rises, row, strict=True):
            cost = fg.cross_entropy(llama, tokenizer, texts, steering=make(strength)) - base
            assert cost == pytest.approx(rise, rel=0.021)  # 2 %, and float32 sums in another order
            plain = reference.calibrate(llama, tokenizer, make, texts, rise)
            assert strength == pytest.approx(plain, rel=0.05)  # two roots within 2 % of a slope near 1


def test_the_first_guess_goes_by_the_size_of_activations(llama, tokenizer):
    costs = CostMeter(llama, tokenizer, TEXTS, "target_ce_rise", None)
    vector = fg.SteeringVector(torch.ones(D_MODEL), fg.Hookpoint(1))
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    norms = [
        fg.record(llama, torch.tensor([row]), None, [fg.Hookpoint(1)])[fg.Hookpoint(1)][0].norm(dim=-1) for row in ids
    ]
    expected = float(torch.cat(norms).median()) / float(vector.norm)
    half = costs.guess(vector.add(1.0), 0.5) / expected
    assert 0.3 < half < 1.5
    assert costs.guess((10 * vector).add(1.0), 0.5) == pytest.approx(half * expected / 10)
    assert costs.guess(vector.add(1.0), 0.1) < half * expected
    assert costs.guess(vector.ablate(), 0.5) == 1.0
    assert costs.guess(fg.SteeringVector(torch.zeros(D_MODEL), fg.Hookpoint(1)).add(1.0), 0.5) == 1.0
