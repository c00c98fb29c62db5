"""What the forward passes that run now are: noted by the code that runs them, read by ``steer`` and by other hooks.

Where prompts end in them, and whether they read a prompt ahead of the pass that is steered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fgsteer.errors.changes import Changes, temporary_change
from fgsteer.models.hookpoints import decoder_of
from fgsteer.models.properties import input_device

PassKey = tuple[int, int]  # the id of a decoder, and a thread
_ends: dict[PassKey, Tensor] = {}  # where prompts end in the passes that run now
_ahead: set[PassKey] = set()  # models that read ahead now, by thread


def pass_key(model: nn.Module) -> PassKey:
    """Return what tells passes of this model in this thread from all others."""
    return id(decoder_of(model)), threading.get_ident()


@temporary_change
def note_prompt_ends(changes: Changes, model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Note where prompts end in passes over prompts and completions at once, for every ``steer`` block on the model.

    ``lengths`` has an entry for each row of the batch: the columns, padding included, before its first completion
    token. It does not matter whether the ``steer`` block is around this one or inside.
    """
    changes.set_item(_ends, pass_key(model), torch.tensor(lengths, device=input_device(model)))
    yield


def noted_prompt_ends(key: PassKey) -> Int[Tensor, " batch"] | None:
    """Return what ``note_prompt_ends`` noted for the pass that runs now, None outside of it."""
    return _ends.get(key)


@temporary_change
def reading_ahead(changes: Changes, model: nn.Module) -> Iterator[None]:
    """Note that this thread's passes of the model read prompts ahead: no block steers them, and no other hook acts."""
    key = pass_key(model)
    changes.undo_by(partial(_ahead.discard, key))
    _ahead.add(key)
    yield


def reads_ahead(key: PassKey) -> bool:
    """Return whether the pass that runs now reads a prompt ahead."""
    return not torch.compiler.is_compiling() and key in _ahead


def thread_reads_ahead() -> bool:
    """Return whether a pass that reads ahead runs in this thread, of whichever model."""
    return not torch.compiler.is_compiling() and any(thread == threading.get_ident() for _, thread in _ahead)
