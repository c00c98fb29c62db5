"""The blocks below the first steered one: what they compute is the same at every strength, so that they are run once.

A steered pass then goes on from their output. It is the whole model that is called all the same: embeddings, masks and
rotary embeddings are the model's own, and the lower blocks hand on what they returned before.

    output = output_of_blocks(model, ids, attention, 13)           what block 12 returns
    with skip_blocks(model, 13, output, times=4):                  for four copies of the rows
        model(input_ids=ids.repeat(4, 1), attention_mask=attention.repeat(4, 1), use_cache=False)
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from fgsteer.activations.outputs import hidden_states_of, replace_hidden_states
from fgsteer.interventions.readings import Preview
from fgsteer.models.hookpoints import blocks_of, decoder_of, uncompiled, why_not_added
from fgsteer.models.properties import virtual_tokens
from fgsteer.steering.entries import Entry, interventions_of
from fgsteer.steering.shadows import shadowed


class _Reached(Exception):  # noqa: N818
    """The block whose output is asked for has run: the forward pass may stop."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def unchanged_blocks(entry: Entry, blocks: int) -> int:
    """The number of lowest blocks, of so many, below all that an entry changes or reads."""
    items = interventions_of(entry)
    places = [at for item in items for at in (item.hookpoint, item.source) if at is not None]
    readings = [reading for item in items for reading in item.readings]
    if any(isinstance(reading, Preview) for reading in readings):
        return 0  # the prompt is read ahead by the whole model
    places += [reading.hookpoint for reading in readings]
    return min([blocks, *(at.layer + (at.site == "resid_post") for at in places)])


def has_plain_blocks(model: nn.Module) -> bool:
    """Whether the blocks are transformers' and of known kinds, which pass on a residual stream and no other state."""
    blocks = [*map(uncompiled, blocks_of(model))]
    return all(type(b).__module__.startswith("transformers.") and not why_not_added(b) for b in blocks)


def can_skip_blocks(model: nn.Module) -> bool:
    """Whether a pass may go on from the output of a block, and nothing changes but speed.

    That is in plain blocks, without virtual tokens, dropout or compiled graphs.
    """
    if not has_plain_blocks(model) or model.training or virtual_tokens(model):
        return False
    modules = (model, decoder_of(model), *blocks_of(model))
    return not any(uncompiled(m) is not m or m._compiled_call_impl is not None for m in modules)


def output_of_blocks(
    model: nn.Module, ids: Int[Tensor, "batch tokens"], attention: Int[Tensor, "batch tokens"], depth: int
) -> Any:
    """What the ``depth``-th block returns; the pass stops there. None where that is more than a residual stream."""
    block = uncompiled(blocks_of(model)[depth - 1])
    original, this_thread = block.forward, threading.get_ident()

    @wraps(original)
    def stop(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if threading.get_ident() != this_thread:
            return output
        raise _Reached(output)

    with shadowed([(block, "forward", stop)]):
        try:
            decoder_of(model)(input_ids=ids, attention_mask=attention, use_cache=False)
        except _Reached as reached:
            output = reached.output
        else:
            return None
        others = output[1:] if isinstance(output, tuple | list) else ()
        plain = hidden_states_of(output).shape[:-1] == ids.shape and all(other is None for other in others)
        return output if plain else None


def skip_blocks(model: nn.Module, depth: int, output: Any, times: int = 1) -> AbstractContextManager[None]:
    """Let this thread's passes in the block go on from what the ``depth``-th block returned, its rows ``times`` over.

    Hooks on the skipped blocks run as they would, on what these hand on.
    """
    this_thread = threading.get_ident()
    hidden = hidden_states_of(output).repeat(times, 1, 1)

    def hand_on(block: nn.Module, last: bool) -> Any:
        original = block.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != this_thread:
                return original(*args, **kwargs)
            given = args[0] if args else kwargs["hidden_states"]
            return replace_hidden_states(output, hidden if last else given)

        return forward

    blocks = enumerate(map(uncompiled, blocks_of(model)[:depth]), 1)
    return shadowed((block, "forward", hand_on(block, number == depth)) for number, block in blocks)
