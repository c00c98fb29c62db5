"""The numbers and vectors that interventions hold, checked when an intervention is made.

finite_vector("direction", torch.ones(576)).dtype == torch.float32
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.checks import check_number

Scalar = float | Float[Tensor, ""]  # a tensor where it requires grad, else a float
Bounding = Scalar | None


def finite_number(name: str, value: float) -> float:
    """The value as a float. Raises ArgumentError for what is no number, SteeringError for one that is not finite."""
    check_number(name, value)
    number = float(value)
    if not math.isfinite(number):
        raise SteeringError(
            f"{name} = {number}",
            "a finite number",
            "a nan may come from calibrate_many, where no strength reaches the target",
        )
    return number


def finite_scalar(name: str, value: Scalar) -> Scalar:
    """The value as a float; a tensor that requires grad stays as it is.

    Raises ArgumentError for what is no number, SteeringError for a tensor that is not one finite number.
    """
    if not isinstance(value, Tensor) or not value.requires_grad:
        return finite_number(name, value)  # type: ignore[arg-type]
    if value.ndim:
        raise SteeringError(
            f"{name} of shape {tuple(value.shape)} that requires grad",
            "a single number, as a tensor without dimensions",
            f"pass torch.tensor(1.0, requires_grad=True), or one entry of your tensor, as {name}",
        )
    finite_number(name, float(value.detach()))
    return value


def finite_vector(name: str, value: Tensor) -> Tensor:
    """A float32 copy (d_model,) of the value; one that requires grad stays the caller's own, to be trained.

    Raises PairingError unless it is one floating-point vector, SteeringError where it is not finite.
    """
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point():
        is_tensor = isinstance(value, Tensor)
        raise PairingError(
            f"shape {tuple(value.shape)} and {value.dtype}" if is_tensor else type(value).__name__,
            f"a {name} that is one floating-point vector of shape (d_model,)",
            "take one row, and make it floating-point with .float()" if is_tensor else "pass a torch tensor",
        )
    if not bool(torch.isfinite(value).all()):
        raise SteeringError(
            f"nan or inf in the {name}",
            "finite values",
            "look at the activations that it was made of: a model in float16 may have overflowed",
        )
    if value.requires_grad:
        return value
    return value.detach().float().clone()  # the caller's tensor may change later


def finite_matrix(name: str, value: Tensor) -> Tensor:
    """A float32 copy (k, d_model) of the value, of k ≥ 1 rows; one that requires grad stays the caller's own.

    Raises PairingError unless it is one floating-point matrix, SteeringError where it is not finite.
    """
    if not isinstance(value, Tensor) or value.ndim != 2 or not len(value) or not value.is_floating_point():
        is_tensor = isinstance(value, Tensor)
        raise PairingError(
            f"shape {tuple(value.shape)} and {value.dtype}" if is_tensor else type(value).__name__,
            f"{name} as one floating-point matrix of shape (k, d_model)",
            "stack the vectors: torch.stack([a.direction, b.direction])",
        )
    for row in value:
        finite_vector(name, row)
    return value if value.requires_grad else value.detach().float().clone()


def check_equal_width(name: str, vector: Tensor, direction: Tensor) -> None:
    """Raises PairingError for a vector whose width is not the direction's."""
    if vector.shape != direction.shape:
        raise PairingError(
            f"a vector {name!r} of width {len(vector)}",
            f"one as wide as the direction, {len(direction)} values",
            "pass a vector of the direction's own hookpoint",
        )


class Bound(NamedTuple):
    """A term of a clamp: ``clip(value − λ·read, lo, hi)``. With lo = 0 the value is a least one, with hi = 0 a most."""

    value: Any  # Scalar, or None where there is no such bound
    lo: float = -math.inf
    hi: float = math.inf


def bounds_of(bounds: Sequence[Bound], like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Bounds as const, lo and hi of an update, each (1, k); lo and hi are None where nothing is bounded."""
    const = torch.cat([as_tensor(bound.value, like) for bound in bounds], 1)
    if all(math.isinf(bound.lo) and math.isinf(bound.hi) for bound in bounds):
        return const, None, None
    lo = torch.tensor([[bound.lo for bound in bounds]], dtype=like.dtype, device=like.device)
    return const, lo, torch.tensor([[bound.hi for bound in bounds]], dtype=like.dtype, device=like.device)


def bounds_or_target(
    what: str, target: Scalar | None, at_least: Scalar | None, at_most: Scalar | None
) -> tuple[Scalar | None, Scalar | None, Scalar | None]:
    """A target, or bounds in its place, checked. Raises SteeringError for neither, both, or bounds that cross."""
    given = {"target": target, "at_least": at_least, "at_most": at_most}
    named = [name for name, value in given.items() if value is not None]
    if not named or (target is not None and len(named) > 1):
        raise SteeringError(
            f"{what} with {' and '.join(named) or 'nothing to set'}",
            "a number as target, or in its place one as lowest or highest value, or both of these",
            "pass target=, or at_least= and at_most=",
        )
    low, high = check_bounds(what, at_least, at_most)
    return None if target is None else finite_scalar("target", target), low, high


def check_bounds(what: str, at_least: Bounding, at_most: Bounding) -> tuple[Bounding, Bounding]:
    """Bounds as finite numbers, None for none. Raises SteeringError for others, and where they cross."""
    low = None if at_least is None else finite_scalar("at_least", at_least)
    high = None if at_most is None else finite_scalar("at_most", at_most)
    if low is not None and high is not None and not torch.compiler.is_compiling() and float(low) > float(high):
        raise SteeringError(
            f"{what} to at least {float(low):g} and at most {float(high):g}",
            "a lowest value that is not above the highest",
            "exchange at_least and at_most",
        )
    return low, high


def unit_and_norm(direction: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector and the norm of a direction, in float32. Raises SteeringError for norm 0, or beyond float32."""
    direction = direction.float()
    norm = direction.norm()
    if not torch.compiler.is_compiling() and not 0 < norm < math.inf:
        raise SteeringError(
            f"a direction of norm {float(norm):g}",
            "a direction to project on, with a norm above 0",
            "check what the vector was made of: equal positives and negatives give a zero vector",
        )
    return direction / norm, norm


def as_tensor(value: Scalar, like: Tensor) -> Tensor:
    """A number as a tensor (1, 1) with the dtype and on the device of another."""
    number = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
    return number.to(like).reshape(1, 1)
