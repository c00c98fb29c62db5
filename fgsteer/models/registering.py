"""Forward hooks that come off again, whatever happens.

with registered([(module, False, keep)]):
    model(ids)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from fgsteer.errors.changes import Changes, temporary_change

Hook = tuple[nn.Module, bool, Callable[..., Any]]  # a module, whether the hook is given its input, and the hook


@temporary_change
def registered(changes: Changes, hooks: Iterable[Hook]) -> Iterator[None]:
    """A block with hooks: those of outputs, and those of inputs, which are given keyword arguments too."""
    for module, is_input, hook in hooks:
        register(changes, module, is_input, hook)
    yield


def register(
    changes: Changes, module: nn.Module, is_input: bool, hook: Callable[..., Any], *, prepend: bool = False
) -> RemovableHandle:
    """Set a hook until the changes are undone."""
    others = {*module._forward_hooks, *module._forward_pre_hooks}
    changes.undo_by(partial(_take_off, module, hook, others))
    if is_input:
        return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)
    return module.register_forward_hook(hook, prepend=prepend)


def _take_off(module: nn.Module, hook: Callable[..., Any], others: Container[int]) -> None:
    """Take a hook off by what it is: an exception may have kept its handle from whoever set it.

    ``others`` are the numbers of hooks that were set before, of which one may be the same function.
    """
    for hooks, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for number, other in list(hooks.items()):
            if other is hook and number not in others:
                hooks.pop(number, None)
        for number in with_kwargs.keys() - hooks.keys():  # also what an exception left of it
            with_kwargs.pop(number, None)
