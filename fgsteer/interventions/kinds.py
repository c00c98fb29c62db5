"""The kinds of interventions: add, clamp, ablate, affine, and the clamp of SAE features.

``SteeringVector.add`` and its like make them; each says, in ``update``, which terms of the one equation it sets.

    Add(hookpoint=Hookpoint(6), direction=v, coefficient=8.0)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Required, TypedDict, TypeVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import ArgumentError, PairingError, SelectionError
from fgsteer.errors.checks import check_flags, describe_value, is_whole_number
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.values import (
    Scalar,
    as_tensor,
    check_equal_width,
    finite_scalar,
    finite_vector,
    parse_scope,
    unit_and_norm,
)
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE


class InterventionFields(TypedDict, total=False):
    """The arguments of every intervention, as callers may pass them: a hookpoint's name or layer will do."""

    hookpoint: Required[Hookpoint | str | int]
    scope: Scope
    bos: bool
    model_name: str
    method: str


Kind = TypeVar("Kind", bound="Intervention")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Intervention(OneLineRepr, ABC):
    """How an activation is changed, where, and on which tokens.

    Padding and virtual tokens (prompt tuning) are never changed. A tensor among the values that requires grad stays
    the caller's own, so that it can be trained: every pass reads it anew and has its own graph. Other tensors are
    copied.

    Args:
        hookpoint: Where the activation is: a Hookpoint, its name ("blocks.6.hook_resid_post"), or a layer.
        scope: The tokens that are changed: "all", "prompt", "generated", or "reply" (from the last prompt token on,
            which is where the first word of a reply is decided).
        bos: Whether a start token at position 0 (BOS, or EOS in its place) is changed too; a word there always is.
        model_name: The model that it was made for, where known.
        method: How it was made, where known.

    Raises:
        HookpointError: The hookpoint cannot be parsed.
        SteeringError: The scope is not one of the four.
    """

    hookpoint: Hookpoint
    scope: Scope = "all"
    bos: bool = False
    model_name: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        _set(self, hookpoint=Hookpoint.parse(self.hookpoint), scope=parse_scope(self.scope))
        check_flags(bos=self.bos)

    @property
    @abstractmethod
    def d_model(self) -> int:
        """The width of the activation that it acts on."""

    @property
    def trained(self) -> bool:
        """Whether one of its values requires grad."""
        return any(isinstance(value, Tensor) and value.requires_grad for value in self._values().values())

    def detach(self: Kind) -> Kind:
        """The same intervention with its present values, none of which requires grad."""
        values: dict[str, Any] = {n: v.detach() for n, v in self._values().items() if isinstance(v, Tensor)}
        return replace(self, **values) if self.trained else self

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def update(self) -> Update:
        """The kernel's form of this intervention, for one row."""


def _set(intervention: Intervention, **values: object) -> None:
    """Set fields of a frozen dataclass to their checked values, while it is being made."""
    for name, value in values.items():
        object.__setattr__(intervention, name, value)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DirectionIntervention(Intervention):
    """An intervention along one ``direction`` (d_model,)."""

    direction: Float[Tensor, " d_model"]

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, direction=finite_vector("direction", self.direction))

    @property
    def d_model(self) -> int:
        """The width of the direction."""
        return self.direction.shape[0]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Add(DirectionIntervention):
    """Adds a direction to an activation: ``h' = h + c·v`` (CAA, arXiv 2312.06681).

    Args:
        direction: The direction v, (d_model,).
        coefficient: The strength c.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction or the coefficient is not finite.
        PairingError: The direction is not one floating-point vector.
    """

    coefficient: Scalar = 1.0

    if TYPE_CHECKING:  # the constructor as it is called: it takes more than the fields hold

        def __init__(
            self, *, direction: Tensor, coefficient: Scalar = 1.0, **common: Unpack[InterventionFields]
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, coefficient=finite_scalar("coefficient", self.coefficient))

    def update(self) -> Update:
        """The update with w = v, λ = 0, α = c."""
        row = self.direction.float()[None, None]
        const = as_tensor(self.coefficient, row)
        return Update(write=row, const=const, lam=torch.zeros_like(const))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ProjectionIntervention(DirectionIntervention):
    """An intervention that sets the projection on ``direction`` r (d_model,): ``r̂·h'`` is the same for every h."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_and_norm(self.direction)  # raises for a zero direction

    @abstractmethod
    def projection(self) -> Scalar:
        """What the projection on the unit vector r̂ becomes, in units of the residual stream."""

    def update(self) -> Update:
        """The update with w = r̂, read = r̂·h, λ = 1, and the projection as α + λμ."""
        row = unit_and_norm(self.direction)[0][None, None]
        const = as_tensor(self.projection(), row)
        return Update(write=row, const=const, lam=torch.ones_like(const), read=row)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Clamp(ProjectionIntervention):
    """Sets the projection on a direction: ``h' = h + (t − r̂·h) r̂``.

    Args:
        direction: The direction r, (d_model,), of which only r̂ = r/‖r‖ matters.
        target: The projection t, in units of the residual stream.

    The other arguments are those of ``Intervention``.

    Raises:
        SteeringError: The direction is zero or not finite, or the target is not finite.
        PairingError: The direction is not one floating-point vector.
    """

    target: Scalar

    if TYPE_CHECKING:

        def __init__(self, *, direction: Tensor, target: Scalar, **common: Unpack[InterventionFields]) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, target=finite_scalar("target", self.target))

    def projection(self) -> Scalar:
        """The target."""
        return self.target


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

    def projection(self) -> Scalar:
        """Zero."""
        return 0.0


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
        _set(self, reference=finite_vector("reference", self.reference), alpha=finite_scalar("alpha", self.alpha))
        check_equal_width(self.reference, self.direction)

    def projection(self) -> Scalar:
        """The reference's projection and α‖r‖."""
        unit, norm = unit_and_norm(self.direction)
        return unit @ self.reference.float().to(unit) + as_tensor(self.alpha, unit)[0, 0] * norm


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ClampFeature(Intervention):
    """Sets feature activations, and keeps the SAE's reconstruction error: ``h' = h + Σⱼ (tⱼ − fⱼ(h)) W_dec[j]``.

    Every fⱼ is read from the same h, so that a clamp of several features is joint.

    Args:
        sae: The SAE whose features are set; it must have been trained at ``hookpoint``.
        targets: {feature id: activation}.

    The other arguments are those of ``Intervention``.

    Raises:
        SelectionError: There is no target, or one of a feature that the SAE does not have.
        ArgumentError: The targets are no mapping of whole numbers to numbers.
        PairingError: The SAE belongs to another hookpoint, or is a transcoder.
    """

    sae: SAE
    targets: Mapping[int, Scalar]

    if TYPE_CHECKING:

        def __init__(
            self, *, sae: SAE, targets: Mapping[int, Scalar], **common: Unpack[InterventionFields]
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, targets=_checked_targets(self.targets))
        for feature in self.targets:
            self.sae.direction(feature)
        if self.sae.reads is not None:
            raise PairingError(
                f"the features of a transcoder, which reads at {self.sae.reads} and writes elsewhere",
                "features of an SAE that reads where it steers",
                "steer with their directions: fg.from_features(sae, ids).add(coefficient)",
            )
        if self.hookpoint != self.sae.hookpoint:
            raise PairingError(
                f"a feature clamp at {self.hookpoint}",
                f"a clamp at {self.sae.hookpoint}, where its SAE was trained",
                "pass hookpoint=sae.hookpoint",
            )

    def _values(self) -> dict[str, Any]:
        tensors = {name: value for name, value in vars(self.sae).items() if isinstance(value, Tensor)}
        return tensors | {f"target of feature {j}": target for j, target in self.targets.items()}

    def detach(self) -> ClampFeature:
        """The same intervention with its present targets, as floats."""
        targets = {j: t.detach() if isinstance(t, Tensor) else t for j, t in self.targets.items()}
        return replace(self, targets=targets) if self.trained else self

    @property
    def d_model(self) -> int:
        """The width of the SAE's decoder rows."""
        return self.sae.d_model

    def update(self) -> Update:
        """The update with w = W_dec[j], read = fⱼ(h), λ = 1, μ = 0, α = tⱼ."""
        features = list(self.targets)
        write = self.sae.W_dec[features][None].float()
        const = torch.cat([as_tensor(target, write) for target in self.targets.values()], 1)
        competing = self.sae.activation == "topk"
        return Update(
            write=write,
            const=const,
            lam=torch.ones_like(const),
            sae=self.sae if competing else self.sae.restrict(features),
            features=tuple(features) if competing else (),
        )


def _checked_targets(targets: object) -> dict[int, Scalar]:
    """Targets by feature id. Raises ArgumentError for another mapping, SelectionError for an empty one."""
    if not isinstance(targets, Mapping):
        raise ArgumentError(
            f"targets that are {describe_value(targets)}",
            "targets as a dictionary {feature id: activation}",
            "pass {42: 8.0}",
        )
    if not targets:
        raise SelectionError("no targets", "at least one {feature id: activation}", "name a feature to clamp")
    for feature in targets:
        if not is_whole_number(feature):
            raise ArgumentError(f"feature id {describe_value(feature)}", "a whole number", "pass targets={42: 8.0}")
    return {int(feature): finite_scalar(f"target of feature {feature}", t) for feature, t in targets.items()}
