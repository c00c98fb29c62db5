"""Cache steering from contrastive prompts: mean differences of the keys and values of their last tokens.

steering = cache_steering(model, tokenizer, {"positive": […], "negative": […]}, value_coefficient=6.0)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgsteer.activations.batches import batch_rows, tokens_in_batch
from fgsteer.activations.memory import AnyBatch, map_with_oom_backoff
from fgsteer.activations.tokens import TokenRow, encode_prompts, pad
from fgsteer.data.chat import Text
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.data.rendering import render
from fgsteer.errors import DataError, PairingError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.interventions.cached import CacheSteering
from fgsteer.models.hookpoints import blocks_of, decoder_of
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import context_window, input_device, warn_of_dropout
from fgsteer.steering.caching import cached_states, check_cache, check_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked
def cache_steering(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrastable,
    *,
    layers: Sequence[int] | None = None,
    value_coefficient: float = 1.0,
    key_coefficient: float = 0.0,
    prepend_bos: bool | None = None,
    batch_tokens: int | None = None,
) -> CacheSteering:
    """Build cache steering of two sides of prompts: ``S_ℓ = mean(s_ℓ⁺) − mean(s_ℓ⁻)`` (arXiv 2507.08799).

    ``s_ℓ`` are the keys, or the values, (n_kv_heads, d_head) that layer ℓ caches of a prompt's last token. The paper
    contrasts prompts with examples that are solved in steps with the same examples solved without, 100 to 400 pairs.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        contrast: What ``collect`` takes: a ContrastSet, ``{"positive": [...], "negative": [...]}``, or pairs. Each text
            is a prompt as ``generate`` reads it: a conversation that ends with the user gets what the chat template
            opens an answer with, and one that ends with the assistant is read up to the end of that message.
        layers: The layers to steer, from 0; by default all. Their keys have one shape, and so have their values.
        value_coefficient: The strength c_V of values; the paper uses 1 to 10. ``dataclasses.replace`` changes it later.
        key_coefficient: The strength c_K of keys, 0 to 0.2 in the paper; see ``CacheSteering`` for what mixes there.
        prepend_bos: True puts BOS before every prompt, False takes the tokenizer's away, None leaves it to the
            tokenizer, as ``generate`` does.
        batch_tokens: Padded tokens in a batch, by default as in ``collect``; it changes nothing but speed.

    Returns:
        The steering, with keys (layers, n_kv_heads, d_head) and values alike, in units of cached keys and values.

    Raises:
        DataError: A prompt is empty, exceeds the model's window, or does not fit in memory.
        SelectionError: Both sides have the same mean.
        PairingError: A layer is not there or caches nothing, or the layers differ in shape.
        SteeringError: The model keeps no keys and values, or they are not finite.
    """
    check_model(model)
    warn_of_dropout(model)
    data, count = as_contrast(contrast), len(blocks_of(model))
    chosen = list(range(count)) if layers is None else list(layers) if isinstance(layers, list | tuple | range) else []
    if not chosen:
        raise DataError(f"layers = {layers!r:.40}", "a list of at least one layer", "pass layers=[1, 2]")
    for layer in chosen:
        check_range("a layer", layer, 0, count - 1, whole=True)
    rows = _rows(tokenizer, data, context_window(model), prepend_bos)
    device = input_device(model)
    size = tokens_in_batch(batch_tokens, device)
    batches = batch_rows(rows, batch_tokens=size, pad_id=0, device=device)
    keys = values = torch.zeros(())
    for batch, states in map_with_oom_backoff(batches, lambda part: _last_states(model, part, chosen)):
        signs = [1 / data.count(True) if row.positive else -1 / data.count(False) for row in batch.rows]
        weights = torch.tensor(signs, dtype=torch.float64)[None, :, None, None]
        keys, values = (total + (weights * state).sum(1) for total, state in zip((keys, values), states, strict=True))
    if not (keys.any() or values.any()):
        raise SelectionError(
            "the same mean on both sides",
            "prompts whose last tokens are cached differently",
            "check that the contrast's two sides hold different prompts",
        )
    identity = model_identity(model)
    return CacheSteering(
        layers=chosen,
        keys=keys,
        values=values,
        key_coefficient=key_coefficient,
        value_coefficient=value_coefficient,
        d_model=identity["d_model"],
        model_name=identity["name"],
        method="cache_steering",
    )


def _rows(
    tokenizer: PreTrainedTokenizerBase, data: ContrastSet, window: int | None, prepend_bos: bool | None
) -> list[TokenRow]:
    """The prompts of both sides as ids, shortest first. Raises DataError for one beyond the window."""
    rows = []
    for index, (text, positive) in enumerate(_prompts(tokenizer, data)):
        ids = encode_prompts(tokenizer, [text], prepend_bos=prepend_bos)[0][0].tolist()
        where = f"prompt {index} ({'positive' if positive else 'negative'})"
        if window is not None and len(ids) > window:
            raise DataError(
                f"{where} with {len(ids)} tokens",
                f"prompts of at most {window} tokens, the model's window",
                "shorten it: what is read is its last token",
            )
        rows.append(TokenRow(ids, [len(ids) - 1], index, positive, where))
    return sorted(rows, key=lambda row: len(row.ids))


def _prompts(tokenizer: PreTrainedTokenizerBase, data: ContrastSet) -> Iterator[tuple[Text, bool]]:
    """Every text of a contrast with what comes before it, as a prompt to be continued, and whether it is positive."""
    for positive in (True, False):
        for prompt, completion in data.side(positive):
            if isinstance(prompt, str) and isinstance(completion, str):
                yield render(tokenizer, prompt, completion).text, positive
                continue
            before, after = (
                ([{"role": role, "content": text}] if text else []) if isinstance(text, str) else list(text)
                for role, text in (("user", prompt), ("assistant", completion))
            )
            yield [*before, *after], positive


@torch.no_grad()
def _last_states(model: nn.Module, batch: AnyBatch, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values of each prompt's last token, (layers, prompts, n_kv_heads, d_head), on the CPU in float64.

    Raises PairingError, SteeringError for a cache that does not hold them.
    """
    decoder, device = decoder_of(model), input_device(model)
    ids, mask = (t.to(device) for t in pad([row.ids for row in batch.rows], 0, side="left"))
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    cache = getattr(decoder(**arguments), "past_key_values", None)
    check_cache(cache, f"{type(model).__name__}, which has no cache of keys and values")
    states = [cached_states(cache, layer) for layer in layers]
    for name, number in (("keys", 0), ("values", 1)):
        if len(shapes := {(s[number].shape[1], s[number].shape[3]) for s in states}) > 1:
            raise PairingError(
                f"layers whose {name} have the shapes {' and '.join(map(str, sorted(shapes)))}",
                "layers of one shape, (n_kv_heads, d_head)",
                "pass layers= with those of one shape, and build a second CacheSteering for the others",
            )
    keys, values = (torch.stack([s[number][:, :, -1].double().cpu() for s in states]) for number in (0, 1))
    return keys, values
