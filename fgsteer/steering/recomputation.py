"""Gradient checkpointing: what is computed again for a backward pass sees the tokens of its own pass.

A model that trains with checkpointing runs parts of itself a second time while gradients are
computed, when a block's hooks may hold another pass's positions, or be gone. Each of these parts
is therefore given the positions that it first ran with.

    recomputation = Recomputation(positions, claim)
    recomputation.install(decoder, hooks)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from fgsteer.errors import SteeringError
from fgsteer.models.claims import Claim, backward_pass
from fgsteer.steering.positions import Positions
from fgsteer.steering.shadows import shadow

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name, on each module that checkpoints


class Recomputation:
    """The passes of one block, and the parts of them that are computed again.

    What is compiled checks nothing; modules that checkpoint are left out of it, but not what they run.
    """

    def __init__(self, positions: Positions, claim: Claim) -> None:
        self.positions, self.claim = positions, claim
        self.backward = -1  # the backward pass in which the running forward pass began; -1 outside any

    def begin(self) -> None:
        """Note that the decoder begins a pass. Raises SteeringError where it may not."""
        if not torch.compiler.is_compiling():
            self.claim.check()
            self.backward = backward_pass()

    def check(self) -> None:
        """Raises SteeringError where no pass may run, or a module runs again whose positions were not kept."""
        if torch.compiler.is_compiling():
            return
        self.claim.check()
        if backward_pass() != self.backward:
            raise SteeringError(
                "a layer that is computed again for gradients, of a pass that ran outside this steer block or that "
                "other code than transformers checkpointed: which tokens it holds is not known",
                "forward and backward pass in one block, with model.gradient_checkpointing_enable() called before it",
                "move both into the block, or train without gradient checkpointing",
            )

    def install(self, decoder: nn.Module, hooks: ExitStack) -> None:
        """Keep the positions of everything that the decoder checkpoints, until the stack closes."""
        for module in decoder.modules():
            checkpoint = vars(module).get(_CHECKPOINT)
            if callable(checkpoint):
                shadow(module, _CHECKPOINT, self._keeping(checkpoint), hooks)

    def _keeping(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpointing function for functions that need the positions of their pass."""

        @wraps(checkpoint)
        def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.claim.open:
                return checkpoint(function, *args, **kwargs)
            return checkpoint(self._again(function), *args, **kwargs)

        eager: Callable[..., Any] = torch.compiler.disable(keeping, recursive=False)  # type: ignore[no-untyped-call]
        return eager

    def _again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, run with the positions of now each time after the first. Raises SteeringError there."""
        state, ran = self._state(), False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            if not ran:
                ran = True
                return function(*args, **kwargs)
            if not self.claim.open:
                raise SteeringError(
                    "a backward pass, with gradient checkpointing, after the steer block of its forward pass: "
                    "the layers are computed again, without steering",
                    "backward inside the block",
                    "call loss.backward() before the block is left, or train without gradient checkpointing",
                )
            self.claim.check("a backward pass")
            with self._restored(state):
                return function(*args, **kwargs)

        eager: Callable[..., Any] = torch.compiler.disable(run, recursive=False)  # type: ignore[no-untyped-call]
        return eager

    def _state(self) -> list[dict[str, Any]]:
        """All that is known of the running pass."""
        return [dict(vars(holder)) for holder in (self.positions, *self.positions.places)]

    @contextmanager
    def _restored(self, state: list[dict[str, Any]]) -> Iterator[None]:
        """The state of an earlier pass, in the backward pass that runs."""
        holders = (self.positions, *self.positions.places)
        now, began = self._state(), self.backward
        for holder, values in zip(holders, state, strict=True):
            vars(holder).update(values)
        self.backward = backward_pass()
        try:
            yield
        finally:
            for holder, values in zip(holders, now, strict=True):
                vars(holder).update(values)
            self.backward = began
