"""torch's defaults, which a caller may have changed, as they are at first while a public function runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from threading import Lock

import torch

from fgsteer.errors.interrupts import whole_contextmanager

_lock = Lock()
_callers: list[torch.dtype] = []  # of calls that run now, the default dtype that is set back after the last of them


def has_usual_defaults() -> bool:
    """Tell whether tensors that name neither are float32 and on the CPU, and stay so."""
    usual = torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu"
    return usual and not _callers


@whole_contextmanager
def usual_defaults() -> Iterator[None]:
    """A block in which tensors that name neither are float32 and on the CPU.

    torch's default dtype is that of all threads: while one is in such a block it is float32 for all of them, and
    for what the block calls, such as a model whose own code relies on another default.
    """
    with ExitStack() as stack:
        with _lock:
            _callers.append(_callers[0] if _callers else torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        stack.callback(_leave)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def _leave() -> None:
    with _lock:
        dtype = _callers.pop()
        if not _callers:
            torch.set_default_dtype(dtype)
