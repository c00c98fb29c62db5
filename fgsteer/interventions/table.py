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
    from fgsteer.interventions.kinds import Intervention


@dataclass(frozen=True)
class InterventionSpec:
    """One kind of intervention.

    Args:
        name: What it is called in ``--op``, in ``steer_op``, and as a method of ``SteeringVector``.
        kind: Its class, a public name of fgsteer.
        amount: The argument that sets its strength; "" for a kind without one.
        equation: What becomes of an activation h.
        summary: What it does, in one sentence.
        of_vector: Whether a vector makes it; ClampFeature is made of an SAE and feature ids.
    """

    name: str
    kind: str
    amount: str
    equation: str
    summary: str
    of_vector: bool = True

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
                f"make it of an SAE's features: fg.{self.kind}(sae=sae, hookpoint=sae.hookpoint, targets={{42: 8.0}})",
            )
        amounts = {self.amount: amount} if self.amount else {}
        intervention: Intervention = getattr(vector, self.name)(**amounts, **tokens)
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
        "clamp_feature",
        "ClampFeature",
        "targets",
        "h + Σⱼ (tⱼ − fⱼ(h)) W_dec[j]",
        "Sets the activations of SAE features to targets, and keeps the SAE's reconstruction error.",
        of_vector=False,
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
    """The row of an intervention's kind. Raises SteeringError for a kind that is not in the table."""
    for kind in type(intervention).__mro__:
        for spec in INTERVENTIONS:
            if spec.kind == kind.__name__ and kind.__module__ == "fgsteer.interventions.kinds":
                return spec
    raise SteeringError(
        f"{type(intervention).__name__}, an intervention of your own",
        f"one of {', '.join(spec.kind for spec in INTERVENTIONS)}",
        "where other engines steer, only these can be expressed; steer here with fgsteer.steer",
    )
