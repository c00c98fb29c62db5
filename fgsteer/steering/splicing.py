"""Put other hidden states in the place of a model's own, as when an SAE's reconstruction is measured.

with splice(model, sae.hookpoint, lambda h: sae.decode(sae.encode(h))):
    model(ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fgsteer.activations.outputs import hidden_states_of, replace_hidden_states
from fgsteer.models.hookpoints import Hookpoint, resolve


@contextmanager
def splice(model: nn.Module, hookpoint: Hookpoint, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what is at a hookpoint for the block, in every forward pass.

    Args:
        model: A Hugging Face causal language model.
        hookpoint: Where.
        replace: From hidden states (batch, tokens, d_model) to those that the model goes on with.

    Raises:
        HookpointError: The model lacks the hookpoint.
    """
    module, is_input = resolve(model, hookpoint)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replace(kwargs["hidden_states"])}

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return replace_hidden_states(output, replace(hidden_states_of(output)))

    if is_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
