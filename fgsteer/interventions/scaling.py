"""Activations multiplied by a number, or by one that each activation sets itself (activation scaling).

Scale(hookpoint=Hookpoint(6), width=768, coefficient=0.2, scope="last_prompt")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError
from fgsteer.errors.checks import check_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.base import Intervention, InterventionFields, set_fields
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.values import Scalar, as_tensor, finite_scalar, finite_vector


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Scale(Intervention):
    """Multiplies an activation: ``h' = (1 + α + θ·h)·h`` (activation scaling, arXiv 2410.04962).

    Args:
        width: The width of the activation, d_model.
        coefficient: The number α; −1 without θ sets the activation to zero, and 0 leaves it as it is.
        read: The vector θ, (d_model,), for a factor that each activation sets itself; None for one factor.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: A number or a vector is not finite.
        PairingError: ``read`` is not one floating-point vector of this width.
        DataError: The width is no number of entries.
    """

    width: int
    coefficient: Scalar = 0.0
    read: Float[Tensor, " d_model"] | None = None

    if TYPE_CHECKING:  # the constructor as it is called: it takes more than the fields hold

        def __init__(
            self,
            *,
            width: int,
            coefficient: Scalar = 0.0,
            read: Tensor | None = None,
            **common: Unpack[InterventionFields],
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("width", self.width, 1, MAX_COUNT, whole=True)
        set_fields(self, coefficient=finite_scalar("coefficient", self.coefficient))
        if self.read is not None:
            set_fields(self, read=finite_vector("read", self.read))
            if len(self.read) != self.width:
                raise PairingError(
                    f"read of {len(self.read)} values for a width of {self.width}", "as many", "check the hookpoint"
                )

    @property
    def d_model(self) -> int:
        """The width of the activation that it multiplies."""
        return self.width

    def update(self) -> Update:
        """The update with w = 1 in every entry, read = θ·h, λ = −1 and α, whose change is multiplied by h entrywise."""
        device = "cpu" if self.read is None else self.read.device
        row = torch.ones(1, 1, self.width, dtype=torch.float32, device=device)
        const = as_tensor(self.coefficient, row)
        every = torch.ones(1, dtype=torch.bool, device=row.device)
        if self.read is None:
            return Update(write=row, const=const, lam=torch.zeros_like(const), entrywise=every)
        read = self.read.float()[None, None]
        return Update(write=row, const=const, lam=torch.full_like(const, -1.0), read=read, entrywise=every)
