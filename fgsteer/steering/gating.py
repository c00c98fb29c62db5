"""What gates and transcoders read in the passes of one steer block: of each token, or of a prompt and then kept.

    readings = Readings(positions)
    gate = readings.add(item.when)
    readings.take(hookpoint, h)             in the hook at a hookpoint, before anything there acts
    gate.open_for(h)                        the tokens at which the gate is open

One reading is read once in a pass, so that all gates that share it decide alike. Gates are made into objects that hold
numbers as tensors, so that compiled graphs serve other thresholds too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.errors.wording import count
from fgsteer.interventions.gates import Both, Condition, Either, Gate, Mask, Not, Reading, pool
from fgsteer.interventions.readings import Feature, Preview
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.steering.masks import ScopeMask
from fgsteer.steering.positions import Positions


class Readings:
    """The readings of the gates of one steer block.

    Args:
        positions: Which tokens the running pass holds; a scope of its prompt is added where a prompt is read.
    """

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.prompt: ScopeMask | None = None
        self.whole: ScopeMask | None = None  # the prompt with its start token, which previews read
        self.places: list[Place] = []
        self.features: list[_Features] = []
        self.sources: list[Source] = []
        self.cache: weakref.ref[Any] | None = None  # that of the prompts that were read last

    @property
    def hookpoints(self) -> list[Hookpoint]:
        """Where something is read."""
        gates = [place.reading.hookpoint for place in self.places if not isinstance(place.reading, Preview)]
        return list(dict.fromkeys([*gates, *(source.hookpoint for source in self.sources)]))

    def source(self, hookpoint: Hookpoint | None) -> Source | None:
        """What updates read that read at another hookpoint than they write at; None for None."""
        if hookpoint is None:
            return None
        found = next((source for source in self.sources if source.hookpoint == hookpoint), None)
        if found is None:
            found = Source(hookpoint)
            self.sources.append(found)
        return found

    def add(self, gate: Gate | None) -> GateNode | None:
        """The gate of an intervention, as the hooks evaluate it. Raises SteeringError for a gate of one's own."""
        if gate is None:
            return None
        if isinstance(gate, Both | Either):
            return GateNode("and" if isinstance(gate, Both) else "or", self.add(gate.first), self.add(gate.second))
        if isinstance(gate, Not):
            return GateNode("not", self.add(gate.gate))
        if not isinstance(gate, Condition):
            raise SteeringError(
                f"a gate of the class {type(gate).__name__}",
                "readings that are compared with thresholds and combined by &, | and ~",
                "write a reading of your own, with values(h), instead of a gate",
            )
        place = self.place(gate.reading)
        return GateNode("read", place=place, threshold=torch.tensor(gate.threshold), above=gate.fires_above)

    def place(self, reading: Reading) -> Place:
        """Where a reading is noted: one place for all that share it."""
        for place in self.places:
            if place.reading is reading:
                return place
        if reading.pooling and self.prompt is None:
            self.prompt = ScopeMask("prompt", bos=False)
            self.positions.masks = [*self.positions.masks, self.prompt]
        if isinstance(reading, Preview) and self.whole is None:
            self.whole = ScopeMask("prompt", bos=True)
            self.positions.masks = [*self.positions.masks, self.whole]
        features = self._features(reading) if isinstance(reading, Feature) else None
        self.places.append(Place(self, reading, features))
        return self.places[-1]

    def _features(self, reading: Feature) -> _Features:
        features = next((one for one in self.features if one.sae is reading.sae), None)
        if features is None:
            features = _Features(reading.sae)
            self.features.append(features)
        if reading.feature not in features.ids:
            features.ids.append(reading.feature)
        return features

    def begin_pass(self, cache: Any) -> None:
        """Forget what was read of the last pass, but for decisions on the prompts that this pass goes on from.

        Raises SteeringError where it goes on from other prompts than those that were decided on.
        """
        for place in self.places:
            place.value = None
        for features in self.features:
            features.seen = features.acts = None
        for source in self.sources:
            source.value = None
        if self.prompt is None or self.positions.generating or not self.prompt.empty or torch.compiler.is_compiling():
            return
        if self.cache is None or self.cache() is not cache:
            raise SteeringError(
                "a gate on prompts in a pass that goes on from another prompt than the last one read in this block",
                "passes that go on from the prompt that was read last, inside the block",
                "open the block before the prompt is read, and one block for each conversation",
            )

    def end_pass(self, cache: Any) -> None:
        """Note the cache that a pass over prompts has filled, so that decisions are not taken for those of others."""
        if self.prompt is not None and not self.prompt.empty and not torch.compiler.is_compiling():
            self.cache = None if cache is None else weakref.ref(cache)

    def take(self, hookpoint: Hookpoint, h: Tensor) -> None:
        """Read the activations (batch, tokens, d_model) that come to a hookpoint, before anything there acts."""
        for place in self.places:
            if place.reading.hookpoint == hookpoint and not isinstance(place.reading, Preview):
                place.value = place.read(h)

    def keep(self, hookpoint: Hookpoint, h: Tensor) -> None:
        """Keep the activations (batch, tokens, d_model) that go on from a hookpoint, after what acts there."""
        for source in self.sources:
            if source.hookpoint == hookpoint:
                source.value = h


@dataclass(eq=False)
class Source:
    """The activations of the running pass at a hookpoint where a transcoder reads, as what comes next gets them."""

    hookpoint: Hookpoint
    value: Tensor | None = None

    def noted(self) -> Tensor:
        """The activations. Raises SteeringError where the pass did not come by."""
        if self.value is None:
            raise SteeringError(
                f"a pass that did not come by {self.hookpoint}, where a transcoder reads",
                "a pass through the whole block",
                "clamp the features of an SAE that reads where it steers",
            )
        return self.value


@dataclass(eq=False)
class GateNode:
    """A gate, or a part of one: "and", "or" and "not" of other nodes, or "read", which compares with a threshold."""

    kind: str
    first: GateNode | None = None
    second: GateNode | None = None
    place: Place | None = None
    threshold: Tensor | None = None
    above: bool = True

    def open_for(self, h: Tensor) -> Mask:
        """The tokens (batch, tokens) of these activations at which it is open."""
        if self.kind == "read":
            assert self.place is not None
            assert self.threshold is not None
            value = self.place.noted().to(h.device)
            met = value > self.threshold if self.above else value < self.threshold
            return met.expand(h.shape[:2])
        assert self.first is not None
        first = self.first.open_for(h)
        if self.kind == "not":
            return ~first
        assert self.second is not None
        second = self.second.open_for(h)
        return first & second if self.kind == "and" else first | second


@dataclass(eq=False)
class Place:
    """A reading, and what was read of the running pass and of the prompts."""

    owner: Readings
    reading: Reading
    features: _Features | None
    ready: Reading | None = None
    value: Tensor | None = None  # (batch, tokens) or (batch, 1), of the running pass
    kept: Tensor | None = None  # (batch, 1), of the prompts

    def noted(self) -> Tensor:
        """What was read in this pass. Raises SteeringError where the pass did not come by."""
        if self.value is None:
            raise SteeringError(
                f"a pass that did not come by {self.reading.hookpoint}, where a gate reads",
                "a pass through all blocks below the intervention",
                "read where the intervention acts",
            )
        return self.value

    def read(self, h: Tensor) -> Tensor:
        """What is read of each token, (batch, tokens), or of the prompt of each row, (batch, 1)."""
        prompt = self.owner.prompt
        if not self.reading.pooling:
            return self._by_token(h)
        assert prompt is not None
        if not prompt.empty:
            self.refuse_parts()
            assert prompt.mask is not None
            if self.features is None or self.reading.pooling == "of_mean":
                self.kept = self._ready(h).of_prompt(h, prompt.mask.to(h.device))
            else:
                self.kept = pool(self._by_token(h), prompt.mask.to(h.device), self.reading.pooling)
        return self.for_rows(len(h))

    def for_rows(self, rows: int) -> Tensor:
        """What was read of the prompts, (rows, 1), for a pass of so many rows. Raises SteeringError for other ones."""
        kept = self.kept
        if kept is None or rows % len(kept):
            decided = 0 if kept is None else len(kept)
            raise SteeringError(
                f"a gate on prompts in a pass of {count(rows, 'row')}, after prompts of {count(decided, 'row')}",
                "a pass that goes on from the prompts that were read inside the block, in their order",
                "open the block before the prompts are read, and do not add or drop rows inside",
            )
        return kept if len(kept) == rows else kept.repeat_interleave(rows // len(kept), 0)

    def _by_token(self, h: Tensor) -> Tensor:
        if self.features is not None:
            assert isinstance(self.reading, Feature)
            return self.features.read(self.reading.feature, h)
        return self._ready(h).values(h)

    def _ready(self, h: Tensor) -> Reading:
        """The reading with its tensors where the activations are."""
        if self.ready is None or self.ready.device != h.device:
            self.ready = self.reading.to(h.device)
        return self.ready

    def refuse_parts(self) -> None:
        """Raises SteeringError for a pass that holds a part of the prompt alone."""
        positions = self.owner.positions
        if positions.columns_before > positions.virtual or not positions.prompt_is_cached:
            raise SteeringError(
                "a gate on prompts, and a prompt that is read in parts",
                "the whole prompt in one pass, so that the gate is decided before any of it is steered",
                "leave prefill_chunk_size and a cache of the prompt's beginning out, or use a gate on tokens",
            )


@dataclass(eq=False)
class _Features:
    """The features of one SAE that gates read: encoded together, once for the activations of a pass."""

    sae: SAE
    ids: list[int] = field(default_factory=list)
    part: SAE | None = None
    seen: Tensor | None = None
    acts: Tensor | None = None

    def read(self, feature: int, h: Tensor) -> Tensor:
        """The activation of a feature at each token, (batch, tokens)."""
        if self.seen is not h or self.acts is None:
            competing = self.sae.activation == "topk"
            if self.part is None or self.part.W_enc.device != h.device:
                self.part = (self.sae if competing else self.sae.restrict(self.ids)).to(h.device, torch.float32)
            acts = self.part.encode(h.float())
            self.acts = acts[..., self.ids] if competing else acts
            self.seen = h
        return self.acts[..., self.ids.index(feature)]
