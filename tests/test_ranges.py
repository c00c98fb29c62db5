"""Amounts at which activations overflow: refused by hooks, exports, folding and admission, limited in the kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer import export
from fgsteer.serving.control import Control
from fgsteer.serving.converting import rows_of
from fgsteer.serving.request import PLAN, steering
from fgsteer.serving.rows import KEEP_NORM, PLAIN, RELATIVE
from fgsteer.serving.sources import load_stages
from fgsteer.serving.tables import COLUMNS, Batch, Table
from fgsteer.steering.ranges import max_change
from fgsteer.storage.files import write_tensors
from tests.helpers.engine import WIDTH, FakeEngine, clamp, normal, request, vector
from tests.helpers.saes import make_sae
from tests.helpers.tiny import tiny_model

AT = "blocks.1.hook_resid_post"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("width", [8, 320, 16384])
def test_the_bound_leaves_room_for_norms_and_for_the_model(width):
    assert max_change(torch.float16, width) == 65504 / 2
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        most = max_change(dtype, width)
        assert 1e6 < most < 1e8  # above the massive activations of every known model
        fourth = torch.full((width,), most) ** 4
        assert (fourth.sum() * 1e6).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_hooks_refuse_what_would_become_nan(dtype, tokenizer):
    v, sae = fg.SteeringVector(torch.ones(32), AT, reference=torch.zeros(32)), make_sae("relu")
    model = tiny_model("llama", dtype=dtype)
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: 1e39})
    wide = replace(sae, W_enc=sae.W_enc * 1e30)
    loud = fg.ClampFeature(hookpoint=sae.hookpoint, sae=wide, targets={1: 1.0})
    topk = replace(make_sae("topk"), W_enc=sae.W_enc * 1e38)
    far = fg.ClampFeature(hookpoint=sae.hookpoint, sae=topk, targets={1: 1.0, 3: 0.0})
    refused = [
        v.clamp(1e39),
        v.affine(-1e39),
        v.add(1e39),
        clamp,
        loud,
        far,
        (v * 1e15).add(1e15),
        [None, v.clamp(1e300)],
    ]
    for item in refused:
        with pytest.raises(fg.SteeringError, match=r"blocks\.1\.hook_resid_post that changes entries by"):  # noqa: SIM117
            with fg.steer(model, item):
                pass
    assert not model.model.layers[1]._forward_hooks
    ids = tokenizer("the man sat", return_tensors="pt")["input_ids"]
    for item in (v.clamp, v.add):
        with torch.no_grad(), fg.steer(model, item(0.9 * max_change(dtype, 32))) as steered:
            assert steered(ids).logits.isfinite().all()


def test_numbers_beyond_floats_are_typed_errors():
    v = vector()
    for make in (v.add, v.clamp, v.affine, v.__mul__, v.__truediv__):
        for amount in (math.inf, math.nan):
            with pytest.raises(fg.SteeringError, match="finite"):
                make(amount)
        for amount in (10**400, -(10**5000)):  # beyond floats
            with pytest.raises(fg.ArgumentError, match="number"):
                make(amount)
    far = fg.SteeringVector(torch.full((8,), 1e30), AT)
    with pytest.raises(fg.SteeringError, match="norm inf"):
        far.clamp(1.0)
    with pytest.raises(fg.SelectionError, match="norm inf"):
        far.unit()


def test_a_strength_that_no_amount_reaches_is_nan_before_activations_overflow(tokenizer):
    """Doubling stops where float16 does, and the other intervention of the same call is found."""
    model, v = tiny_model("llama", dtype=torch.float16), vector()
    texts = ["the man sat on the old ship"]
    makes = [lambda c: v.add(c * 1e-30), v.add]
    far, found = fg.calibrate_many(model, tokenizer, makes, texts, target_kl=0.01)
    assert math.isnan(far)
    assert 0 < found < max_change(torch.float16, 32)
    assert all(math.isnan(c) for c in fg.calibrate_many(model, tokenizer, makes, texts, target_kl=1e6))
    with pytest.raises(fg.SteeringError, match="changes entries"):
        fg.calibrate_many(model, tokenizer, [v.add], texts, start=1e30)


@pytest.mark.parametrize("coefficient", [1e300, 1e39, 1e20])
def test_exports_refuse_what_their_engines_cannot_hold(coefficient, tmp_path, llama):
    item = vector().add(coefficient, bos=True)
    sae = replace(make_sae(), neuronpedia="m/1-res")
    feature = fg.from_features(sae, [3])
    writes = {
        "v.gguf": lambda path: export.gguf.write(item, path),
        "v.json": lambda path: export.easysteer.write(item, path),
        "v.pt": lambda path: export.lm_eval.write(item, path, llama),
        "folder": lambda path: export.checkpoint.write(item, path, tiny_model("gpt2")),
        "n.json": lambda path: export.neuronpedia.write(feature, path, sae, coefficient=coefficient),
    }
    for name, write in writes.items():
        with pytest.raises(fg.SteeringError, match=r"float32 do not overflow, got .* that changes entries by"):
            write(tmp_path / name)
        assert not list(tmp_path.iterdir()), name
    with pytest.raises(fg.SteeringError, match="changes entries"):
        fg.fold(tiny_model("gpt2"), item)


# ---------------------------------------------------------------- serving


def tensors(**changed):
    """The rows of a clamp of two features, some of them changed."""
    found = rows_of(fg.ClampFeature(hookpoint=AT, sae=make_sae("relu"), targets={3: 2.0, 7: 0.5})).tensors
    return found | {name: change(found[name]) for name, change in changed.items()}


def huge(size):
    return lambda tensor: torch.full_like(tensor, size)


@pytest.mark.parametrize("size", [1e12, 1e20, 1e30, 1e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_huge_entries_are_refused_when_they_are_loaded(size, dtype, tmp_path):
    engine = FakeEngine([1])
    engine.config.model_config.dtype = dtype
    control = Control(engine, [1])
    fg.SteeringVector(torch.full((WIDTH,), size), AT).save(tmp_path / "v.safetensors")
    fg.SteeringVector(normal(0, WIDTH), AT, torch.full((WIDTH,), size)).save(tmp_path / "r.safetensors")
    for name in ("read", "write", "bias", "target"):
        write_tensors(
            tmp_path / f"{name}.safetensors", tensors(**{name: huge(size)}), kind="clamp", header={"hookpoint": AT}
        )
    both = tensors(read=huge(1e6 * size**0), write=huge(1e6))  # neither is, and what one does to the other is
    write_tensors(tmp_path / "both.safetensors", both, kind="clamp", header={"hookpoint": AT})
    for path in tmp_path.iterdir():
        with pytest.raises(fg.SteeringError, match=r"changes entries|norm inf"):
            control.load("x", path)
    assert control.names == []
    assert (engine.tables[1].owner == -1).all()


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc"])
def test_a_clamp_of_a_damaged_sae_is_refused(name):
    sae = make_sae("relu")
    sae = replace(sae, **{name: getattr(sae, name).clone().fill_(math.nan)})
    control = Control(FakeEngine([1]), [1])
    with pytest.raises(fg.SteeringError, match="changes entries by nan"):
        control.load("x", fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={3: 1.0}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_admission_holds_amounts_against_the_engines_dtype(dtype):
    engine = FakeEngine([1])
    engine.config.model_config.dtype = dtype
    control = Control(engine, [1])
    v = vector()
    control.load("v", v)
    control.load("c", clamp("relu"))
    most = max_change(dtype, WIDTH)
    edge = most / float(v.unit().direction.abs().max())  # the largest entry of the change is then the bound
    for op, scale in (("add", edge / v.norm), ("clamp", edge), ("affine", edge / v.norm)):
        control.admit(request(steering("v", op=op, scale=0.9 * scale)))
        for factor in (1.1, -1.1, 1e30, 1e300):
            with pytest.raises(fg.SteeringError, match=r"a request that changes entries by"):
                control.admit(request(steering("v", op=op, scale=factor * scale)))
    for scale in (most, 1e39, -1e300, 1.7e308):
        with pytest.raises(fg.SteeringError, match="changes entries"):
            control.admit(request(steering("c", scale=scale)))
    assert control.admit(request(steering("v", op="ablate")))


EVERYWHERE = (0.0, 99.0, *[0.0] * 6)  # one run of positions


def step(table, batch, plans, hidden, residual):
    batch.plans = plans
    starts = np.arange(len(plans) + 1, dtype=np.int32) * (len(hidden) // len(plans))
    batch.write_plan(list(plans), starts, torch.arange(len(hidden) // len(plans)).repeat(len(plans)))
    return table(hidden, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("const", [0.0, 1.0, 1e30, -1e38, math.inf, math.nan])
@pytest.mark.parametrize("entries", [1.0, 1e20, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("mode", [PLAIN, RELATIVE, KEEP_NORM])
def test_the_table_lets_nothing_overflow_and_unsteered_tokens_alone(dtype, const, entries, mode):
    """Even where checks before it failed: rows and plans of anything, next to unsteered tokens."""
    batch = Batch(64, torch.device("cpu"))
    table = Table(4, WIDTH, batch.tokens)
    rows = {name: torch.full_like(tensor, entries) for name, tensor in tensors().items()}
    table.fill(1.0, rows | {"threshold": torch.full((2,), -math.inf)})
    hidden, residual = (3 * normal(1, 12, WIDTH)).to(dtype), (3 * normal(2, 12, WIDTH)).to(dtype)
    out = step(
        table, batch, {"a": [(1.0, const, -1.0, -math.inf, math.inf, mode, *EVERYWHERE)], "b": None}, hidden, residual
    )
    assert out.dtype == dtype
    stream = out[:6].float() + residual[:6].float()
    assert stream.isfinite().all()
    assert stream.abs().max() <= 1.01 * max_change(dtype, WIDTH)  # bfloat16 keeps 8 bits
    square = (out + residual)[:6].float() ** 2
    assert square.sum(1).isfinite().all()
    assert torch.equal(out[6:], hidden[6:])


def test_an_entry_that_the_model_itself_makes_large_is_kept(monkeypatch):
    """A massive activation beyond the bound: what is steered beside it changes as asked, and it is not cut."""
    batch = Batch(64, torch.device("cpu"))
    table = Table(1, WIDTH, batch.tokens)
    v = vector()
    table.fill(1.0, rows_of(v).tensors)
    hidden = normal(3, 4, WIDTH)
    hidden[:, 5] = 1e9
    out = step(table, batch, {"a": [(1.0, 2.0 * v.norm, 0.0, -math.inf, math.inf, 0.0, *EVERYWHERE)]}, hidden, None)
    others = [i for i in range(WIDTH) if i != 5]
    torch.testing.assert_close((out - hidden)[:, others], (2 * v.direction)[others].expand(4, -1))
    assert (out[:, 5] >= 0.99e9).all()


def test_negative_zeros_of_unsteered_tokens_stay():
    table = Table(1, WIDTH, torch.zeros(1, COLUMNS, 8))
    hidden = torch.full((4, WIDTH), -0.0)
    assert torch.signbit(table(hidden, None)).all()


def test_the_table_compiles_to_one_graph_whatever_it_holds():
    batch = Batch(64, torch.device("cpu"))
    table = Table(2, WIDTH, batch.tokens)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(table, backend=count, fullgraph=True)
    hidden = normal(4, 6, WIDTH)
    with torch.no_grad():
        assert torch.equal(compiled(hidden, hidden), hidden)
        table.fill(1.0, rows_of(vector()).tensors)
        batch.tokens[:] = torch.tensor([1.0, 1.0, 0.0, -math.inf, math.inf, 0.0])[:, None]
        assert not torch.allclose(compiled(hidden, hidden), hidden)
        batch.tokens[0, 1] = math.inf
        assert compiled(hidden, hidden).isfinite().all()
    assert len(graphs) == 1


def test_a_plan_is_the_one_of_its_request():
    """What admission writes is what the table does: an accepted request at the bound stays within it."""
    engine = FakeEngine([1])
    control = Control(engine, [1])
    v = vector()
    control.load("v", v)
    most = max_change(torch.float32, WIDTH)
    made = request(steering("v", scale=0.99 * most / float(v.direction.abs().max()), bos=True))
    control.admit(made)
    table = engine.tables[1]
    batch = Batch(7, torch.device("cpu"))
    table.tokens = batch.tokens
    hidden = normal(5, 4, WIDTH)
    out = step(table, batch, {"r": made.sampling_params.extra_args[PLAN]}, hidden, None)
    assert 0.9 * most < out.abs().max() <= most


def test_served_rows_are_numbers(tmp_path):
    for name in ("read", "write", "bias", "target"):
        for bad in (1e300, math.inf):
            rows = tensors()
            rows[name] = torch.full(rows[name].shape, bad, dtype=torch.float64)
            write_tensors(tmp_path / "c", rows, kind="clamp", header={"hookpoint": AT})
            with pytest.raises(fg.FormatError, match="nan or inf"):
                load_stages(tmp_path / "c")
    none = {name: tensor[:0] for name, tensor in tensors().items()}
    write_tensors(tmp_path / "c", none, kind="clamp", header={"hookpoint": AT})
    with pytest.raises(fg.FormatError, match="damaged"):
        load_stages(tmp_path / "c")
