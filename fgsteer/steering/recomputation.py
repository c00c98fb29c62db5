"""Gradient checkpointing: layers that are computed again for a backward pass are steered as they first were.

A model that trains with checkpointing runs parts of itself a second time while gradients are
computed, when a block's hooks may hold another pass's positions, or be gone. Each of these parts
is therefore given the positions that it first ran with.

    recomputation = Recomputation(positions, claim)
    recomputation.install(decoder, changes)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import nn

from fgsteer.errors import SteeringError
from fgsteer.errors.changes import Changes
from fgsteer.models.claims import Claim, backward_pass
from fgsteer.steering.gating import Readings
from fgsteer.steering.positions import Positions
from fgsteer.steering.shadows import shadow

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name, on each module that checkpoints


class Recomputation:
    """The passes of one block, and the parts of them that are computed again.

    What is compiled checks nothing; modules that checkpoint are left out of it, but not what they run.
    """

    def __init__(self, positions: Positions, readings: Readings, claim: Claim) -> None:
        self.positions, self.readings, self.claim = positions, readings, claim
        self.backward = -1  # the backward pass in which the running forward pass began; -1 outside any

    def begin(self) -> None:
        """Note that the decoder begins a pass. Raises SteeringError where it may not."""
        if not torch.compiler.is_compiling():
            self.claim.check()
            self.backward = backward_pass()

    def is_same_pass(self) -> bool:
        """Tell whether what runs belongs to the pass that began last: neither another thread's, nor computed again."""
        return get_ident() == self.claim.thread and backward_pass() == self.backward

    def check(self) -> None:
        """Raises SteeringError where no pass may run, or where a module runs again whose positions were not kept."""
        if torch.compiler.is_compiling():
            return
        self.claim.check()
        if backward_pass() != self.backward:
            raise SteeringError(
                "A layer is recomputed for gradients, but its forward pass ran outside this steer block or was "
                "checkpointed by code other than transformers, so fgsteer cannot tell which tokens it holds.",
                "forward and backward pass in one block, with model.gradient_checkpointing_enable() called before it",
                "move both into the block, or train without gradient checkpointing",
            )

    def install(self, decoder: nn.Module, changes: Changes) -> None:
        """Keep the positions of everything that the decoder checkpoints, until the changes are undone."""
        for module in decoder.modules():
            checkpoint = vars(module).get(_CHECKPOINT)
            if callable(checkpoint):
                shadow(module, _CHECKPOINT, self._with_positions(checkpoint), changes)

    def _with_positions(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """The checkpointing function, which keeps the positions of the pass that it is called in."""

        @wraps(checkpoint)
        def keep_positions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.claim.open:
                return checkpoint(function, *args, **kwargs)
            return checkpoint(self._rerunnable(function), *args, **kwargs)

        eager: Callable[..., Any] = torch.compiler.disable(keep_positions, recursive=False)  # type: ignore[no-untyped-call]
        return eager

    def _rerunnable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which runs with the present positions each time after the first. Raises SteeringError then."""
        state, ran = self._state(), False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            if not ran:
                ran = True
                return function(*args, **kwargs)
            if not self.claim.open:
                raise SteeringError(
                    "A backward pass with gradient checkpointing came after the steer block of its forward pass, and "
                    "would compute the layers again without steering.",
                    "the backward pass inside the block",
                    "call loss.backward() before the block is left, or train without gradient checkpointing",
                )
            self.claim.check("a backward pass")
            with self._restored(state):
                return function(*args, **kwargs)

        eager: Callable[..., Any] = torch.compiler.disable(run, recursive=False)  # type: ignore[no-untyped-call]
        return eager

    @property
    def _holders(self) -> list[Any]:
        return [self.positions, *self.positions.masks, *self.readings.places, *self.readings.sources]

    def _state(self) -> list[dict[str, Any]]:
        """Everything that is known of the running pass: its positions, and what gates read in lower blocks."""
        return [dict(vars(holder)) for holder in self._holders]

    @contextmanager
    def _restored(self, state: list[dict[str, Any]]) -> Iterator[None]:
        """The state of an earlier pass, in the backward pass that runs."""
        holders = self._holders
        present, backward = self._state(), self.backward
        for holder, values in zip(holders, state, strict=True):
            vars(holder).update(values)
        self.backward = backward_pass()
        try:
            yield
        finally:
            for holder, values in zip(holders, present, strict=True):
                vars(holder).update(values)
            self.backward = backward
