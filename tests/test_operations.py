"""Every operation against its loop version, its identities, its no-ops, and all in one batch under ``generate``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fgsteer as fg
from fgsteer.interventions import Update, apply, stack
from fgsteer.storage.files import write_tensors
from tests.helpers.saes import make_sae
from tests.helpers.steering import batch, direction, naive_everywhere, rows_of, run, vector
from tests.helpers.tiny import D_MODEL

AT = fg.Hookpoint(1)
EDITS = {
    2: 1.5,
    9: "off",
    11: ("at_least", 0.7),
    4: ("at_most", 0.3),
    6: ("plus", -0.4),
    7: ("plus", 0.5),
    8: ("times", 2.5),
}


def operations(layer=1):
    """One of every operation that is not in the loops of ``test_interventions``."""
    v, at = vector(1, layer), {"hookpoint": fg.Hookpoint(layer)}
    other, third = direction(2), direction(3)
    return {
        "relative": v.add_relative(0.4),
        "keeping norm": v.add_keeping_norm(1.3),
        "at least": v.clamp(at_least=0.5),
        "at most": v.clamp(at_most=-0.5),
        "between": v.clamp(at_least=-0.2, at_most=0.3),
        "adaptive": fg.AdaptiveAdd(direction=v.direction, read=other * 0.1, bias=0.2, coefficient=0.7, **at),
        "adaptive, negative": fg.AdaptiveAdd(
            direction=v.direction, read=other * 0.1, bias=-0.1, coefficient=-0.5, **at
        ),
        "subspace removed": fg.ClampSubspace(directions=torch.stack([v.direction, other, third]), **at),
        "subspace": fg.ClampSubspace(directions=torch.stack([v.direction, other]), targets=[2.0, -1.0], **at),
        "remapped": fg.Remap(weight=tensors(7, (D_MODEL, D_MODEL))[0] / 6, bias=other, strength=0.6, **at),
        "remapped, hidden": fg.Remap(
            weight=tensors(8, (D_MODEL, 40))[0] / 6,
            bias=third,
            hidden_weight=tensors(9, (40, D_MODEL))[0] / 6,
            hidden_bias=tensors(10, (40,))[0],
            **at,
        ),
        "rotated by": fg.Rotate(direction=v.direction, other=other, by=70.0, **at),
        "rotated to": fg.Rotate(direction=v.direction, other=other, to=-120.0, **at),
        "scaled": fg.Scale(width=D_MODEL, coefficient=-0.4, **at),
        "scaled by itself": fg.Scale(width=D_MODEL, coefficient=0.1, read=other * 0.05, **at),
    }


def tensors(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("name", operations())
def test_an_operation_equals_its_loops(name):
    item = operations()[name]
    (h,) = tensors(4, (2, 5, item.d_model))
    expected = naive_everywhere(h.flatten(0, 1).double().numpy(), item)
    out = apply(h, item.update()).flatten(0, 1).double()
    # float32 sums of 32 products of size 10 against float64
    torch.testing.assert_close(out, torch.as_tensor(expected), atol=5e-5, rtol=1e-5)
    assert not torch.equal(apply(h, item.update()), h)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_edits_equal_decoding_edited_activations(activation, norm):
    """With the SAE's own error added back, whatever its kind and normalisation."""
    sae = make_sae(activation, input_norm=norm)
    (h,) = tensors(3, (2, 6, sae.d_model))
    acts = sae.encode(h)
    edited = acts.clone()
    edited[..., 2], edited[..., 9] = 1.5, 0.0
    edited[..., 11] = acts[..., 11].clamp(min=0.7)
    edited[..., 4] = acts[..., 4].clamp(max=0.3)
    edited[..., 6], edited[..., 7] = (acts[..., 6] - 0.4).relu(), acts[..., 7] + 0.5
    edited[..., 8] = 2.5 * acts[..., 8]
    _, scale, shift = sae._normalised(h)
    expected = sae.decode(edited) * scale + shift + (h - sae.reconstruct(h))
    got = apply(h, fg.edit(sae, EDITS).update())
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-5)  # float32 sums of d_sae decoder rows


def test_what_edits_say():
    sae = make_sae()
    item = fg.edit(sae, {**EDITS, 3: ("set", 2.0)}, scope=fg.last(2), bos=True)
    assert item.edits == {
        "targets": {2: 1.5, 9: 0.0, 3: 2.0},
        "at_least": {11: 0.7},
        "at_most": {4: 0.3},
        "plus": {6: -0.4, 7: 0.5},
        "times": {8: 2.5},
    }
    assert (item.scope, item.bos, item.hookpoint) == ("last:2", True, sae.hookpoint)
    for wrong in ("on", ("below", 2.0), (2.0,), None, True):
        with pytest.raises(fg.SteeringError, match=r"for feature 3.*at_most"):
            fg.edit(sae, {3: wrong})
    with pytest.raises(fg.SelectionError):
        fg.edit(sae, {})
    with pytest.raises(fg.SteeringError, match="feature 3 in targets and times"):
        fg.ClampFeature(sae=sae, hookpoint=sae.hookpoint, targets={3: 1.0}, times={3: 2.0})
    with pytest.raises(fg.SteeringError, match="feature 3 at least 2 and at most 1"):
        fg.ClampFeature(sae=sae, hookpoint=sae.hookpoint, at_least={3: 2.0}, at_most={3: 1.0})


# ---------------------------------------------------------------- identities, in float64: 1e-12 is rounding of 32 sums

CLOSE = {"atol": 1e-12, "rtol": 0.0}


def unit64(x):
    return x / x.norm()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-2, 2))
def test_identities(seed, tau):
    d = 32
    h, v, a = tensors(seed, (2, 3, d), (d,), (d,), dtype=torch.float64)
    unit = unit64(v)[None, None]
    value, one, inf = torch.full((1, 1), tau, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), math.inf
    zero = one * 0
    cap = Update(unit, value, one, unit, lo=-inf * one, hi=zero)
    floor = Update(unit, value, one, unit, lo=zero, hi=inf * one)
    projection = h @ unit[0, 0]
    capped, floored = apply(h, cap), apply(h, floor)
    torch.testing.assert_close(capped @ unit[0, 0], projection.clamp(max=tau), **CLOSE)
    torch.testing.assert_close(floored @ unit[0, 0], projection.clamp(min=tau), **CLOSE)
    torch.testing.assert_close(apply(capped, cap), capped, **CLOSE)
    assert torch.equal(capped[projection < tau], h[projection < tau]), "what is below keeps every bit"
    # a cap and a floor at one value are a clamp
    both = Update(unit.expand(1, 2, -1), value.expand(1, 2), one.expand(1, 2), unit.expand(1, 2, -1))
    both = Update(
        both.write, both.const, both.lam, both.read, lo=torch.tensor([[-inf, 0.0]]), hi=torch.tensor([[0.0, inf]])
    )
    torch.testing.assert_close(apply(h, both), apply(h, Update(unit, value, one, unit)), **CLOSE)
    # PSR: s·relu(a·h + b)·u; with a = 0 and b = 1 it is Add
    s, b = 0.7, tau
    psr = Update(v[None, None], s * b * one, -s * one, a[None, None], lo=zero)
    torch.testing.assert_close(apply(h, psr), h + s * (h @ a + b).relu()[..., None] * v, **CLOSE)
    plain = Update(v[None, None], s * one, -s * one, a[None, None] * 0, lo=zero)
    torch.testing.assert_close(apply(h, plain), h + s * v, **CLOSE)
    # RePS null-out: h − relu(v·h + b) v/‖v‖²
    nulled = Update(v[None, None] / (v @ v), -b * one, one, v[None, None], hi=zero)
    torch.testing.assert_close(apply(h, nulled), h - (h @ v + b).relu()[..., None] * v / (v @ v), **CLOSE)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 180.0, -250.0])
def test_rotation_keeps_norm_and_the_rest_and_turns_by_the_angle(angle):
    (h,) = tensors(1, (2, 4, 32))
    first, other = direction(1), direction(2)
    b1 = unit64(first.double())
    b2 = unit64(other.double() - (b1 @ other.double()) * b1)
    plane = torch.stack([b1, b2])
    for how in ("by", "to"):
        item = fg.Rotate(hookpoint=AT, direction=first, other=other, **{how: angle})
        out = apply(h, item.update())
        # float32 beside float64: 1e-5 is two orders above the rounding of 32 sums
        torch.testing.assert_close(out.norm(dim=-1), h.norm(dim=-1), atol=1e-5, rtol=1e-5)
        rest = torch.eye(32, dtype=torch.float64) - plane.T @ plane
        torch.testing.assert_close(out.double() @ rest, h.double() @ rest, atol=1e-5, rtol=1e-5)
        before, after = (torch.view_as_complex((x.double() @ plane.T).contiguous()) for x in (h, out))
        turned = after / before if how == "by" else after / after.abs()
        wanted = torch.polar(torch.ones(()).double(), torch.tensor(math.radians(angle)).double()).expand_as(turned)
        torch.testing.assert_close(turned, wanted, atol=2e-5, rtol=0.0)
    still = fg.Rotate(hookpoint=AT, direction=first, other=other, by=0.0)
    assert torch.equal(apply(h, still.update()), h), "no turn keeps every bit"


def test_a_subspace_is_removed_whatever_vectors_span_it():
    (h,) = tensors(2, (2, 4, 32))
    first, other = direction(1), direction(2)
    spans = [torch.stack([first, other]), torch.stack([first + other, first - 0.3 * other])]
    one, two = (apply(h, fg.ClampSubspace(hookpoint=AT, directions=span).update()) for span in spans)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)  # float32
    assert float((one @ torch.stack([first, other]).T).abs().max()) < 1e-3  # directions of norm 17
    single = apply(h, fg.ClampSubspace(hookpoint=AT, directions=first[None]).update())
    torch.testing.assert_close(single, apply(h, vector(1).ablate().update()), atol=1e-5, rtol=1e-5)


def test_doses_are_shares_of_the_norm():
    (h,) = tensors(2, (2, 4, 32))
    moved = apply(h, vector().add_relative(0.3).update()) - h
    torch.testing.assert_close(moved.norm(dim=-1), 0.3 * h.norm(dim=-1), atol=1e-5, rtol=1e-5)  # float32
    kept = apply(h, vector().add_keeping_norm(2.0).update())
    torch.testing.assert_close(kept.norm(dim=-1), h.norm(dim=-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(apply(h * 0, vector().add_keeping_norm(0.0).update()), h * 0), "no norm divides by zero"


# ---------------------------------------------------------------- no-ops, batches, refusals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_ops_keep_every_bit(dtype):
    (h,) = tensors(2, (2, 4, 32))
    h, v, at = h.to(dtype), vector(), {"hookpoint": AT}
    sae = make_sae("topk")
    items = [
        v.add_relative(0.0),
        v.add_keeping_norm(0.0),
        v.clamp(at_least=-1e4),
        v.clamp(at_most=1e4),
        v.clamp(at_least=-1e4, at_most=1e4),
        fg.AdaptiveAdd(direction=v.direction, read=v.direction, coefficient=0.0, **at),
        fg.AdaptiveAdd(direction=v.direction, read=v.direction, bias=-1e4, **at),
        fg.Rotate(direction=v.direction, other=direction(2), by=0.0, **at),
        fg.Remap(weight=torch.eye(32) * 2, bias=direction(3), strength=0, **at),
        fg.Scale(width=32, **at),
        fg.Scale(width=32, read=torch.zeros(32), **at),
        fg.edit(sae, {3: ("at_least", -1.0), 5: ("at_most", 1e4), 7: ("times", 1.0), 8: ("plus", 0.0)}),
    ]
    for item in items:
        assert torch.equal(apply(h, item.update().prepare(h.device, dtype)), h), item


def test_rows_of_every_kind_share_an_update():
    items = [*operations().values(), None, vector(4).add(0.5), vector(5).affine(0.3)]
    (h,) = tensors(6, (len(items), 5, 32))
    own = {n for n, item in enumerate(items) if isinstance(item, fg.Remap)}  # as many terms as the stream is wide
    *apart, (update, numbers) = stack(items)
    assert [rows for _, rows in apart] == [[n] for n in sorted(own)]
    assert numbers == [n for n, item in enumerate(items) if item is not None and n not in own]
    out = apply(h, update)
    for row, (item, before, after) in enumerate(zip(items, h, out, strict=True)):
        if item is None or row in own:
            assert torch.equal(after, before)
        else:
            alone = apply(before[None], item.update())[0]
            torch.testing.assert_close(after, alone, atol=1e-5, rtol=1e-5, msg=f"row {row}")  # sums of padded zeros


@pytest.mark.parametrize("name", operations())
def test_generation_equals_the_recompute(llama, tokenizer, name):
    item = operations()[name]
    entries = [item, None, [vector(2, layer=0).add(0.5), item]]
    expected = rows_of(llama, tokenizer, [[item], [], entries[2]])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert run(llama, batch(tokenizer), entries, **options) == expected


def test_edits_generate_as_the_recompute(llama, tokenizer):
    for activation in ("relu", "topk"):
        item = fg.edit(make_sae(activation), EDITS)
        expected = rows_of(llama, tokenizer, [[item], [], [item]])
        assert run(llama, batch(tokenizer), [item, None, item]) == expected


def test_scopes_that_count_are_made_of_counts():
    assert (fg.first(2), fg.last(3), fg.at([3, 0])) == ("first:2", "last:3", "at:0,3")
    assert fg.ends(4, 2) == "ends:4,2"
    for wrong in (lambda: fg.at(3), lambda: fg.at([]), lambda: fg.at("0,3"), lambda: fg.first(0), lambda: fg.last(1.5)):
        with pytest.raises(fg.FgsteerError):
            wrong()


def test_what_is_refused():
    v = vector()
    for arguments in ({}, {"target": 1.0, "at_most": 2.0}):
        with pytest.raises(fg.SteeringError, match="a number as target, or in its place"):
            v.clamp(**arguments)
    with pytest.raises(fg.SteeringError, match="at least 2 and at most 1"):
        v.clamp(at_least=2.0, at_most=1.0)
    with pytest.raises(fg.SteeringError, match="depend linearly"):
        fg.ClampSubspace(hookpoint=AT, directions=torch.stack([v.direction, v.direction * -2]))
    with pytest.raises(fg.SteeringError, match="1 target for 2 directions"):
        fg.ClampSubspace(hookpoint=AT, directions=torch.stack([v.direction, direction(2)]), targets=[1.0])
    with pytest.raises(fg.PairingError, match="floating-point matrix"):
        fg.ClampSubspace(hookpoint=AT, directions=v.direction)
    with pytest.raises(fg.SteeringError, match="parallel"):
        fg.Rotate(hookpoint=AT, direction=v.direction, other=-3 * v.direction, by=10.0)
    for angles in ({}, {"by": 1.0, "to": 2.0}):
        with pytest.raises(fg.SteeringError, match="one angle"):
            fg.Rotate(hookpoint=AT, direction=v.direction, other=direction(2), **angles)
    with pytest.raises(fg.PairingError, match=r"'read' of width 3"):
        fg.AdaptiveAdd(hookpoint=AT, direction=v.direction, read=torch.ones(3))
    with pytest.raises(fg.PairingError, match="3 values for a width of 32"):
        fg.Scale(hookpoint=AT, width=32, read=torch.ones(3))


@pytest.mark.parametrize("kind", ["adaptive", "rotate", "subspace", "bounds", "remap", "scale"])
def test_values_are_trained_through(llama, tokenizer, kind):
    ids = tokenizer("the man sat on the ship", return_tensors="pt")["input_ids"]
    first, other = direction(1).requires_grad_(), direction(2).requires_grad_()
    item = {
        "adaptive": lambda: fg.AdaptiveAdd(hookpoint=AT, direction=first, read=other, bias=5.0),
        "rotate": lambda: fg.Rotate(hookpoint=AT, direction=first, other=other, to=20.0),
        "subspace": lambda: fg.ClampSubspace(hookpoint=AT, directions=torch.stack([first, other])),
        "bounds": lambda: fg.Clamp(hookpoint=AT, direction=first + other, at_most=-3.0),
        "remap": lambda: fg.Remap(hookpoint=AT, weight=torch.outer(first, other), bias=other),
        "scale": lambda: fg.Scale(hookpoint=AT, width=D_MODEL, coefficient=first.sum() * 0.1, read=other * 0.1),
    }[kind]()
    with fg.steer(llama, item):
        llama(ids, labels=ids).loss.backward()
    for value in (first, other):
        assert value.grad is not None
        assert float(value.grad.norm()) > 0
    assert not item.detach().trained


# ---------------------------------------------------------------- files


def test_steering_in_a_file_is_the_same_steering(llama, tokenizer, tmp_path):
    sae = make_sae("topk", layer=0)
    gate = (fg.Feature(sae, 3).mean() > 0.1) & ~(fg.Cosine(vector(2, 0)) > 0.3) | (fg.Probe(direction(4), 0) < 2.0)
    items = [
        *operations().values(),
        vector(4).affine(0.3, scope=fg.last(2), bos=True),
        vector(5).ablate(scope="reply"),
        vector(6).add(0.5, when=gate),
        fg.edit(make_sae("relu"), EDITS, when=fg.Projection(vector(1)).last() > -5.0),
    ]
    fg.save_steering(tmp_path / "s.safetensors", items)
    with pytest.raises(fg.PairingError, match=r"Pass it with saes="):
        fg.load_steering(tmp_path / "s.safetensors")
    loaded = fg.load_steering(tmp_path / "s.safetensors", saes=[make_sae("relu"), sae])
    assert [type(item) for item in loaded] == [type(item) for item in items]
    for one, other in zip(items, loaded, strict=True):
        assert isinstance(other, fg.Intervention)
        assert (one.scope, one.bos, one.hookpoint, one.method) == (
            other.scope,
            other.bos,
            other.hookpoint,
            other.method,
        )
        (h,) = tensors(1, (2, 4, 32))
        assert torch.equal(apply(h, one.update()), apply(h, other.update()))
        inputs = batch(tokenizer)
        with fg.steer(llama, one):
            expected = llama(**inputs).logits
        with fg.steer(llama, other):
            assert torch.equal(llama(**inputs).logits, expected)
    fg.save_steering(tmp_path / "again.safetensors", loaded)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def test_files_of_steering_that_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"

    class Mine(fg.Add):
        pass

    for wrong, match in (([], "empty list"), (Mine(hookpoint=AT, direction=direction()), "of your own")):
        with pytest.raises(fg.SteeringError, match=match):
            fg.save_steering(path, wrong)
    assert not path.exists()
    vector().save(path)
    with pytest.raises(fg.FormatError, match="a vector file"):
        fg.load_steering(path)
    good = {"kind": "Add", "hookpoint": "blocks.1.hook_resid_post", "direction": {"tensor": "v"}, "coefficient": 1.0}
    for change in (
        {"kind": "OneLineRepr"},
        {"kind": 3},
        {"direction": {"tensor": "w"}},
        {"coefficient": "much"},
        {"scope": "some"},
        {"unknown": 1},
        {"when": {"all": []}},
        {"when": {"reading": {"kind": "Gate"}, "threshold": 1.0, "fires_above": True}},
        {"hookpoint": 1.5},
    ):
        write_tensors(path, {"v": direction()}, kind="steering", header={"interventions": [{**good, **change}]})
        with pytest.raises(fg.FgsteerError):
            fg.load_steering(path)
    write_tensors(path, {"v": direction()}, kind="steering", header={"interventions": [good]})
    (item,) = fg.load_steering(path)
    assert isinstance(item, fg.Add)
    assert torch.equal(item.direction, direction())
