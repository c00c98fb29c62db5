"""Which of several processes this one is, as torchrun or another launcher says. No process talks to another.

torchrun --nproc-per-node 2 -m fgsteer collect love -o love.stats
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fgsteer.errors import DataError


@dataclass(frozen=True)
class Ranks:
    """The ``rank`` of this process among the ``world`` processes of one job, from 0.

    Raises DataError unless 0 ≤ rank < world.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise DataError(
                f"RANK = {self.rank} with WORLD_SIZE = {self.world}",
                "a RANK from 0 to WORLD_SIZE - 1",
                "set the environment variables as torchrun does, or unset both",
            )

    @classmethod
    def from_env(cls) -> Ranks:
        """Read RANK and WORLD_SIZE; without them this is the only process. Raises DataError for no whole numbers."""
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            numbers = int(rank), int(world)
        except ValueError as error:
            raise DataError(
                f"RANK = {rank!r} and WORLD_SIZE = {world!r}",
                "two whole numbers in these environment variables",
                "set them as torchrun does, or unset both",
            ) from error
        return cls(*numbers)

    def owns(self, number: int) -> bool:
        """Tell whether shard ``number`` is for this process to make."""
        return number % self.world == self.rank
