"""Forward hooks that come off again, whatever happens.

with registered([partial(module.register_forward_hook, keep)]):
    model(ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from torch.utils.hooks import RemovableHandle

from fgsteer.errors.interrupts import whole_contextmanager


@whole_contextmanager
def registered(hooks: Iterable[Callable[[], RemovableHandle]]) -> Iterator[None]:
    """A block with hooks, each given as a function that registers it."""
    with ExitStack() as stack:
        for register in hooks:
            stack.callback(register().remove)
        yield
