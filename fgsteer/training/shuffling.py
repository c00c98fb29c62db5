"""Shuffled batches of activations, endless, from a place that can be noted and found again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import DataError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.storage.json_files import text_sha256
from fgsteer.training.activation_store import ActivationSource

BUFFER_TOKENS = 1 << 20  # tokens that are shuffled together


@dataclass(frozen=True)
class Place:
    """Where a run is in its source.

    Attributes:
        epoch: How often all shards have been read.
        shard: The first shard of the buffer, of those of the epoch in their order.
        batch: The batches of the buffer that have been used.
    """

    epoch: int = 0
    shard: int = 0
    batch: int = 0


class ShuffledBatches(Iterator[Float[Tensor, "batch d_model"]]):
    """Float32 batches of tokens drawn at random from several shards at a time, without end.

    What is drawn depends on the seed and the place alone. Where fewer tokens than a batch remain of a buffer, they are
    left out of that epoch.

    Args:
        source: The activations.
        hookpoint: At which of its hookpoints.
        batch: Tokens in a batch.
        seed: The seed of the order.
        place: Where to begin.
        buffer_tokens: Tokens that are held and shuffled together, at least.
        device: Where the batches are wanted; what is held stays in the memory of the CPU.

    Raises:
        DataError: The source has fewer tokens than a batch.
    """

    def __init__(
        self,
        source: ActivationSource,
        hookpoint: Hookpoint,
        batch: int,
        seed: int,
        place: Place | None = None,
        *,
        buffer_tokens: int = BUFFER_TOKENS,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.hookpoint, self.batch, self.seed = source, hookpoint, batch, seed
        self.place, self.buffer_tokens, self.device = place or Place(), buffer_tokens, device
        self._shards = source.shards(hookpoint, self.place.shard)
        self._buffer: Tensor | None = None
        self._order = torch.empty(0, dtype=torch.long)
        self._next_shard = self.place.shard
        self._usable = self.place != Place()  # whether this epoch has had a batch

    def __next__(self) -> Float[Tensor, "batch d_model"]:
        start = self.place.batch * self.batch
        while self._buffer is None or start + self.batch > len(self._order):
            if self._buffer is not None:
                self.place = replace(self.place, shard=self._next_shard, batch=0)
            self._fill()
            start = self.place.batch * self.batch
        self.place = replace(self.place, batch=self.place.batch + 1)
        self._usable = True
        assert self._buffer is not None
        return self._buffer[self._order[start : start + self.batch]].to(self.device).float()

    def _fill(self) -> None:
        """Load the next shards into the buffer, from the first one again where there are none left."""
        parts: list[Tensor] = []
        while sum(map(len, parts)) < max(self.buffer_tokens, self.batch):
            part = next(self._shards, None)
            if part is None:
                break
            self._next_shard += 1
            parts.append(part)
        if not parts:
            self._start_epoch()
            return
        self._buffer = torch.cat(parts)
        generator = torch.Generator().manual_seed(self._seed())
        self._order = torch.randperm(len(self._buffer), generator=generator)

    def _seed(self) -> int:
        """The seed of the order of the buffer, which seed, epoch and first shard decide."""
        return int(text_sha256([self.seed, self.place.epoch, self.place.shard])[:15], 16)

    def _start_epoch(self) -> None:
        """Begin with the first shard again. Raises DataError where that would give no batch."""
        if not self._usable:
            held = 0 if self._buffer is None else len(self._buffer)
            raise DataError(
                f"{held} tokens of activations at {self.hookpoint}",
                f"at least one batch of {self.batch}",
                "train on more text, or pass a smaller batch",
            )
        if not self.source.repeats:
            raise DataError(
                f"The texts end before the training at {self.hookpoint} does.",
                "texts with as many tokens as are trained on",
                "pass more text, fewer tokens, or store=True, which reads the same activations several times",
            )
        self.place = Place(self.place.epoch + 1)
        self._shards, self._buffer, self._next_shard, self._usable = self.source.shards(self.hookpoint), None, 0, False
