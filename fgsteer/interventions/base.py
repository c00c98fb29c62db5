"""What every intervention is: a hookpoint, a scope, and values that become an update of the kernel.

class Turn(Intervention): ...       a kind of one's own, with d_model and update
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Required, TypedDict, TypeVar

from jaxtyping import Float
from torch import Tensor

from fgsteer.errors.checks import check_flags
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.gates import Gate, Reading, check_gate
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.interventions.values import finite_vector
from fgsteer.models.hookpoints import Hookpoint


class InterventionFields(TypedDict, total=False):
    """The arguments of every intervention, as callers may pass them: a hookpoint's name or layer will do."""

    hookpoint: Required[Hookpoint | str | int]
    scope: Scope
    bos: bool
    when: Gate | None
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
        scope: The tokens that are changed: "all", "prompt", "generated", "reply" (from the last prompt token on,
            which is where the first word of a reply is decided), "last_prompt" (that token alone), or some tokens of
            the prompt: ``fg.first(5)``, ``fg.last(5)``, ``fg.ends(4, 4)``, ``fg.at([0, 3])``, also written "first:5",
            "last:5", "ends:4,4", "at:0,3".
        bos: Whether a start token at position 0 (BOS, or EOS in its place) is changed too; a word there always is.
        when: The gate under which it acts, such as ``fg.Feature(sae, 123) > 2.0``; None for always.
        model_name: The model that it was made for, where known.
        method: How it was made, where known.

    Raises:
        HookpointError: The hookpoint cannot be parsed.
        SteeringError: The scope is none of these, or ``when`` is no gate.
        PairingError: The gate reads above the place where the intervention acts.
    """

    hookpoint: Hookpoint
    scope: Scope = "all"
    bos: bool = False
    when: Gate | None = None
    model_name: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        set_fields(self, hookpoint=Hookpoint.parse(self.hookpoint), scope=parse_scope(self.scope))
        check_flags(bos=self.bos)
        if self.when is not None:
            check_gate(self.when, self.hookpoint)

    @property
    @abstractmethod
    def d_model(self) -> int:
        """The width of the activation that it acts on."""

    @property
    def source(self) -> Hookpoint | None:
        """Where it reads, if that is elsewhere than where it acts, as features of a transcoder are."""
        return None

    @property
    def strength_reading(self) -> Reading | None:
        """What is read of a prompt that decides how strongly it acts there; None where no prompt decides that."""
        return None

    @property
    def readings(self) -> list[Reading]:
        """All that decides whether and how strongly it acts: what its gate and its strength go by."""
        of_gate = [] if self.when is None else [condition.reading for condition in self.when.conditions]
        return of_gate if self.strength_reading is None else [*of_gate, self.strength_reading]

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


def set_fields(item: object, **values: object) -> None:
    """Set fields of a frozen dataclass to their checked values, while it is being made."""
    for name, value in values.items():
        object.__setattr__(item, name, value)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DirectionIntervention(Intervention):
    """An intervention along one ``direction`` (d_model,)."""

    direction: Float[Tensor, " d_model"]

    def __post_init__(self) -> None:
        super().__post_init__()
        set_fields(self, direction=finite_vector("direction", self.direction))

    @property
    def d_model(self) -> int:
        """The width of the direction."""
        return self.direction.shape[0]
