"""Out of memory: a batch that does not fit is read in halves.

for part, found in in_parts(batches, read):
    ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from fgsteer.activations.batches import Batch
from fgsteer.activations.prefixes import SharedBatch
from fgsteer.errors import DataError, FgsteerWarning
from fgsteer.errors.checks import warn
from fgsteer.errors.wording import count

T = TypeVar("T")
Either = Batch | SharedBatch
# how torch says it, on CUDA, in cuBLAS, on the CPU of Linux and of Windows
_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def map_with_oom_backoff(batches: Iterable[Either], read: Callable[[Either], T]) -> Iterator[tuple[Either, T]]:
    """Each batch with what ``read`` gives for it; from the first that memory does not suffice for, in halves.

    Warns FgsteerWarning once. Raises DataError naming a text that does not fit alone.
    """
    most = math.inf  # padded tokens that were not too many yet
    for batch in batches:
        waiting: list[Either] = [batch]
        while waiting:
            part = waiting.pop()
            if part.tokens <= most or len(part.rows) == 1:
                found = _try(read, part)
                if found is not None:
                    yield part, found[0]
                    continue
                if most == math.inf:
                    warn(
                        f"a batch of {count(part.tokens, 'token')} does not fit in memory: going on in halves; "
                        "a smaller batch_tokens spares the attempt",
                        FgsteerWarning,
                    )
            middle = len(part.rows) // 2
            halves = [part.part(slice(middle, None)), part.part(slice(middle))]
            most = min(most, max(half.tokens for half in halves))
            waiting += halves


def _try(read: Callable[[Either], T], batch: Either) -> tuple[T] | None:
    """What ``read`` gives, or None where memory does not suffice for several rows. Raises DataError for one row."""
    try:
        return (read(batch),)
    except (RuntimeError, MemoryError) as error:
        short = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not short and not any(word in str(error) for word in _WORDS):
            raise
        if len(batch.rows) > 1:
            return None
        row = batch.rows[0]
        raise DataError(
            f"{row.where or f'text {row.index}'}, {count(len(row.ids), 'token')} long, does not fit in memory",
            "one that does",
            "pass max_tokens=, load the model in a smaller dtype, or use another device",
        ) from error
