"""Rerouting: how much a vector can move attention between the keys that heads read and those that they do not.

risk = measure_rerouting(model, tokenizer, vec)
risk.relative                   1 where it moves attention no more than any direction of queries does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.tokens import prompt_ids
from fgsteer.data.chat import Text
from fgsteer.data.shipped import load_neutral
from fgsteer.errors import DataError, HookpointError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import a
from fgsteer.mechanisms.freezing import eager_attention
from fgsteer.mechanisms.parts import BlockParts, block_parts, norm_linear, project_weight
from fgsteer.models.hookpoints import decoder_of
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import check_window, input_device
from fgsteer.models.registering import registered
from fgsteer.steering.splicing import splice_modules
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS, LAYERS, PAIRS = 8, 8, 24
FOCUS, QUERIES, TOP = 0.8, 0.25, 0.2
ROUNDING = 8  # times the dtype's, below which W_q v counts as 0
LEAST_TOKENS = 8  # of a prompt
SENTENCES = 5  # of the shipped neutral texts, in a prompt


@dataclass(frozen=True, repr=False)
class Rerouting(OneLineRepr):
    """How much a vector can move attention.

    Args:
        risk: The mean of the heads' risks, in squared units of keys.
        relative: The mean of the heads' risks over what a query of any direction has, ``tr Σ / d_head``.
        top_risk: The mean risk of the heads with the largest.
        top_relative: The mean relative risk of the same heads.
        heads: How many heads were measured.
        layers: The blocks that they are in.
        top: Those heads of the largest risk, as (layer, head, risk, relative risk), the largest first.
    """

    risk: float
    relative: float
    top_risk: float
    top_relative: float
    heads: int
    layers: tuple[int, ...]
    top: tuple[tuple[int, int, float, float], ...]


@checked
@torch.no_grad()
def measure_rerouting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    *,
    prompts: Sequence[Text] | None = None,
    layers: int = LAYERS,
    pairs: int = PAIRS,
    focus: float = FOCUS,
    queries: float = QUERIES,
    top: float = TOP,
    seed: int = 0,
) -> Rerouting:
    """The rerouting risk of each head above a vector, ``(W_q v)ᵀ Σ (W_q v) / ‖W_q v‖²`` (SKOP, arXiv 2605.06342).

    A head's focus at a token is its smallest set of keys that together have ``focus`` of its attention, the tail all
    others. Σ is the second moment of differences of a key of the focus and one of the tail, before positions are turned
    into them. A vector that its queries do not see (``W_q v = 0``) has risk 0; with Σ = I every vector has risk 1. What
    queries read of a vector is its linear part behind the norm before attention. The risk is of the direction, and
    the same at all strengths.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vector: A vector on the residual stream, or on what a sublayer adds to it.
        prompts: Texts or conversations of at least eight tokens; by default eight of shipped neutral sentences.
        layers: How many blocks above the vector are measured.
        pairs: The pairs of keys that are drawn at each token.
        focus: The share of attention that the focus has.
        queries: The share of a text's tokens that are measured, its last ones.
        top: The share of heads that count as those of the largest risk.
        seed: The seed of the pairs.

    Raises:
        HookpointError: Queries or keys of the model cannot be read: attention of an unknown form, or with norms of its
            own; or no block reads the vector.
        PairingError: The vector does not fit the model.
        DataError: A prompt is too short, or a number is out of range.
    """
    for name, value in (("layers", layers), ("pairs", pairs)):
        check_range(name, value, 1, MAX_COUNT, whole=True)
    for name, share in (("focus", focus), ("queries", queries), ("top", top)):
        check_range(name, share, 0, 1)
    check_pairing(model, vector.hookpoint, vector.d_model, "", "vector")
    parts = _read_parts(model, vector, layers)
    generator = torch.Generator().manual_seed(seed)
    keys = _moments(model, tokenizer, parts, prompts, pairs, focus, queries, generator)
    rows = []
    for part in parts:
        norm = part.attention_port.norm if part.attention_port else None
        for head, reader in enumerate(part.readers["q"]):
            weight = project_weight(reader).detach()
            seen = norm_linear(norm, vector.direction.detach().float().to(weight.device)).double().cpu()
            weight = weight.double().cpu()
            sigma = keys[part.layer][head]
            risk = head_risk(weight, sigma, seen)
            level = float(sigma.trace()) / len(sigma)
            rows.append((part.layer, head, risk, risk / level if level else 0.0))
    rows.sort(key=lambda row: -row[2])
    chosen = rows[: max(1, round(top * len(rows)))]

    def mean(among: Sequence[tuple[int, int, float, float]], column: int) -> float:
        return sum(row[column] for row in among) / len(among)

    numbers = (mean(rows, 2), mean(rows, 3), mean(chosen, 2), mean(chosen, 3))
    return Rerouting(*numbers, len(rows), tuple(part.layer for part in parts), tuple(chosen))


def head_risk(
    weight: Float[Tensor, "d_head d_model"], sigma: Float[Tensor, "d_head d_head"], v: Float[Tensor, " d_model"]
) -> float:
    """``(W_q v)ᵀ Σ (W_q v) / ‖W_q v‖²``; 0 for a vector that the queries do not see."""
    shift = weight @ v
    size = float(shift.square().sum())
    seen = size > (ROUNDING * torch.finfo(weight.dtype).eps * float(weight.norm()) * float(v.norm())) ** 2
    return float(shift @ sigma @ shift) / size if seen else 0.0


def _read_parts(model: PreTrainedModel, vector: SteeringVector, layers: int) -> list[BlockParts]:
    """The blocks above a vector whose queries and keys can be read. Raises HookpointError."""
    at = vector.hookpoint
    if at.site in ("z", "mlp_in"):
        raise HookpointError(f"a vector at {at}", "one on the residual stream, or on what a sublayer adds to it")
    parts = block_parts(model, at.layer + (at.site != "resid_pre"))[:layers]
    if not parts:
        raise HookpointError(f"a vector at {at}", "a vector that a later block reads", "its queries move nothing")
    for part in parts:
        inner = [name for name, _ in part.attention.named_modules() if "norm" in name.rpartition(".")[2]]
        if inner:
            raise HookpointError(
                f"{a(type(part.attention).__name__)} with {', '.join(inner)}",
                "attention whose queries are linear in what it reads",
                "with norms of its own, what a vector changes of a query is not W_q v",
            )
    return parts


def _moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[BlockParts],
    prompts: Sequence[Text] | None,
    pairs: int,
    focus: float,
    queries: float,
    generator: torch.Generator,
) -> dict[int, Float[Tensor, "heads d_head d_head"]]:
    """Σ of each head by block, over prompts."""
    texts = list(prompts) if prompts is not None else _neutral_prompts()
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    with eager_attention(model):
        for number, row in enumerate(prompt_ids(tokenizer, texts)):
            first = len(row) - max(1, round(queries * len(row)))
            if len(row) < LEAST_TOKENS:
                raise DataError(f"prompt {number} of {len(row)} tokens", "at least eight tokens", "pass longer prompts")
            check_window(model, len(row), f"prompt {number}")
            kept = _keys_and_weights(model, parts, row)
            for part in parts:
                total, drawn = _second_moments(part, *kept[part.layer], first, pairs, focus, generator)
                sums[part.layer] = sums.get(part.layer, 0) + total
                counts[part.layer] = counts.get(part.layer, 0) + drawn
    return {layer: total / counts[layer].clamp(min=1)[:, None, None] for layer, total in sums.items()}


def _neutral_prompts() -> list[str]:
    sentences = load_neutral()[0]
    return [" ".join(sentences[n * SENTENCES : (n + 1) * SENTENCES]) for n in range(PROMPTS)]


def _keys_and_weights(
    model: PreTrainedModel, parts: Sequence[BlockParts], row: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The output of the module that makes keys, and attention weights (heads, queries, keys), by block."""
    keys: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}

    def keep_keys(layer: int, h: Tensor) -> Tensor:
        keys[layer] = h
        return h

    def keep_weights(layer: int, module: nn.Module, _: Any, output: Any) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(found, Tensor) or found.ndim != 4:
            raise HookpointError(f"{a(type(module).__name__)} that returns no weights", "attention that returns them")
        weights[layer] = found[0]

    ids = torch.tensor([row], device=input_device(model))
    changes = [(part.readers["k"][0].module, False, partial(keep_keys, part.layer)) for part in parts]
    hooks = [(part.attention, False, partial(keep_weights, part.layer)) for part in parts]
    with splice_modules(changes), registered(hooks):
        decoder_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return {part.layer: (keys[part.layer].reshape(len(row), -1), weights[part.layer]) for part in parts}


def _second_moments(
    part: BlockParts,
    output: Float[Tensor, "tokens width"],
    weights: Float[Tensor, "heads tokens keys"],
    first: int,
    pairs: int,
    focus: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "heads d_head d_head"], Float[Tensor, " heads"]]:
    """The sum over drawn pairs of ``d dᵀ`` with d a key of the focus less one of the tail, and the pairs, by head."""
    k = torch.stack([output[:, reader.entries] for reader in part.readers["k"]]).double().cpu()
    k = k.repeat_interleave(part.group, 0)  # (heads, tokens, d_head)
    totals, counts = torch.zeros(len(k), k.shape[2], k.shape[2], dtype=torch.float64), torch.zeros(len(k))
    for head in range(len(k)):
        for token in range(first, k.shape[1]):
            order, size = focus_keys(weights[head, token, : token + 1].double().cpu(), focus)
            if size == len(order):
                continue  # no tail
            near = torch.randint(size, (pairs,), generator=generator)
            far = torch.randint(size, len(order), (pairs,), generator=generator)
            differences = k[head, order[near]] - k[head, order[far]]
            totals[head] += differences.T @ differences
            counts[head] += pairs
    return totals, counts.double()


def focus_keys(weights: Float[Tensor, " keys"], focus: float) -> tuple[Tensor, int]:
    """Keys by falling attention, and how many of the first make up the smallest set with ``focus`` of it.

    Keys without attention, as those outside of a sliding window, are left out.
    """
    sorted_weights, order = weights.sort(descending=True, stable=True)
    sorted_weights, order = (part[: int((weights > 0).sum())] for part in (sorted_weights, order))
    below = sorted_weights.cumsum(0) < focus * sorted_weights.sum() * (1 - 1e-12)
    return order, min(len(order), int(below.sum()) + 1)
