"""Steering: what a steered generation costs beside an unsteered one, and measuring many vectors beside one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from itertools import cycle
from operator import or_
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.effects.rollouts import Sampling, rollout_features
from timing import peers
from timing.bench import Bench, distance, unequal
from timing.clock import Case, Contender, Row
from timing.subjects import Subject, directions, prompt_ids

NEW_TOKENS = 32
PROMPT_TOKENS, NEXT_TOKENS = 64, 256  # before a step, and those that come in turn: more than are soon learnt by heart
STEPS, IN_A_ROW = 61, 0.05  # turns, of so many seconds of decoding steps in a row, as steps of a text are
CELLS = ((1, 8), (8, 8), (64, 8), (1, 256), (8, 256), (64, 256))  # batch, prompt tokens
CPU_CELLS = {
    "default": CELLS[:5],
    "llama": CELLS[:2],
    "gpt2": CELLS[1:2],
    "llama-100m": CELLS[:1],
    "smollm2": CELLS[:1],
}
UNSTEERED, ADD, ADD_ALL = "unsteered", "steer, 1 layer", "steer, all layers"


def generate(bench: Bench) -> Iterator[Row]:
    """Greedy generation under each way to steer, in new tokens a second."""
    for subject in bench.subjects():
        cells = CPU_CELLS[subject.name] if bench.on_cpu else CELLS
        for batch, length in ((2, 8),) if bench.quick else cells:
            yield from _generate(bench, subject, batch, min(length, subject.context - NEW_TOKENS))


def _generate(bench: Bench, subject: Subject, batch: int, length: int) -> Iterator[Row]:
    ids = prompt_ids(subject, batch, length)
    new = 4 if bench.quick else NEW_TOKENS
    plain = partial(
        subject.model.generate,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=1,
    )
    case = Case("generate", subject.name, f"{batch} x {length}", batch * new, "tokens/s", unequal, 0.02)
    yield from bench.clock.compare(case, [Contender(UNSTEERED, plain), *_ways(bench, subject, plain, batch)])


def _ways(bench: Bench, subject: Subject, plain: Callable[[], Tensor], batch: int) -> list[Contender]:
    """Every way to steer; all of them act on every token, as the peers do."""
    vectors = directions(subject, max(batch, 2)).to(subject.model.device)
    everywhere = dict.fromkeys(range(subject.layers), vectors[0] / subject.layers)

    def vector(direction: Tensor, layer: int = subject.layer) -> fg.SteeringVector:
        return fg.SteeringVector(direction, fg.Hookpoint(layer))

    def steered(items: Any, **options: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with fg.steer(subject.model, items, **options):
                return plain()

        return run

    add = vector(vectors[0]).add(bos=True)
    adds = [vector(v, layer).add(bos=True) for layer, v in everywhere.items()]
    rows = [vector(v).add(bos=True) for v in vectors[:batch]]
    one = {subject.layer: vectors[0]}
    ablate = vector(vectors[1]).ablate(bos=True)
    targets = dict.fromkeys(range(0, subject.sae.d_sae, subject.sae.d_sae // 8), 1.0)
    clamp = fg.ClampFeature(hookpoint=subject.sae.hookpoint, sae=subject.sae, targets=targets, bos=True)
    ways = [
        Contender(ADD, steered(add)),
        Contender("steer, a vector a row", _first_row(steered(rows, per_row=True)), ADD),
        *peers.steerers(bench.peers, subject, plain, one, "1 layer", ADD),
        Contender(ADD_ALL, steered(adds)),
        *peers.steerers(bench.peers, subject, plain, everywhere, "all layers", ADD_ALL),
        Contender("steer, Ablate + Add", steered([ablate, add])),
        Contender(f"steer, ClampFeature x 8 ({subject.sae.activation})", steered(clamp)),
    ]
    if hasattr(fg, "fold"):
        folded, thick = fg.fold(subject.model, add), fg.fold(subject.model, adds)
        ways += [
            Contender("folded, 1 layer", _of(folded, plain), ADD),
            Contender("folded, all layers", _of(thick, plain), ADD_ALL),
        ]
    return ways


def _first_row(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: run()[:1]


def _of(model: Any, plain: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same generation by another model."""
    assert isinstance(plain, partial)
    return partial(model.generate, **plain.keywords)


def step(bench: Bench) -> Iterator[Row]:
    """One decoding step under each way to steer, so often that a hundredth of it shows."""
    clock = replace(bench.clock, repetitions=2 if bench.quick else STEPS, at_least=0.0 if bench.quick else IN_A_ROW)
    for subject in bench.subjects():
        for batch in (2,) if bench.quick else (1, 8):
            with ExitStack() as held:
                yield from clock.compare(
                    Case("step", subject.name, f"{batch} x 1", batch, "tokens/s"),
                    [Contender(name, _stepper(subject, batch, *how, held)) for name, how in _steered(subject, batch)],
                )


def _steered(subject: Subject, batch: int) -> Iterator[tuple[str, tuple[Any, bool]]]:
    """Names of the ways to steer, each with what ``steer`` is given and whether it is by row."""
    v, w = (fg.SteeringVector(row, fg.Hookpoint(subject.layer)) for row in directions(subject, 2))
    everywhere = [replace(v, hookpoint=fg.Hookpoint(n)) * (1 / subject.layers) for n in range(subject.layers)]
    targets = dict.fromkeys(range(0, subject.sae.d_sae, subject.sae.d_sae // 8), 1.0)
    clamp = fg.ClampFeature(hookpoint=subject.sae.hookpoint, sae=subject.sae, targets=targets)
    yield UNSTEERED, (None, False)
    yield ADD, (v.add(), False)
    yield ADD_ALL, ([each.add() for each in everywhere], False)
    yield "steer, a vector a row", ([(v * (n + 1)).add() for n in range(batch)], True)
    yield "steer, Ablate + Add", ([w.ablate(), v.add()], False)
    yield f"steer, ClampFeature x 8 ({subject.sae.activation})", (clamp, False)
    yield "steer, cap", (v.clamp(at_most=0.0), False)
    yield "steer, AdaptiveAdd", (fg.AdaptiveAdd(direction=v.direction, read=w.direction, hookpoint=v.hookpoint), False)
    fires = [fg.Feature(subject.sae, feature) > 0.0 for feature in targets]
    yield "steer, a gate on 8 features", (v.add(when=reduce(or_, fires)), False)
    if subject.sae.activation == "topk":  # few of whose activations are as low
        much = [fg.Feature(subject.sae, feature) > 10.0 for feature in targets]
        yield "steer, a gate on 8 features above 10 (topk)", (v.add(when=reduce(or_, much)), False)
    yield "steer, a gate on the prompt", (v.add(when=fg.Cosine(v).mean() > -1.0), False)


@torch.no_grad()
def _stepper(subject: Subject, batch: int, items: Any, by_row: bool, held: ExitStack) -> Callable[[], Any]:
    """One more token for each row, in turn of many, by modules of their own over the same weights."""
    weights = [*subject.model.parameters(), *subject.model.buffers()]
    model = copy.deepcopy(subject.model, {id(weight): weight for weight in weights})
    cache = DynamicCache(config=model.config)
    ids = prompt_ids(subject, batch, PROMPT_TOKENS + NEXT_TOKENS)
    tokens = cycle(ids[:, PROMPT_TOKENS:].split(1, dim=1))
    held.enter_context(fg.steer(model, items, per_row=by_row))  # before the prompt, which gates read
    model(input_ids=ids[:, :PROMPT_TOKENS], past_key_values=cache)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=next(tokens), past_key_values=cache)
        cache.crop(-1)

    return run


def effects(bench: Bench) -> Iterator[Row]:
    """Measuring what vectors do: all of them in one batch, against one generate call each."""
    for subject in bench.subjects(*(() if bench.quick else ("default",))):
        yield from _rollouts(bench, subject)
        if subject.name == "default":  # strengths need a model that has learnt something
            yield from _measure(bench, subject)


def _rollouts(bench: Bench, subject: Subject) -> Iterator[Row]:
    """Sampled continuations, and the features read from them."""
    count, new = (3, 4) if bench.quick else (16, 16)
    prompts = encode_prompts(subject.tokenizer, fg.load_neutral()[1][:4])
    items = [fg.SteeringVector(v, subject.sae.hookpoint).add() for v in directions(subject, count)]

    def read(some: Sequence[fg.Intervention]) -> Tensor:
        return rollout_features(subject.model, prompts, subject.sae, some, Sampling(max_new_tokens=new))

    case = Case("effects", subject.name, "rollouts", 60 * count, "vectors/min", distance, 0.05)
    yield from bench.clock.compare(
        case,
        [
            Contender("a vector a call", lambda: torch.cat([read([item]) for item in items])),
            Contender("a vector a row", lambda: read(items), "a vector a call"),
        ],
    )


def _measure(bench: Bench, subject: Subject) -> Iterator[Row]:
    """EffectApproximator.measure, with calibration and fit; with as many rows as prompts a call has one vector."""
    texts, prompts = fg.load_neutral()
    few = {"texts": texts[:4], "prompts": prompts[:4], "vectors": 20}
    plan = {"rollouts": 2, "sampling": Sampling(max_new_tokens=2 if bench.quick else 8)}

    def measure(rows: int) -> Tensor:
        options: Mapping[str, Any] = {**few, **plan, "rows": rows}
        return fg.EffectApproximator.measure(subject.model, subject.tokenizer, subject.sae, **options).M

    case = Case("effects", subject.name, "measure", 60 * 20, "vectors/min", distance, 0.2)
    yield from bench.clock.compare(
        case,
        [
            Contender("a vector a call", partial(measure, len(prompts[:4]))),
            Contender("a vector a row", partial(measure, 512), "a vector a call"),
        ],
    )
