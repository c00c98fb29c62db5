"""Activations replaced by what a map makes of them, such as those of a base model by a tuned model's.

Remap(hookpoint=Hookpoint(6), weight=W, bias=b, strength=1.0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError
from fgsteer.errors.checks import check_range
from fgsteer.interventions.base import Intervention, InterventionFields, set_fields
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.values import finite_matrix, finite_vector


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Remap(Intervention):
    """Replaces an activation by what a map makes of it: ``h' = h + s·(f(h) − h)`` (arXiv 2503.04429).

    The map is affine, ``f(h) = W h + b``, or has a hidden layer, ``f(h) = W ReLU(W₁h + b₁) + b``. Both are cases of the
    one equation of interventions, with a term for each dimension and each hidden unit.

    Args:
        weight: The matrix W, (d_model, d_model), or (d_model, hidden) with a hidden layer.
        bias: The vector b, (d_model,).
        hidden_weight: The matrix W₁ of the hidden layer, (hidden, d_model); None for an affine map.
        hidden_bias: The vector b₁ of the hidden layer, (hidden,).
        strength: The share s of the way from h to f(h), from 0 to 1; with 0 every bit stays as it is.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: A matrix or vector is not finite.
        PairingError: The shapes do not fit together, or the map gives another width than it takes.
        DataError: The strength is not between 0 and 1.
    """

    weight: Float[Tensor, "d_model d_in"]
    bias: Float[Tensor, " d_model"]
    hidden_weight: Float[Tensor, "hidden d_model"] | None = None
    hidden_bias: Float[Tensor, " hidden"] | None = None
    strength: float = 1.0

    if TYPE_CHECKING:  # the constructor as it is called: it takes more than the fields hold

        def __init__(
            self,
            *,
            weight: Tensor,
            bias: Tensor,
            hidden_weight: Tensor | None = None,
            hidden_bias: Tensor | None = None,
            strength: float = 1.0,
            **common: Unpack[InterventionFields],
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("strength", self.strength, 0, 1)
        set_fields(
            self,
            strength=float(self.strength),
            weight=finite_matrix("weight", self.weight),
            bias=finite_vector("bias", self.bias),
        )
        check_map_shapes(self.weight, self.bias, self.hidden_weight, self.hidden_bias)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            set_fields(
                self,
                hidden_weight=finite_matrix("hidden_weight", self.hidden_weight),
                hidden_bias=finite_vector("hidden_bias", self.hidden_bias),
            )
        taken = (self.weight if self.hidden_weight is None else self.hidden_weight).shape[1]
        if taken != len(self.bias):
            raise PairingError(
                f"a map from width {taken} to width {len(self.bias)}",
                "a map between two models of one width, as what it gives takes the place of what it reads",
                "carry a vector over instead: fg.caa(transfer_map.collect(model, tokenizer, contrast))",
            )

    @property
    def d_model(self) -> int:
        """The width of the activation that it replaces."""
        return len(self.bias)

    def update(self) -> Update:
        """The update: for each dimension i ``w = eᵢ``, and for each hidden unit j ``w = W[:, j]`` with ``lo = 0``.

        An affine map reads ``W[i] − eᵢ`` with λ = −s and α = s·bᵢ. One with a hidden layer reads ``eᵢ`` with λ = s, and
        ``W₁[j]`` with λ = −s and α = s·b₁ⱼ.
        """
        W, b, s = self.weight.float(), self.bias.float(), self.strength
        if s == 0:
            nothing = torch.zeros(1, 1, dtype=W.dtype, device=W.device)
            return Update(write=torch.zeros(1, 1, len(b), dtype=W.dtype, device=W.device), const=nothing, lam=nothing)
        eye = torch.eye(len(b), dtype=W.dtype, device=W.device)
        if self.hidden_weight is None or self.hidden_bias is None:
            const = s * b[None]
            return Update(write=eye[None], const=const, lam=torch.full_like(const, -s), read=(W - eye)[None])
        W1, b1 = self.hidden_weight.float().to(W), self.hidden_bias.float().to(W)
        lam = torch.cat([torch.full_like(b1, -s), torch.full_like(b, s)])
        lo = torch.cat([torch.zeros_like(b1), torch.full_like(b, -torch.inf)])
        return Update(
            write=torch.cat([W.T, eye])[None],
            const=s * torch.cat([b1, b])[None],
            lam=lam[None],
            read=torch.cat([W1, eye])[None],
            lo=lo[None],
        )


def check_map_shapes(weight: Tensor, bias: Tensor, hidden_weight: Tensor | None, hidden_bias: Tensor | None) -> None:
    """Raises PairingError for matrices and biases that do not make up a map."""
    shapes = [None if t is None else tuple(t.shape) for t in (weight, bias, hidden_weight, hidden_bias)]
    fits = weight.ndim == 2 and bias.shape == weight.shape[:1] and (hidden_weight is None) == (hidden_bias is None)
    if fits and hidden_weight is not None and hidden_bias is not None:
        fits = hidden_weight.ndim == 2 and hidden_bias.shape == hidden_weight.shape[:1] == weight.shape[1:]
    if not fits:
        raise PairingError(
            f"weight, bias, hidden_weight and hidden_bias of the shapes {', '.join(map(str, shapes))}",
            "(d_out, d_in), (d_out,), None, None, or (d_out, hidden), (d_out,), (hidden, d_in), (hidden,)",
            "check that no matrix is transposed",
        )
