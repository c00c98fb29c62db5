"""One thread steers a model at a time: hooks would act on every other thread's forward passes too.

with claim(model):
    check_thread(mine)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fgsteer.errors import SteeringError
from fgsteer.hookpoints import decoder_of

_lock = threading.Lock()
_owners: dict[int, list[int]] = {}  # by the id of a decoder: the thread of each open block on it


@contextmanager
def claim(model: nn.Module) -> Iterator[None]:
    """The model for this thread alone, which may claim it again. Raises SteeringError while another one has it."""
    key, me = id(decoder_of(model)), threading.get_ident()
    with _lock:
        for thread in _owners.get(key, ()):
            check_thread(thread, "a second steer block")
        _owners.setdefault(key, []).append(me)
    try:
        yield
    finally:
        with _lock:
            _owners[key].remove(me)
            if not _owners[key]:
                del _owners[key]


def check_thread(owner: int, what: str = "a forward pass") -> None:
    """Nothing in the thread that steers, or inside a compiled graph. Raises SteeringError in another thread."""
    if not torch.compiler.is_compiling() and threading.get_ident() != owner:
        raise SteeringError(
            f"{what} on a model that another thread is steering",
            "one thread at a time",
            "enter steer in the thread that runs the model, hold a lock around both, or put the requests into "
            "one batch: generate(…, steering=[a, b, None])",
        )
