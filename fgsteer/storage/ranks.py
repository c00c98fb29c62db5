"""Which of several processes this one is, as torchrun, or whoever else started them, says; none talks to another.

torchrun --nproc-per-node 2 -m fgsteer collect love -o love.stats
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fgsteer.errors import DataError


@dataclass(frozen=True)
class Ranks:
    """This process's number among the ``world`` processes of one job. Raises DataError unless 0 ≤ rank < world."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise DataError(f"RANK {self.rank} of WORLD_SIZE {self.world}", "0 to WORLD_SIZE - 1")

    @classmethod
    def from_env(cls) -> Ranks:
        """What RANK and WORLD_SIZE say; the only process where they are not set. Raises DataError."""
        given = {name: os.environ.get(name, other) for name, other in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        try:
            return cls(int(given["RANK"]), int(given["WORLD_SIZE"]))
        except ValueError as error:
            raise DataError(f"the environment variables {given}", "two whole numbers, as torchrun sets") from error

    def owns(self, number: int) -> bool:
        """Whether part ``number`` is for this process to make."""
        return number % self.world == self.rank
