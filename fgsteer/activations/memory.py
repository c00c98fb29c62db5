"""Back off when memory runs out: a batch that does not fit is read in halves.

for batch, result in map_with_oom_backoff(batches, read):
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
AnyBatch = Batch | SharedBatch
# what torch's errors say on CUDA, in cuBLAS, on the CPU of Linux and of Windows
OUT_OF_MEMORY_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def map_with_oom_backoff(batches: Iterable[AnyBatch], read: Callable[[AnyBatch], T]) -> Iterator[tuple[AnyBatch, T]]:
    """Yield each batch with what ``read`` returns for it; a batch for which memory does not suffice goes in halves.

    From the first such batch on, no larger one is tried. Warns FgsteerWarning once. Raises DataError naming a text
    that does not fit alone.
    """
    max_tokens = math.inf  # padded tokens that have not been too many yet
    for batch in batches:
        waiting: list[AnyBatch] = [batch]
        while waiting:
            part = waiting.pop()
            if part.tokens <= max_tokens or len(part.rows) == 1:
                result = _try(read, part)
                if result is not None:
                    yield part, result[0]
                    continue
                if max_tokens == math.inf:
                    warn(
                        f"A batch of {count(part.tokens, 'token')} does not fit in memory and is read in halves. "
                        "Pass a smaller batch_tokens to spare the attempt.",
                        FgsteerWarning,
                    )
            middle = len(part.rows) // 2
            halves = [part.part(slice(middle, None)), part.part(slice(middle))]
            max_tokens = min(max_tokens, max(half.tokens for half in halves))
            waiting += halves


def _try(read: Callable[[AnyBatch], T], batch: AnyBatch) -> tuple[T] | None:
    """Return what ``read`` does, or None where memory does not suffice for several rows. Raises DataError for one."""
    try:
        return (read(batch),)
    except (RuntimeError, MemoryError) as error:
        is_typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_typed and not any(words in str(error) for words in OUT_OF_MEMORY_WORDS):
            raise
        if len(batch.rows) > 1:
            return None
        row = batch.rows[0]
        raise DataError(
            f"Memory does not suffice for {row.where or f'text {row.index}'}, with {count(len(row.ids), 'token')}.",
            "a text that fits",
            "pass max_tokens=, load the model in a smaller dtype, or use another device",
        ) from error
