"""torch's defaults, which a caller may have changed, as they are at first while a public function runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from threading import RLock

import torch

from fgsteer.errors.changes import Changes, temporary_change

_lock = RLock()
_callers: dict[object, torch.dtype] = {}  # of calls that run now, the default dtype that is set back after the last


def has_usual_defaults() -> bool:
    """Tell whether tensors that name neither are float32 and on the CPU, and stay so."""
    usual = torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu"
    return usual and not _callers


@temporary_change
def usual_defaults(changes: Changes) -> Iterator[None]:
    """A block in which tensors that name neither are float32 and on the CPU.

    torch's default dtype is that of all threads: while one is in such a block it is float32 for all of them, and
    for what the block calls, such as a model whose own code relies on another default.
    """
    caller = object()
    changes.undo_by(partial(_leave, caller))
    with _lock:
        _callers[caller] = next(iter(_callers.values()), torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
    with torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext():
        yield


def _leave(caller: object) -> None:
    with _lock:
        if set(_callers) == {caller}:
            torch.set_default_dtype(_callers[caller])
        _callers.pop(caller, None)
