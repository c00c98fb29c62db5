"""The mixed batch, and what Hugging Face hooks make of it token for token."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import fgsteer as fg
from fgsteer.models.shipped import DEFAULT, SHIPPED
from fgsteer.serving import steering
from fgsteer.storage.json_files import read_json, write_json

TOKENS = 24
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "seed": 0,
}
PROMPTS = (
    "Once upon a time there was a little girl who",
    "The next day",
    "The king looked at the sea and said to his men that the ship would have to leave before the morning, and",
    "I think the film was",
    "She said that",
)


@dataclass(frozen=True)
class Case:
    """One request: a prompt, what vLLM is asked, and the same as an intervention (None: unsteered)."""

    label: str
    prompt: str
    extra: dict[str, Any]
    item: fg.Intervention | list[fg.Intervention] | None


def four_heads(folder: Path) -> str:
    """The embedded default cut into 4 heads, which two ranks can share, in place of its 5: another model."""
    shutil.copytree(SHIPPED[DEFAULT].model_folder(), folder, dirs_exist_ok=True)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 80})
    return str(folder)


@cache
def model(source: str = DEFAULT) -> tuple[Any, Any]:
    """A model in float32 that never ends a text."""
    loaded, tokenizer = fg.load_model(source, dtype=torch.float32)
    loaded.generation_config.eos_token_id = None
    return loaded, tokenizer


@cache
def ids(prompt: str) -> tuple[int, ...]:
    return tuple(model(DEFAULT)[1](prompt)["input_ids"])  # as ``served`` asks for it: several threads may come here


@cache
def served(source: str = DEFAULT) -> dict[str, Any]:
    """Vectors of half the stream's own size at several layers, and a clamp of features that fire on the prompts."""
    network, tokenizer = model(source)
    inputs = tokenizer(PROMPTS[2], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        states = network(**inputs, output_hidden_states=True).hidden_states
    named: dict[str, Any] = {}
    for name, layer in (("first", 0), ("middle", 2), ("late", 3)):
        size = states[layer + 1][0, 1:].norm(dim=-1).mean()
        g = torch.Generator().manual_seed(layer)
        direction, away = torch.nn.functional.normalize(torch.randn(2, network.config.hidden_size, generator=g))
        mean = states[layer + 1][0, 1:].mean(0)
        named[name] = fg.SteeringVector(direction * size / 2, fg.Hookpoint(layer), reference=mean + away * size)
    named["mean"] = fg.SteeringVector(mean, fg.Hookpoint(layer))  # the projection on it is large, so ablation shows
    last = network.config.num_hidden_layers - 1  # its output is large: a direction the head reads
    row = network.get_output_embeddings().weight[123].detach()
    named["last"] = fg.SteeringVector(row / row.norm() * 40, fg.Hookpoint(last))
    (sae,) = saes()
    active = sae.encode(states[sae.hookpoint.layer + 1][0, 1:])
    features = active.gt(0).sum(0).topk(3).indices.tolist()
    floor = active[active > 0].min().expand(sae.d_sae)  # JumpReLU in place of TopK, whose features compete
    jump = replace(sae, activation="jumprelu", k=None, threshold=floor, fingerprint="", density=None)
    named["features"] = fg.ClampFeature(
        hookpoint=sae.hookpoint, sae=jump, targets={j: float(4 * active.max()) for j in features}
    )
    competing = {j: float(1.5 * active.max()) for j in features}
    named["competing"] = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets=competing)
    return named | others(named, features[0], states[sae.hookpoint.layer + 1][0, 1:])


def others(named: dict[str, Any], feature: int, h: torch.Tensor) -> dict[str, Any]:
    """Interventions that no vector makes, some that compose, and one that is gated by activations like h."""
    middle, late, (sae,) = named["middle"], named["late"], saes()
    cosine = float(torch.cosine_similarity(h, middle.direction[None]).median())
    direction, other, at = late.direction, named["mean"].direction, late.hookpoint
    return {
        "adaptive": fg.AdaptiveAdd(hookpoint=at, direction=direction, read=other / other.norm(), coefficient=0.01),
        "turn": fg.Rotate(hookpoint=at, direction=other, other=direction, by=-70.0),
        "plane": fg.ClampSubspace(hookpoint=at, directions=torch.stack([direction, other])),
        "gated": middle.add(3.0, when=(fg.Feature(sae, feature) > 0.0) | (fg.Cosine(middle) > cosine)),
        "composed": [middle.add(1.0), late.add(-2.0, scope="generated"), middle.ablate()],
    }


@cache
def saes() -> tuple[Any, ...]:
    """The SAE whose features are clamped, which is TopK."""
    return (fg.load_sae("default"),)


@cache
def cases(source: str = DEFAULT) -> tuple[Case, ...]:
    """Requests none of which shares its steering with another."""
    s = served(source)
    first, middle, late, last, clamp = (s[name] for name in ("first", "middle", "late", "last", "features"))
    a, b, c, d, e = PROMPTS
    return (
        Case("unsteered", a, {}, None),
        Case("add", a, steering("middle", scale=1.0), middle.add(1.0)),
        Case("ablate", b, steering("mean", op="ablate"), s["mean"].ablate()),
        Case("affine", c, steering("middle", op="affine", scale=0.5), middle.affine(0.5)),
        Case("features", b, steering("features"), clamp),
        Case("last layer", d, steering("last", scale=1.0), last.add(1.0)),
        Case("layer 0", e, steering("first", scale=1.5), first.add(1.5)),
        Case("negative", a, steering("middle", scale=-0.5), middle.add(-0.5)),
        Case("generated", c, steering("late", scale=2.0, scope="generated"), late.add(2.0, scope="generated")),
        Case("unsteered too", c, {}, None),
        Case("clamp", e, steering("late", op="clamp", scale=4 * late.norm), late.clamp(4 * late.norm)),
        Case("prompt", c, steering("first", scale=2.0, scope="prompt"), first.add(2.0, scope="prompt")),
        Case(
            "from the last",
            d,
            steering("late", scale=2.0, scope="reply"),
            late.add(2.0, scope="reply"),
        ),
        Case("position 0", d, steering("first", scale=1.0, bos=True), first.add(1.0, bos=True)),
        Case("cap", c, steering("mean", op="at_most", scale=0.0), s["mean"].clamp(at_most=0.0)),
        Case(
            "lift",
            a,
            steering("late", op="at_least", scale=4 * late.norm, scope=fg.last(3)),
            late.clamp(at_least=4 * late.norm, scope=fg.last(3)),
        ),
        Case("both ends", c, steering("late", scale=2.0, scope="ends:2,3"), late.add(2.0, scope="ends:2,3")),
        Case("positions", d, steering("first", scale=2.0, scope="at:1,3,4"), first.add(2.0, scope="at:1,3,4")),
        Case("relative", e, steering("middle", op="add_relative", scale=0.6), middle.add_relative(0.6)),
        Case("norm kept", b, steering("middle", op="add_keeping_norm", scale=2.0), middle.add_keeping_norm(2.0)),
        Case("a TopK SAE's features", a, steering("competing"), s["competing"]),
        Case("adaptive", d, steering("adaptive"), s["adaptive"]),
        Case("turn", b, steering("turn"), s["turn"]),
        Case("subspace", e, steering("plane"), s["plane"]),
        Case(
            "two at one layer",
            c,
            steering([{"name": "mean", "op": "ablate"}, {"name": "middle", "scale": -1.0, "scope": "reply"}]),
            [s["mean"].ablate(), middle.add(-1.0, scope="reply")],
        ),
        Case(
            "three",
            d,
            steering([{"name": "late", "scale": 2.0}, {"name": "competing", "bos": True}, {"name": "first"}]),
            [late.add(2.0), replace(s["competing"], bos=True), first.add(1.0)],
        ),
        Case("gated", c, steering("gated"), s["gated"]),
        Case("a file of several", a, steering("composed"), s["composed"]),
    )


@dataclass(frozen=True)
class Continuation:
    tokens: list[int]
    logprobs: list[float]


def continue_with_hooks(
    prompt: str, item: fg.Intervention | list[fg.Intervention] | None, tokens: int = TOKENS, source: str = DEFAULT
) -> Continuation:
    """Greedy continuation of one prompt alone, under ``fg.steer``."""
    network, _ = model(source)
    inputs = torch.tensor([ids(prompt)])
    with torch.no_grad(), fg.steer(network, item):
        output = network.generate(
            inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    chosen = output.sequences[0, inputs.shape[1] :]
    logprobs = torch.stack(output.logits).log_softmax(-1)[:, 0].gather(1, chosen[:, None])[:, 0]
    return Continuation(chosen.tolist(), logprobs.tolist())


@cache
def expected(source: str = DEFAULT) -> tuple[Continuation, ...]:
    """Of every case; a case that does not change its text would test nothing."""
    made = tuple(continue_with_hooks(case.prompt, case.item, source=source) for case in cases(source))
    plain = {prompt: continue_with_hooks(prompt, None, source=source).tokens for prompt in PROMPTS}
    for case, continuation in zip(cases(source), made, strict=True):
        assert (continuation.tokens == plain[case.prompt]) == (case.item is None), case.label
    return made


def check(found: list[Continuation], source: str = DEFAULT) -> None:
    """The same tokens, and log-probabilities within float32's rounding over 5 layers."""
    for case, ours, theirs in zip(cases(source), found, expected(source), strict=True):
        assert ours.tokens == theirs.tokens, case.label
        worst = max(abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True))
        assert worst < 2e-4, f"{case.label}: {worst}"
