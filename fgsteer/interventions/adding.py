"""Interventions that add a direction: as it is, in units of the activation's norm, or as strongly as a token asks for.

Add(hookpoint=Hookpoint(6), direction=v, coefficient=8.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.errors.checks import describe_value
from fgsteer.interventions.base import DirectionIntervention, InterventionFields, set_fields
from fgsteer.interventions.gates import Reading, check_reading
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.values import (
    Scalar,
    as_tensor,
    check_bounds,
    check_equal_width,
    finite_scalar,
    finite_vector,
    unit_and_norm,
)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AddingIntervention(DirectionIntervention):
    """An intervention that adds ``direction``, times a coefficient."""

    coefficient: Scalar = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        set_fields(self, coefficient=finite_scalar("coefficient", self.coefficient))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Add(AddingIntervention):
    """Adds a direction to an activation: ``h' = h + c·v`` (CAA, arXiv 2312.06681).

    Args:
        direction: The direction v, (d_model,).
        coefficient: The strength c.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction or the coefficient is not finite.
        PairingError: The direction is not one floating-point vector.
    """

    if TYPE_CHECKING:  # the constructor as it is called: it takes more than the fields hold

        def __init__(
            self, *, direction: Tensor, coefficient: Scalar = 1.0, **common: Unpack[InterventionFields]
        ) -> None: ...

    def update(self) -> Update:
        """The update with w = v, λ = 0, α = c."""
        row = self.direction.float()[None, None]
        const = as_tensor(self.coefficient, row)
        return Update(write=row, const=const, lam=torch.zeros_like(const))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AddRelative(AddingIntervention):
    """Adds a direction in units of the activation's own norm: ``h' = h + c·‖h‖·v̂``, token by token.

    Args:
        direction: The direction v, (d_model,), of which only v̂ = v/‖v‖ matters.
        coefficient: The dose c: the norm of what is added, as a share of ‖h‖.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction is zero or not finite, or the coefficient is not finite.
        PairingError: The direction is not one floating-point vector.
    """

    if TYPE_CHECKING:

        def __init__(
            self, *, direction: Tensor, coefficient: Scalar = 1.0, **common: Unpack[InterventionFields]
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_and_norm(self.direction)  # raises for a zero direction

    def update(self) -> Update:
        """The update with w = v̂, λ = 0, α = c, in units of ‖h‖."""
        row = unit_and_norm(self.direction)[0][None, None]
        const = as_tensor(self.coefficient, row)
        every = torch.ones(1, dtype=torch.bool, device=row.device)
        return Update(write=row, const=const, lam=torch.zeros_like(const), relative=every)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AddKeepingNorm(AddingIntervention):
    """Adds a direction and restores the activation's norm: ``h' = (h + c·v)·‖h‖/‖h + c·v‖``.

    Args:
        direction: The direction v, (d_model,).
        coefficient: The strength c.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction or the coefficient is not finite.
        PairingError: The direction is not one floating-point vector.
    """

    if TYPE_CHECKING:

        def __init__(
            self, *, direction: Tensor, coefficient: Scalar = 1.0, **common: Unpack[InterventionFields]
        ) -> None: ...

    def update(self) -> Update:
        """The update of ``Add``, whose result is scaled to ‖h‖."""
        row = self.direction.float()[None, None]
        const = as_tensor(self.coefficient, row)
        every = torch.ones(1, dtype=torch.bool, device=row.device)
        return Update(write=row, const=const, lam=torch.zeros_like(const), keep_norm=every)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AdaptiveAdd(DirectionIntervention):
    """Adds a direction as strongly as each token calls for: ``h' = h + s·relu(a·h + b)·u`` (PSR, arXiv 2605.03907).

    Args:
        direction: The direction u, (d_model,), that is added.
        read: The vector a, (d_model,), that activations are projected on.
        bias: The number b that is added to the projection.
        coefficient: The strength s; a negative one subtracts.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: A vector or a number is not finite.
        PairingError: ``direction`` and ``read`` are not floating-point vectors of one width.
    """

    read: Float[Tensor, " d_model"]
    bias: Scalar = 0.0
    coefficient: Scalar = 1.0

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            direction: Tensor,
            read: Tensor,
            bias: Scalar = 0.0,
            coefficient: Scalar = 1.0,
            **common: Unpack[InterventionFields],
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = {name: finite_scalar(name, getattr(self, name)) for name in ("bias", "coefficient")}
        set_fields(self, read=finite_vector("read", self.read), **numbers)
        check_equal_width("read", self.read, self.direction)

    def update(self) -> Update:
        """The update with w = u, read = a·h, λ = −s, α = s·b, bounded at 0 on the side that s points away from."""
        row = self.direction.float()[None, None]
        strength = as_tensor(self.coefficient, row)
        unbounded, zero = torch.full_like(strength, math.inf), torch.zeros_like(strength)
        return Update(
            write=row,
            const=strength * as_tensor(self.bias, row),
            lam=-strength,
            read=self.read.float().to(row.device)[None, None],
            lo=torch.where(strength >= 0, zero, -unbounded),
            hi=torch.where(strength > 0, unbounded, zero),
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AddByPrompt(DirectionIntervention):
    """Adds a direction as strongly as a prompt calls for: ``h' = h + clip(s·(r + b), lo, hi)·v``, r read of the prompt.

    The strength is decided once, for each row by its own prompt, and kept for all that the row generates. It is the
    rule of AdaSteer (arXiv 2504.09466).

    Args:
        direction: The direction v, (d_model,), that is added.
        reading: What r is: a reading of prompts, such as ``fg.Probe(w, 8).last()`` or a ``fg.Preview``.
        bias: The number b that is added to r.
        coefficient: The slope s.
        at_least: The least strength lo; None for no bound.
        at_most: The largest strength hi; None for no bound.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: A vector or a number is not finite, the reading is not one of prompts, or the bounds cross.
        PairingError: The direction is not one floating-point vector, or the reading is above the place of acting.
    """

    reading: Reading
    bias: Scalar = 0.0
    coefficient: Scalar = 1.0
    at_least: float | None = None
    at_most: float | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            direction: Tensor,
            reading: Reading,
            bias: Scalar = 0.0,
            coefficient: Scalar = 1.0,
            at_least: float | None = None,
            at_most: float | None = None,
            **common: Unpack[InterventionFields],
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reading, Reading) or not self.reading.pooling:
            raise SteeringError(
                describe_value(self.reading),
                "a reading of prompts, which decides how strongly each is steered",
                "write reading=fg.Probe(w, 8).last(), or fg.Preview(fg.Probe(w, 8)) for one of a pass of its own",
            )
        check_reading(self.reading, self.hookpoint)
        numbers = {name: finite_scalar(name, getattr(self, name)) for name in ("bias", "coefficient")}
        low, high = check_bounds("an AddByPrompt", self.at_least, self.at_most)
        set_fields(self, **numbers, at_least=low, at_most=high)

    @property
    def strength_reading(self) -> Reading:
        """What the strength goes by."""
        return self.reading

    def update(self) -> Update:
        """The update with w = v, read = r, λ = −s, α = s·b, between the bounds."""
        row = self.direction.float()[None, None]
        strength = as_tensor(self.coefficient, row)
        limits = (self.at_least, self.at_most)
        low, high = (None if value is None else as_tensor(value, row) for value in limits)
        return Update(
            write=row, const=strength * as_tensor(self.bias, row), lam=-strength, of_prompt=True, lo=low, hi=high
        )
