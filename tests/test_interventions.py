"""The kernel's algebra, by property and against the loop versions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fgsteer as fg
from fgsteer.interventions import apply, stack
from fgsteer.interventions.table import INTERVENTIONS, OPERATIONS, intervention_spec, spec_of
from tests.helpers.saes import make_sae
from tests.reference import apply as reference

AT = fg.Hookpoint(1)
seeds = st.integers(0, 10_000)
alphas = st.floats(-3, 3)


def tensors(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def run(h, item):
    return apply(h, item.update())


@settings(max_examples=40, deadline=None)
@given(seeds, alphas)
def test_affine_sets_the_projection_keeps_the_rest_and_is_idempotent(seed, alpha):
    h, r, reference_mean = tensors(seed, (2, 3, 16), (16,), (16,))
    item = fg.Affine(hookpoint=AT, direction=r, reference=reference_mean, alpha=alpha)
    out = run(h, item)
    unit = r / r.norm()
    # float32 dot products over 16 terms: 1e-5 is two orders above their rounding
    assert torch.allclose(out @ unit, (unit @ reference_mean + alpha * r.norm()).expand(2, 3), atol=1e-5)
    orthogonal = torch.eye(16) - torch.outer(unit, unit)
    assert torch.allclose(out @ orthogonal, h @ orthogonal, atol=1e-5)
    assert torch.allclose(run(out, item), out, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_rows_are_independent_and_the_input_is_not_written(seed):
    h, v, r = tensors(seed, (3, 4, 16), (16,), (16,))
    kept = h.clone()
    items = [fg.Add(hookpoint=AT, direction=v, coefficient=2.0), None, fg.Ablate(hookpoint=AT, direction=r)]
    ((update, numbers),) = stack(items)
    assert numbers == [0, 2]
    out = apply(h, update)
    assert torch.equal(out[1], h[1])
    assert torch.allclose(out[0], run(h[:1], items[0])[0], atol=1e-6)
    assert torch.allclose(out[2], run(h[2:], items[2])[0], atol=1e-6)
    assert torch.equal(h, kept)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_equals_the_loops(seed):
    h, v, r = tensors(seed, (1, 5, 16), (16,), (16,))
    rows = h[0].double().numpy()
    pairs = [
        (fg.Add(hookpoint=AT, direction=v, coefficient=-1.5), reference.add(rows, v.double().numpy(), -1.5)),
        (fg.Ablate(hookpoint=AT, direction=v), reference.ablate(rows, v.double().numpy())),
        (fg.Clamp(hookpoint=AT, direction=v, target=2.0), reference.clamp(rows, v.double().numpy(), 2.0)),
        (
            fg.Affine(hookpoint=AT, direction=v, reference=r, alpha=0.5),
            reference.affine(rows, v.double().numpy(), r.double().numpy(), 0.5),
        ),
    ]
    for item, expected in pairs:
        # float32 against float64
        assert torch.allclose(run(h, item)[0].double(), torch.as_tensor(expected), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_clamp_feature_keeps_the_reconstruction_error(activation, norm):
    """Clamping equals decoding clamped activations and adding the SAE's own error back."""
    sae = make_sae(activation, input_norm=norm)
    (h,) = tensors(3, (2, 4, sae.d_model))
    targets = {2: 1.5, 9: 0.0}
    acts = sae.encode(h)
    clamped = acts.clone()
    for j, t in targets.items():
        clamped[..., j] = t
    _, scale, shift = sae._normalised(h)
    expected = sae.decode(clamped) * scale + shift + (h - sae.reconstruct(h))
    got = run(h, fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets=targets))
    assert torch.allclose(got, expected, atol=2e-5)  # float32 sums of d_sae decoder rows


def test_refusals():
    v = torch.ones(4)
    with pytest.raises(fg.SteeringError, match="nan"):
        fg.Add(hookpoint=AT, direction=v * float("nan"))
    with pytest.raises(fg.SteeringError, match="norm 0"):
        fg.Ablate(hookpoint=AT, direction=v * 0)
    with pytest.raises(fg.SteeringError, match="scope"):
        fg.Add(hookpoint=AT, direction=v, scope="some")
    with pytest.raises(fg.PairingError):
        fg.Affine(hookpoint=AT, direction=v, reference=torch.ones(3), alpha=1.0)
    with pytest.raises(fg.SelectionError):
        fg.ClampFeature(hookpoint=AT, sae=make_sae(), targets={99: 1.0})


# ---------------------------------------------------------------- the table


def test_every_kind_of_intervention_has_a_row():
    public = {name: getattr(fg, name) for name in dir(fg)}
    kinds = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, fg.Intervention)}
    kinds -= {"Intervention"}
    assert {spec.kind for spec in INTERVENTIONS} == kinds
    for spec in INTERVENTIONS:
        assert spec.summary.endswith(".")
        assert spec.equation.lstrip("(").startswith("h ")
        assert not spec.amount or spec.amount in getattr(fg, spec.kind).__dataclass_fields__


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_makes_what_the_vectors_method_makes(name):
    v, reference_mean, read, h = tensors(5, (8,), (8,), (8,), (2, 3, 8))
    vector = fg.SteeringVector(v, AT, reference_mean, read=read)
    spec = intervention_spec(name)
    made = spec.make(vector, 0.5, scope="generated", bos=True)
    amount = {spec.amount: 0.5} if spec.amount else {}
    by_hand = getattr(vector, spec.method or name)(**amount, scope="generated", bos=True)
    assert type(made) is type(by_hand) is getattr(fg, spec.kind)
    assert (made.scope, made.bos, spec_of(made)) == ("generated", True, spec)
    assert torch.equal(run(h, made), run(h, by_hand))
    assert not torch.equal(run(h, made), h)


def test_names_and_kinds_that_are_not_in_the_table_are_refused():
    class Turn(fg.Intervention):
        d_model = 8

        def update(self):
            raise NotImplementedError

    with pytest.raises(fg.SteeringError, match=r"add, add_relative, .*, clamp_feature, got .* 'turn'"):
        intervention_spec("turn")
    with pytest.raises(fg.SteeringError, match=r"add, add_relative, .*adaptive_add, got clamp_feature of a vector"):
        intervention_spec("clamp_feature").make(fg.SteeringVector(torch.ones(8), AT), 1.0)
    with pytest.raises(fg.SteeringError, match="Turn, an intervention of your own"):
        spec_of(Turn(hookpoint=AT))


def test_the_table_is_read_without_torch():
    code = "import sys, fgsteer.interventions.table as t; assert t.OPERATIONS and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
