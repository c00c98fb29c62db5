"""Vectors add, subtract and scale; what is not a number or a vector is a typed error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fgsteer as fg
from tests.helpers.saes import make_sae

AT = "model.layers.1"
NO_NUMBERS = ["2", None, True, np.True_, 1j, [1], np.ones(2), torch.ones(2), torch.tensor(True), {"a": 1}]
NUMBERS = [2, 2.0, np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2.0)]


def vectors(n=3):
    sae = make_sae()
    return [fg.from_features(sae, {j: 1.0 + j, 9: -0.5}) for j in range(n)]


def test_division_and_sums_are_those_of_directions_and_features():
    a, b, c = vectors()
    cases = [
        (a / 2, a.direction / 2, {0: 0.5, 9: -0.25}),
        (-a, -a.direction, {0: -1.0, 9: 0.5}),
        (a * 3, a.direction * 3, {0: 3.0, 9: -1.5}),
        (a + b, a.direction + b.direction, {0: 1.0, 1: 2.0, 9: -1.0}),
        (a - b, a.direction - b.direction, {0: 1.0, 1: -2.0, 9: 0.0}),
        (sum([a, b, c]), a.direction + b.direction + c.direction, {0: 1.0, 1: 2.0, 2: 3.0, 9: -1.5}),
        (sum([a, b, c]) / 3, (a.direction + b.direction + c.direction) / 3, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 9: -0.5}),
    ]
    for made, direction, features in cases:
        assert torch.allclose(made.direction, direction, atol=1e-6)  # float32 sums of three terms of size 1
        assert dict(made.features) == pytest.approx(features)
        assert made.hookpoint == a.hookpoint
    assert sum([a]) is a


def test_provenance_of_arithmetic_is_kept(tmp_path):
    a, b, c = vectors()
    assert (a / 4).provenance["scale"] == 0.25
    assert (a / 4).provenance["method"] == "from_features"
    total = sum([a, b, c])
    assert total.provenance["method"] == "sum"
    assert total.provenance["sae"] == a.provenance["sae"]
    assert [term["sign"] for term in total.provenance["terms"]] == [1.0, 1.0, 1.0]
    assert [term["sign"] for term in (a - (b - c)).provenance["terms"]] == [1.0, -1.0, 1.0]
    assert len(((a + b) * 2 + c).provenance["terms"]) == 2  # a scaled sum is one term
    total.save(tmp_path / "v")
    assert fg.SteeringVector.load(tmp_path / "v").provenance["terms"] == total.provenance["terms"]


def test_hookpoints_must_agree():
    one, other = (fg.SteeringVector(torch.ones(4), at) for at in (1, 2))
    for make in (lambda: one + other, lambda: one - other, lambda: sum([one, other])):
        with pytest.raises(fg.PairingError, match="one hookpoint"):
            make()


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_of_every_library_are_numbers(value):
    vec = fg.SteeringVector(torch.ones(4), AT, reference=torch.zeros(4))
    for made in (vec * value, value * vec):
        assert torch.equal(made.direction, 2 * vec.direction)
    assert torch.equal((vec / value).direction, vec.direction / 2)
    assert vec.add(value).coefficient == vec.clamp(value).target == vec.affine(value).alpha == 2.0


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_a_typed_error(value, sae):
    vec = fg.SteeringVector(torch.ones(4), AT, reference=torch.zeros(4))
    for make in (
        vec.add,
        vec.clamp,
        vec.affine,
        lambda x: vec * x,
        lambda x: x * vec,
        lambda x: vec / x,
        lambda x: fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: x}),
    ):
        with pytest.raises(fg.FgsteerError, match="number"):
            make(value)


def test_what_is_no_vector_or_feature_is_a_typed_error(sae):
    vec: Any = fg.SteeringVector(torch.ones(4), AT)
    for make in (lambda: vec + 1, lambda: 1 + vec, lambda: vec - None, lambda: vec + torch.ones(4)):
        with pytest.raises(fg.FgsteerError, match="vectors"):
            make()
    for divisor in (0, 0.0):
        with pytest.raises(fg.FgsteerError, match="other than 0"):
            vec / divisor
    for factor in (math.nan, math.inf):
        with pytest.raises(fg.SteeringError, match="finite"):
            vec * factor
    for targets in ([1], {"1": 2.0}, {1.5: 2.0}, {True: 2.0}):
        with pytest.raises(fg.FgsteerError):
            fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets=targets)
    with pytest.raises(fg.ArgumentError, match="whole number"):
        vec.top_features("3")


def test_a_trained_factor_is_refused_and_not_cut_off_from_its_gradient():
    vector, strength = vectors()[0], torch.nn.Parameter(torch.tensor(2.0))
    for wrong in (lambda: vector * strength, lambda: strength * vector, lambda: vector / strength):
        with pytest.raises(fg.ArgumentError, match="coefficient"):
            wrong()
    assert vector.add(strength).trained
    for infinite in (math.inf, math.nan):
        for wrong in (lambda x=infinite: vector * x, lambda x=infinite: vector / x):
            with pytest.raises(fg.SteeringError, match="finite"):
                wrong()
