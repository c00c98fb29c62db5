"""Steering of the cache under ``generate``: a prompt is read in two parts, and what is cached is changed between them.

cache_changes = CacheChanges(model, [[cache_steering], []], positions, readings)
cache_changes.install(changes)    from here on, the model's forward reads prompts in two parts
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.changes import Changes
from fgsteer.errors.wording import a
from fgsteer.interventions.cached import CacheSteering, SteeringItem
from fgsteer.models.properties import d_model, virtual_tokens
from fgsteer.steering.gating import Readings
from fgsteer.steering.positions import Positions
from fgsteer.steering.ranges import activation_dtype, check_amount
from fgsteer.steering.shadows import shadow

_BY_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids")  # (…, tokens), besides ids and embeddings


class LayerChange(NamedTuple):
    """What is added to the keys and values of one layer, each (rows, n_kv_heads, d_head) or None for nothing."""

    keys: Tensor | None
    values: Tensor | None


class CacheChanges:
    """The cache steering of one ``steer`` block; false where it changes nothing.

    Args:
        model: The model to steer.
        rows: What steers each row; one row serves every row of a batch.
        positions: Where the prompt of the running call of ``generate`` ends.
        readings: What the gates of the block read.

    Raises:
        PairingError: Keys or values of two rows have other shapes.
        SteeringError: The block has a gate on prompts, the model virtual tokens or latent attention, or a strength
            makes keys or values of the model's dtype overflow.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Sequence[SteeringItem]], positions: Positions, readings: Readings
    ) -> None:
        self.model, self.positions = model, positions
        steerings = [[i for i in items if isinstance(i, CacheSteering) and not i.changes_nothing] for items in rows]
        self.is_steered = torch.tensor([bool(items) for items in steerings], device="cpu")
        layers = sorted({layer for items in steerings for item in items for layer in item.layers})
        self.layers = {layer: _change_of(layer, steerings) for layer in layers}
        for layer, change in self.layers.items():
            for added in (change.keys, change.values):
                if added is not None:
                    what = f"a CacheSteering in layer {layer}"
                    check_amount(float(added.abs().max()), activation_dtype(model), d_model(model), what)
        if self and readings.prompt is not None:
            raise SteeringError(
                "a CacheSteering beside a gate on prompts",
                "gates on tokens, as the cache is changed when a part of the prompt has been read",
                "leave .last(), .mean() or .max() out of the gate, or the CacheSteering",
            )
        if self:
            check_model(model)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def install(self, changes: Changes) -> None:
        """Let the model read prompts in two parts, until the changes are undone."""
        if self:
            base = getattr(self.model, "get_base_model", None)  # PEFT's, whose forward generate runs
            module = base() if callable(base) else self.model
            shadow(module, "forward", self._in_parts(module.forward), changes)

    def check_pass(self) -> None:
        """Raises SteeringError for a pass outside of ``generate``."""
        if self and not self.positions.generating:
            raise SteeringError(
                "a CacheSteering in a forward pass outside of generate",
                "generation, where the prompt's cache is changed before its last token is read",
                "call model.generate inside the block, or fg.generate or fg.stream",
            )

    def check_prompt(self, columns: int, mask: Tensor | None) -> None:
        """Raises SteeringError for prompts (rows, columns) of which a steered one does not end in two tokens."""
        if not self:
            return
        if columns > 1 and mask is not None and mask.ndim == 2:
            real = mask[:, -2:].bool().all(1).cpu()
            short = (~real & self.is_steered.expand(len(real))).nonzero()[:, 0].tolist()
        else:
            short = [] if columns > 1 else [0]
        if short:
            raise SteeringError(
                f"a CacheSteering on prompt {short[0]}, which has one token or is padded on the right",
                "prompts of two tokens or more, padded on the left: what is cached before the last token is changed",
                'write a longer prompt, and pad with tokenizer.padding_side = "left"',
            )

    def _in_parts(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, which reads up to the prompt's last token, changes the cache, and reads on."""
        names = list(inspect.signature(forward).parameters)

        @wraps(forward)
        def in_parts(*args: Any, **kwargs: Any) -> Any:
            if not self.positions.generating:
                return forward(*args, **kwargs)
            arguments = dict(zip(names, args, strict=False)) | kwargs
            ids = arguments.get("input_ids")
            length = (arguments["inputs_embeds"] if ids is None else ids).shape[1]
            cache: Any = arguments.get("past_key_values")
            check_cache(cache, "a pass without a cache of keys and values, as with use_cache=False")
            begin: int = cache.get_seq_length()
            last = (self.positions.prompt_columns or 0) - 1
            if not begin <= last < begin + length:
                return forward(**arguments)
            if begin < last:
                forward(**_part(arguments, 0, last - begin, begin))
            self._add_to(cache)
            return forward(**_part(arguments, last - begin, length, begin))

        return in_parts

    def _add_to(self, cache: Any) -> None:
        """Add the changes to what is cached of the last token. Raises PairingError for a cache of other shapes."""
        for layer, change in self.layers.items():
            keys, values = cached_states(cache, layer)
            for name, states, added in (("keys", keys, change.keys), ("values", values, change.values)):
                if added is None:
                    continue
                last = states[:, :, -1]
                if added.shape[1:] != last.shape[1:]:
                    raise PairingError(
                        f"a CacheSteering whose {name} have the shape {tuple(added.shape[1:])} in layer {layer}",
                        f"{tuple(last.shape[1:])}, the heads of this {type(self.model).__name__} and their width",
                        "build it with this model: fg.cache_steering(model, tokenizer, contrast)",
                    )
                last += added.to(last).repeat_interleave(len(last) // len(added), 0)  # beams share their prompt's


def _change_of(layer: int, rows: Sequence[Sequence[CacheSteering]]) -> LayerChange:
    """The sum of what the rows add in a layer. Raises PairingError where shapes differ."""
    there = [
        (row, item, item.layers.index(layer))
        for row, items in enumerate(rows)
        for item in items
        if layer in item.layers
    ]
    keys = [(row, i.key_coefficient * i.keys[n].double()) for row, i, n in there if i.key_coefficient]
    values = [(row, i.value_coefficient * i.values[n].double()) for row, i, n in there if i.value_coefficient]
    return LayerChange(_sum_by_row(keys, len(rows)), _sum_by_row(values, len(rows)))


def _sum_by_row(parts: Sequence[tuple[int, Tensor]], rows: int) -> Tensor | None:
    """The sum of tensors (n_kv_heads, d_head) for each row, (rows, n_kv_heads, d_head). Raises PairingError."""
    if not parts:
        return None
    if len(shapes := {tuple(part.shape) for _, part in parts}) > 1:
        raise PairingError(
            f"CacheSteering values of the shapes {' and '.join(map(str, sorted(shapes)))} in one layer",
            "those of one model",
            "build them all with the model that is steered",
        )
    total = parts[0][1].new_zeros(rows, *parts[0][1].shape)
    for row, part in parts:
        total[row] += part
    return total


def check_model(model: nn.Module) -> None:
    """Raises SteeringError for a model with prompt or prefix tuning, or with latent attention."""
    if virtual_tokens(model):
        raise SteeringError(
            "a CacheSteering on a model with virtual tokens (prompt or prefix tuning)",
            "a model whose prompts are texts alone",
            "disable the adapter, or steer activations",
        )
    if getattr(model.config.get_text_config(), "kv_lora_rank", None):  # type: ignore[union-attr, operator]
        raise SteeringError(
            f"a CacheSteering on {a(type(model).__name__)}, which caches what its keys and values are made from",
            "a model that caches keys and values",
            "steer activations, at attn_out or z",
        )


def check_cache(cache: Any, got: str) -> None:
    """Raises SteeringError, with what there is instead, for all but a growing cache of keys and values in place."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = getattr(cache, "layers", ())
    if type(cache) is DynamicCache and not cache.offloading and all(type(layer) in kinds for layer in layers):
        return
    if cache is not None:
        others = sorted({type(layer).__name__ for layer in layers if type(layer) not in kinds})
        offloaded = ", offloaded" if getattr(cache, "offloading", False) else ""
        got = f"{a(type(cache).__name__)}{offloaded}{f' with {others[0]}' if others else ''}"
    raise SteeringError(
        f"a CacheSteering for {got}",
        "a DynamicCache of keys and values in every layer, which is what attention models generate with by default",
        "leave cache_implementation, use_cache and past_key_values out; where blocks are recurrent, steer activations",
    )


def cached_states(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, (batch, n_kv_heads, tokens, d_head). Raises PairingError where it has none."""
    held = cache.layers[layer] if layer < len(cache.layers) else None
    if held is None or not held.get_seq_length():
        raise PairingError(
            f"layer {layer}, which caches no keys and values of its own",
            f"a layer below {len(cache.layers)} that caches them",
            "leave it out of layers=",
        )
    return held.keys, held.values


def _part(arguments: dict[str, Any], begin: int, end: int, before: int) -> dict[str, Any]:
    """The arguments of a pass over some of its tokens, with so many cached before it. Raises SteeringError."""
    part = dict(arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor | dict) or (isinstance(value, dict) and not value):
            continue
        if name in ("input_ids", "inputs_embeds"):
            part[name] = value[:, begin:end]
        elif name in _BY_TOKEN and isinstance(value, Tensor):
            part[name] = value[..., begin:end]
        elif name == "attention_mask" and isinstance(value, Tensor) and value.ndim == 2:
            part[name] = value[:, : before + end]
        else:
            raise SteeringError(
                f"a CacheSteering for a prompt with {name}",
                "a prompt of ids or embeddings with an attention mask (rows, tokens), which is read in two parts",
                f"leave {name} out, or steer activations",
            )
    return part
