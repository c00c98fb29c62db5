"""Gradient checkpointing: blocks that keep their inputs alone, and are computed again in the backward pass.

with checkpointed_blocks(model, 13):                 blocks from 13 on
    loss = ...
loss.backward()
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fgsteer.models.hookpoints import blocks_of, uncompiled
from fgsteer.steering.shadows import shadowed


def checkpointed_blocks(model: nn.Module, first: int) -> AbstractContextManager[None]:
    """Let this thread's passes keep of each block from ``first`` on only what goes into it, for the backward pass.

    The backward pass may come after the block of code. Hooks of a block itself, as steering at its output or input
    sets them, lie outside of what is computed again; nothing may steer within these blocks, as at their attention or
    MLP. The model is to be in eval mode: random numbers are not drawn a second time as they were.
    """
    this_thread = threading.get_ident()

    def again(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != this_thread:
                return original(*args, **kwargs)
            run = partial(original, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

        return forward

    blocks = map(uncompiled, blocks_of(model)[first:])
    return shadowed((block, "forward", again(block.forward)) for block in blocks)
