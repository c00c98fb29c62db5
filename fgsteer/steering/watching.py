"""What a steer block did in a pass: each update, the activations that it was given and those that it gave.

with watch(model) as steps, steer(model, vec.add(8.0)):
    model(ids)
steps[0].after - steps[0].before
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fgsteer.activations.prompt_ends import PassKey, pass_key
from fgsteer.errors.changes import Changes, temporary_change
from fgsteer.interventions.kernel import ReadyUpdate
from fgsteer.models.hookpoints import Hookpoint

_watchers: dict[PassKey, list[Step]] = {}  # of the blocks that are entered now, by model and thread


@dataclass(frozen=True, eq=False)
class Step:
    """One update of one pass.

    Args:
        number: The number of the update in its block, in the order of application.
        hookpoint: Where it acts.
        update: What it does.
        before: The activations that it was given, (batch, tokens, d_model).
        after: The activations that it gave.
        where: The tokens that it changed, (batch, tokens); None for all.
        gate: Where its gate was open, (batch, tokens); None without a gate.
        source: What it read at another hookpoint, or None.
        prompt: What it read of prompts, (batch, 1), or None.
    """

    number: int
    hookpoint: Hookpoint
    update: ReadyUpdate
    before: Float[Tensor, "batch tokens d_model"]
    after: Float[Tensor, "batch tokens d_model"]
    where: Bool[Tensor, "batch tokens"] | None
    gate: Bool[Tensor, "batch tokens"] | None
    source: Tensor | None = None
    prompt: Tensor | None = None

    def strengths(self) -> Float[Tensor, "batch tokens k"]:
        """The numbers that each of the k directions was multiplied by; 0 at tokens that were not changed."""
        amounts = self.update.amounts(self.before, self.source, self.prompt)
        amounts = amounts.expand(*self.before.shape[:2], -1)
        return amounts if self.where is None else torch.where(self.where[..., None], amounts, 0.0)


@temporary_change
def watch(changes: Changes, model: nn.Module) -> Iterator[list[Step]]:
    """A block that lists what ``steer`` blocks do which are entered inside it, on this model in this thread.

    Steps of updates whose scope holds no token of a pass are left out. The list grows with every pass; clear it between
    passes.
    """
    steps: list[Step] = []
    changes.set_item(_watchers, pass_key(model), steps)
    yield steps


def watcher_of(key: PassKey) -> list[Step] | None:
    """Where a block that is entered now notes its steps; None where nothing watches."""
    return _watchers.get(key)
