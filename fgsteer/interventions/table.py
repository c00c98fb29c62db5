"""The table of interventions: what each is called, what makes it, and what it does, in words.

The command line's ``--op``, the server's ``steer_op`` and the documentation read this table; so that ``--help`` stays
quick, it imports no torch.

    intervention_spec("add").make(vector, 8.0, scope="generated") is the same as vector.add(8.0, scope="generated")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fgsteer.errors import SteeringError

if TYPE_CHECKING:
    from fgsteer.interventions.base import Intervention


@dataclass(frozen=True)
class InterventionSpec:
    """One kind of intervention.

    Args:
        name: What it is called in ``--op``, in ``steer_op``, and as a method of ``SteeringVector``.
        kind: Its class, a public name of fgsteer.
        amount: The argument that sets its strength; "" for a kind without one.
        equation: What becomes of an activation h.
        summary: What it does, in one sentence.
        of_vector: Whether a vector makes it, rather than several, or an SAE.
        method: The method of ``SteeringVector`` that makes it, where that is not its name.
        example: Arguments of the class, for one that no vector makes.
    """

    name: str
    kind: str
    amount: str
    equation: str
    summary: str
    of_vector: bool = True
    method: str = ""
    example: str = ""

    def make(self, vector: Any, amount: float, **tokens: Any) -> Intervention:
        """The intervention of a vector, with an amount where the kind takes one.

        Args:
            vector: The ``SteeringVector`` that acts.
            amount: The coefficient, target or alpha; a kind without an amount ignores it.
            **tokens: ``scope`` and ``bos``, as in ``Intervention``.

        Raises:
            SteeringError: The kind is not made of a vector, or this vector lacks what it needs.
        """
        if not self.of_vector:
            raise SteeringError(
                f"{self.name} of a vector",
                f"one of {', '.join(OPERATIONS)}",
                f"make it by its class: fg.{self.kind}({self.example})",
            )
        amounts = {self.amount: amount} if self.amount else {}
        intervention: Intervention = getattr(vector, self.method or self.name)(**amounts, **tokens)
        return intervention


INTERVENTIONS = (
    InterventionSpec(
        "add",
        "Add",
        "coefficient",
        "h + c·v",
        "Adds the vector, times a coefficient, to every activation.",
    ),
    InterventionSpec(
        "add_relative",
        "AddRelative",
        "coefficient",
        "h + c·‖h‖·v̂",
        "Adds the vector at norm 1, times a coefficient and the norm of each activation.",
    ),
    InterventionSpec(
        "add_keeping_norm",
        "AddKeepingNorm",
        "coefficient",
        "(h + c·v)·‖h‖/‖h + c·v‖",
        "Adds the vector, times a coefficient, and scales each activation back to its norm.",
    ),
    InterventionSpec(
        "affine",
        "Affine",
        "alpha",
        "h − proj_v(h) + proj_v(r⁻) + α·v",
        "Sets the projection on the vector to a point between the negative mean (0) and the positive mean (1).",
    ),
    InterventionSpec(
        "ablate",
        "Ablate",
        "",
        "h − (v̂·h) v̂",
        "Removes the projection on the vector; it has no strength.",
    ),
    InterventionSpec(
        "clamp",
        "Clamp",
        "target",
        "h + (t − v̂·h) v̂",
        "Sets the projection on the vector to a target, in units of the residual stream.",
    ),
    InterventionSpec(
        "at_least",
        "Clamp",
        "at_least",
        "h + max(t − v̂·h, 0) v̂",
        "Raises projections on the vector that are lower than a bound to it.",
        method="clamp",
    ),
    InterventionSpec(
        "at_most",
        "Clamp",
        "at_most",
        "h + min(t − v̂·h, 0) v̂",
        "Lowers projections on the vector that are higher than a bound to it.",
        method="clamp",
    ),
    InterventionSpec(
        "clamp_subspace",
        "ClampSubspace",
        "targets",
        "h + R⁺ (t − R h)",
        "Sets the projections on several directions, by default to zero, which removes the subspace.",
        of_vector=False,
        example="directions=torch.stack([a.direction, b.direction]), hookpoint=a.hookpoint",
    ),
    InterventionSpec(
        "rotate",
        "Rotate",
        "by",
        "h − Ph + ‖Ph‖·(cos θ·b₁ + sin θ·b₂)",
        "Turns activations in the plane of two directions, by an angle or to one, and keeps their norm.",
        of_vector=False,
        example="direction=a.direction, other=b.direction, by=30.0, hookpoint=a.hookpoint",
    ),
    InterventionSpec(
        "adaptive_add",
        "AdaptiveAdd",
        "coefficient",
        "h + s·relu(a·h + b)·v",
        "Adds the vector as strongly as its vector of reading finds in each activation.",
    ),
    InterventionSpec(
        "add_by_prompt",
        "AddByPrompt",
        "coefficient",
        "h + clip(s·(r + b), lo, hi)·v",
        "Adds a direction as strongly as a reading r of the prompt calls for, decided once for each prompt.",
        of_vector=False,
        example="direction=a.direction, reading=fg.Projection(a).last(), hookpoint=a.hookpoint",
    ),
    InterventionSpec(
        "remap",
        "Remap",
        "strength",
        "h + s·(f(h) − h)",
        "Replaces activations, in part or in full, by what a map between two models makes of them.",
        of_vector=False,
        example="weight=W, bias=b, hookpoint=6",
    ),
    InterventionSpec(
        "scale",
        "Scale",
        "coefficient",
        "h + (α + θ·h)·h",
        "Multiplies activations by 1 + α, or by a factor that each of them sets itself.",
        of_vector=False,
        example="width=a.d_model, coefficient=0.2, hookpoint=a.hookpoint",
    ),
    InterventionSpec(
        "clamp_feature",
        "ClampFeature",
        "targets",
        "h + Σⱼ (f'ⱼ − fⱼ(h)) W_dec[j]",
        "Sets, bounds, raises or scales the activations of SAE features, and keeps the SAE's reconstruction error.",
        of_vector=False,
        example="sae=sae, hookpoint=sae.hookpoint, targets={42: 8.0}",
    ),
)
OPERATIONS = tuple(spec.name for spec in INTERVENTIONS if spec.of_vector)


def intervention_spec(name: str) -> InterventionSpec:
    """The row of a name. Raises SteeringError for a name that is not in the table."""
    for spec in INTERVENTIONS:
        if spec.name == name:
            return spec
    names = ", ".join(spec.name for spec in INTERVENTIONS)
    raise SteeringError(f"an intervention called {name!r:.60}", f"one of {names}", "check its spelling")


def describe_operations() -> str:
    """What each operation on a vector does, for help texts."""
    return " ".join(f"{spec.name}: {spec.summary}" for spec in INTERVENTIONS if spec.of_vector)


def spec_of(intervention: Intervention) -> InterventionSpec:
    """The row of an intervention's kind: of a clamp with one bound, the row of that bound.

    Raises SteeringError for a kind that is not in the table, and for a clamp between two bounds, which no row is.
    """
    for kind in type(intervention).__mro__:
        own = [spec for spec in INTERVENTIONS if spec.kind == kind.__name__]
        if not own or not kind.__module__.startswith("fgsteer.interventions."):
            continue
        if len(own) == 1:
            return own[0]
        given = [spec for spec in own if getattr(intervention, spec.amount) is not None]
        if len(given) == 1:
            return given[0]
        raise SteeringError(
            f"{type(intervention).__name__} with {' and '.join(spec.amount for spec in given)}",
            "one of them, where other engines steer",
            "pass two interventions that compose, one with each bound; or steer here with fgsteer.steer",
        )
    raise SteeringError(
        f"{type(intervention).__name__}, an intervention of your own",
        f"one of {', '.join(spec.kind for spec in INTERVENTIONS)}",
        "where other engines steer, only these can be expressed; steer here with fgsteer.steer",
    )
