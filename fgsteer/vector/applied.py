"""The interventions that a direction at a hookpoint gives, whatever else is known of it.

vec.add(8.0), vec.clamp(at_most=5.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.errors.wording import a
from fgsteer.interventions.adding import AdaptiveAdd, Add, AddKeepingNorm, AddRelative
from fgsteer.interventions.gates import Gate
from fgsteer.interventions.projecting import Ablate, Affine, Clamp
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.values import Scalar
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.vector.provenance import model_name


class Applied:
    """What has a direction and can steer with it; ``SteeringVector`` is."""

    direction: Float[Tensor, " d_model"]
    hookpoint: Hookpoint
    reference: Float[Tensor, " d_model"] | None
    provenance: Mapping[str, Any]
    read: Float[Tensor, " d_model"] | None
    bias: Scalar

    def add(
        self, coefficient: Scalar = 1.0, *, scope: Scope = "all", bos: bool = False, when: Gate | None = None
    ) -> Add:
        """The intervention ``h' = h + c·v`` (CAA, arXiv 2312.06681).

        Args:
            coefficient: The strength c; a tensor that requires grad can be trained.
            scope: The tokens that are steered: "all", "prompt", "generated" or "reply" (from the last prompt token on).
            bos: Whether a start token at position 0 is steered too.
            when: The gate under which it acts, such as ``fg.Feature(sae, 123) > 2.0``; None for always.

        Raises:
            SteeringError: The coefficient is not finite, or the scope is none of the four.
        """
        return Add(direction=self.direction, coefficient=coefficient, scope=scope, bos=bos, when=when, **self._origin)

    def add_relative(
        self, coefficient: Scalar = 1.0, *, scope: Scope = "all", bos: bool = False, when: Gate | None = None
    ) -> AddRelative:
        """The intervention ``h' = h + c·‖h‖·v̂``, whose strength is in units of each activation's norm.

        Args:
            coefficient: The dose c, such as 0.3.
            scope: As in ``add``.
            bos: As in ``add``.
            when: As in ``add``.

        Raises:
            SteeringError: The direction is zero, or the coefficient is not finite.
        """
        return AddRelative(
            direction=self.direction, coefficient=coefficient, scope=scope, bos=bos, when=when, **self._origin
        )

    def add_keeping_norm(
        self, coefficient: Scalar = 1.0, *, scope: Scope = "all", bos: bool = False, when: Gate | None = None
    ) -> AddKeepingNorm:
        """The intervention ``h' = (h + c·v)·‖h‖/‖h + c·v‖``, which keeps the norm of each activation.

        Args:
            coefficient: The strength c.
            scope: As in ``add``.
            bos: As in ``add``.
            when: As in ``add``.

        Raises:
            SteeringError: The coefficient is not finite.
        """
        return AddKeepingNorm(
            direction=self.direction, coefficient=coefficient, scope=scope, bos=bos, when=when, **self._origin
        )

    def adaptive_add(
        self, coefficient: Scalar = 1.0, *, scope: Scope = "all", bos: bool = False, when: Gate | None = None
    ) -> AdaptiveAdd:
        """The intervention ``h' = h + s·relu(a·h + b)·v``, as strong as each token calls for (PSR, arXiv 2605.03907).

        Args:
            coefficient: The strength s; a negative one subtracts.
            scope: As in ``add``.
            bos: As in ``add``.
            when: As in ``add``.

        Raises:
            SteeringError: The vector has no ``read``, or the coefficient is not finite.
        """
        if self.read is None:
            raise SteeringError(
                f"{a(self.provenance.get('method', 'bare'))} vector whose strength depends on no token",
                "a vector with read",
                "pass read= and bias= to SteeringVector, or use add(coefficient)",
            )
        return AdaptiveAdd(
            direction=self.direction,
            read=self.read,
            bias=self.bias,
            coefficient=coefficient,
            scope=scope,
            bos=bos,
            when=when,
            **self._origin,
        )

    def ablate(self, *, scope: Scope = "all", bos: bool = False, when: Gate | None = None) -> Ablate:
        """The intervention ``h' = h − (v̂·h) v̂``, which removes the projection on v (arXiv 2406.11717).

        Args:
            scope: As in ``add``.
            bos: As in ``add``.
            when: As in ``add``.

        Raises:
            SteeringError: The direction is zero.
        """
        return Ablate(direction=self.direction, scope=scope, bos=bos, when=when, **self._origin)

    def clamp(
        self,
        target: Scalar | None = None,
        *,
        at_least: Scalar | None = None,
        at_most: Scalar | None = None,
        scope: Scope = "all",
        bos: bool = False,
        when: Gate | None = None,
    ) -> Clamp:
        """The intervention ``h' = h + (t − v̂·h) v̂``, which sets the projection on v, or keeps it within bounds.

        Args:
            target: The projection t, in units of the residual stream.
            at_least: In place of a target, the lowest projection: only those below it move, to it.
            at_most: In place of a target, the highest projection, alone or with ``at_least``.
            scope: As in ``add``.
            bos: As in ``add``.
            when: As in ``add``.

        Raises:
            SteeringError: The direction is zero, a number is not finite, or there is neither a target nor a bound.
        """
        return Clamp(
            direction=self.direction,
            target=target,
            at_least=at_least,
            at_most=at_most,
            scope=scope,
            bos=bos,
            when=when,
            **self._origin,
        )

    def affine(
        self, alpha: Scalar = 1.0, *, scope: Scope = "all", bos: bool = False, when: Gate | None = None
    ) -> Affine:
        """The intervention ``r̂·h' = r̂·r⁻ + α‖r‖``: affine concept editing, ACE (arXiv 2411.09003).

        Args:
            alpha: The strength α: 0 puts activations at the negative mean, 1 at the positive mean.
            scope: As in ``add``.
            bos: As in ``add``.
            when: As in ``add``.

        Raises:
            SteeringError: The vector has no reference, its direction is zero, or alpha is not finite.
        """
        if self.reference is None:
            raise SteeringError(
                f"{a(self.provenance.get('method', 'bare'))} vector without a reference",
                "a vector that keeps the negative mean as its reference",
                "build it with ace(), or use clamp(target)",
            )
        return Affine(
            direction=self.direction,
            reference=self.reference,
            alpha=alpha,
            scope=scope,
            bos=bos,
            when=when,
            **self._origin,
        )

    @property
    def _origin(self) -> dict[str, Any]:
        """What every intervention of this vector remembers of it."""
        return {
            "hookpoint": self.hookpoint,
            "model_name": model_name(self.provenance),
            "method": str(self.provenance.get("method") or ""),
        }
