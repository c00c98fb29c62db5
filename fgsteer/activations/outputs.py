"""The hidden states in what a module returns: a tensor, or the first entry of a tuple or list."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import HookpointError


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states of a module's output. Raises HookpointError where there are none."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise HookpointError(
            f"a module output of type {type(output).__name__}",
            "a tensor, or a tuple that begins with one",
            "models whose blocks return anything else are not supported",
        )
    return hidden


def replace_hidden_states(output: Any, hidden: Tensor) -> Any:
    """Return the same module output with other hidden states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def reshape_by_token(hidden: Tensor, batch: int, length: int) -> Float[Tensor, "batch tokens width"]:
    """Return hidden states as (batch, tokens, width), also of modules that flatten batch and tokens (OPT's fc2).

    Raises HookpointError when there is not one vector a token, or when tokens come before rows.
    """
    if hidden.shape[:2] == (length, batch) and hidden.ndim == 3 and min(batch, length) > 1 and batch != length:
        raise HookpointError(
            f"hidden states of shape {tuple(hidden.shape)}, with tokens before rows",
            f"hidden states of shape ({batch}, {length}, width)",
            "models whose blocks keep the sequence first are not supported",
        )
    if hidden.numel() != batch * length * hidden.shape[-1]:
        raise HookpointError(
            f"hidden states of shape {tuple(hidden.shape)}",
            f"one vector for each of {batch} x {length} tokens",
            "models with several residual streams are not supported",
        )
    return hidden.reshape(batch, length, -1)
