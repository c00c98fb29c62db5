"""Where prompts end in the forward passes that run now: noted by the code that runs them, read by ``steer``."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fgsteer.models.hookpoints import decoder_of
from fgsteer.models.properties import input_device

PassKey = tuple[int, int]  # the id of a decoder, and a thread
_ends: dict[PassKey, Tensor] = {}  # where prompts end in the passes that run now


def pass_key(model: nn.Module) -> PassKey:
    """Return what tells passes of this model in this thread from all others."""
    return id(decoder_of(model)), threading.get_ident()


@contextmanager
def note_prompt_ends(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Note where prompts end in passes over prompts and completions at once, for every ``steer`` block on the model.

    ``lengths`` has an entry for each row of the batch: the columns, padding included, before its first completion
    token. It does not matter whether the ``steer`` block is around this one or inside.
    """
    key = pass_key(model)
    before, _ends[key] = _ends.get(key), torch.tensor(lengths, device=input_device(model))
    try:
        yield
    finally:
        if before is None:
            del _ends[key]
        else:
            _ends[key] = before


def noted_prompt_ends(key: PassKey) -> Int[Tensor, " batch"] | None:
    """Return what ``note_prompt_ends`` noted for the pass that runs now, None outside of it."""
    return _ends.get(key)
