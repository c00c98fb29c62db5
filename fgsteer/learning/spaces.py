"""What is trained: a vector of the residual stream, or weights of an SAE's features that are written through its rows.

space = FeatureSpace(sae, [3, 17], nonnegative=False)
space.direction(weights)                        Σⱼ wⱼ W_dec[j]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import DataError, PairingError, SelectionError
from fgsteer.errors.wording import count
from fgsteer.interventions.adding import Add
from fgsteer.interventions.base import Intervention, InterventionFields
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.values import Scalar
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE


@dataclass(frozen=True, eq=False)
class ResidualSpace:
    """The vector itself is trained: ``v = w``.

    Args:
        hookpoint: Where it acts.
        size: How many numbers are trained, d_model.
        scope: The tokens that it acts on.
    """

    hookpoint: Hookpoint
    size: int
    scope: Scope = "all"

    def direction(self, weights: Float[Tensor, " size"]) -> Float[Tensor, " d_model"]:
        """The direction of trained numbers."""
        return weights

    def size_of_rows(self) -> float:
        """The root of the sum of the squared norms of what each number is multiplied by: here the unit vectors."""
        return math.sqrt(self.size)

    def add(self, weights: Tensor, direction: Tensor, strength: Scalar) -> Intervention:
        """The intervention that adds the direction, so many times."""
        return Add(direction=direction, coefficient=strength, hookpoint=self.hookpoint, scope=self.scope)

    def features(self, weights: Float[Tensor, " size"]) -> dict[int, float]:
        """The weights by feature id: none."""
        return {}


class FeatureSpace:
    """Weights of features are trained, and written through the decoder: ``v = Σⱼ wⱼ W_dec[j]``.

    Args:
        sae: The SAE, which stays as it is.
        ids: The features whose weights are trained; None for all.
        device: Where they are trained.
        scope: The tokens that are steered.
        nonnegative: Whether activations are kept from becoming negative, ``h' = h + Σⱼ (relu(zⱼ + wⱼ) − zⱼ) W_dec[j]``
            (YaPO, arXiv 2601.08441).

    Raises:
        SelectionError: There is no feature, one comes twice, or the SAE lacks one.
        PairingError: The SAE reads elsewhere than it writes.
    """

    def __init__(
        self,
        sae: SAE,
        ids: Sequence[int] | None,
        device: torch.device,
        scope: Scope = "all",
        *,
        nonnegative: bool = False,
    ) -> None:
        if sae.reads is not None:
            raise PairingError("a transcoder", "an SAE, which reads where it writes", "pass another SAE")
        self.all, self.ids = ids is None, list(range(sae.d_sae)) if ids is None else [int(j) for j in ids]
        if not self.ids or len(set(self.ids)) < len(self.ids):
            raise SelectionError(f"{count(len(self.ids), 'feature')}: {self.ids!r:.60}", "features, each of them once")
        for j in self.ids:
            sae.direction(j)  # raises for an id that it lacks
        self.sae, self.scope, self.nonnegative = sae.to(device, torch.float32), scope, nonnegative
        self.rows = self.sae.W_dec if self.all else self.sae.W_dec[self.ids]

    @property
    def hookpoint(self) -> Hookpoint:
        """Where the SAE reads and writes."""
        return self.sae.hookpoint

    @property
    def size(self) -> int:
        """How many weights are trained."""
        return len(self.ids)

    def direction(self, weights: Float[Tensor, " size"]) -> Float[Tensor, " d_model"]:
        """The sum of the decoder's rows."""
        return weights @ self.rows

    def size_of_rows(self) -> float:
        """The root of the sum of the squared norms of the decoder's rows."""
        return float(self.rows.norm())

    def add(self, weights: Tensor, direction: Tensor, strength: Scalar) -> Intervention:
        """The intervention that adds the features' rows, so many times."""
        if not self.nonnegative:
            return Add(direction=direction, coefficient=strength, hookpoint=self.hookpoint, scope=self.scope)
        return ShiftFeatures(
            sae=self.sae,
            ids=() if self.all else tuple(self.ids),
            amounts=strength * weights,
            hookpoint=self.hookpoint,
            scope=self.scope,
        )

    def features(self, weights: Float[Tensor, " size"]) -> dict[int, float]:
        """The weights that are not 0, by feature id."""
        values = weights.detach().tolist()
        return {j: value for j, value in zip(self.ids, values, strict=True) if value}


Space = ResidualSpace | FeatureSpace


def check_space(space: Space, objective: str) -> None:
    """Raises DataError for an objective that cannot be trained in a space."""
    if isinstance(space, FeatureSpace) and space.nonnegative and objective in ("reps", "reft_r1"):
        raise DataError(
            f"nonnegative=True with {objective}",
            "an objective that only adds: lm, bipo or simpo",
            "leave nonnegative out, or choose bipo, as YaPO has it",
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ShiftFeatures(Intervention):
    """Shifts feature activations, none below 0: ``h' = h + Σⱼ (relu(zⱼ + aⱼ) − zⱼ) W_dec[j]``, a trained as a tensor.

    ``ClampFeature(plus=…)`` does the same for numbers. Where zⱼ and aⱼ are both 0, aⱼ gets half of the gradient (the
    kernel takes a maximum), so that a feature that is never active can be learned; with ``relu`` it would get none.

    Args:
        sae: The SAE, on the device of ``amounts``.
        ids: Ids of the n features; () for all of the SAE's.
        amounts: a, (n,).
    """

    sae: SAE
    ids: tuple[int, ...]
    amounts: Float[Tensor, " n"]

    if TYPE_CHECKING:

        def __init__(
            self, *, sae: SAE, ids: tuple[int, ...], amounts: Tensor, **common: Unpack[InterventionFields]
        ) -> None: ...

    @property
    def d_model(self) -> int:
        """The width of the decoder's rows."""
        return self.sae.d_model

    def update(self) -> Update:
        """The update with w = W_dec[j], read = zⱼ, α = 0, λ = 1, at least aⱼ: ``max(−z, a) = relu(z + a) − z``."""
        whole = not self.ids or self.sae.activation == "topk"
        part = self.sae if whole else self.sae.restrict(self.ids)
        write = self.sae.W_dec[list(self.ids)] if self.ids else self.sae.W_dec
        const = self.amounts.new_zeros(1, len(self.amounts))
        return Update(
            write=write[None],
            const=const,
            lam=torch.ones_like(const),
            sae=part,
            features=self.ids if whole else (),
            lo=self.amounts[None],
        )
