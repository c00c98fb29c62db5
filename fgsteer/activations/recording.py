"""Record activations: one forward pass over a batch of token rows, which stops at the last hookpoint.

No later block and no head is computed.

    acts = record(model, ids, mask, [Hookpoint(6)])[Hookpoint(6)]      (batch, tokens, d_model)
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fgsteer.activations.outputs import hidden_states_of, reshape_by_token
from fgsteer.activations.prompt_ends import pass_key, reads_ahead
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.models.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.models.properties import check_window, virtual_tokens, warn_of_dropout
from fgsteer.models.registering import Hook, registered

if TYPE_CHECKING:
    from transformers import Cache


class _AllRecorded(Exception):  # noqa: N818
    """Every hookpoint asked for has been recorded: the forward pass may stop."""


@checked
@torch.no_grad()
def record(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    attention: Int[Tensor, "batch seen"] | None,
    hookpoints: Iterable[Hookpoint],
    cache: Cache | None = None,
) -> dict[Hookpoint, Float[Tensor, "batch tokens d_model"]]:
    """Record the activations at hookpoints in one forward pass, which stops at the last of them.

    Args:
        model: A Hugging Face causal language model.
        ids: Token ids (batch, tokens).
        attention: Attention mask; with a ``cache`` it covers the tokens in there too.
        hookpoints: Where to record.
        cache: Keys and values of earlier tokens, from which the pass goes on, and to which it adds its own.

    Returns:
        Activations (batch, tokens, width) by hookpoint, in the model's dtype. Virtual tokens of prompt and prefix
        tuning (PEFT) come before the ids and are not among them.

    Raises:
        HookpointError: The model lacks a hookpoint.
        DataError: There is no hookpoint, or there are more tokens than the model has positions.

    Warns:
        FgsteerWarning: The model is in train mode and has dropout.
    """
    warn_of_dropout(model)
    check_window(model, ids.shape[1], "a row")
    wanted = list(dict.fromkeys(map(Hookpoint.parse, hookpoints)))
    if not wanted:
        raise DataError("no hookpoint", "at least one hookpoint to record at", "pass hookpoints=")
    recorded: dict[Hookpoint, Tensor] = {}
    this_thread, key = threading.get_ident(), pass_key(model)
    is_ahead = reads_ahead(key)
    virtual = virtual_tokens(model)
    run = model if virtual else decoder_of(model)  # PEFT puts virtual tokens in front where the whole model is called

    def keep(hookpoint: Hookpoint, value: Tensor) -> None:
        if threading.get_ident() != this_thread:  # another thread's pass, which goes on as it is
            return
        if reads_ahead(key) != is_ahead:  # a gate's own pass inside the one that is recorded
            return
        batch, length = ids.shape
        if value.numel() == batch * (virtual + length) * value.shape[-1]:  # not those of a prefix, which are in a cache
            length += virtual
        recorded[hookpoint] = reshape_by_token(value, batch, length)[:, -ids.shape[1] :]
        if len(recorded) == len(wanted):
            raise _AllRecorded
        # the pass goes on, and Falcon adds to its MLP's output in place
        recorded[hookpoint] = recorded[hookpoint].clone()

    def before(at: Hookpoint, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(at, args[0] if args else kwargs["hidden_states"])

    def after(at: Hookpoint, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(at, hidden_states_of(output))

    hooks: list[Hook] = []
    for hookpoint in wanted:
        module, is_input = resolve(model, hookpoint)
        hooks.append((module, is_input, partial(before if is_input else after, hookpoint)))
    with registered(hooks):
        with suppress(_AllRecorded):
            run(input_ids=ids, attention_mask=attention, **_cache_arguments(model, ids, attention, cache))
        return dict(recorded)  # a call, at which Ctrl-C is raised that came while the pass was dropped


def _cache_arguments(model: nn.Module, ids: Tensor, attention: Tensor | None, cache: Cache | None) -> dict[str, Any]:
    """Return the arguments of a pass that goes on from a cache: the positions of its tokens, padding not counted."""
    if cache is None:
        return {"use_cache": False}
    assert attention is not None
    arguments: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if "position_ids" in inspect.signature(decoder_of(model).forward).parameters:  # BLOOM counts its mask
        arguments["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return arguments
