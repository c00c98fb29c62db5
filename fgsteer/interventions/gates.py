"""Gates: conditions under which an intervention acts, token by token or once for a prompt.

    vec.add(8.0, when=(Feature(sae, 123) > 2.0) & ~(Cosine(refusal, 9).mean() > 0.2))

A reading is a number of each token: a feature's activation, a projection, a cosine or a probe's score. Comparing it
with a threshold gives a condition, and conditions combine by ``&``, ``|`` and ``~``. A reading of tokens is decided
for each token; ``last()``, ``mean()`` and ``max()`` make it one of the prompt, which is decided when the prompt has
been read and then kept for that row.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.checks import describe_value, is_whole_number
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.values import finite_number, finite_vector, unit_and_norm
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE

Pooling = Literal["", "last", "mean", "max"]
SelfReading = TypeVar("SelfReading", bound="Reading")
Mask = Bool[Tensor, "batch tokens"]


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
    """Open where a gate is shut."""

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

    def compare(self, values: Float[Tensor, "batch tokens"]) -> Mask:
        """Whether values are beyond the threshold. nan, as of a prompt without a token, never is."""
        return values > self.threshold if self.fires_above else values < self.threshold


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Reading(OneLineRepr, ABC):
    """A number of each token at a hookpoint, or of a prompt, to be compared with a threshold.

    Args:
        hookpoint: Where it is read: a Hookpoint, its name, or a layer.
        pooling: "" for a number of each token; "last", "mean" or "max" over the prompt's tokens, without a start
            token, for one of the prompt.
    """

    hookpoint: Hookpoint
    pooling: Pooling = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        if self.pooling not in ("", "last", "mean", "max"):
            raise SteeringError(f"pooling = {self.pooling!r}", "'', 'last', 'mean' or 'max'", "call .mean() instead")

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


def _copied(name: str, value: Any) -> Tensor:
    """A float32 copy of a vector, which training it further does not reach: gates pass on no gradient."""
    return finite_vector(name, value.detach() if isinstance(value, Tensor) else value)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class _Along(Reading):
    """A reading along a direction."""

    direction: Float[Tensor, " d_model"]
    _unit: Tensor = field(init=False, repr=False, compare=False)

    def __init__(self, direction: Any, hookpoint: Hookpoint | str | int | None = None, pooling: Pooling = "") -> None:
        place = getattr(direction, "hookpoint", None) if hookpoint is None else hookpoint
        if place is None:
            raise SteeringError(
                "a direction without a hookpoint", "a place to read at", "pass a SteeringVector, or hookpoint="
            )
        values: dict[str, Any] = {
            "direction": _copied("direction", getattr(direction, "direction", direction)),
            "hookpoint": place,
            "pooling": pooling,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_unit", unit_and_norm(self.direction)[0])  # raises for a zero direction
        self.__post_init__()

    @property
    def d_model(self) -> int:
        return self.direction.shape[0]


class Projection(_Along):
    """The projection ``v̂·h`` of each token, in units of the residual stream.

    Args:
        direction: The direction v: a ``SteeringVector``, or a tensor (d_model,).
        hookpoint: Where it is read; by default the vector's hookpoint.
        pooling: As in ``Reading``; ``last()``, ``mean()`` and ``max()`` set it.
    """

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """v̂·h."""
        return h.float() @ self._unit.to(h.device)


class Cosine(_Along):
    """The cosine of each token with a direction, ``v̂·h/‖h‖``, with its sign: the condition of CAST (arXiv 2409.05907).

    The published code compares ``|cos|``, which a vector and its opposite have in common.

    Args:
        direction: The direction v: a ``SteeringVector``, or a tensor (d_model,).
        hookpoint: Where it is read; by default the vector's hookpoint.
        pooling: As in ``Reading``. ``mean()`` is the mean of the tokens' cosines.
    """

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """v̂·h/‖h‖, 0 for h = 0."""
        wide = h.float()
        norm = wide.norm(dim=-1)
        return (wide @ self._unit.to(h.device)) / torch.where(norm > 0, norm, 1.0)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Probe(Reading):
    """A linear probe's score of each token, ``w·h + b``.

    Args:
        weight: The weights w, (d_model,).
        hookpoint: Where it is read.
        bias: The bias b.
        pooling: As in ``Reading``.
    """

    weight: Float[Tensor, " d_model"]
    bias: float = 0.0

    def __init__(
        self, weight: Tensor, hookpoint: Hookpoint | str | int, bias: float = 0.0, pooling: Pooling = ""
    ) -> None:
        values: dict[str, Any] = {
            "weight": _copied("weight", weight),
            "bias": finite_number("bias", bias),
            "hookpoint": hookpoint,
            "pooling": pooling,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def d_model(self) -> int:
        """The width of the weights."""
        return self.weight.shape[0]

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """w·h + b."""
        return h.float() @ self.weight.float().to(h.device) + self.bias


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Feature(Reading):
    """The activation of an SAE's feature at each token.

    Args:
        sae: The SAE, which is read where it reads: a transcoder at its input.
        feature: The feature's id.
        pooling: As in ``Reading``.
    """

    sae: SAE
    feature: int

    def __init__(self, sae: SAE, feature: int, pooling: Pooling = "") -> None:
        if not is_whole_number(feature):
            raise SteeringError(f"feature {feature!r:.40}", "the id of a feature", "pass a whole number")
        sae.direction(feature)  # raises for a feature that the SAE does not have
        values: dict[str, Any] = {
            "sae": sae,
            "feature": int(feature),
            "hookpoint": sae.hookpoint if sae.reads is None else sae.reads,
            "pooling": pooling,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def d_model(self) -> int:
        """The width that the SAE reads."""
        return self.sae.W_enc.shape[0]

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """f_j(h)."""
        sae = self.sae.to(h.device, torch.float32)
        return sae.encode_selected(h.float(), [self.feature])[..., 0]


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
        at = condition.reading.hookpoint
        if not at.precedes(hookpoint) and at != hookpoint:
            raise PairingError(
                f"a condition that is read at {at}, for an intervention at {hookpoint}",
                "a condition that is read where the intervention acts, or before it",
                "what comes later in a pass is not known yet: read at an earlier layer, or steer at a later one",
            )
