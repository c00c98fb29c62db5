"""Serving without vLLM: tables against the loops and against hooks, plans, requests, names, the canary, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.cli import main
from fgsteer.effects.rollouts import Sampling
from fgsteer.serving import VllmWriter, save_clamp, steered_llm, steering
from fgsteer.serving.admission import check_planned
from fgsteer.serving.control import Control
from fgsteer.serving.converting import rows_of
from fgsteer.serving.offline import engine_settings
from fgsteer.serving.request import PLAN, RequestedSteering, parse_request
from fgsteer.serving.server import set_engine_options
from fgsteer.serving.sources import load_stages, stages_by_name
from fgsteer.serving.tables import COLUMNS, Batch, Table, blocks_of, steer_block
from fgsteer.serving.writer import servable
from fgsteer.storage.files import write_tensors
from tests.helpers.engine import WIDTH, FakeEngine, clamp, normal, request, vector
from tests.reference import apply as reference

PROMPT, LENGTH = 3, 6


def only(path):
    """The rows of a file that holds one intervention."""
    (stage,) = load_stages(path)
    (rows,) = stage.rows
    return rows


def run(items, hidden, residual):
    """Steer a batch that holds the tokens of every item after one another, each from position 0."""
    batch = Batch(64, torch.device("cpu"))
    table = Table(16, WIDTH, batch.tokens)
    for tag, (served, operation, scale, wanted) in enumerate(items, start=1):
        if served is not None:
            table.fill(float(tag), served.tensors)
            batch.plans[str(tag)] = [(tag, *served.amounts(operation, scale), *wanted.slot(PROMPT, True))]
    count = len(hidden) // len(items)
    starts = np.arange(len(items) + 3, dtype=np.int32) * count  # longer than the batch, as vLLM's is
    batch.write_plan([str(tag) for tag in range(1, len(items) + 1)], starts, torch.arange(count).repeat(len(items)))
    return table(hidden, residual)


@pytest.mark.parametrize("scope", [*reference.SCOPES, "first:2", "last:2", "ends:1,2", "ends:3,9", "at:0", "at:0,2"])
@pytest.mark.parametrize("bos", [False, True])
def test_one_batch_equals_the_loops_token_by_token(scope, bos):
    wanted = RequestedSteering("x", None, 1.0, scope, bos)
    v, clamps = vector(), [clamp(kind) for kind in ("relu", "jumprelu", "gated")]
    items = [
        (None, None, 1.0, wanted),
        *((rows_of(v), op, scale, wanted) for op, scale in (("add", -0.5), ("ablate", 1.0), ("clamp", 2.0))),
        (rows_of(v), "affine", 1.5, wanted),
    ]
    items += [(rows_of(item), None, 1.0, wanted) for item in clamps[:1]]
    items += [(rows_of(v), "at_least", 1.0, wanted), (rows_of(v), "at_most", -1.0, wanted)]
    hidden, residual = normal(5, LENGTH * len(items), WIDTH), normal(6, LENGTH * len(items), WIDTH)
    out = run(items, hidden, residual)
    assert torch.equal(out[:LENGTH], hidden[:LENGTH])  # unsteered: bit for bit
    where = reference.positions(scope, LENGTH, PROMPT, 0, bos=bos)
    h = (hidden + residual).double().numpy().reshape(len(items), LENGTH, WIDTH)
    d, r = v.direction.numpy(), v.reference.numpy()
    rows = {j: clamps[0].sae.W_dec[j].numpy() for j in clamps[0].targets}

    def encode(x):
        return clamps[0].sae.encode(torch.tensor(x, dtype=torch.float32)).numpy()

    expected = [
        h[0],
        reference.add(h[1], d, -0.5, where),
        reference.ablate(h[2], d, where),
        reference.clamp(h[3], d, 2.0, where),
        reference.affine(h[4], d, r, 1.5, where),
        reference.clamp_feature(h[5], encode, rows, clamps[0].targets, where),
        h[6].copy(),
        h[7].copy(),
    ]
    expected[6][where] = reference.bound(h[6], d, at_least=1.0)[where]
    expected[7][where] = reference.bound(h[7], d, at_most=-1.0)[where]
    found = (out + residual).numpy().reshape(h.shape)
    # float32 sums over 32 terms of size about 3
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_feature_clamps_equal_the_hooks_kernel(kind, scale, tmp_path):
    item = clamp(kind)
    save_clamp(item, tmp_path / "c.safetensors")
    hidden = normal(8, 40, WIDTH)
    out = run(
        [(only(tmp_path / "c.safetensors"), None, scale, RequestedSteering("c", None, scale, "all", True))],
        hidden,
        None,
    )
    scaled = fg.ClampFeature(
        hookpoint=item.hookpoint, sae=item.sae, targets={j: t * scale for j, t in item.targets.items()}
    )
    change = scaled.update().change(hidden[None])[0]
    assert (change.abs().amax(1) > 0).any()
    torch.testing.assert_close(out, hidden + change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_edits_equal_the_hooks_kernel(kind, tmp_path):
    edits = {3: 2.0, 7: "off", 11: ("at_most", 0.4), 4: ("at_least", 0.5), 9: ("plus", -0.3), 2: ("times", 1.5)}
    item = fg.edit(clamp(kind).sae, edits)
    save_clamp(item, tmp_path / "c.safetensors")
    hidden = normal(8, 40, WIDTH)
    wanted = RequestedSteering("c", None, 1.0, "all", True)
    out = run([(only(tmp_path / "c.safetensors"), None, 1.0, wanted)], hidden, None)
    change = item.update().change(hidden[None])[0]
    torch.testing.assert_close(out, hidden + change, atol=1e-5, rtol=1e-5)


def test_a_file_of_an_earlier_version_has_no_bounds(tmp_path):
    item = clamp("relu")
    tensors = {name: t for name, t in rows_of(item).tensors.items() if name not in ("lam", "lo", "hi")}
    write_tensors(tmp_path / "c", tensors, kind="clamp", header={"hookpoint": str(item.hookpoint)})
    for name, tensor in only(tmp_path / "c").tensors.items():
        assert torch.equal(tensor, rows_of(item).tensors[name])
    crossed = rows_of(item).tensors
    crossed |= {"lo": torch.full((3,), 2.0), "hi": torch.full((3,), 1.0)}
    write_tensors(tmp_path / "c", crossed, kind="clamp", header={"hookpoint": str(item.hookpoint)})
    with pytest.raises(fg.FormatError, match="lower bound is above"):
        only(tmp_path / "c")


def test_hooked_blocks_equal_steer(llama, tokenizer):
    """The block's hook on a Hugging Face block, whose output is the stream: logits as with ``fg.steer``."""
    ids = tokenizer("the man sat on the old ship", return_tensors="pt")["input_ids"]
    v, batch = vector(), Batch(64, torch.device("cpu"))
    block = blocks_of(llama, llama.config.num_hidden_layers)[1]
    plain = llama(ids).logits
    with fg.steer(llama, v.affine(1.0, scope="prompt")):
        expected = llama(ids).logits
    block.steering = Table(2, WIDTH, batch.tokens)
    handle = block.register_forward_hook(steer_block)
    try:
        block.steering.fill(4.0, rows_of(v).tensors)
        batch.plans["r"] = (
            (
                4.0,
                *rows_of(v).amounts("affine", 1.0),
                *RequestedSteering("v", None, 1.0, "prompt", False).slot(99, True),
            ),
        )
        starts, places = np.array([0, ids.shape[1]]), torch.arange(ids.shape[1])
        batch.write_plan(["r"], starts, places)
        steered = llama(ids).logits
        batch.plans.clear()
        batch.write_plan(["r"], starts, places)  # gone: nothing of it is left in the plan
        after = llama(ids).logits
    finally:
        handle.remove()
        del block.steering
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(steered, plain, atol=1e-2)
    assert torch.equal(after, plain)


def test_block_outputs_keep_their_form():
    class Split(torch.nn.Module):
        def forward(self, x):
            return x, x * 2

    class Odd(torch.nn.Module):
        def forward(self, x):
            return x, x, x

    for kind in (Split, Odd):
        block = kind()
        block.steering = Table(1, 4, torch.zeros(1, COLUMNS, 8))
        block.register_forward_hook(steer_block)
        if kind is Odd:
            with pytest.raises(fg.HookpointError, match="Odd"):
                block(torch.ones(2, 4))
        else:
            hidden, residual = block(torch.ones(2, 4))
            assert torch.equal(hidden, torch.ones(2, 4))
            assert torch.equal(residual, torch.ones(2, 4) * 2)


def test_rows_are_given_and_taken_back():
    table = Table(4, WIDTH, torch.zeros(1, COLUMNS, 8))
    three = rows_of(clamp("relu")).tensors
    table.fill(1.0, three)
    with pytest.raises(fg.SteeringError, match=r"1 of 4 are free.*more rows"):
        table.fill(2.0, three)
    with pytest.raises(fg.PairingError, match="width 5"):
        table.fill(2.0, {name: t[..., :5] for name, t in rows_of(vector()).tensors.items()})
    table.fill(2.0, rows_of(vector()).tensors)
    table.clear(1.0)
    assert table.owner.tolist() == [-1.0, -1.0, -1.0, 2.0]
    table.fill(3.0, three)
    assert table.owner.tolist() == [3.0, 3.0, 3.0, 2.0]


def test_what_cannot_be_served_is_refused(tmp_path):
    with pytest.raises(fg.HookpointError, match="resid_post"):
        rows_of(fg.SteeringVector(normal(0, 4), "blocks.1.hook_mlp_out"))
    with pytest.raises(fg.HookpointError, match="output of a block"):
        rows_of(fg.SteeringVector(normal(0, 4), "blocks.0.hook_resid_pre"))
    assert rows_of(fg.SteeringVector(normal(0, 4), "blocks.2.hook_resid_pre")).layer == 1
    with pytest.raises(fg.SteeringError, match="norm 0"):
        rows_of(fg.SteeringVector(torch.zeros(4), fg.Hookpoint(0)))
    bare = rows_of(fg.SteeringVector(normal(0, 4), fg.Hookpoint(0)))
    for operation, scale, why in (("affine", 1.0, "reference"), ("ablate", 2.0, "strength"), ("turn", 1.0, "'turn'")):
        with pytest.raises(fg.SteeringError, match=why):
            bare.amounts(operation, scale)
    with pytest.raises(fg.SteeringError, match="feature clamp"):
        rows_of(clamp("relu")).amounts("add", 1.0)
    with pytest.raises(fg.FormatError, match="no folder"):
        stages_by_name(tmp_path / "none")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, kind="stats", header={})
    with pytest.raises(fg.FormatError, match="stats"):
        stages_by_name(tmp_path)
    write_tensors(tmp_path / "x.safetensors", {"read": torch.zeros(1)}, kind="clamp", header={})
    with pytest.raises(fg.FormatError, match="damaged"):
        stages_by_name(tmp_path)


def test_requests_are_read_strictly():
    extra = steering("love", op="affine", scale=-0.5, scope="generated", bos=True)
    assert parse_request({**extra, "other": 1}) == (RequestedSteering("love", "affine", -0.5, "generated", True),)
    assert parse_request(None) == ()
    assert parse_request({"other": 1}) == ()
    for bad, why in (
        ({"steer": ""}, "name"),
        ({"steer_scale": 2.0}, "name"),
        ({"steer": "a", "steer_scale": "2"}, "finite"),
        ({"steer": "a", "steer_scale": math.nan}, "finite"),
        ({"steer": "a", "steer_scope": "some"}, "scope"),
        ({"steer": "a", "steer_bos": 2}, "bos"),
        ({"steer": "a", "steer_strength": 2}, "steer_strength"),
        ({"steer": "a", PLAN: [1, 1, 1, 0, 9]}, PLAN),
        ({"steer": ["a"]}, "name"),
        ({"steer": "a", "steer_op": ["add"]}, "steer_op"),
        ({"steer": "a", "steer_op": {"add": 1}}, "steer_op"),
        ({"steer": "a", "steer_op": "turn"}, "steer_op"),
        ({"steer": "a", "steer_scope": ["all"]}, "steer_scope"),
        ({"steer": "a", "steer_bos": [0]}, "steer_bos"),
        ({"steer": "a", "steer_scale": [1.0]}, "steer_scale"),
        ({"steer": "a", "steer_scale": 10**5000}, "steer_scale"),
        ({"steer": "a", "steer_x\n\u202e": 1}, r"steer_x\\n\\u202e"),
    ):
        with pytest.raises(fg.SteeringError, match=why):
            parse_request(bad)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "a\n", "a\x00b", "\u202eevol", "é", "a b", "a" * 65, None, 3]
)
def test_names_are_of_a_plain_alphabet(name, tmp_path):
    control = Control(FakeEngine([1]), [1])
    with pytest.raises(fg.SteeringError, match="letters, digits"):
        control.load(name, vector())
    with pytest.raises(fg.SteeringError, match="letters, digits"):
        stages_by_name({name: vector()})
    with pytest.raises(fg.SteeringError, match="name"):
        parse_request({"steer": name})
    if name in ("a b", "é", "\u202eevol"):
        vector().save(tmp_path / f"{name}.safetensors")
        with pytest.raises(fg.SteeringError, match="letters, digits"):
            stages_by_name(tmp_path)


def test_names_of_letters_and_the_like_are_taken():
    control = Control(FakeEngine([1]), [1])
    for name in ("a", "-a_B.9", "0" * 64, "_"):
        control.load(name, vector())
        control.unload(name)


def test_names_come_and_go_while_requests_run():
    engine = FakeEngine([1, 2])
    control = Control(engine, [1, 2])
    control.load("love", vector(0))
    first = request(steering("love", scale=2.0, scope="generated"))
    control.admit(first)
    (plan,) = first.sampling_params.extra_args[PLAN]
    assert plan[1:] == [pytest.approx(2.0 * vector(0).norm), 0.0, -math.inf, math.inf, 0.0, 3, math.inf, *[0.0] * 6]
    engine.live = [first.request_id]
    control.load("love", vector(3))  # replaced: the request under way keeps its rows
    assert (engine.tables[1].owner == plan[0]).sum() == 1
    second = request(steering("love"))
    control.admit(second)
    assert second.sampling_params.extra_args[PLAN][0][0] != plan[0]
    control.unload("love")
    with pytest.raises(fg.SteeringError, match="Nothing is loaded as 'love'"):
        control.admit(request(steering("love")))
    with pytest.raises(fg.SteeringError, match="Nothing is loaded"):
        control.unload("love")
    engine.live = []
    control.load("calm", vector(4, layer=2))  # the next change frees what nothing uses
    assert (engine.tables[1].owner == -1).all()
    assert control.hookpoints() == {"calm": "blocks.2.hook_resid_post"}


@pytest.mark.parametrize("scope", reference.SCOPES)
@pytest.mark.parametrize("bos", [False, True])
def test_a_start_token_at_position_0_is_spared_and_a_word_is_not(scope, bos):
    control = Control(FakeEngine([1]), [1])
    control.load("love", vector(0))
    for first in (0, 2, 9, 5):
        ids = [first, 2, 7]
        made = request(steering("love", scope=scope, bos=bos), ids=ids)
        control.admit(made)
        bounds = made.sampling_params.extra_args[PLAN][0][COLUMNS:]
        runs = list(zip(bounds[::2], bounds[1::2], strict=True))
        places = [i for i in range(6) if any(start <= i < end for start, end in runs)]
        assert places == reference.positions(scope, 6, len(ids), 0, bos=bos or first == 5)
    if scope == "reply":  # by its earlier name, as clients may still send it
        assert parse_request({"steer": "love", "steer_scope": "last_prompt_on"})[0].scope == "reply"
    one_word = request(steering("love", scope="reply"), ids=[5])
    control.admit(one_word)
    assert one_word.sampling_params.extra_args[PLAN][0][COLUMNS] == 0
    embedded = request(steering("love", scope=scope, bos=bos), ids=None, embeds=normal(0, 3, WIDTH))
    if bos or scope in ("generated", "reply", "last_prompt"):
        control.admit(embedded)
    else:
        with pytest.raises(fg.SteeringError, match=r"embeddings.*steer_bos = 1"):
            control.admit(embedded)


@pytest.mark.parametrize("scope", ["prompt", "generated", "reply", "last_prompt", "first:4", "last:2"])
def test_salts_tell_apart_which_tokens_are_steered(scope):
    """A longer prompt that begins with a shorter one must not find what was steered at other places of that one."""
    control = Control(FakeEngine([1]), [1])
    control.load("a", vector(0))
    salts = []
    for ids in ([0, 5, 6], [0, 5, 6, 7, 8, 9], [0, 5, 6, 7, 8, 9]):
        made = request(steering("a", scope=scope), ids=ids)
        control.admit(made)
        salts.append(made.cache_salt)
    assert salts[0] != salts[1] == salts[2]


def test_what_is_sent_is_plain():
    assert type(steering("a", scope=fg.last(2))["steer_scope"]) is str  # engines serialise no other class


def test_salts_tell_steerings_apart():
    control = Control(FakeEngine([1]), [1])
    control.load("a", vector(0))
    control.load("b", vector(3))
    unsteered = request({"other": 1}, salt="own")
    control.admit(unsteered)
    assert (unsteered.cache_salt, unsteered.request_id) == ("own", "r")
    kinds = [steering("a"), steering("b"), steering("a", scale=2.0), steering("a", scope="generated")]
    kinds += [steering("a", bos=True), steering("a", op="clamp")]
    salts = []
    for extra, salt in [(kind, None) for kind in kinds] + [(kinds[0], "own")]:
        made = request(extra, salt, ids=(0, 6, 7))
        control.admit(made)
        salts.append(made.cache_salt)
    assert len({*salts, None, "own"}) == len(salts) + 2
    again = request(kinds[0], ids=(0, 6, 7))
    control.admit(again)
    assert again.cache_salt == salts[0]


def test_refused_loads_leave_nothing_behind():
    engine = FakeEngine([1], rows=2)
    control = Control(engine, [1])
    with pytest.raises(fg.HookpointError, match="layer 2"):
        control.load("x", vector(layer=2))
    with pytest.raises(fg.SteeringError, match="2 of 2 are free"):
        control.load("x", clamp("relu"))
    with pytest.raises(fg.SteeringError, match="width 4"):
        control.load("x", fg.SteeringVector(normal(0, 4), fg.Hookpoint(1)))
    assert control.names == []
    assert (engine.tables[1].owner == -1).all()


def test_a_name_in_a_full_table_is_replaced_once_nothing_uses_it():
    engine = FakeEngine([1], rows=1)
    control = Control(engine, [1])
    control.load("a", vector(0))
    used = request(steering("a"))
    control.admit(used)
    engine.live = [used.request_id]
    with pytest.raises(fg.SteeringError, match="requests that have not ended use the rows"):
        control.load("a", vector(3))
    assert engine.tables[1].owner.tolist() == [used.sampling_params.extra_args[PLAN][0][0]]  # theirs still
    engine.live = []
    control.load("a", vector(3))
    torch.testing.assert_close(engine.tables[1].write[0], vector(3).unit().direction)
    with pytest.raises(fg.SteeringError, match="0 of 1 are free"):
        control.load("b", vector(4))
    with pytest.raises(fg.SteeringError, match="no room for 3 rows: 1 of 1 are free"):
        control.load("a", clamp("relu"))  # does not fit even alone: what was there comes back
    torch.testing.assert_close(engine.tables[1].write[0], vector(3).unit().direction)
    again = request(steering("a"))
    control.admit(again)
    assert engine.tables[1].owner.tolist() == [again.sampling_params.extra_args[PLAN][0][0]]


def test_tags_stay_whole_numbers_of_float32():
    """Whatever the number of uploads: 2²⁴ + 1 would be the tag before it, and steer by another's rows."""
    engine = FakeEngine([1])
    control = Control(engine, [1])
    control.load("kept", vector(0))
    for number in range(50):
        control.load("a", vector(number))
    assert engine.tables[1].owner.max() <= 3
    control.unload("a")
    assert (engine.tables[1].owner == -1).sum() == 3


def test_what_admission_has_not_planned_never_reaches_the_engine():
    control = Control(FakeEngine([1]), [1])
    control.load("love", vector(0))
    good = request(steering("love"))
    assert control.admit(good)
    check_planned(good)
    assert not control.admit(request({"other": 1}))
    check_planned(request({"other": 1}))
    check_planned(request(None))
    streamed = request(good.sampling_params.extra_args)  # a chunk of an input that is streamed
    streamed.request_id, streamed.resumable = good.request_id, True
    forged = request({PLAN: good.sampling_params.extra_args[PLAN]})
    for bad in (request(steering("love")), streamed, forged):
        with pytest.raises(fg.SteeringError, match="streamed"):
            check_planned(bad)
    pooled = request(None)
    pooled.sampling_params, pooled.pooling_params = None, SimpleNamespace(extra_kwargs=steering("love"))
    with pytest.raises(fg.SteeringError, match="generates nothing"):
        control.admit(pooled)
    pooled.pooling_params.extra_kwargs = None
    assert not control.admit(pooled)


def test_canary():
    engine = FakeEngine([0, 1])
    Control(engine, [0, 1]).canary()
    blind = FakeEngine([0, 1], steers=False)
    control = Control(blind, [0, 1])
    with pytest.raises(fg.SteeringError, match=r"layer 0.*compile cache"):
        control.canary()
    for one in (engine, blind):
        assert all((table.owner == -1).all() for table in one.tables.values())


def parsed(**given):
    """vLLM's options as its parser leaves them."""
    bare = {"worker_cls": "auto", "additional_config": {}, "api_server_count": None, "headless": False, "grpc": False}
    bare |= {"data_parallel_multi_port_external_lb": False, "served_model_name": None, "api_key": None}
    return SimpleNamespace(**bare | given)


def test_options_of_the_server(tmp_path):
    vector().save(tmp_path / "love.safetensors")
    _, _, settings = engine_settings("default", stages_by_name(tmp_path), [2], 8)
    args = parsed(additional_config={"other": 1})
    set_engine_options(args, "default", settings)
    assert args.worker_cls == "fgsteer.serving.worker.SteeringWorker"
    assert (args.additional_config["other"], args.additional_config["fgsteer"]["layers"]) == (1, [1, 2])
    assert (args.api_server_count, args.served_model_name) == (1, ["default"])
    headless = parsed(headless=True, served_model_name=["mine"])
    set_engine_options(headless, "default", settings)
    assert (headless.api_server_count, headless.served_model_name) == (None, ["mine"])
    for given, option in (
        ({"worker_cls": "x"}, "--worker-cls"),
        ({"api_server_count": 2}, "--api-server-count"),
        ({"additional_config": {"fgsteer": {}}}, "--additional-config"),
        ({"grpc": True}, "--grpc"),
        ({"data_parallel_multi_port_external_lb": True}, "multi-port"),
    ):
        with pytest.raises(fg.SteeringError, match=option):
            set_engine_options(parsed(**given), "default", settings)


def test_command_line_of_the_server(tmp_path, monkeypatch, capsys):
    vector().save(tmp_path / "love.safetensors")
    with pytest.raises(fg.SteeringError, match="no layer"):
        engine_settings("default", {}, None, 8)
    monkeypatch.setattr("fgsteer.serving.offline.find_spec", lambda name: None)
    with pytest.raises(fg.SteeringError, match=r"pip install 'fgsteer\[vllm\]'"):
        steered_llm("default", vectors=tmp_path)
    command = ["fgsteer", "serve", "default", "--vectors", str(tmp_path), "--admin-key", "k", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "vllm" in capsys.readouterr().err


def test_the_soaks_figures_are_in_the_docs():
    root = Path(__file__).parents[1]
    told = json.loads((root / "benchmarks" / "results" / "soak.json").read_text(encoding="utf-8"))
    honest, memory = told["honest"], told["memory"]
    assert (told["minutes"], told["clients"], honest["unequal"], told["broken"]) == (10, 8, 0, [])
    assert told["alive"]
    assert memory["flat"]
    figures = (
        f"all {honest['answers']:,} honest answers among {told['requests']:,} requests equalled their hook-made twins, "
        f"memory {memory['growth']:+.1%}"
    )
    page = (root / "docs" / "reference" / "failures.md").read_text(encoding="utf-8")
    assert figures in page
    assert f"revision {told['revision'][:7]}" in page


def test_importing_serving_needs_no_vllm():
    code = "import sys, fgsteer.serving, fgsteer.serving.server; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- writing for a benchmark


@pytest.mark.parametrize(
    "item",
    [
        vector().add(-1.5),
        vector().ablate(),
        vector().clamp(2.0),
        vector().affine(0.5),
        vector().clamp(at_least=1.0),
        vector().clamp(at_most=-1.0),
        clamp("jumprelu"),
        fg.edit(clamp("relu").sae, {3: "off", 4: ("times", 2.0)}),
    ],
    ids=lambda item: type(item).__name__,
)
def test_a_request_says_what_an_intervention_does(item):
    served, options = servable(item)
    (parsed,) = parse_request(steering("x", **options))
    hidden = normal(9, 20, WIDTH)
    out = run([(served, parsed.operation, parsed.scale, RequestedSteering("x", None, 1.0, "all", True))], hidden, None)
    torch.testing.assert_close(out, hidden + item.update().change(hidden[None])[0], atol=1e-5, rtol=1e-5)
    moved = replace(item, scope="generated", bos=True)
    assert (servable(moved)[1]["scope"], servable(moved)[1]["bos"]) == ("generated", True)


class FakeControl:
    """Names and what is loaded as them."""

    def __init__(self):
        self.loaded: dict[str, object] = {}
        self.load, self.unload = self.loaded.__setitem__, self.loaded.pop

    @property
    def names(self):
        return list(self.loaded)


class FakeLLM:
    """Answers with the place of each request; notes what was loaded meanwhile."""

    def __init__(self):
        config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(eos_token_id=2)))
        self.llm_engine, self.seen = SimpleNamespace(vllm_config=config), []
        self.steering = FakeControl()

    def generate(self, prompts, params, use_tqdm):
        self.seen = [
            (p["prompt_token_ids"], q, dict(self.steering.loaded)) for p, q in zip(prompts, params, strict=True)
        ]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5 + n])]) for n in range(len(prompts))]


def test_the_writer_asks_for_every_arm_of_every_prompt(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    llm = FakeLLM()
    add, ablate = vector(0).add(2.0), vector(0).ablate()
    writer = VllmWriter(llm, tokenizer)
    texts = writer(["the man", "a queen sat"], [None, add, ablate], Sampling(4, 0.7, 10, 0.9, seed=3), 8)
    assert texts == [tokenizer.decode([5 + n]) for n in range(6)]  # by intervention, then prompt
    ids, params, loaded = zip(*llm.seen, strict=True)
    assert [list(i) for i in ids] == [tokenizer(t)["input_ids"] for t in ("the man", "a queen sat")] * 3
    assert all(len(each) == 1 for each in loaded)  # one direction serves both operations
    assert [bool(p.extra_args) for p in params] == [False, False, True, True, True, True]
    assert [p.extra_args.get("steer_op") for p in params[2:]] == ["add", "add", "ablate", "ablate"]
    assert len({p.seed for p in params}) == 2  # one a prompt, the same for every arm
    assert params[0].seed == params[2].seed != params[1].seed
    assert {(p.temperature, p.top_k, p.top_p, p.max_tokens, p.ignore_eos) for p in params} == {(0.7, 10, 0.9, 4, True)}
    assert params[0].logit_bias == {2: -100.0}
    assert llm.steering.loaded == {}  # nothing is left behind
