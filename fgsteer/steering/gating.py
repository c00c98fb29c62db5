"""What gates and transcoders read in the passes of one steer block: of each token, or of a prompt and then kept.

    readings = Readings(positions)
    gate = readings.add(item.when)
    readings.places_at(hookpoint)           what the hook at a hookpoint reads, before anything there acts
    gate.open_for(h)                        the tokens at which the gate is open

One reading is read once in a pass, so that all gates that share it decide alike. Gates are made into objects that hold
numbers as tensors, so that compiled graphs serve other thresholds too.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.errors.wording import count
from fgsteer.interventions.gates import COMPARISONS, Both, Condition, Either, Gate, Not, Reading, pool
from fgsteer.interventions.readings import Feature, Preview
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.saes.selected import SelectedFeatures
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

    def add(self, gate: Gate | None, negated: bool = False) -> GateNode | None:
        """The gate of an intervention, or its opposite, as hooks evaluate it.

        A negation is one of its conditions, none of which is met where it reads nan. Raises SteeringError for a gate of
        one's own.
        """
        if gate is None:
            return None
        if isinstance(gate, Not):
            return self.add(gate.gate, not negated)
        if isinstance(gate, Both | Either):
            needs_all = isinstance(gate, Both) != negated
            if conditions := _same_features(gate, type(gate)):
                return self._comparison(conditions, negated, needs_all)
            return GateNode(needs_all, self.add(gate.first, negated), self.add(gate.second, negated))
        if not isinstance(gate, Condition):
            raise SteeringError(
                f"a gate of the class {type(gate).__name__}",
                "readings that are compared with thresholds and combined by &, | and ~",
                "write a reading of your own, with values(h), instead of a gate",
            )
        return self._comparison([gate], negated)

    def _comparison(self, conditions: Sequence[Condition], negated: bool, needs_all: bool = False) -> GateNode:
        """The comparison of one reading, or of features of one SAE, with thresholds.

        A feature whose activation is its pre-activation where that is above some number ≥ 0, and 0 elsewhere, is above
        a threshold ≥ 0 where the pre-activation is above both, so that its activation need not be computed.
        """
        first, numbers = conditions[0], [condition.threshold for condition in conditions]
        thresholds = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        compare, reading = COMPARISONS[first.fires_above, negated], first.reading
        if not isinstance(reading, Feature) or reading.pooling:
            return GateNode(needs_all, place=self.place(reading), threshold=thresholds[0], compare=compare)
        ids, sae = tuple(c.reading.feature for c in conditions), reading.sae  # type: ignore[attr-defined]
        is_linear = sae.activation in ("relu", "jumprelu") and sae.input_norm == "none"
        raw = is_linear and first.fires_above and bool((thresholds >= 0).all())
        if raw and sae.threshold is not None:
            thresholds = torch.maximum(thresholds, sae.threshold[list(ids)].to(thresholds))
        self._features(sae, ids, raw).compare(ids, thresholds.tolist())
        return GateNode(needs_all, place=self.place(reading, ids, raw), threshold=thresholds, compare=compare)

    def place(self, reading: Reading, several: tuple[int, ...] = (), raw: bool = False) -> Place:
        """Where a reading is noted: one place for all that share it, or for several features of one SAE."""
        for place in self.places:
            if place.reading is reading and place.several == several and place.is_raw == raw:
                return place
        if reading.pooling and self.prompt is None:
            self.prompt = ScopeMask("prompt", bos=False)
            self.positions.masks = [*self.positions.masks, self.prompt]
        if isinstance(reading, Preview) and self.whole is None:
            self.whole = ScopeMask("prompt", bos=True)
            self.positions.masks = [*self.positions.masks, self.whole]
        features = None
        if isinstance(reading, Feature):
            features = self._features(reading.sae, several or (reading.feature,), raw)
            if not several:
                features.compare([reading.feature], [0.0])
        self.places.append(Place(self, reading, features, several, raw))
        return self.places[-1]

    def _features(self, sae: SAE, ids: tuple[int, ...], raw: bool) -> _Features:
        features = next((one for one in self.features if one.sae is sae and one.is_raw == raw), None)
        if features is None:
            features = _Features(sae, raw)
            self.features.append(features)
        features.ids.extend(feature for feature in ids if feature not in features.ids)
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

    def go_on(self) -> None:
        """Forget what was read of the tokens of the last pass, and keep what was read of prompts."""
        for place in self.places:
            if not place.reading.pooling:
                place.value = None
        for features in self.features:
            features.seen = features.acts = None
        for source in self.sources:
            source.value = None

    def end_pass(self, cache: Any) -> None:
        """Note the cache that a pass over prompts has filled, so that decisions are not taken for those of others."""
        if self.prompt is not None and not self.prompt.empty and not torch.compiler.is_compiling():
            self.cache = None if cache is None else weakref.ref(cache)

    def places_at(self, hookpoint: Hookpoint) -> list[Place]:
        """What is read of the activations that come to a hookpoint, before anything there acts."""
        return [p for p in self.places if p.reading.hookpoint == hookpoint and not isinstance(p.reading, Preview)]

    def sources_at(self, hookpoint: Hookpoint) -> list[Source]:
        """What is kept of the activations that go on from a hookpoint, after what acts there."""
        return [source for source in self.sources if source.hookpoint == hookpoint]


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
    """A gate, or a part of one: two others, or what is read at a place, compared with a threshold.

    Of both others, or of several features with a threshold each, all must be met, or any.
    """

    needs_all: bool
    first: GateNode | None = None
    second: GateNode | None = None
    place: Place | None = None
    threshold: Tensor | None = None
    compare: Callable[..., Tensor] = torch.gt
    kept: Tensor | None = None  # what was read of prompts, or where no feature is active, and what was decided by it
    decision: Tensor | None = None
    is_closed: bool = False  # whether that is known to be open nowhere, which is asked where it is known for long

    @property
    def is_of_prompts(self) -> bool:
        """Whether all of it was decided when the prompts were read."""
        if self.place is not None:
            return bool(self.place.reading.pooling)
        return all(node.is_of_prompts for node in (self.first, self.second) if node is not None)

    def prepare(self, device: torch.device) -> None:
        """Move thresholds to a device, but for single numbers, which may stay on the CPU."""
        if self.threshold is not None and self.threshold.ndim and self.threshold.device != device:
            self.threshold = self.threshold.to(device)
        for node in (self.first, self.second):
            if node is not None:
                node.prepare(device)

    def open_for(self, h: Tensor) -> Tensor:
        """The tokens (batch, tokens, 1) of these activations at which it is open, or the rows (batch, 1, 1)."""
        if self.place is not None:
            return self._decide(self.place, h.device)
        assert self.first is not None
        assert self.second is not None
        first, second = self.first.open_for(h), self.second.open_for(h)
        self.is_closed = (any if self.needs_all else all)((self.first.is_closed, self.second.is_closed))
        return first & second if self.needs_all else first | second

    def _decide(self, place: Place, device: torch.device) -> Tensor:
        """The comparison of what was read, which is made once where the same tensor is read again, as of prompts."""
        value, is_compiling = place.noted(), torch.compiler.is_compiling()
        if not is_compiling and self.kept is value and self.decision is not None:
            return self.decision
        self.prepare(device)
        assert self.threshold is not None
        met = self.compare(value.to(device), self.threshold)
        if not self.threshold.ndim:
            met = met.unsqueeze(-1)
        elif len(self.threshold) > 1:
            met = met.all(-1, keepdim=True) if self.needs_all else met.any(-1, keepdim=True)
        if not is_compiling:  # a compiled graph leaves no tensor behind
            stays = not value.requires_grad and (bool(place.reading.pooling) or place.is_shut)
            self.kept, self.decision = (value, met) if stays else (None, None)
            self.is_closed = stays and met.is_cpu and not bool(met.any())
        return met


def _same_features(gate: Gate, kind: type[Both | Either]) -> list[Any]:
    """The conditions of a gate that joins features of one SAE by one sign alone, compared one way; else none."""
    if not isinstance(gate, kind):
        whole = isinstance(gate, Condition) and isinstance(gate.reading, Feature) and not gate.reading.pooling
        return [gate] if whole else []
    first, second = _same_features(gate.first, kind), _same_features(gate.second, kind)
    if not first or not second:
        return []
    one, other = first[0], second[0]
    alike = one.reading.sae is other.reading.sae and one.fires_above == other.fires_above
    return first + second if alike else []


@dataclass(eq=False)
class Place:
    """A reading, and what was read of the running pass and of the prompts."""

    owner: Readings
    reading: Reading
    features: _Features | None
    several: tuple[int, ...] = ()  # the features, where they are read together
    is_raw: bool = False  # whether their pre-activations are read
    ready: Reading | None = None
    device: torch.device | None = None  # of ``ready``
    value: Tensor | None = None  # (batch, tokens), with features (batch, tokens, n), or (batch, 1), of the running pass
    kept: Tensor | None = None  # (batch, 1), of the prompts

    @property
    def is_shut(self) -> bool:
        """Whether features were read of which none is active at any token of this pass."""
        encoder = None if self.features is None else self.features.encoder
        return isinstance(encoder, SelectedFeatures) and self.value is encoder.shut

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
            return self.features.read(self.several or self.reading.feature, h)
        return self._ready(h).values(h)

    def prepare(self, device: torch.device) -> None:
        """Have what is read with where the activations are."""
        if self.features is not None:
            self.features.prepare(device)
        if (self.features is None or self.reading.pooling) and self.device != device:
            self.ready, self.device = self.reading.to(device), device

    def _ready(self, h: Tensor) -> Reading:
        """The reading with its tensors where the activations are."""
        self.prepare(h.device)
        assert self.ready is not None
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
    is_raw: bool  # whether pre-activations are read
    ids: list[int] = field(default_factory=list)
    floors: dict[int, float] = field(default_factory=dict)  # the lowest thresholds that features are compared with
    encoder: SelectedFeatures | SAE | None = None
    weight: Tensor | None = None  # of pre-activations, (n, d_model)
    device: torch.device | None = None
    seen: Tensor | None = None
    acts: Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Make the encoder of the features, on the device of what will be read."""
        if self.device == device:
            return
        wide = self.sae.to(device, torch.float32)
        competes = wide.activation == "topk"
        floors = [self.floors[feature] for feature in self.ids]
        self.encoder = SelectedFeatures(wide, self.ids, floors) if competes else wide.restrict(self.ids)
        self.weight = self.encoder.W_enc.T.contiguous() if self.is_raw and isinstance(self.encoder, SAE) else None
        self.device = device

    def compare(self, features: Sequence[int], thresholds: Sequence[float]) -> None:
        """Note thresholds that the activations of features are compared with; 0 where they are used by themselves."""
        for feature, threshold in zip(features, thresholds, strict=True):
            self.floors[feature] = max(0.0, min(threshold, self.floors.get(feature, math.inf)))

    def _encode(self, h: Tensor) -> Tensor:
        if isinstance(self.encoder, SelectedFeatures):
            return self.encoder.read(h)
        assert self.encoder is not None
        if self.weight is not None:
            return torch.nn.functional.linear(h, self.weight, self.encoder.b_enc)
        return self.encoder.encode(h)

    def read(self, feature: int | tuple[int, ...], h: Tensor) -> Tensor:
        """The activations of a feature at each token, (batch, tokens), or of several, (batch, tokens, n)."""
        if self.seen is not h or self.acts is None:
            self.prepare(h.device)
            self.acts, self.seen = self._encode(h.float()), h
        if isinstance(feature, int):
            return self.acts[..., self.ids.index(feature)]
        if list(feature) == self.ids:
            return self.acts
        return self.acts[..., [self.ids.index(one) for one in feature]]
