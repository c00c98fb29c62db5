"""Gates: conditions under which an intervention acts, token by token or once for a prompt.

    vec.add(8.0, when=(Feature(sae, 123) > 2.0) & ~(Cosine(refusal, 9).mean() > 0.2))

A reading is a number of each token: a feature's activation, a projection, a cosine or a probe's score. Comparing it
with a threshold gives a condition, and conditions combine by ``&``, ``|`` and ``~``. A reading of tokens is decided
for each token; ``last()``, ``mean()`` and ``max()`` make it one of the prompt, which is decided when the prompt has
been read and then kept for that row, as ``of_mean()`` does, which reads the mean of the prompt's activations.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.checks import describe_value
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.values import finite_number
from fgsteer.models.hookpoints import Hookpoint

Pooling = Literal["", "last", "mean", "max", "of_mean"]
SelfReading = TypeVar("SelfReading", bound="Reading")
Mask = Bool[Tensor, "batch tokens"]
# of conditions that fire above their threshold or below it, and of the negated ones; each is False for nan
COMPARISONS: dict[tuple[bool, bool], Callable[..., Tensor]] = {
    (True, False): torch.gt,
    (False, False): torch.lt,
    (True, True): torch.le,
    (False, True): torch.ge,
}


class Gate(ABC):
    """A condition under which an intervention acts, or several that are combined."""

    @property
    @abstractmethod
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions that it is made of."""

    def __and__(self, other: Gate) -> Gate:
        return Both(self, _gate(other))

    def __or__(self, other: Gate) -> Gate:
        return Either(self, _gate(other))

    def __invert__(self) -> Gate:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise SteeringError(
            "a gate as a truth value",
            "gates that are combined by &, | and ~",
            "write (a > 1) & (b > 2) with parentheses, not `a > 1 and b > 2`",
        )


def _gate(other: object) -> Gate:
    """What a gate is combined with. Raises SteeringError for what is no gate."""
    if not isinstance(other, Gate):
        raise SteeringError(
            f"a gate combined with {type(other).__name__}",
            "another gate",
            "put comparisons in parentheses: (a > 1) & (b > 2)",
        )
    return other


@dataclass(frozen=True, eq=False, repr=False)
class _Pair(Gate):
    """Two gates that are combined."""

    first: Gate
    second: Gate
    sign: ClassVar[str]

    def __repr__(self) -> str:
        return f"({self.first!r} {self.sign} {self.second!r})"

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those of both."""
        return (*self.first.conditions, *self.second.conditions)


class Both(_Pair):
    """Open where both of two gates are."""

    sign = "&"


class Either(_Pair):
    """Open where either of two gates is."""

    sign = "|"


@dataclass(frozen=True, eq=False)
class Not(Gate):
    """Open where a gate is shut, other than by a reading that is nan: such a condition is shut, negated or not."""

    gate: Gate

    def __repr__(self) -> str:
        return f"~({self.gate!r})"

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those of what it combines."""
        return self.gate.conditions


@dataclass(frozen=True, eq=False)
class Condition(Gate):
    """A reading compared with a threshold: ``reading > threshold``, or ``<`` where ``fires_above`` is False."""

    reading: Reading
    threshold: float
    fires_above: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", finite_number("threshold", self.threshold))

    def __repr__(self) -> str:
        pooled = f".{self.reading.pooling}()" if self.reading.pooling else ""
        place = f"{type(self.reading).__name__} at {self.reading.hookpoint}"
        return f"{place}{pooled} {'>' if self.fires_above else '<'} {self.threshold:.4g}"

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The condition itself."""
        return (self,)

    def compare(self, values: Float[Tensor, "batch tokens"], negated: bool = False) -> Mask:
        """Whether values are beyond the threshold, or with ``negated`` on the other side of it or at it.

        nan, as of a prompt without a token, is neither.
        """
        return COMPARISONS[self.fires_above, negated](values, self.threshold)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Reading(OneLineRepr, ABC):
    """A number of each token at a hookpoint, or of a prompt, to be compared with a threshold.

    Args:
        hookpoint: Where it is read: a Hookpoint, its name, or a layer.
        pooling: "" for a number of each token; "last", "mean" or "max" over the prompt's tokens, without a start
            token, for one of the prompt; "of_mean" for what is read of the mean of their activations.
    """

    hookpoint: Hookpoint
    pooling: Pooling = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        if self.pooling not in get_args(Pooling):
            kinds = ", ".join(map(repr, get_args(Pooling)))
            raise SteeringError(f"pooling = {self.pooling!r}", f"one of {kinds}", "call .mean() instead")

    @property
    @abstractmethod
    def d_model(self) -> int:
        """The width of the activations that it reads."""

    @abstractmethod
    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """The number of each token, in float32."""

    def last(self: SelfReading) -> SelfReading:
        """The reading of a prompt's last token, as one of the prompt."""
        return self._pooled("last")

    def mean(self: SelfReading) -> SelfReading:
        """The mean over a prompt's tokens, as one of the prompt."""
        return self._pooled("mean")

    def max(self: SelfReading) -> SelfReading:
        """The largest over a prompt's tokens, as one of the prompt."""
        return self._pooled("max")

    def of_mean(self: SelfReading) -> SelfReading:
        """The reading of the mean of a prompt's activations, as one of the prompt."""
        return self._pooled("of_mean")

    def of_prompt(self, h: Float[Tensor, "batch tokens d_model"], prompt: Mask) -> Float[Tensor, "batch 1"]:
        """The number of each row's prompt, whose tokens the mask tells; nan for a prompt without a token."""
        if self.pooling != "of_mean":
            return pool(self.values(h), prompt, self.pooling)
        count = prompt.sum(1, keepdim=True)
        mean = torch.where(prompt[..., None], h.float(), 0.0).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, self.values(mean[:, None]), torch.nan)

    @property
    def parts(self) -> tuple[Reading, ...]:
        """The readings of activations that it is made of: itself, unless it is of several."""
        return (self,)

    @property
    def device(self) -> torch.device:
        """The device of its tensors; the CPU without any."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return tensors[0].device if tensors else torch.device("cpu")

    def to(self: SelfReading, device: torch.device) -> SelfReading:
        """The same reading with its tensors on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(moved, name, value.to(device))
        return moved

    def _pooled(self: SelfReading, pooling: Pooling) -> SelfReading:
        pooled = copy.copy(self)
        object.__setattr__(pooled, "pooling", pooling)
        return pooled

    def __gt__(self, threshold: float) -> Condition:
        return Condition(self, threshold)

    def __lt__(self, threshold: float) -> Condition:
        return Condition(self, threshold, fires_above=False)


def check_gate(gate: object, hookpoint: Hookpoint) -> None:
    """Check the gate of an intervention at a hookpoint.

    Raises SteeringError for what is no gate, PairingError for one that reads above the place of the intervention.
    """
    if not isinstance(gate, Gate):
        raise SteeringError(
            f"when = {describe_value(gate)}",
            "a gate, which compares readings with thresholds",
            "write when=fg.Feature(sae, 123) > 2.0, or leave it out to act always",
        )
    for condition in gate.conditions:
        check_reading(condition.reading, hookpoint)


def check_reading(reading: Reading, hookpoint: Hookpoint) -> None:
    """Check a reading that an intervention at a hookpoint goes by. Raises PairingError for one above that place."""
    at = reading.hookpoint
    if reading.parts == (reading,) and not at.precedes(hookpoint) and at != hookpoint:
        raise PairingError(
            f"a condition that is read at {at}, for an intervention at {hookpoint}",
            "a condition that is read where the intervention acts, or before it",
            "what comes later in a pass is not known yet: read at an earlier layer, steer at a later one, or read the "
            "prompt ahead in a pass of its own with fg.Preview(reading)",
        )


def pool(values: Float[Tensor, "batch tokens"], prompt: Mask, pooling: str) -> Float[Tensor, "batch 1"]:
    """The last, mean or largest of values over each row's prompt; nan for a prompt without a token."""
    none = ~prompt.any(1, keepdim=True)
    if pooling == "mean":
        pooled = torch.where(prompt, values, 0.0).sum(1, keepdim=True) / prompt.sum(1, keepdim=True)
    elif pooling == "max":
        pooled = torch.where(prompt, values, -torch.inf).amax(1, keepdim=True)
    else:
        column = torch.arange(values.shape[1], device=values.device)
        pooled = values.gather(1, torch.where(prompt, column, 0).amax(1, keepdim=True))
    return torch.where(none, torch.nan, pooled)
