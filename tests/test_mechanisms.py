"""What drives steering: attribution, circuits, freezing, value vectors and sparse vectors, against loops."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from functools import cache
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.mechanisms.attribution import kl_metric
from fgsteer.mechanisms.circuits import CircuitEngine, circuit_order, kept_edges
from fgsteer.mechanisms.freezing import FrozenRun, eager_attention
from fgsteer.mechanisms.page import explanation_page
from fgsteer.mechanisms.parts import block_parts, norm_gain
from fgsteer.mechanisms.sparse import kept_by_ratio, kept_entries
from fgsteer.mechanisms.texts import read_texts
from tests.helpers.cli import invoke_on_cpu
from tests.helpers.tiny import D_MODEL, HEADS, LAYERS, tiny_model, word_tokenizer
from tests.reference import mechanisms as reference

PROMPTS = ["the man sat on", "a cat"]
MANY = ["the man sat on", "a cat", "the dog", "a king ran", "the sea was", "she said", "it is", "an old ship"]
FIRST = 1  # the block whose input is steered
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "qwen3")
# of families whose blocks differ: parallel with one norm and with two, fused projections, norms after sublayers alone
OTHERS = ("cohere", "gpt_neox", "phi3", "olmo2")
# norms and softmax are computed in float32 in models of float64 too, whose rounding is 6e-8
ROUNDING = 1e-6


@cache
def wide(family="llama"):
    """A model of float64."""
    return tiny_model(family, dtype=torch.float64)


def vector(norm=5.0, seed=0):
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return fg.SteeringVector(direction * norm / direction.norm(), fg.Hookpoint(FIRST, "resid_pre"))


@cache
def attributed(family="llama", coefficient=2.0, **options):
    return fg.attribute_steering(
        wide(family), word_tokenizer(), PROMPTS, vector().add(coefficient), **{"max_new_tokens": 5, **options}
    )


def starts(model, text):
    """The stream before the steered block, and what steering adds."""
    hidden = model(text.ids[None], output_hidden_states=True).hidden_states[FIRST][0].detach()
    return hidden, text.delta


def names_of(found):
    return [str(node) for node in found.graph.nodes], [str(reader) for reader in found.graph.readers]


# ---------------------------------------------------------------- attribution


def test_effects_are_those_of_loops():
    model, found = wide(), attributed(steps=3)
    assert len(found.texts) == 2
    weights = torch.tensor(found.positions, dtype=torch.float64)
    own = []
    for text in found.texts:
        places = range(text.prompt_length - 1, len(text.ids) - 1)
        start, delta = starts(model, text)
        own.append(reference.attribute(model, start, delta, FIRST, places, steps=3))
    assert [one[5] for one in own] == list(found.positions)
    share = (weights / weights.sum()).tolist()
    nodes, readers = names_of(found)
    for number, name in enumerate(nodes):
        expected = sum(w * one[0][name] for w, one in zip(share, own, strict=True))
        assert float(found.node_effects[number]) == pytest.approx(expected, abs=ROUNDING)
    effects = sum(w * one[2] for w, one in zip(share, own, strict=True))
    torch.testing.assert_close(found.effects, effects, atol=ROUNDING, rtol=0)
    assert found.difference == pytest.approx(sum(w * (o[3] - o[4]) for w, o in zip(share, own, strict=True)))
    edges = found.edge_effects
    assert edges is not None
    seen = set()
    for place in found.graph.edges.nonzero().tolist():
        name = nodes[place[0]], readers[place[1]]
        seen.add(name)
        expected = sum(w * one[1][name] for w, one in zip(share, own, strict=True))
        assert float(edges[tuple(place)]) == pytest.approx(expected, abs=ROUNDING)
    assert seen == own[0][1].keys(), "no edge is left out, and none is made up"
    assert not edges[~found.graph.edges].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_at_the_steered_site_add_up(family):
    """Completeness. The midpoint rule's error falls with the square of the steps."""
    coarse, fine = (attributed(family, 0.2, steps=steps, edges=False, metric="kl") for steps in (10, 40))
    assert fine.error < 1e-4
    assert fine.error < coarse.error / 4 + 1e-7  # rounding of float32 norms
    logits = attributed(family, 0.4, steps=120, edges=False, max_new_tokens=12)
    assert logits.error < 1e-4
    assert logits.difference > 0
    assert float(logits.node_effects[0]) == pytest.approx(float(logits.effects.sum()), abs=1e-12)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_edges_out_of_a_node_add_up_to_it(family):
    """Both are in units of the stream: without the norm's gain and scale in the gradient, they would not."""
    found = attributed(family, steps=2, max_new_tokens=3)
    edges = found.edge_effects
    assert edges is not None
    torch.testing.assert_close(edges.sum(1), found.node_effects, atol=ROUNDING, rtol=0)
    assert found.node_effects.abs().max() > 100 * ROUNDING


def test_texts_in_which_nothing_changes_are_left_out():
    model, tokenizer = wide(), word_tokenizer()
    weak = vector().add(1e-9)
    with pytest.raises(fg.DataError, match="2 texts in which steering changes no next token"):
        fg.attribute_steering(model, tokenizer, PROMPTS, weak, max_new_tokens=3, steps=1)
    steering = vector().add(0.1)
    mixed = fg.attribute_steering(model, tokenizer, MANY, steering, max_new_tokens=1, steps=1, edges=False)
    assert mixed.left_out > 0
    assert len(mixed.texts) > 0
    assert len(mixed.texts) + mixed.left_out == len(MANY)
    assert set(mixed.positions) == {1}
    assert torch.isfinite(mixed.effects).all()


def test_the_run_that_is_read_is_the_one_that_matches():
    steered, unsteered = (attributed(steps=40, edges=False, run=run) for run in ("steered", "unsteered"))
    assert steered.difference > 0
    assert unsteered.difference > 0
    ids = unsteered.texts[0].ids
    written = wide()(ids[None]).logits[0].argmax(-1)
    assert torch.equal(written[unsteered.texts[0].predicted], ids[unsteered.texts[0].prompt_length :])


def test_the_kl_metric_is_that_of_a_sum_over_tokens():
    logits = torch.randn(4, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, value in enumerate(kl_metric(logits, 0, 1).tolist()):
        expected = 0.0
        for token in range(3):
            p, q, r = (logits[n, token].softmax(-1) for n in (1, 0, row))
            for one in range(7):
                expected += float(p[one] * (p[one] / r[one]).log() - q[one] * (q[one] / r[one]).log()) / 3
        assert value == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- circuits


def test_a_circuit_is_that_of_loops():
    model, found = wide(), attributed(steps=2)
    parts, dropped = block_parts(model, FIRST), 0
    draws = torch.Generator().manual_seed(3)
    masks = [found.graph.edges & (torch.rand(found.graph.edges.shape, generator=draws) < 0.3) for _ in range(3)]
    for text in found.texts:
        engine = CircuitEngine(model, parts, found.graph, text)
        with torch.no_grad():
            rows = engine.logits(torch.stack(masks))
        nodes, readers = names_of(found)
        start, delta = starts(model, text)
        for mask, row in zip(masks, rows, strict=True):
            kept = {(nodes[n], readers[r]) for n, r in mask.nonzero().tolist()}
            own = reference.circuit(model, start, delta, FIRST, kept)[text.predicted]
            torch.testing.assert_close(row, own, atol=10 * ROUNDING, rtol=0)
            on_paths = found.graph.on_paths(mask)
            assert not (on_paths & ~mask).any()
            dropped += int((mask & ~on_paths).sum())
            with torch.no_grad():  # what lies on no path to the logits changes nothing
                torch.testing.assert_close(engine.logits(on_paths[None])[0], row, atol=10 * ROUNDING, rtol=0)
    assert dropped, "some edges lie on no path"


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_all_edges_are_the_steered_run_and_none_the_unsteered_one(family):
    model, found = wide(family), attributed(family, steps=2, max_new_tokens=3)
    total = int(found.graph.edges.sum())
    none, every = fg.circuit_faithfulness(model, found, [0, total], controls=0)
    assert none.faithfulness == pytest.approx(0, abs=1e-5)
    assert every.faithfulness == pytest.approx(1, abs=1e-5)
    assert (none.token_match, every.token_match, every.on_paths) == (0, 1, total)
    heads, both = (len(circuit_order(found, kind)) for kind in ("heads", "nodes"))
    assert (heads, both) == (HEADS * (LAYERS - FIRST), (HEADS + 1) * (LAYERS - FIRST))
    (every,) = fg.circuit_faithfulness(model, found, [heads], kind="heads", controls=0)
    assert every.faithfulness == pytest.approx(1, abs=1e-5)


def test_a_circuit_of_heads_keeps_all_mlps_and_their_edges():
    found = attributed(steps=2)
    order = circuit_order(found, "heads")
    effects = found.node_effects[order].abs().tolist()
    assert effects == sorted(effects, reverse=True)
    kept = kept_edges(found.graph, "heads", order[:2])
    names = [str(node) for node, row in zip(found.graph.nodes, kept, strict=True) if row.any()]
    chosen = {str(found.graph.nodes[n]) for n in order[:2]}
    assert set(names) == {"steering", *chosen, *(f"L{n}.MLP" for n in range(FIRST, LAYERS))}
    edges = circuit_order(found, "edges")
    assert kept_edges(found.graph, "edges", edges).equal(found.graph.edges)


def test_agreement_of_sets():
    assert fg.iou({1, 2, 3}, {2, 3, 4}) == 0.5
    assert fg.iou(set(), set()) == 1.0
    assert fg.iou(torch.tensor([True, True, False]), torch.tensor([False, True, True])) == pytest.approx(1 / 3)
    with pytest.raises(fg.DataError, match="two sets"):
        fg.iou({1}, 2)


# ---------------------------------------------------------------- freezing


@pytest.mark.parametrize("names", [("qk",), ("ov",), ("mlp",), ("qk", "ov"), ("qk", "ov", "mlp")])
def test_freezing_is_that_of_loops(names):
    model, found = wide(), attributed(steps=2)
    text = found.texts[0]
    with torch.no_grad(), eager_attention(model):
        run = FrozenRun(model, block_parts(model, FIRST), text.ids[None])
        logits = run.steered_logits(found.steering, names, [text.prompt_length])[0]
        start, delta = starts(model, text)
        own = reference.frozen(model, start, delta, FIRST, names)
    torch.testing.assert_close(logits, own, atol=10 * ROUNDING, rtol=0)


@pytest.mark.parametrize("family", [*FAMILIES, "phi3", "gpt_neox"])
def test_with_everything_frozen_only_the_final_norm_is_left(family):
    """``W_U·Norm(h + v)``; and a coefficient of 0 leaves the unsteered run bit for bit, whatever is frozen."""
    model, text = wide(family), attributed(family, steps=2, max_new_tokens=3, edges=False).texts[0]
    decoder, v = model.get_decoder(), vector().direction.double()
    norm = getattr(decoder, {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(family, "norm"))
    last: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0].detach()))
    with torch.no_grad(), eager_attention(model):
        parts = block_parts(model, FIRST)
        run = FrozenRun(model, parts, text.ids[None])
        handle.remove()
        for names in (("qk",), ("ov",), ("mlp",), ("qk", "ov", "mlp")):
            none = run.steered_logits(vector().add(0.0), names, [text.prompt_length])
            if names in (("ov",), ("mlp",)):  # weights times values are rounded in another order
                assert torch.equal(none, run.logits)
            torch.testing.assert_close(none, run.logits, atol=10 * ROUNDING, rtol=0)
        frozen = run.steered_logits(vector().add(2.0, bos=True), ("qk", "ov", "mlp"), [text.prompt_length])
        expected = model.get_output_embeddings()(norm(last[-1] + 2.0 * v))
    cap = getattr(model.config, "final_logit_softcapping", None)
    expected = cap * torch.tanh(expected / cap) if cap else expected
    torch.testing.assert_close(frozen, expected, atol=10 * ROUNDING, rtol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_eager_attention_is_the_decoders_alone_and_for_a_while(fails):
    model = tiny_model("gemma3 with vision")
    decoder, vision = model.get_decoder(), model.config.vision_config
    model.config._attn_implementation = {"": "sdpa", "text_config": "sdpa", "vision_config": "flex_attention"}
    configs = (model.config, decoder.config, vision)
    before = [config._attn_implementation for config in configs]
    with contextlib.suppress(ZeroDivisionError), eager_attention(model):
        assert decoder.config._attn_implementation == "eager"
        assert vision._attn_implementation == "flex_attention"
        assert 1 / (not fails)
    assert [config._attn_implementation for config in configs] == before


def test_a_model_without_eager_attention_stays_as_it_was(llama, monkeypatch):
    before = llama.config._attn_implementation

    def refuse(self, _):
        self.config._attn_implementation = "eager"
        raise ValueError("no such attention")

    monkeypatch.setattr(type(llama.get_decoder()), "set_attn_implementation", refuse)
    with pytest.raises(fg.HookpointError, match="eager"), eager_attention(llama):
        pass
    assert llama.config._attn_implementation == before


def test_faithfulness_of_frozen_runs_and_of_other_steerings():
    model, found = wide(), attributed(steps=2)
    rows = fg.freeze_steering(model, found, [(), "qk", ("qk", "ov", "mlp")])
    assert [row.name for row in rows] == ["", "qk", "qk + ov + mlp"]
    assert rows[0].faithfulness == pytest.approx(1, abs=1e-9)
    assert rows[0].token_match == 1
    (direct,) = fg.circuit_faithfulness(model, found, [1], controls=0)
    steering_to_logits = kept_edges(found.graph, "edges", circuit_order(found, "edges")[:1])
    assert steering_to_logits[0, -1], "the strongest edge of this model is the one past all blocks"
    assert rows[2].faithfulness == pytest.approx(direct.faithfulness, abs=1e-6), "what is left is that edge"
    others = fg.steering_faithfulness(model, found, {"same": found.steering, "none": None, "half": vector().add(1.0)})
    assert [row.name for row in others] == ["same", "none", "half"]
    assert others[0].faithfulness == 1
    assert others[1].faithfulness == 0
    assert 0 < others[2].faithfulness < 1
    assert all(row.low <= row.faithfulness <= row.high for row in others)


def test_generation_with_frozen_parts():
    model, tokenizer = wide(), word_tokenizer()
    plain, steered = (
        [fg.generate(model, tokenizer, [p], steering=s, max_new_tokens=5, do_sample=False)[0] for p in PROMPTS]
        for s in (None, [vector().add(2.0)])
    )
    assert plain != steered
    for freeze in ("qk", "ov", "mlp", ["qk", "ov", "mlp"]):
        zero = fg.generate_frozen(model, tokenizer, PROMPTS, vector().add(0.0), freeze, max_new_tokens=5)
        assert zero == plain
    assert fg.generate_frozen(model, tokenizer, PROMPTS, vector().add(2.0), [], max_new_tokens=5) == steered
    with pytest.raises(fg.DataError, match="freeze = 'kv'"):
        fg.generate_frozen(model, tokenizer, PROMPTS, vector().add(2.0), "kv")


# ---------------------------------------------------------------- value vectors


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_value_vectors_are_those_of_loops(family):
    model, v = wide(family), vector().direction.double()
    rows = fg.value_vectors(model, word_tokenizer(), vector(), tokens=3)
    size = D_MODEL // HEADS
    expected = {}
    for layer in range(FIRST, LAYERS):
        block = model.get_decoder().h[layer] if family == "gpt2" else model.model.layers[layer]
        for head in range(HEADS):
            if family == "gpt2":
                read = block.ln_1.weight * (v - v.mean())
                start = 2 * D_MODEL + head * size
                value = read @ block.attn.c_attn.weight[:, start : start + size]
                s = value @ block.attn.c_proj.weight[head * size : (head + 1) * size]
            else:
                gain = block.input_layernorm.weight + (family == "gemma2")
                group = head // 2
                value = block.self_attn.v_proj.weight[group * size : (group + 1) * size] @ (gain * v)
                s = block.self_attn.o_proj.weight[:, head * size : (head + 1) * size] @ value
                if family == "gemma2":
                    s = s * (1 + block.post_attention_layernorm.weight)
            expected[layer, head] = s.detach()
        expected[layer, None] = sum(expected[layer, head] for head in range(HEADS))
    assert {(row.layer, row.head) for row in rows} == expected.keys()
    for row in rows:
        own = expected[row.layer, row.head]
        torch.testing.assert_close(
            row.vector.double(), own, rtol=1e-5, atol=1e-5 * float(own.norm())
        )  # kept in float32
        for sign, words in ((1.0, row.raises), (-1.0, row.lowers)):
            top = fg.logit_lens(model, sign * own[None])[0].topk(3).indices
            assert words == tuple(word_tokenizer().decode([int(i)]) for i in top)


def test_gains_of_norms():
    torch.manual_seed(0)
    for family, name in (("gemma3", "input_layernorm"), ("llama", "input_layernorm"), ("nemotron", "input_layernorm")):
        norm = getattr(wide(family).model.layers[0], name)
        gain = norm.weight.double() + (family != "llama")
        torch.testing.assert_close(norm_gain(norm, D_MODEL), gain.detach(), rtol=1e-6, atol=1e-6)  # float32 norms
    odd = torch.nn.LayerNorm(7, dtype=torch.float64)
    torch.nn.init.normal_(odd.weight)
    torch.nn.init.normal_(odd.bias)
    torch.testing.assert_close(norm_gain(odd, 7), odd.weight.detach())


# ---------------------------------------------------------------- sparse vectors


def test_the_rule_by_effects_is_the_rule_by_gradients():
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        v, gradient = (torch.randn(50, generator=draws, dtype=torch.float64) for _ in range(2))
        e = v * gradient
        for tau in (0.1, 0.5, 1.0, 2.5):
            by_gradient = gradient.abs() >= tau * e.norm() / v.norm()
            assert torch.equal(kept_by_ratio(v, e, tau), by_gradient)
    v[0] = 0.0
    assert not kept_by_ratio(v, v * gradient, 0.1)[0], "an entry of 0 is not kept, as it is none"


def test_sparse_vectors_and_their_controls():
    v, found = vector(), attributed(steps=2)
    sparse = fg.sparsify(v, found, tau=1.0)
    kept = kept_entries(sparse)
    count = int(kept.sum())
    assert 0 < count < D_MODEL
    assert torch.equal(kept, kept_by_ratio(v.direction.double(), found.effects, 1.0))
    assert sparse.norm == pytest.approx(v.norm, rel=1e-6)
    ratio = sparse.direction[kept] / v.direction[kept]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0])))
    assert sparse.provenance["sparsified"] == {"by": "ratio", "tau": 1.0, "count": count, "rescale": True}
    plain = fg.sparsify(v, found.effects, tau=1.0, rescale=False)
    assert torch.equal(plain.direction[kept], v.direction[kept])
    assert torch.equal(kept_entries(fg.sparsify(v, found, count=count)), kept), "those of the largest share"
    by_size = kept_entries(fg.sparsify(v, found, count=count, by="entries"))
    assert v.direction[by_size].abs().min() > v.direction[~by_size].abs().max()
    by_effect = kept_entries(fg.sparsify(v, found, count=count, by="effects"))
    assert found.effects[by_effect].abs().min() > found.effects[~by_effect].abs().max()
    random = [kept_entries(fg.sparsify(v, found, count=count, by="random", seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])
    assert all(int(mask.sum()) == count for mask in (by_size, by_effect, *random))
    assert torch.equal(fg.sparsify(v, found, count=D_MODEL).direction, v.direction), "all of it is the vector"


def test_what_cannot_be_sparsified_is_refused():
    v, e = vector(), torch.randn(D_MODEL)
    cases: list[tuple[Any, dict[str, Any], type[fg.FgsteerError], str]] = [
        (e[1:], {}, fg.PairingError, "one for each of"),
        (e, {"tau": 1.0, "count": 2}, fg.DataError, "a threshold or a count"),
        (e, {"by": "random"}, fg.DataError, "a threshold or a count"),
        (e, {"by": "size", "count": 1}, fg.DataError, "one of ratio"),
        (e, {"count": 0}, fg.DataError, "count = 0"),
        (e, {"tau": 1e5}, fg.SelectionError, "Lower tau"),
    ]
    for effects, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            fg.sparsify(v, effects, **options)


# ---------------------------------------------------------------- what holds for all


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_after_an_exception(monkeypatch):
    model, found = wide(), attributed(steps=2)
    before, hooks = model.config._attn_implementation, hooks_of(model)
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
    calls: list[Any] = [
        lambda: fg.attribute_steering(model, word_tokenizer(), PROMPTS, vector().add(2.0), completions=["sat", "ran"]),
        lambda: fg.circuit_faithfulness(model, found, [3]),
        lambda: fg.freeze_steering(model, found),
        lambda: fg.generate_frozen(model, word_tokenizer(), PROMPTS, vector().add(2.0), "qk"),
    ]
    for call in calls:
        with pytest.raises(ZeroDivisionError):
            call()
        assert hooks_of(model) == hooks
        assert model.config._attn_implementation == before


def test_what_cannot_be_taken_apart_is_refused(tokenizer):
    model = wide()
    both = [vector().add(1.0), fg.SteeringVector(torch.ones(D_MODEL), 2).add(1.0)]
    inner = fg.SteeringVector(torch.ones(D_MODEL), fg.Hookpoint(1, "mlp_out")).add(1.0)
    for steering, kind, message in (
        (both, fg.SteeringError, "one hookpoint"),
        ([], fg.SteeringError, "nothing"),
        (inner, fg.HookpointError, "resid_pre or resid_post"),
    ):
        with pytest.raises(kind, match=message):
            fg.attribute_steering(model, tokenizer, PROMPTS, steering)
    for family, message in (("bloom", "residual added"), ("codegen", "unknown form"), ("opt", "a child named mlp")):
        with pytest.raises(fg.HookpointError, match=message):
            fg.attribute_steering(tiny_model(family), tokenizer, PROMPTS, vector().add(4.0), max_new_tokens=2)
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.register_forward_hook(lambda _, __, output: (output[0], None))
    with pytest.raises(fg.HookpointError, match="returns no weights"):
        fg.freeze_steering(other, attributed(steps=2), ["qk"])
    options: list[tuple[dict[str, Any], str]] = [
        ({"metric": "loss"}, "metric"),
        ({"run": "both"}, "run"),
        ({"steps": 0}, "steps"),
        ({"completions": ["sat"]}, "1 completions for 2 prompts"),
    ]
    for option, message in options:
        with pytest.raises(fg.DataError, match=message):
            fg.attribute_steering(model, tokenizer, PROMPTS, vector().add(1.0), **option)
    with pytest.raises(fg.DataError, match="sizes"):
        fg.circuit_faithfulness(model, attributed(steps=2), [10**6])
    with pytest.raises(fg.DataError, match="without edges"):
        fg.circuit_faithfulness(model, attributed(steps=40, edges=False), [1])


def test_steering_by_other_interventions_and_at_the_last_block():
    """What steering changes is measured, so that any intervention counts; past the last block there are no parts."""
    model, tokenizer = wide(), word_tokenizer()
    clamp = vector().clamp(6.0)
    found = fg.attribute_steering(model, tokenizer, PROMPTS, clamp, steps=40, edges=False, max_new_tokens=5)
    assert found.error < 2e-2 * found.difference
    last = fg.SteeringVector(vector().direction, LAYERS - 1).add(3.0)
    found = fg.attribute_steering(model, tokenizer, PROMPTS, last, steps=40, max_new_tokens=5)
    assert [str(node) for node in found.graph.nodes] == ["steering"]
    assert found.edge_effects is not None
    assert float(found.edge_effects.sum()) == pytest.approx(float(found.node_effects[0]))
    assert not found.table()
    texts = read_texts(model, tokenizer, PROMPTS, last, run="steered", completions=["sat on", "ran"], max_new_tokens=1)
    assert [len(text.ids) - text.prompt_length for text in texts] == [2, 1]


# ---------------------------------------------------------------- explanations


def test_an_explanation_is_a_page_that_does_nothing(tokenizer):
    model = wide()
    named = vector()
    named.provenance["method"] = "<script>alert(1)</script>"
    found = fg.explain(model, tokenizer, named, 2.0, [*PROMPTS, "the dog ran", "a king"], steps=2, max_new_tokens=3)
    page = explanation_page(found)
    assert "<script" not in page.lower()
    assert not re.search(r"\bon\w+=|javascript:|https?://", page)
    for heading in ("Heads and MLPs", "Circuits of edges", "Parts frozen", "Sparse vectors", "Settings"):
        assert heading in page
    places = page[page.index("Effects of heads and MLPs") : page.index("Circuits of edges")]
    assert len(re.findall(r"<td[ >]", places)) == (HEADS + 1) * (LAYERS - FIRST)
    content = json.loads(json.dumps(found.as_dict()))
    assert content["texts"] == [2, 2]
    assert len(content["nodes"]) == (HEADS + 1) * (LAYERS - FIRST)
    assert content["completeness_error"] == found.attribution.error
    with pytest.raises(fg.DataError, match="at least two"):
        fg.explain(model, tokenizer, vector(), 2.0, PROMPTS[:1])


def test_the_command(tmp_path):
    default, tokenizer = fg.load_model("default")
    stats = fg.collect(default, tokenizer, fg.load_contrast("wedding"), hookpoints=[3])
    fg.caa(stats).save(tmp_path / "v.safetensors")
    (tmp_path / "prompts.txt").write_text("I think that\nThe sea\n", "utf-8")
    result = invoke_on_cpu(
        *("explain", tmp_path / "v.safetensors", "-c", 20, "--prompts", tmp_path / "prompts.txt", "--json"),
        *("--max-new-tokens", 3, "--steps", 2, "--html", tmp_path / "v.html"),
    )
    content = json.loads(result.stdout)
    assert content["settings"]["coefficient"] == 20
    assert (tmp_path / "v.html").read_text("utf-8").startswith("<!DOCTYPE html>")
