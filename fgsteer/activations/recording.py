"""Reading activations: batches of token rows, and one truncated forward pass per batch.

``record`` runs a model only as far as the last hookpoint asked for; no later block
and no head is computed.

    acts = record(model, ids, mask, [Hookpoint(6)])[Hookpoint(6)]      (batch, tokens, d_model)
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.models.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.models.properties import check_window, virtual_tokens, warn_of_dropout

if TYPE_CHECKING:
    from transformers import Cache


from fgsteer.activations.outputs import hidden_states_of, reshape_by_token


class _Reached(Exception):  # noqa: N818
    """Every hookpoint asked for has been read: the forward pass may stop."""


@checked
@torch.no_grad()
def record(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    attention: Int[Tensor, "batch seen"] | None,
    hookpoints: Iterable[Hookpoint],
    cache: Cache | None = None,
) -> dict[Hookpoint, Float[Tensor, "batch tokens d_model"]]:
    """Activations (batch, tokens, d_model) at each hookpoint, in the model's dtype.

    The forward pass stops at the last of them. With a ``cache`` it goes on from the tokens in there, which
    ``attention`` then covers too, and leaves its own in it. Virtual tokens of prompt and prefix tuning (PEFT) come
    before the ids and are not among what is returned. Raises HookpointError for one that the
    model lacks, DataError for none; warns FgsteerWarning of a model in train mode with dropout.
    """
    warn_of_dropout(model)
    check_window(model, ids.shape[1], "a row")
    wanted = list(dict.fromkeys(map(Hookpoint.parse, hookpoints)))
    if not wanted:
        raise DataError("no hookpoint", "at least one")
    found: dict[Hookpoint, Tensor] = {}
    mine = threading.get_ident()
    virtual = virtual_tokens(model)
    run = model if virtual else decoder_of(model)  # PEFT puts virtual tokens in front where the whole model is called

    def keep(hookpoint: Hookpoint, value: Tensor) -> None:
        if threading.get_ident() != mine:  # another thread's pass, which goes on as it is
            return
        batch, length = ids.shape
        if value.numel() == batch * (virtual + length) * value.shape[-1]:  # not those of a prefix, which are in a cache
            length += virtual
        found[hookpoint] = reshape_by_token(value, batch, length)[:, -ids.shape[1] :]
        if len(found) == len(wanted):
            raise _Reached
        found[hookpoint] = found[hookpoint].clone()  # the pass goes on, and Falcon adds to its MLP's output in place

    with ExitStack() as stack:
        for hookpoint in wanted:
            module, is_input = resolve(model, hookpoint)
            if is_input:

                def before(
                    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: Hookpoint = hookpoint
                ) -> None:
                    keep(at, args[0] if args else kwargs["hidden_states"])

                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            else:

                def after(_: nn.Module, __: tuple[Any, ...], output: Any, at: Hookpoint = hookpoint) -> None:
                    keep(at, hidden_states_of(output))

                handle = module.register_forward_hook(after)
            stack.callback(handle.remove)
        with suppress(_Reached):
            run(input_ids=ids, attention_mask=attention, **_continuing(model, ids, attention, cache))
    return found


def _continuing(model: nn.Module, ids: Tensor, attention: Tensor | None, cache: Cache | None) -> dict[str, Any]:
    """Arguments of a forward pass that goes on from a cache: the positions of its tokens, padding not counted."""
    if cache is None:
        return {"use_cache": False}
    assert attention is not None
    given: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if "position_ids" in inspect.signature(decoder_of(model).forward).parameters:  # BLOOM counts its mask
        given["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return given
