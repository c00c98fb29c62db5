"""What gates read in the passes of one steer block: of each token, or once for a prompt and then kept.

readings = Readings(interventions, positions)
readings.take(hookpoint, h)             in the hook at a hookpoint where something is read
readings.mask(gate, hookpoint, h)       the tokens at which a gate is open
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.interventions.base import Intervention
from fgsteer.interventions.gates import Condition, Gate, Mask, Reading
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.steering.positions import Positions, ScopeMask


class Readings:
    """The readings of the gates of one steer block.

    Args:
        interventions: All interventions of the block.
        positions: Which tokens the running pass holds; a scope of its prompt is added where a prompt is read.
    """

    def __init__(self, interventions: Iterable[Intervention], positions: Positions) -> None:
        gated = [(item.when, item.hookpoint) for item in interventions if item.when is not None]
        pairs = [(condition.reading, at) for gate, at in gated for condition in gate.conditions]
        self.positions = positions
        self.prompt: ScopeMask | None = None
        if any(reading.pooling for reading, _ in pairs):
            self.prompt = ScopeMask("prompt", bos=False)
            positions.masks = [*positions.masks, self.prompt]
        self.elsewhere: dict[Hookpoint, list[Reading]] = {}  # those that are read before their intervention acts
        for reading, at in pairs:
            if reading.hookpoint != at and reading not in self.elsewhere.get(reading.hookpoint, []):
                self.elsewhere.setdefault(reading.hookpoint, []).append(reading)
        self.values: dict[int, Tensor] = {}  # by reading: (batch, tokens) of the running pass
        self.kept: dict[int, Tensor] = {}  # by reading: (batch, 1) of the prompts

    def take(self, hookpoint: Hookpoint, h: Tensor) -> None:
        """Note what is read of the activations (batch, tokens, d_model) at a hookpoint."""
        for reading in self.elsewhere.get(hookpoint, ()):
            self.values[id(reading)] = self._value(reading, h)

    def mask(self, gate: Gate, hookpoint: Hookpoint, h: Tensor) -> Mask:
        """The tokens (batch, tokens) at which the gate of an intervention on h is open."""

        def met(condition: Condition) -> Mask:
            reading = condition.reading
            value = self._value(reading, h) if reading.hookpoint == hookpoint else self.values[id(reading)]
            return condition.compare(value.to(h.device)).expand(h.shape[:2])

        return gate.evaluate(met)

    def _value(self, reading: Reading, h: Tensor) -> Tensor:
        """What is read of each token, (batch, tokens), or of the prompt of each row, (batch, 1)."""
        if not reading.pooling:
            return reading.values(h)
        assert self.prompt is not None
        if not self.prompt.empty:
            self._refuse_parts()
            assert self.prompt.mask is not None
            self.kept[id(reading)] = pool(reading.values(h), self.prompt.mask.to(h.device), reading.pooling)
        if id(reading) not in self.kept:
            raise SteeringError(
                "a gate on prompts in a pass that goes on from a prompt that was read before the steer block",
                "the prompt inside the block",
                "open the block before the prompt is read",
            )
        kept = self.kept[id(reading)]
        return kept if len(kept) == len(h) else kept.repeat_interleave(len(h) // len(kept), 0)

    def _refuse_parts(self) -> None:
        """Raises SteeringError for a pass that holds a part of the prompt alone."""
        positions = self.positions
        if positions.columns_before > positions.virtual or not positions.prompt_is_cached:
            raise SteeringError(
                "a gate on prompts, and a prompt that is read in parts",
                "the whole prompt in one pass, so that the gate is decided before any of it is steered",
                "leave prefill_chunk_size and a cache of the prompt's beginning out, or use a gate on tokens",
            )


def pool(values: Tensor, prompt: Mask, pooling: str) -> Tensor:
    """The last, mean or largest of values (batch, tokens) over each row's prompt, (batch, 1); nan without a token."""
    none = ~prompt.any(1, keepdim=True)
    if pooling == "mean":
        pooled = torch.where(prompt, values, 0.0).sum(1, keepdim=True) / prompt.sum(1, keepdim=True)
    elif pooling == "max":
        pooled = torch.where(prompt, values, -torch.inf).amax(1, keepdim=True)
    else:
        column = torch.arange(values.shape[1], device=values.device)
        pooled = values.gather(1, torch.where(prompt, column, 0).amax(1, keepdim=True))
    return torch.where(none, torch.nan, pooled)
