"""Put other hidden states in the place of a model's own, as when an SAE's reconstruction is measured.

with splice(model, sae.hookpoint, lambda h: sae.decode(sae.encode(h))):
    model(ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from fgsteer.activations.outputs import hidden_states_of, replace_hidden_states
from fgsteer.activations.prompt_ends import thread_reads_ahead
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.registering import registered

Change = tuple[nn.Module, bool, Callable[[Tensor], Tensor]]  # a module, whether its input is changed, and how


def splice(model: nn.Module, hookpoint: Hookpoint, replace: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Replace what is at a hookpoint for the block, in every forward pass.

    Args:
        model: A Hugging Face causal language model.
        hookpoint: Where.
        replace: From hidden states (batch, tokens, d_model) to those that the model goes on with.

    Raises:
        HookpointError: The model lacks the hookpoint.
    """
    return splice_modules([(*resolve(model, hookpoint), replace)])


def splice_modules(changes: Iterable[Change]) -> AbstractContextManager[None]:
    """Replace inputs or outputs of modules for the block, in every forward pass."""
    return registered(
        (module, is_input, (_before if is_input else _after)(replace)) for module, is_input, replace in changes
    )


def _before(replace: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if thread_reads_ahead():
            return args, kwargs
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replace(kwargs["hidden_states"])}

    return before


def _after(replace: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return None if thread_reads_ahead() else replace_hidden_states(output, replace(hidden_states_of(output)))

    return after
