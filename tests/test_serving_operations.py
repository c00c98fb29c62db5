"""Every operation, and several in a request, as the tables do them: equal to hooks, in one batch, without vLLM."""

from __future__ import annotations

import base64
import itertools
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch

import fgsteer as fg
from fgsteer.interventions import apply
from fgsteer.interventions.gates import Both, Either, Not
from fgsteer.serving import save_clamp, steering
from fgsteer.serving.admission import check_planned, suffix_of, tags_of
from fgsteer.serving.control import Control
from fgsteer.serving.inline import encode_vector, inline_chars, inline_name
from fgsteer.serving.offline import engine_settings
from fgsteer.serving.request import MAX_ENTRIES, PLAN, RequestedSteering, parse_request
from fgsteer.serving.sources import load_stages, stages_from
from fgsteer.serving.writer import servable
from fgsteer.storage.files import read_tensors, write_tensors
from tests.helpers.engine import WIDTH, FakeEngine, clamp, normal, request, steer_batch, vector
from tests.helpers.saes import make_sae
from tests.reference import apply as reference

PROMPT, LENGTH = 3, 6
NORMED = replace(make_sae("relu"), input_norm="layer_norm")


def items(layer=1):
    """One intervention of every kind that rows can be."""
    v, other, third = vector(0, layer), vector(3, layer), vector(6, layer)
    pair = torch.stack([v.direction, other.direction])
    return [
        v.add(-1.5),
        v.add_relative(0.4),
        v.add_keeping_norm(2.0),
        v.ablate(),
        v.affine(0.5),
        v.clamp(2.0),
        v.clamp(at_least=1.0),
        v.clamp(at_most=-1.0),
        v.clamp(at_least=-0.5, at_most=0.5),
        fg.ClampSubspace(hookpoint=layer, directions=pair),
        fg.ClampSubspace(hookpoint=layer, directions=pair, targets=[2.0, -1.0]),
        fg.Rotate(hookpoint=layer, direction=v.direction, other=other.direction, by=40.0),
        fg.AdaptiveAdd(hookpoint=layer, direction=other.direction, read=third.direction, bias=0.3, coefficient=0.2),
        fg.AdaptiveAdd(hookpoint=layer, direction=other.direction, read=third.direction, bias=-0.3, coefficient=-0.2),
        clamp("jumprelu", layer),
        fg.edit(clamp("relu", layer).sae, {3: "off", 4: ("times", 2.0), 9: ("plus", 0.5), 5: ("at_least", 1.0)}),
    ]


NAMES = [f"{type(item).__name__}-{number}" for number, item in enumerate(items())]


def expected(steered, hidden):
    """What the hooks' kernel makes of a row's tokens, in every scope, by the layers and then the order of a list."""
    out = hidden.clone()
    came = {}  # what comes to a layer, which gates read
    for item in sorted(steered, key=lambda item: item.hookpoint.layer - (item.hookpoint.site == "resid_pre") / 2):
        came.setdefault(item.hookpoint.layer, out)
        where = torch.zeros(1, len(hidden), dtype=torch.bool)
        where[0, reference.positions(item.scope, len(hidden), PROMPT, 0, bos=item.bos)] = True
        where &= True if item.when is None else is_open(item.when, came[item.hookpoint.layer])
        out = apply(out[None], item.update(), where)[0]
    return out


def is_open(gate, h, negated=False):
    """The tokens (1, tokens) at which a gate, or its opposite, is open; a condition that reads nan is shut in both."""
    if isinstance(gate, Not):
        return is_open(gate.gate, h, not negated)
    if isinstance(gate, Both | Either):
        first, second = is_open(gate.first, h, negated), is_open(gate.second, h, negated)
        return first & second if isinstance(gate, Both) != negated else first | second
    values = gate.reading.values(h[None])
    met = values > gate.threshold if gate.fires_above else values < gate.threshold
    return (~met if negated else met) & ~values.isnan()


def control_of(layers=(1, 2), slots=1, rows=64):
    return Control(FakeEngine(layers, rows=rows, slots=slots), layers, slots)


@pytest.mark.parametrize("way", ["loaded", "servable"])
def test_every_operation_equals_the_hooks_in_one_batch(way):
    """As it is loaded, and as the writer of a benchmark asks for it."""
    control, extras = control_of(), [{}]
    for name, item in zip(NAMES, items(), strict=True):
        rows, options = servable(item)
        control.load(name, item if way == "loaded" else rows)
        extras.append(steering(name) if way == "loaded" else steering(name, **options))
    hidden = normal(9, len(extras), LENGTH, WIDTH)
    out = steer_batch(control, extras, hidden)
    assert torch.equal(out[0], hidden[0])  # unsteered: bit for bit
    assert torch.equal(out[:, 0], hidden[:, 0])  # BOS
    for n, item in enumerate(items(), start=1):
        assert not torch.equal(out[n], hidden[n]), NAMES[n - 1]
        # float32 sums over 32 terms of size about 3
        torch.testing.assert_close(out[n], expected([item], hidden[n]), atol=2e-5, rtol=2e-5, msg=NAMES[n - 1])


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "reply", "last_prompt", "first:2", "last:2"])
def test_what_is_loaded_keeps_its_scope_and_a_request_may_choose_another(scope):
    control, item = control_of(), vector().add(2.0, scope=scope, bos=True)
    control.load("own", item)
    control.load("vector", vector())
    asked = [
        steering("own"),
        steering("vector", scale=2.0, scope=scope, bos=True),
        steering("own", scope="all", bos=False),
    ]
    hidden = normal(9, 3, LENGTH, WIDTH)
    out = steer_batch(control, asked, hidden)
    for row, wanted in enumerate([item, item, replace(item, scope="all", bos=False)]):
        torch.testing.assert_close(out[row], expected([wanted], hidden[row]), atol=2e-5, rtol=2e-5)


def test_several_steerings_of_a_request_compose_in_their_order():
    """Every pair of kinds, at one layer and at two, next to unsteered tokens."""
    control = control_of(slots=2, rows=128)
    both = [items(1), items(2)]
    for layer, made in enumerate(both, start=1):
        for name, item in zip(NAMES, made, strict=True):
            control.load(f"{name}-{layer}", item)
    for first, second in itertools.product(range(len(NAMES)), range(0, len(NAMES), 3)):
        lists = [[(first, 1), (second, 1)], [(second, 2), (first, 1)], [(first, 2), (second, 1)], []]
        names = [[{"name": f"{NAMES[n]}-{layer}"} for n, layer in each] for each in lists]
        hidden = normal(first, len(lists), LENGTH, WIDTH)
        out = steer_batch(control, [steering(each) if each else {} for each in names], hidden)
        for row, each in enumerate(lists):
            wanted = expected([both[layer - 1][n] for n, layer in each], hidden[row])
            torch.testing.assert_close(out[row], wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(out[-1], hidden[-1])


def test_each_of_several_has_its_own_amount_operation_and_scope():
    control, v = control_of(slots=3), vector()
    control.load("v", v)
    control.load("w", vector(3))
    asked = [
        {"name": "v", "op": "ablate"},
        {"name": "w", "scale": -2.0, "scope": "generated"},
        {"name": "v", "op": "at_least", "scale": 1.0, "scope": fg.first(2), "bos": True},
    ]
    wanted = [v.ablate(), vector(3).add(-2.0, scope="generated"), v.clamp(at_least=1.0, scope="first:2", bos=True)]
    hidden = normal(9, 1, LENGTH, WIDTH)
    out = steer_batch(control, [steering(asked)], hidden)
    torch.testing.assert_close(out[0], expected(wanted, hidden[0]), atol=2e-5, rtol=2e-5)


def test_the_input_of_a_block_comes_after_the_output_of_the_one_before():
    """Whatever their order in a list, and in a request: they share a table."""
    late = replace(vector(0).add(3.0), hookpoint=fg.Hookpoint.parse("blocks.2.hook_resid_pre"))
    early = vector(0).clamp(2.0)
    control = control_of(slots=2)
    for n, source in enumerate(([late, early], [early, late], late, early)):
        control.load(str(n), source)
    asked = [steering("0"), steering("1"), *(steering([{"name": a}, {"name": b}]) for a, b in ("23", "32"))]
    hidden = normal(9, 1, LENGTH, WIDTH).expand(4, -1, -1).contiguous()
    wanted = expected([early, late], hidden[0])
    for row in steer_batch(control, asked, hidden):
        torch.testing.assert_close(row, wanted, atol=2e-5, rtol=2e-5)


def test_one_slot_is_as_it_was_beside_more():
    """The second slot does nothing to tokens that use the first alone: the same bits as in a table with one."""
    outs = []
    for slots in (1, 4):
        control = control_of(slots=slots)
        control.load("v", vector())
        outs.append(steer_batch(control, [steering("v", scale=2.0), {}], normal(9, 2, LENGTH, WIDTH)))
    assert torch.equal(*outs)


def test_scales_multiply_what_can_be_scaled():
    v, other = vector(), vector(3)
    read = {"hookpoint": 1, "direction": v.direction, "read": other.direction, "bias": 0.2}
    pair = torch.stack([v.direction, other.direction])
    scaled = [
        (v.add(0.5), v.add(-1.5)),
        (v.add_relative(0.1), v.add_relative(-0.3)),
        (v.add_keeping_norm(0.5), v.add_keeping_norm(-1.5)),
        (v.clamp(1.0), v.clamp(-3.0)),
        (v.clamp(at_most=0.0), v.clamp(at_most=0.0)),
        (fg.ClampSubspace(hookpoint=1, directions=pair, targets=[1.0, -2.0]), [-3.0, 6.0]),
        (fg.AdaptiveAdd(**read, coefficient=0.5), fg.AdaptiveAdd(**read, coefficient=-1.5)),
    ]
    control = control_of()
    for n, (item, _) in enumerate(scaled):
        control.load(str(n), item)
    hidden = normal(9, len(scaled), LENGTH, WIDTH)
    out = steer_batch(control, [steering(str(n), scale=-3.0) for n in range(len(scaled))], hidden)
    for n, (item, wanted) in enumerate(scaled):
        wanted = replace(item, targets=tuple(wanted)) if isinstance(wanted, list) else wanted
        torch.testing.assert_close(out[n], expected([wanted], hidden[n]), atol=2e-5, rtol=2e-5)
    for item in (
        v.ablate(),
        v.affine(1.0),
        fg.Rotate(hookpoint=1, direction=v.direction, other=other.direction, by=9.0),
    ):
        control.load("x", item)
        with pytest.raises(fg.SteeringError, match="no one strength"):
            control.admit(request(steering("x", scale=2.0)))
        with pytest.raises(fg.SteeringError, match="no operation"):
            control.admit(request(steering("x", op="add")))


# ---------------------------------------------------------------- files


def test_a_file_of_steering_is_served(tmp_path):
    """Interventions that compose, with their scopes, under one name."""
    v, other = vector(), vector(3)
    made = [
        v.add(2.0, scope="generated"),
        fg.Rotate(hookpoint=2, direction=v.direction, other=other.direction, by=40.0),
        other.ablate(bos=True),
    ]
    fg.save_steering(tmp_path / "s.safetensors", made)
    control = control_of(slots=3)
    control.load("s", tmp_path / "s.safetensors")
    assert control.hookpoints() == {"s": "blocks.1.hook_resid_post, blocks.2.hook_resid_post"}
    hidden = normal(9, 2, LENGTH, WIDTH)
    out = steer_batch(control, [steering("s"), {}], hidden)
    torch.testing.assert_close(out[0], expected(made, hidden[0]), atol=2e-5, rtol=2e-5)
    assert torch.equal(out[1], hidden[1])


def test_what_acts_on_the_same_tokens_at_several_layers_takes_one_slot():
    everywhere = [vector(layer, layer).add(1.0) for layer in (1, 2)]
    (stage,) = stages_from(everywhere)
    assert stage.layers == [1, 2]
    control = control_of()
    control.load("both", everywhere)
    hidden = normal(9, 1, LENGTH, WIDTH)
    out = steer_batch(control, [steering("both", scale=-2.0)], hidden)
    wanted = [vector(layer, layer).add(-2.0) for layer in (1, 2)]
    torch.testing.assert_close(out[0], expected(wanted, hidden[0]), atol=2e-5, rtol=2e-5)
    twice = [*everywhere, vector(4, 1).add(1.0), vector(5, 2).add(1.0, scope="prompt")]
    assert [stage.layers for stage in stages_from(twice)] == [[1, 2], [1], [2]]  # in order at each layer
    with pytest.raises(fg.SteeringError, match=r"at most 1.*3 steerings.*vectors_per_request"):
        control.load("more", twice)
    assert control.names == ["both"]


def test_clamps_keep_their_scope_in_a_file(tmp_path):
    save_clamp(replace(clamp("relu"), scope="reply", bos=True), tmp_path / "c")
    (stage,) = load_stages(tmp_path / "c")
    assert (stage.scope, stage.bos) == ("reply", True)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (vector().add(1.0, scope="at:0,2,4,6,8"), "at most 4 runs"),
        (vector().add(1.0, when=fg.Projection(vector()).mean() > 0.0), "gate of each token"),
        (vector(0, 2).add(1.0, when=fg.Projection(vector(0, 1)) > 0.0), "where the intervention acts"),
        (vector().add(1.0, when=fg.Feature(NORMED, 3) > 0.0), "input_norm"),
        (fg.Rotate(hookpoint=1, direction=vector().direction, other=vector(3).direction, to=10.0), "by="),
        (fg.SteeringVector(normal(0, WIDTH), "blocks.1.hook_mlp_out").add(1.0), "resid_post"),
        (fg.edit(NORMED, {3: "off"}), "input_norm"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_vllm_cannot_do_is_refused(item, why, tmp_path):
    control = control_of()
    fg.save_steering(tmp_path / "s.safetensors", item)
    control.saes = (NORMED,)  # for files that name it
    for run in (
        lambda: steering("x", **servable(item)[1]),
        lambda: control.load("x", item),
        lambda: control.load("x", tmp_path / "s.safetensors"),
    ):
        with pytest.raises(fg.FgsteerError, match=why):
            run()
    assert control.names == []


# ---------------------------------------------------------------- the list of a request


def test_lists_are_read_strictly():
    asked = [{"name": "a", "op": "clamp", "scale": -2.0, "scope": fg.last(3), "bos": True}, {"name": "b"}]
    extra = steering(asked)
    assert {key: type(value) for key, value in extra.items()} == {"steer": str}
    assert parse_request(extra) == (
        RequestedSteering("a", "clamp", -2.0, "last:3", True),
        RequestedSteering("b", None, 1.0, None, None),
    )
    good = {"name": "a"}
    for bad, why in (
        ("[", "cannot be read"),
        ("[]", "0 entries"),
        ("[1]", r"steer\[0\] = 1"),
        ("[[]]", r"steer\[0\]"),
        ("[{}]", "without a name"),
        (json.dumps([good] * (MAX_ENTRIES + 1)), "17 entries"),
        (json.dumps([{**good, "scope": "x" * 5000}]), "characters"),
        ('[{"name": "a", "name": "b"}]', "twice"),
        ('[{"name": "a", "scale": NaN}]', r"steer\[0\].scale"),
        ('[{"name": "a", "scale": Infinity}]', r"steer\[0\].scale"),
        ('[{"name": "a", "scale": 1e999}]', r"steer\[0\].scale"),
        ('[{"name": "a", "scale": true}]', r"steer\[0\].scale"),
        ('[{"name": "a", "scale": "2"}]', r"steer\[0\].scale"),
        ('[{"name": "a", "scale": ' + "9" * 400 + "}]", r"steer\[0\].scale"),
        ('[{"name": "a"}, {"name": "b", "op": "turn"}]', r"steer\[1\].op"),
        ('[{"name": "a", "op": ["add"]}]', r"steer\[0\].op"),
        ('[{"name": "a", "scope": "at:1,3,5,7,9"}]', r"steer\[0\].scope"),
        ('[{"name": "a", "scope": {}}]', r"steer\[0\].scope"),
        ('[{"name": "a", "bos": "yes"}]', r"steer\[0\].bos"),
        ('[{"name": "a", "bos": []}]', r"steer\[0\].bos"),
        ('[{"name": "a/b"}]', "name"),
        ('[{"name": null}]', "name"),
        ('[{"name": ["a"]}]', "name"),
        ('[{"name": "a", "steer_scale": 2}]', "steer_scale"),
        ('[{"name": "a", "x\\n\\u202e": 2}]', r"x\\n\\u202e"),
        ("[" * 3000, "cannot be read"),
    ):
        with pytest.raises(fg.SteeringError, match=why) as refusal:
            parse_request({"steer": bad})
        assert str(refusal.value).isprintable()
    with pytest.raises(fg.SteeringError, match=r"in each entry.*steer_scale"):
        parse_request({"steer": '[{"name": "a"}]', "steer_scale": 2.0})
    for arguments in ({"op": "add"}, {"scale": 2.0}, {"scope": "all"}, {"bos": False}):
        with pytest.raises(fg.SteeringError, match="in each entry"):
            steering([good], **arguments)
    for entries in ([{"name": object()}], [{"name": "a", "scale": math.nan}], [], ["a"], [None]):
        with pytest.raises(fg.SteeringError):
            steering(entries)


def test_more_than_the_slots_of_an_engine_are_refused():
    control = control_of(slots=2)
    control.load("v", vector())
    control.load("two", [vector().add(1.0), vector(3).add(1.0)])
    assert control.admit(request(steering([{"name": "v"}] * 2)))
    assert control.admit(request(steering("two")))
    for asked in ([{"name": "v"}] * 3, [{"name": "two"}, {"name": "v"}]):
        made = request(steering(asked))
        with pytest.raises(fg.SteeringError, match=r"at most 2.*3 steerings.*vectors_per_request"):
            control.admit(made)
        assert made.request_id == "r"


def test_rows_of_all_that_a_request_uses_are_kept():
    engine = FakeEngine([1], rows=3, slots=2)
    control = Control(engine, [1], 2)
    for number, name in enumerate("abc"):
        control.load(name, vector(number))
    made = request(steering([{"name": "a"}, {"name": "c"}]))
    control.admit(made)
    check_planned(made)
    tags = [slot[0] for slot in made.sampling_params.extra_args[PLAN]]
    assert tags_of(made.request_id) == set(tags)
    assert not tags_of("r") | tags_of("r-steered-") | tags_of("r-steered-1-x") | tags_of("r-steered-1\n")
    engine.live = ["0_" + made.request_id, "other"]  # as vLLM names one of several samples
    for name in "abc":
        control.unload(name)
    control.load("d", vector(4))
    assert sorted(engine.tables[1].owner.tolist()) == sorted([*tags, next(iter(control._by_name["d"].tags))])
    with pytest.raises(fg.SteeringError, match="0 of 3 are free"):
        control.load("e", vector(5))
    engine.live = []
    control.load("e", vector(5))
    forged = request(made.sampling_params.extra_args)
    forged.request_id = "r" + suffix_of(tags[:1])
    with pytest.raises(fg.SteeringError, match="streamed"):
        check_planned(forged)


def test_a_file_that_does_not_fit_leaves_nothing_behind():
    engine = FakeEngine([1, 2], rows=2, slots=4)
    control = Control(engine, [1, 2], 4)
    with pytest.raises(fg.SteeringError, match="no room"):
        control.load("x", [vector(0, 2).add(1.0), *(vector(n).add(1.0) for n in range(3))])
    assert all((table.owner == -1).all() for table in engine.tables.values())


def test_salts_tell_orders_and_lists_apart():
    control = control_of(slots=2)
    control.load("a", vector(0))
    control.load("b", vector(3))
    a, b = {"name": "a"}, {"name": "b"}
    kinds = [[a], [b], [a, b], [b, a], [a, a], [a, {**b, "scale": 2.0}], [a, {**b, "scope": "generated"}]]
    kinds += [[{**a, "op": op}] for op in ("add_relative", "add_keeping_norm")]
    salts = []
    for kind in kinds:
        made = request(steering(kind))
        control.admit(made)
        salts.append(made.cache_salt)
    assert len(set(salts)) == len(salts)
    single = request(steering("a"))
    control.admit(single)
    assert single.cache_salt == salts[0]  # however it is asked for


# ---------------------------------------------------------------- TopK SAEs


def topk_control(saes, slots=1, rows=32):
    control = Control(FakeEngine([1, 2], rows=rows, slots=slots, saes=saes), [1, 2], slots, saes)
    control.load_encoders()
    return control


def tied_sae():
    """A TopK SAE with k = 5 of whose 24 features many are equal at every token, so that ties decide which fire."""
    sae = make_sae("topk")
    W_enc = sae.W_enc.clone()
    W_enc[:, 12:] = W_enc[:, :12]
    return replace(sae, W_enc=W_enc, b_enc=torch.zeros(24))


@pytest.mark.parametrize("way", ["itself", "clamp file", "steering file"])
@pytest.mark.parametrize("make", [lambda: make_sae("topk"), tied_sae, lambda: replace(make_sae("topk"), k=24)])
def test_features_of_topk_saes_compete(way, make, tmp_path, monkeypatch):
    """Every feature, whether it is among the k largest or not, tied or below zero, in a batch of many tokens."""
    monkeypatch.setattr("fgsteer.serving.encoders.PIECE_BYTES", 1000)  # the encoder comes in many pieces
    sae = make()
    control = topk_control([make_sae("relu"), replace(make_sae("topk", seed=1), k=3), sae], rows=64)
    edits = {j: [3.0, "off", ("at_most", 0.4), ("times", 2.0), ("plus", -0.3)][j % 5] for j in range(24)}
    item = fg.edit(sae, edits, bos=True)
    source = item if way == "itself" else tmp_path / "c.safetensors"
    if way == "clamp file":
        save_clamp(item, source)
    elif way == "steering file":
        fg.save_steering(source, item)
    control.load("c", source)
    hidden = normal(9, 3, 40, WIDTH)
    fires = sae.encode(hidden) > 0
    assert fires.any(-1).all()
    assert not fires.all(-1).any()
    out = steer_batch(control, [steering("c"), {}, steering("c", bos=True)], hidden)
    assert torch.equal(out[1], hidden[1])
    for row in (0, 2):
        torch.testing.assert_close(out[row], expected([item], hidden[row]), atol=1e-4, rtol=1e-4)


def test_a_topk_clamp_reads_what_a_former_steering_left():
    first, second = make_sae("topk"), make_sae("topk", seed=1, layer=2)
    control = topk_control([first, second], slots=3)
    made = [vector().add(1.0), fg.edit(first, {3: 4.0, 4: "off"}), fg.edit(second, {5: 4.0, 6: "off"})]
    for n, item in enumerate(made):
        control.load(str(n), item)
    for order in itertools.permutations(range(3)):
        hidden = normal(9, 2, 40, WIDTH)
        out = steer_batch(control, [steering([{"name": str(n)} for n in order]), {}], hidden)
        wanted = expected([made[n] for n in order], hidden[0])
        torch.testing.assert_close(out[0], wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(out[1], hidden[1])


def test_a_topk_clamp_needs_its_sae(tmp_path):
    item = fg.edit(make_sae("topk"), {3: 2.0})
    save_clamp(item, tmp_path / "c.safetensors")
    fg.save_steering(tmp_path / "s.safetensors", item)
    for saes in ([], [make_sae("relu")], [make_sae("topk", seed=1)], [make_sae("topk", layer=2)]):
        control = topk_control(saes)
        for source in (item, tmp_path / "c.safetensors", tmp_path / "s.safetensors"):
            with pytest.raises(fg.PairingError, match=r"saes=\[sae\]"):
                control.load("c", source)
    with pytest.raises(fg.PairingError, match="layer_norm"):
        topk_control([replace(make_sae("topk"), input_norm="layer_norm")])
    with pytest.raises(fg.HookpointError, match="output of a block"):
        topk_control([replace(make_sae("topk"), hookpoint=fg.Hookpoint.parse("blocks.1.hook_mlp_out"))])
    with pytest.raises(fg.SteeringError, match="width 16"):
        topk_control([make_sae("topk", d_model=16)])
    _, layers, settings = engine_settings("default", {}, None, 8, 2, [make_sae("topk"), make_sae("relu", layer=2)])
    assert (layers, settings["additional_config"]["fgsteer"]["encoders"]) == ([1], [(1, 24, 5)])


@pytest.mark.parametrize("bad", [{"features": [99]}, {"features": [-1]}, {"features": [True]}, {"features": [1, 2]}])
def test_a_damaged_topk_clamp_is_refused(bad, tmp_path):
    save_clamp(fg.edit(make_sae("topk"), {3: 2.0}), tmp_path / "c")
    tensors, header = read_tensors(tmp_path / "c", kind="clamp")
    del header["kind"]
    write_tensors(tmp_path / "c", tensors, kind="clamp", header=header | bad)
    with pytest.raises(fg.FgsteerError, match=r"damaged|saes"):
        topk_control([make_sae("topk")]).load("c", tmp_path / "c")


def test_rows_of_a_topk_clamp_are_taken_back_whole():
    """What comes after it in the same rows is not cut to the k largest."""
    control = topk_control([make_sae("topk")], rows=2)
    control.load("c", fg.edit(make_sae("topk"), {3: 2.0, 4: "off"}))
    control.unload("c")
    item = fg.edit(make_sae("relu"), {3: 2.0, 4: "off"})
    control.load("d", item)
    hidden = normal(9, 1, 40, WIDTH)
    out = steer_batch(control, [steering("d")], hidden)
    torch.testing.assert_close(out[0], expected([item], hidden[0]), atol=1e-4, rtol=1e-4)


def test_a_table_with_encoders_compiles_to_one_graph():
    sae, graphs = make_sae("topk"), []
    control = topk_control([sae])
    table = control.engine.tables[1]

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(table, backend=count, fullgraph=True)
    control.load("c", fg.edit(sae, {3: 4.0}))
    hidden = normal(4, 6, WIDTH)
    with torch.no_grad():
        assert torch.equal(compiled(hidden, hidden), hidden)
        steer_batch(control, [steering("c")], normal(9, 1, 6, WIDTH))
        assert torch.equal(compiled(hidden, hidden), table(hidden, hidden))
        assert not torch.equal(compiled(hidden, hidden), hidden)
    assert len(graphs) == 1


# ---------------------------------------------------------------- vectors that requests carry


def inline_control(layers=(1,), rows=2, slots=1):
    return Control(FakeEngine(layers, rows=rows, slots=slots), layers, slots, inline=True)


def owners(control):
    return sorted(control.engine.tables[1].owner.tolist())


def test_a_request_carries_its_vector():
    control, vectors = inline_control(rows=3), [vector(n) for n in range(3)]
    asked = [steering(vectors[0], scale=2.0), steering(vectors[1], op="affine", scale=0.5, scope="generated"), {}]
    wanted = [vectors[0].add(2.0), vectors[1].affine(0.5, scope="generated")]
    hidden = normal(9, 3, LENGTH, WIDTH)
    control.leases.take(inline_name(asked[0]["steer_vector"]))  # as an HTTP request does until it is answered
    out = steer_batch(control, asked, hidden)
    assert torch.equal(out[2], hidden[2])
    for row, item in enumerate(wanted):
        torch.testing.assert_close(out[row], expected([item], hidden[row]), atol=2e-5, rtol=2e-5)
    assert (control.names, control.hookpoints()) == ([], {})
    made = request(asked[0])
    control.admit(made)
    check_planned(made)
    assert "steer_vector" not in made.sampling_params.extra_args  # the engine needs its rows alone
    control.load("v", vectors[0])
    named = request(steering("v", scale=2.0))
    control.admit(named)
    assert named.cache_salt == made.cache_salt  # the same steering, however it came


def test_equal_requests_share_rows_which_are_freed_when_no_request_uses_them():
    control = inline_control(rows=2)
    first, second = request(steering(vector(0))), request(steering(vector(0), scale=2.0))
    control.admit(first)
    control.engine.live = [first.request_id]
    control.admit(second)
    assert owners(control) == [-1.0, 1.0]
    control.engine.live = [second.request_id]
    other = request(steering(vector(1)))
    control.admit(other)
    control.engine.live.append(other.request_id)
    with pytest.raises(fg.SteeringError, match=r"steer_vector was not loaded.*no room"):
        control.admit(request(steering(vector(2))))
    with pytest.raises(fg.SteeringError, match="no room"):
        control.load("v", vector(3))
    control.engine.live = []
    control.load("v", vector(3))
    assert owners(control) == [-1.0, 1.0]
    leased = control.load_inline(encode_vector(vector(4)), lease=True)
    with pytest.raises(fg.SteeringError, match="no room"):
        control.load("w", vector(5))
    control.leases.give_back(leased)
    control.load("w", vector(5))
    assert control.names == ["v", "w"]


def test_vectors_in_requests_are_read_strictly(tmp_path):
    control, good = inline_control(), encode_vector(vector())
    save_clamp(clamp("relu"), tmp_path / "c")
    pickled = base64.b64encode(pickle.dumps({"direction": [1.0]})).decode()
    huge = fg.SteeringVector(torch.full((WIDTH,), 1e12), fg.Hookpoint(1))
    narrow, elsewhere = fg.SteeringVector(normal(0, 5), fg.Hookpoint(1)), vector(0, layer=2)
    within = fg.SteeringVector(normal(0, WIDTH), "blocks.1.hook_mlp_out")
    for text, why in (
        ("", "file in steer_vector"),
        ("%%%", "not base64"),
        ("é", "not base64"),
        (good[:-8], "file in steer_vector"),
        (good[:40], "file in steer_vector"),
        (pickled, "file in steer_vector"),
        (base64.b64encode((tmp_path / "c").read_bytes()).decode(), "clamp file"),
        (good + "A" * inline_chars(WIDTH), "at most"),
        (encode_vector(huge), "changes entries"),
        (encode_vector(narrow), "width 5"),
        (encode_vector(elsewhere), "no table at other layers"),
        (encode_vector(within), "resid_post"),
    ):
        with pytest.raises(fg.FgsteerError, match=why) as refusal:
            control.admit(request({"steer_vector": text}))
        assert "/tmp" not in str(refusal.value)
        assert len(str(refusal.value)) < 1000
    for extra, why in (
        ({"steer_vector": 3}, r"steer_vector = 3"),
        ({"steer_vector": [good]}, "steer_vector = a list"),
        ({"steer_vector": good, "steer": "v"}, "steer and steer_vector"),
        ({"steer_vector": good, "steer_scale": "2"}, "steer_scale"),
        ({"steer": inline_name(good)}, "letters, digits"),  # nobody asks for another's by its name
        ({"steer": json.dumps([{"name": inline_name(good)}])}, "letters, digits"),
        ({"steer": json.dumps([{"vector": "x"}])}, "vector"),
    ):
        with pytest.raises(fg.SteeringError, match=why):
            control.admit(request(extra))
    assert owners(control) == [-1.0, -1.0]
    closed = control_of((1,))
    with pytest.raises(fg.SteeringError, match=r"inline_vectors=True.*--inline-vectors"):
        closed.admit(request(steering(vector())))
    control.engine.calls_while_admitting = False
    with pytest.raises(fg.SteeringError, match="/v1/completions"):
        control.admit(request(steering(vector())))


# ---------------------------------------------------------------- gates


def gates(sae):
    """Conditions of every kind, alone and combined."""
    a, b = fg.Projection(vector(7)), fg.Cosine(vector(8))
    c, d = fg.Probe(normal(3, WIDTH), 1, bias=0.5), fg.Feature(sae, 3)
    plain = [a > 0.5, a < 0.5, b > 0.05, b < -0.05, c > 1.0, c < 1.0, d > 0.0, d > 1.0, d < 0.5]
    both, either = (a > 0.0) & (b > 0.0), (c > 0.0) | (d > 0.5)
    three = ((a > 1.0) | (b < 0.0)) & ((c > 0.0) | ~(d > 0.2)) & ~((a > 2.0) & (b > 0.1))
    return [*plain, *(~gate for gate in plain), both, either, ~both, ~either, both | (c > 2.0), both & either, three]


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated", "topk"])
def test_gates_of_tokens_equal_those_of_hooks(kind):
    """Beside tokens without a gate, with a gate that is shut everywhere, and unsteered."""
    sae = make_sae(kind)
    control, hidden = topk_control([sae], rows=256), normal(9, 30, 8, WIDTH)
    made = [vector().add(1.0, when=gate, scope="reply", bos=True) for gate in gates(sae)]
    made += [vector().add(1.0), vector().ablate(when=fg.Projection(vector()) > 1e9)]
    for n, item in enumerate(made):
        control.load(str(n), item)
    out = steer_batch(control, [{}, *(steering(str(n)) for n in range(len(made)))], hidden[: len(made) + 1])
    assert torch.equal(out[0], hidden[0])
    assert torch.equal(out[-1], hidden[len(made)])
    opened = 0
    for n, item in enumerate(made, start=1):
        wanted = expected([item], hidden[n])
        assert torch.equal(out[n] == hidden[n], wanted == hidden[n]), n  # open at the same tokens, shut to the bit
        torch.testing.assert_close(out[n], wanted, atol=2e-5, rtol=2e-5)
        opened += 0 < int((wanted != hidden[n]).any(1).sum()) < 6
    assert opened > 15


def test_conditions_that_read_nan_are_shut_negated_or_not():
    """One entry of each token is nan, so that all that is read is; every other entry shows whether it was steered."""
    made = [vector().add(1.0, when=gate, bos=True) for gate in gates(make_sae("relu"))]
    control, hidden = control_of(rows=256), normal(9, len(made), 8, WIDTH)
    hidden[:, :, 2] = torch.nan
    for n, item in enumerate(made):
        control.load(str(n), item)
    out = steer_batch(control, [steering(str(n)) for n in range(len(made))], hidden)
    torch.testing.assert_close(out, hidden, atol=0, rtol=0, equal_nan=True)


def test_gates_read_before_anything_acts_at_their_layer():
    sae = make_sae("topk")
    control = topk_control([sae], slots=3, rows=64)
    made = [
        vector(7).add(3.0),
        vector(7).add(-2.0, when=fg.Projection(vector(7)) > 0.5),
        fg.edit(sae, {3: 4.0, 4: "off"}, when=(fg.Feature(sae, 5) > 0.0) | (fg.Cosine(vector(8)) > 0.0)),
    ]
    for n, item in enumerate(made):
        control.load(str(n), item)
    hidden = normal(9, 6, 40, WIDTH)
    orders = list(itertools.permutations(range(3)))
    out = steer_batch(control, [steering([{"name": str(n)} for n in order]) for order in orders], hidden)
    for row, order in enumerate(orders):
        wanted = expected([made[n] for n in order], hidden[row])
        torch.testing.assert_close(out[row], wanted, atol=1e-4, rtol=1e-4)


def test_gates_come_in_files_and_go_with_what_they_open(tmp_path):
    sae, path = make_sae("topk"), tmp_path / "s.safetensors"
    control = topk_control([sae], rows=3)
    item = vector().add(2.0, when=(fg.Feature(sae, 5) > 0.0) & (fg.Projection(vector(7)) > 0.0))
    fg.save_steering(path, item)
    control.load("s", path)
    hidden = normal(9, 1, 40, WIDTH)
    wanted = expected([item], hidden[0])
    torch.testing.assert_close(steer_batch(control, [steering("s")], hidden)[0], wanted, atol=2e-5, rtol=2e-5)
    with pytest.raises(fg.SteeringError, match="no room"):
        control.load("more", vector())
    control.unload("s")
    later = fg.edit(make_sae("relu"), {3: 1.0, 4: "off", 5: 2.0})  # in the same rows
    control.load("c", later)
    wanted = expected([later], hidden[0])
    torch.testing.assert_close(steer_batch(control, [steering("c")], hidden)[0], wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(fg.PairingError, match=r"saes=\[sae\]"):
        topk_control([]).load("s", item)
    with pytest.raises(fg.SteeringError, match="save_steering"):
        save_clamp(replace(later, when=fg.Projection(vector()) > 0.0), tmp_path / "c")


def test_gates_that_are_too_large_are_refused():
    a, b = fg.Projection(vector(7)), fg.Cosine(vector(8))
    many = (a > 0.0) & (b > 0.0) & (a < 9.0) & (b < 0.9)
    control_of().load("fits", vector().add(1.0, when=many))
    for gate in (many & (a < 8.0), ~(~many | (a > 8.0)), many | many):
        with pytest.raises(fg.SteeringError, match=r"at most 4 parts.*fgsteer\.steer"):
            control_of().load("x", vector().add(1.0, when=gate))


def test_salts_tell_gates_apart():
    control, salts = control_of(), []
    a = fg.Projection(vector(7))
    made = [None, a > 0.0, a < 0.0, ~(a > 0.0), a > 1.0, fg.Cosine(vector(7)) > 0.0, (a > 0.0) & (a < 9.0)]
    for gate in made:
        control.load("x", vector().add(1.0, when=gate))
        asked = request(steering("x"))
        control.admit(asked)
        salts.append(asked.cache_salt)
    assert len(set(salts)) == len(salts) == len(made)


def test_positions_that_a_prompt_lacks_are_refused():
    control = control_of()
    control.load("v", vector())
    assert control.admit(request(steering("v", scope="at:0,2"), ids=[5, 6, 7]))
    with pytest.raises(fg.SteeringError, match=r"positions from 0 to 2.*at:1,3"):
        control.admit(request(steering("v", scope="at:1,3"), ids=[5, 6, 7]))
