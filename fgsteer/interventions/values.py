"""The numbers and vectors that interventions hold, checked when an intervention is made.

finite_vector("direction", torch.ones(576)).dtype == torch.float32
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.checks import check_number, describe_value, warn
from fgsteer.interventions.scopes import RENAMED_SCOPES, SCOPES, Scope

Scalar = float | Float[Tensor, ""]  # a tensor where it requires grad, else a float


def parse_scope(value: object) -> Scope:
    """Return a scope by its present name, with a DeprecationWarning for an earlier one.

    Raises SteeringError for what is no scope.
    """
    if isinstance(value, str) and value in RENAMED_SCOPES:
        present = RENAMED_SCOPES[value]
        warn(f'The scope "{value}" is now called "{present}".', DeprecationWarning)
        return present
    for scope in SCOPES:
        if value == scope:
            return scope
    raise SteeringError(
        describe_value(value),
        f"a scope among {', '.join(SCOPES)}",
        "the scope says which tokens are steered; leave it out for all of them",
    )


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


def check_equal_width(reference: Tensor, direction: Tensor) -> None:
    """Raises PairingError for a reference whose width is not the direction's."""
    if reference.shape != direction.shape:
        raise PairingError(
            f"a reference of width {len(reference)}",
            f"a reference as wide as the direction, {len(direction)} values",
            "pass the mean activation at the direction's own hookpoint",
        )


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
    return (value.to(like) if isinstance(value, Tensor) else torch.tensor(value).to(like)).reshape(1, 1)
