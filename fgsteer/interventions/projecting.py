"""Interventions on projections: on one direction, set, bounded, removed or moved, and on a whole subspace.

Clamp(hookpoint=Hookpoint(6), direction=v, at_most=20.0)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.errors.checks import check_range
from fgsteer.errors.wording import count
from fgsteer.interventions.base import DirectionIntervention, Intervention, InterventionFields, set_fields
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.values import (
    Bound,
    Scalar,
    as_tensor,
    bounds_of,
    bounds_or_target,
    check_equal_width,
    finite_matrix,
    finite_number,
    finite_scalar,
    finite_vector,
    unit_and_norm,
)

DEPENDENT = 1e-4  # of the largest singular value of unit rows: below it, float32 cannot tell the rows apart


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ProjectionIntervention(DirectionIntervention):
    """An intervention that sets or bounds the projection on ``direction`` r (d_model,)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_and_norm(self.direction)  # raises for a zero direction

    @abstractmethod
    def bounds(self) -> list[Bound]:
        """What the projection on the unit vector r̂ becomes, in units of the residual stream."""

    def update(self) -> Update:
        """The update with w = r̂, read = r̂·h, λ = 1, and each bound as α + λμ."""
        bounds = self.bounds()
        row = unit_and_norm(self.direction)[0][None, None].expand(1, len(bounds), -1)
        const, lo, hi = bounds_of(bounds, row)
        return Update(write=row, const=const, lam=torch.ones_like(const), read=row, lo=lo, hi=hi)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Clamp(ProjectionIntervention):
    """Sets or bounds the projection on a direction: ``h' = h + (t − r̂·h) r̂``, with t = r̂·h where it is in bounds.

    With ``target`` every projection becomes t. With ``at_least``, ``at_most`` or both, only projections beyond a bound
    move, to that bound (the caps of the assistant axis, arXiv 2601.10387); others keep every bit of the activation.

    Args:
        direction: The direction r, (d_model,), of which only r̂ = r/‖r‖ matters.
        target: The projection t, in units of the residual stream.
        at_least: The lowest projection, in place of a target.
        at_most: The highest projection, in place of a target.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction is zero or not finite; there is neither a target nor a bound, or both; a number is
            not finite; or the lowest is above the highest.
        PairingError: The direction is not one floating-point vector.
    """

    target: Scalar | None = None
    at_least: Scalar | None = None
    at_most: Scalar | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            direction: Tensor,
            target: Scalar | None = None,
            at_least: Scalar | None = None,
            at_most: Scalar | None = None,
            **common: Unpack[InterventionFields],
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        target, at_least, at_most = bounds_or_target("a clamp", self.target, self.at_least, self.at_most)
        set_fields(self, target=target, at_least=at_least, at_most=at_most)

    def bounds(self) -> list[Bound]:
        """The target, or the bounds."""
        bounds = [Bound(self.target), Bound(self.at_least, lo=0.0), Bound(self.at_most, hi=0.0)]
        return [bound for bound in bounds if bound.value is not None]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Ablate(ProjectionIntervention):
    """Removes the projection on a direction: ``h' = h − (r̂·h) r̂`` (arXiv 2406.11717).

    Args:
        direction: The direction r, (d_model,), of which only r̂ = r/‖r‖ matters.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction is zero or not finite.
        PairingError: The direction is not one floating-point vector.
    """

    if TYPE_CHECKING:

        def __init__(self, *, direction: Tensor, **common: Unpack[InterventionFields]) -> None: ...

    def bounds(self) -> list[Bound]:
        """The projection becomes zero."""
        return [Bound(0.0)]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Affine(ProjectionIntervention):
    """Edits a concept affinely (ACE, arXiv 2411.09003): ``h' = h − proj_r(h) + proj_r(r⁻) + α·r``.

    Hence ``r̂·h' = r̂·r⁻ + α‖r‖`` for every h.

    Args:
        direction: The direction r, (d_model,): the positive mean less the negative mean.
        reference: The negative mean r⁻, (d_model,).
        alpha: The strength α: 0 puts activations at the negative mean, 1 at the positive mean.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction is zero or not finite, or alpha or the reference is not finite.
        PairingError: The reference and the direction are not vectors of one width.
    """

    reference: Float[Tensor, " d_model"]
    alpha: Scalar

    if TYPE_CHECKING:

        def __init__(
            self, *, direction: Tensor, reference: Tensor, alpha: Scalar, **common: Unpack[InterventionFields]
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        set_fields(self, reference=finite_vector("reference", self.reference), alpha=finite_scalar("alpha", self.alpha))
        check_equal_width("reference", self.reference, self.direction)

    def bounds(self) -> list[Bound]:
        """The projection becomes that of the reference and α‖r‖."""
        unit, norm = unit_and_norm(self.direction)
        return [Bound(unit @ self.reference.float().to(unit) + as_tensor(self.alpha, unit)[0, 0] * norm)]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ClampSubspace(Intervention):
    """Sets the projections on several directions: ``h' = h + R⁺ (t − R h)``, the smallest change that does.

    R holds the unit directions as rows, and R⁺ is its pseudoinverse. Without targets the subspace that the directions
    span is removed (the cones of arXiv 2502.17420): ``h' = h − R⁺ R h``.

    Args:
        directions: The directions, (k, d_model), of which only their units matter; they need not be orthogonal.
        targets: The k projections t, in units of the residual stream; by default zeros.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: A direction is zero or not finite, the directions are linearly dependent, or there are other
            numbers of targets and directions.
        PairingError: The directions are not one floating-point matrix.
    """

    directions: Float[Tensor, "k d_model"]
    targets: tuple[Scalar, ...] | None = None

    if TYPE_CHECKING:

        def __init__(
            self, *, directions: Tensor, targets: Sequence[Scalar] | None = None, **common: Unpack[InterventionFields]
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        set_fields(self, directions=finite_matrix("directions", self.directions))
        _check_independent(self.directions)
        if self.targets is None:
            return
        targets = tuple(finite_scalar("a target", target) for target in self.targets)
        if len(targets) != len(self.directions):
            raise SteeringError(
                f"{count(len(targets), 'target')} for {count(len(self.directions), 'direction')}",
                "a target for each direction",
                "pass targets in the order of the directions, or none to remove the subspace",
            )
        set_fields(self, targets=targets)

    def _values(self) -> dict[str, object]:
        return {"directions": self.directions, **{f"target {n}": t for n, t in enumerate(self.targets or ())}}

    def detach(self) -> ClampSubspace:
        """The same intervention with its present values, none of which requires grad."""
        if not self.trained:
            return self
        targets = None if self.targets is None else tuple(_present(target) for target in self.targets)
        return replace(self, directions=self.directions.detach(), targets=targets)

    @property
    def d_model(self) -> int:
        """The width of the directions."""
        return self.directions.shape[1]

    def update(self) -> Update:
        """The update with the rows of (R⁺)ᵀ as w, those of R as read, λ = 1 and α = t."""
        rows = torch.stack([unit_and_norm(direction)[0] for direction in self.directions])
        wide = rows.double()
        writes = torch.linalg.solve(wide @ wide.T, wide).float()
        targets = self.targets or (0.0,) * len(rows)
        const = torch.cat([as_tensor(target, rows) for target in targets], 1)
        return Update(write=writes[None], const=const, lam=torch.ones_like(const), read=rows[None])


def _present(value: Scalar) -> Scalar:
    return value.detach() if isinstance(value, Tensor) else value


def _check_independent(directions: Tensor) -> None:
    """Raises SteeringError for a zero direction, and for directions that depend on each other."""
    if torch.compiler.is_compiling():
        return
    units = torch.stack([unit_and_norm(direction.detach())[0] for direction in directions])
    values = torch.linalg.svdvals(units.double())
    if len(units) > units.shape[1] or not float(values[-1]) > DEPENDENT * float(values[0]):
        raise SteeringError(
            f"{count(len(units), 'direction')} that depend linearly on each other",
            "directions that span as many dimensions as there are directions",
            "leave out those that others make up, or orthogonalise them first",
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SubtractProjection(DirectionIntervention):
    """Subtracts a bounded multiple of the projection: ``h' = h − α·clip((v·h)/(v·v), −c, c)·v`` (arXiv 2502.09674).

    Args:
        direction: The direction v, (d_model,).
        strength: The multiple α: 1 without a limit is ablation, a negative one amplifies.
        limit: The bound c, 0 or more; None for none.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction is zero or not finite, or the strength is not finite.
        DataError: The limit is below 0.
        PairingError: The direction is not one floating-point vector.
    """

    strength: float = 1.0
    limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_and_norm(self.direction)  # raises for a zero direction
        set_fields(self, strength=finite_number("strength", self.strength))
        if self.limit is not None:
            check_range("limit", self.limit, 0, math.inf)
            set_fields(self, limit=None if self.limit == math.inf else float(self.limit))

    def update(self) -> Update:
        """The update with w = v, read = (v·h)/(v·v), λ = α, α = 0, and bounds ±|α|c."""
        unit, norm = unit_and_norm(self.direction)
        row = self.direction.float()[None, None]
        const = torch.zeros(1, 1, dtype=torch.float32, device=row.device)
        most = None if self.limit is None else torch.full_like(const, abs(self.strength) * self.limit)
        return Update(
            write=row,
            const=const,
            lam=torch.full_like(const, self.strength),
            read=(unit / norm)[None, None],
            lo=None if most is None else -most,
            hi=most,
        )
