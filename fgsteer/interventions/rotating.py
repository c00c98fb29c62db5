"""Rotation of activations in a plane: by an angle, or to one.

Rotate(hookpoint=Hookpoint(6), direction=v, other=u, by=30.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.interventions.base import DirectionIntervention, InterventionFields, set_fields
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.values import (
    Scalar,
    as_tensor,
    check_equal_width,
    finite_scalar,
    finite_vector,
    unit_and_norm,
)

PARALLEL = 1e-4  # of the norm of ``other``: what is left beside the direction must be more, to span a plane


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Rotate(DirectionIntervention):
    """Rotates activations in the plane of two directions (angular steering, arXiv 2510.26243).

    With b₁ the unit direction, b₂ the unit of what ``other`` has beside it, and P the projection on their plane:
    ``by`` turns the part in the plane by an angle, ``to`` turns it to an angle from b₁,
    ``h' = h − Ph + ‖Ph‖·(cos θ·b₁ + sin θ·b₂)``. Both keep ‖h‖ and all that is orthogonal to the plane. An angle of 0
    is no change with ``by``, but lays the part in the plane along b₁ with ``to``.

    Args:
        direction: The direction of b₁, (d_model,).
        other: A second direction, (d_model,), towards which angles are positive.
        by: The angle to turn by, in degrees.
        to: The angle from b₁ to turn to, in degrees, in place of ``by``.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: A direction is zero or not finite, the two are parallel, the angle is not finite, or there is
            not one of ``by`` and ``to``.
        PairingError: The directions are not floating-point vectors of one width.
    """

    other: Float[Tensor, " d_model"]
    by: Scalar | None = None
    to: Scalar | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            direction: Tensor,
            other: Tensor,
            by: Scalar | None = None,
            to: Scalar | None = None,
            **common: Unpack[InterventionFields],
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.by is None) == (self.to is None):
            raise SteeringError(
                "neither by nor to" if self.by is None else "both by and to",
                "one angle in degrees",
                "pass by= to turn by an angle, or to= to turn to one",
            )
        angles = {n: finite_scalar(n, value) for n in ("by", "to") if (value := getattr(self, n)) is not None}
        set_fields(self, other=finite_vector("other", self.other), **angles)
        check_equal_width("other", self.other, self.direction)
        self._plane()  # raises for parallel directions

    def _plane(self) -> tuple[Tensor, Tensor]:
        """The orthonormal vectors b₁ and b₂. Raises SteeringError for parallel directions."""
        first, other = unit_and_norm(self.direction)[0].double(), unit_and_norm(self.other)[0].double()
        first = first / first.norm()
        beside = other.to(first.device) - (first @ other.to(first.device)) * first
        if not torch.compiler.is_compiling() and not float(beside.detach().norm()) > PARALLEL:
            raise SteeringError(
                "two parallel directions",
                "directions that span a plane",
                "pass another second direction, such as the first principal component of the activations",
            )
        return first, beside / beside.norm()

    def update(self) -> Update:
        """The update with w = b₁, b₂: by an angle with λ = −1, to one with λ = 1 and the norm of what is read."""
        planes = torch.stack(self._plane())
        angle = as_tensor(self.by if self.to is None else self.to, planes)[0, 0] * (math.pi / 180)  # type: ignore[arg-type]
        cos, sin = torch.cos(angle), torch.sin(angle)
        write = planes.float()[None]
        zero, one = torch.zeros_like(write[..., 0]), torch.ones_like(write[..., 0])
        if self.to is not None:
            plane = (cos * planes[0] + sin * planes[1]).float()[None]
            return Update(write=write, const=zero, lam=one, read=write, plane=plane)
        turn = torch.stack([torch.stack([cos - 1, -sin]), torch.stack([sin, cos - 1])])
        return Update(write=write, const=zero, lam=-one, read=(turn @ planes).float()[None])
