"""Steering inside compiled graphs and static caches: eager steering's tokens, one graph a structure, one op a layer."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig

import fgsteer as fg
from fgsteer.interventions import SCOPES
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, LAYERS

PROMPTS = ["the man", "a dog sat on the bread", "she took the ring"]
NEW = 5


def vector(seed=1, layer=1, site="resid_post"):
    draw = torch.Generator().manual_seed(seed)
    direction, reference = torch.randn(2, D_MODEL, generator=draw) * 3
    return fg.SteeringVector(direction, fg.Hookpoint(layer, site), reference=reference)


AT, LOW_SAE, LOW_TOPK = fg.Hookpoint(1), make_sae("jumprelu", layer=0), make_sae("topk", layer=0)


def clamp(target):
    sae = make_sae("jumprelu")
    return fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={j: target + j for j in range(8)})


def in_scope(scope):
    return lambda c: vector().add(c, scope=scope)


STRUCTURES: dict[str, Callable[[float], Any]] = {
    "add": lambda c: vector().add(c),
    "every layer and site": lambda c: [
        vector(n, n, site).add(c) for n in range(LAYERS) for site in ("resid_pre", "mlp_out", "resid_post")
    ],
    "affine": lambda c: vector().affine(c),
    "ablate and add": lambda c: [vector(1).ablate(), vector(2).add(c)],
    "clamp": clamp,
    "per row": lambda c: [vector(1).add(c), None, [clamp(c), vector(2, 0).affine(c)]],
    "cap": lambda c: vector().clamp(at_most=c),
    "turn": lambda c: fg.Rotate(direction=vector(1).direction, other=vector(2).direction, by=20 * c, hookpoint=AT),
    "keeping norm": lambda c: [vector().add_keeping_norm(c), vector(2).add_relative(c / 4)],
    "gate on tokens": lambda c: vector().add(c, when=(fg.Feature(LOW_SAE, 3) > 0.1) | (fg.Projection(vector(1)) > 0.0)),
    "gate on prompts": lambda c: vector().add(c, when=fg.Cosine(vector(2, 0)).mean() > 0.0),
    "gates on features": lambda c: [
        vector().add(c, when=(fg.Feature(LOW_SAE, 3) > 0.1) | (fg.Feature(LOW_SAE, 5) > 0.2)),
        vector(2).add(c, when=~(fg.Feature(LOW_TOPK, 3) > 0.1) & (fg.Feature(LOW_TOPK, 0).max() > 0.1)),
    ],
    **{scope: in_scope(scope) for scope in SCOPES[1:]},
}


def slow_but(chosen, names):
    """Parameters of which the chosen ones run by default; the others compile anew for some seconds each."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def graphs():
    """A backend that runs graphs as they are, and the list of those it was given."""
    torch._dynamo.reset()
    found = []

    def backend(graph, _, **__):
        found.append(graph)
        return graph

    yield backend, found
    torch._dynamo.reset()


@pytest.fixture
def inputs(tokenizer):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)


def compiled(backend, **options):
    config = CompileConfig(backend=backend, mode="default", **options)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    return {"cache_implementation": "static", "compile_config": config}


def tokens(model, inputs, steering=None, **options):
    with fg.steer(model, steering):
        return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options).tolist()


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("name", slow_but(["per row", "prompt", "gate on prompts", "gates on features"], STRUCTURES))
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_compiled_decoding_equals_eager_and_compiles_once(models, inputs, graphs, family, name):
    model, make = copy.deepcopy(models[family]), STRUCTURES[name]
    backend, found = graphs
    options = compiled(backend, fullgraph=True)
    plain = tokens(model, inputs)
    assert tokens(model, inputs, **options) == plain
    for number, coefficient in enumerate((1.0, -2.0)):
        expected = tokens(model, inputs, make(coefficient))
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert tokens(model, inputs, make(coefficient), **options) == expected
    assert len(found) == 2  # unsteered and steered
    assert tokens(model, inputs, **options) == plain
    assert len(found) == 2


def whole(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def block(model, backend):
    model.model.layers[1].compile(backend=backend)
    return model


def block_forward(model, backend):
    model.model.layers[1].forward = torch.compile(model.model.layers[1].forward, backend=backend)
    return model


def wrapped_block(model, backend):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend=backend)
    return model


def wrapped_decoder(model, backend):
    model.model = torch.compile(model.model, backend=backend)
    return model


@pytest.mark.parametrize("compile_", [whole, in_place, forward, block, block_forward, wrapped_block, wrapped_decoder])
@pytest.mark.parametrize("when", slow_but(["before"], ["before", "inside"]))
def test_models_that_the_user_compiled(llama, inputs, graphs, compile_, when):
    backend, found = graphs
    model = copy.deepcopy(llama)

    def item(c):
        return [vector(1).add(c), vector(2).ablate(), vector(3, 1, "mlp_out").add(c)]

    with torch.no_grad():
        plain = llama(**inputs).logits
        if when == "before":
            model = compile_(model, backend)
            assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)
        counts = []
        for number, coefficient in enumerate((1.0, -2.0)):
            with fg.steer(llama, item(coefficient)):
                expected = llama(**inputs).logits
            with fg.steer(model, item(coefficient)):
                if when == "inside" and not number:
                    model = compile_(model, backend)
                got = model(**inputs).logits
            assert torch.allclose(got, expected, atol=1e-5)  # the same float32 operations
            counts.append(len(found))
        assert counts[0] == counts[1]
        assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)


PROMPT_GATES = {
    "preview": fg.Preview(fg.Projection(vector(3, 2))) < 0.0,
    "feature": fg.Feature(LOW_SAE, 3).max() > 0.1,
    "mean": fg.Projection(vector(2, 0)).mean() > 0.0,
}


@pytest.mark.parametrize("name", PROMPT_GATES)
def test_gates_on_prompts_in_compiled_models(llama, inputs, graphs, name):
    backend, found = graphs
    item = vector().add(8.0, when=PROMPT_GATES[name])
    with torch.no_grad():
        with fg.steer(llama, item):
            expected = llama(**inputs).logits
        assert not torch.allclose(expected, llama(**inputs).logits, atol=1e-2), "the gate opens for some prompt"
        model = torch.compile(copy.deepcopy(llama), backend=backend)
        with fg.steer(model, item):
            for _ in range(2):
                got = model(**inputs).logits
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # the same float32 operations
    assert found


def operations(model, inputs, steering, *, activities=(ProfilerActivity.CPU,), **options):
    """What each of four decoding steps of ``generate`` runs, by name, apart from the prompt."""
    counts = []
    for new in (7, 3, 7):  # the first makes room in static caches
        with fg.steer(model, steering), profile(activities=list(activities)) as trace:
            model.generate(**inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False, **options)
        counts.append(Counter({event.key: event.count for event in trace.key_averages()}))
    counts[2].subtract(counts[1])
    return counts[2]


def added(model, inputs, steering, **options):
    """What steering adds to a decoding step."""
    more = operations(model, inputs, steering, **options)
    more.subtract(operations(model, inputs, None, **options))
    assert all(count % 4 == 0 for count in more.values())
    return {name: count // 4 for name, count in more.items() if count and name.startswith("aten::")}


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_an_addition_is_one_operation_a_layer(llama, inputs, cache, dtype):
    model = copy.deepcopy(llama).to(dtype)
    everywhere = [vector(n, n).add(2.0) for n in range(LAYERS)]
    for steering in (everywhere, [everywhere, everywhere, everywhere]):
        assert added(model, inputs, steering, cache_implementation=cache) == {"aten::add": LAYERS}


@pytest.mark.filterwarnings("ignore::fgsteer.errors.UntouchedWarning")
@pytest.mark.parametrize("name", slow_but(["per row", "prompt", "gate on prompts"], STRUCTURES))
def test_a_decoding_step_waits_for_nothing(llama, inputs, name):
    more = added(llama, inputs, STRUCTURES[name](2.0), cache_implementation="static")
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"} & set(more)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STRUCTURES)
def test_gpu_twin_of_waiting_for_nothing(llama, inputs, name):
    model, inputs = copy.deepcopy(llama).cuda(), inputs.to("cuda")
    both = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
    options = {"activities": both, "cache_implementation": "static", "disable_compile": True}
    steered, plain = (operations(model, inputs, steering, **options) for steering in (STRUCTURES[name](2.0), None))
    for waits in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::item", "aten::_local_scalar_dense"):
        assert steered[waits] <= plain[waits], waits


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["add", "per row", "clamp"])
def test_gpu_twin_of_compiled_decoding(llama, inputs, name):
    """On a GPU ``generate`` compiles by itself, with CUDA graphs."""
    torch._dynamo.reset()
    model, inputs, make = copy.deepcopy(llama).cuda(), inputs.to("cuda"), STRUCTURES[name]
    for number, coefficient in enumerate((1.0, -2.0)):
        options = {"cache_implementation": "static"}
        expected = tokens(model, inputs, make(coefficient), disable_compile=True, **options)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert tokens(model, inputs, make(coefficient), **options) == expected


@pytest.mark.slow
def test_generated_code(llama, inputs):
    """The default backend: tokens of random models are far enough apart to bear its rounding."""
    torch._dynamo.reset()
    for name in ("add", "per row", "clamp"):
        make = STRUCTURES[name]
        for number, coefficient in enumerate((1.0, -2.0)):
            expected = tokens(llama, inputs, make(coefficient))
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                assert tokens(llama, inputs, make(coefficient), **compiled("inductor")) == expected
    torch._dynamo.reset()


@pytest.mark.slow
def test_chunked_prefill_is_compiled_too(llama, inputs, graphs):
    item = vector().add(2.0, scope="reply")
    model = copy.deepcopy(llama)
    expected = tokens(model, inputs, item)
    assert tokens(model, inputs, item, prefill_chunk_size=3, **compiled(graphs[0])) == expected
    assert graphs[1]
