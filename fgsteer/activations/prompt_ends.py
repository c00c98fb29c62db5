"""Where prompts end in the forward passes that run now: noted by who runs them, read by steer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fgsteer.models.hookpoints import decoder_of
from fgsteer.models.properties import input_device

_ends: dict[tuple[int, int], Tensor] = {}  # by decoder and thread: where prompts end in the passes that run now


def pass_key(model: nn.Module) -> tuple[int, int]:
    """What tells passes of this model in this thread from all others."""
    return id(decoder_of(model)), threading.get_ident()


@contextmanager
def note_prompt_ends(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Forward passes over prompts and completions at once, for every ``steer`` block on the model around or inside.

    ``lengths``, one a row of the batch: the columns, padding included, before its first completion token.
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


def noted_prompt_ends(key: tuple[int, int]) -> Int[Tensor, " batch"] | None:
    """What ``note_prompt_ends`` says of the pass that runs now, None outside of it."""
    return _ends.get(key)
