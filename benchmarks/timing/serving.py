"""Serving: tokens a second of vLLM with steering beside the plain engine, by vectors in a batch, layers and table rows.

Engines stand side by side, each in a process of its own, and take turns with one batch of requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import fgsteer as fg
from fgsteer.models.shipped import find_shipped
from fgsteer.serving import steered_llm, steering
from timing.bench import Bench, unequal
from timing.clock import Case, Contender, Row
from timing.subjects import texts

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 32, 16, 32
ROWS = 32  # of a table, where nothing else is said
PLAIN, UNSTEERED = "plain engine", ", none steered"
INSTALLED = find_spec("vllm") is not None


def serving(bench: Bench) -> Iterator[Row]:
    """One batch of requests: none of them steered, all by one vector, each by its own."""
    for name in ("default",) if bench.quick or list(bench.models) == ["default"] else ("default", "smollm2"):
        engines = dict(_engines(name, bench))
        try:
            new = 4 if bench.quick else NEW_TOKENS
            case = Case("serving", name, f"{REQUESTS} requests", REQUESTS * new, "tokens/s", unequal, 0.02)
            yield from bench.clock.compare(case, list(_contenders(name, engines, new)))
        finally:
            for llm in engines.values():
                llm.llm_engine.engine_core.shutdown()


def _engines(name: str, bench: Bench) -> Iterator[tuple[str, Any]]:
    """The plain engine, and engines with tables at one layer or at all, of more rows, for more steerings a request."""
    from vllm import LLM

    shipped = find_shipped(name)
    assert shipped is not None
    settings: dict[str, Any] = {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "max_model_len": PROMPT_TOKENS + NEW_TOKENS,
        "max_num_seqs": REQUESTS,
        "seed": 0,
        "enable_prefix_caching": False,  # the same prompts come again in every turn
    }
    if bench.on_cpu:
        settings["kv_cache_memory_bytes"] = 256 << 20
    yield PLAIN, LLM(str(shipped.model_folder()), **settings)
    one = _vectors(name, ROWS, 1)
    yield "1 layer", steered_llm(name, vectors=one, rows=ROWS, vectors_per_request=1, **settings)
    yield "1 layer, 2 steerings a request", steered_llm(name, vectors=one, rows=ROWS, **settings)
    yield "1 layer, 256 rows", steered_llm(name, vectors=one, rows=256, vectors_per_request=1, **settings)
    every = _vectors(name, ROWS, None)
    yield "all layers", steered_llm(name, vectors=every, rows=ROWS, vectors_per_request=1, **settings)


def _vectors(name: str, count: int, layers: int | None) -> dict[str, list[fg.Intervention]]:
    """Random vectors by name, which act after the middle block, or share their strength between all blocks."""
    model, _ = fg.load_model(name)
    blocks = int(model.config.num_hidden_layers)
    places = range(blocks) if layers is None else [blocks // 2]
    rows = torch.randn(count, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return {
        f"v{number}": [fg.SteeringVector(row / len(places), fg.Hookpoint(layer)).add(0.1) for layer in places]
        for number, row in enumerate(rows)
    }


def _contenders(name: str, engines: dict[str, Any], new: int) -> Iterator[Contender]:
    """The plain engine's batch, and those of every other engine with no vector, one, and one for each request."""
    from vllm import SamplingParams

    _, tokenizer = fg.load_model(name)
    ids = tokenizer(" ".join(texts(REQUESTS * PROMPT_TOKENS // 4)), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    prompts = [{"prompt_token_ids": ids[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS]} for n in range(REQUESTS)]

    def contender(engine: str, mix: str, names: Sequence[str | None]) -> Contender:
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True}
        params = [SamplingParams(**settings, extra_args=steering(name) if name else None) for name in names]
        run = partial(_generate, engines[engine], prompts, params)
        return Contender(f"{engine}{mix}", run, PLAIN if mix == UNSTEERED else "")

    yield contender(PLAIN, "", [None] * REQUESTS)
    for engine in [engine for engine in engines if engine != PLAIN]:
        yield contender(engine, UNSTEERED, [None] * REQUESTS)
        yield contender(engine, ", one vector", ["v0"] * REQUESTS)
        yield contender(engine, f", {REQUESTS} vectors", [f"v{number}" for number in range(REQUESTS)])


def _generate(llm: Any, prompts: Sequence[Any], params: Sequence[Any]) -> Tensor:
    """The new tokens of each request, (requests, tokens)."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return torch.tensor([output.outputs[0].token_ids for output in outputs])
