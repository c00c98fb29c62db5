"""What most engines can say of where and on what: the output of one block, every token.

layer = block_output(vec.add(8.0), "llama.cpp")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.interventions import Intervention
from fgsteer.steering.ranges import change_bound, check_amount

Interventions = Intervention | Sequence[Intervention]


def checked(interventions: Interventions) -> list[Intervention]:
    """The interventions as a list, with the values of now.

    Raises SteeringError for none and for an amount at which float32 overflows, PairingError for those of two models.
    """
    items = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for item in items:
        if not isinstance(item, Intervention):
            raise SteeringError(a(type(item).__name__), "interventions", "call .add(coefficient) on a vector")
    if not items:
        raise SteeringError("no intervention", "at least one")
    if len(widths := {item.d_model for item in items}) > 1:
        raise PairingError(f"interventions of d_model {', '.join(map(str, sorted(widths)))}", "one model's")
    if len(names := {item.model_name for item in items if item.model_name}) > 1:
        raise PairingError(f"interventions made for {' and '.join(sorted(names))}", "one model's")
    for item in items:
        check_amount(change_bound(item.update()), torch.float32, item.d_model, called(item))
    return [item.detach() for item in items]


def block_output(item: Intervention, engine: str) -> int:
    """The block ℓ whose output is acted on: ``resid_post`` of ℓ is ``resid_pre`` of ℓ + 1. Raises SteeringError."""
    layer, site = item.hookpoint.layer, item.hookpoint.site
    if site == "resid_post":
        return layer
    if site == "resid_pre" and layer > 0:
        return layer - 1
    raise SteeringError(
        f"{called(item)} at {item.hookpoint}",
        f"one at resid_post: {engine} acts on the outputs of blocks",
        "build the vector at a block's output, or steer here: fgsteer.steer",
    )


def every_token(item: Intervention, engine: str) -> None:
    """Raises SteeringError for an intervention that is not for every token, the first one too."""
    if item.scope != "all":
        raise SteeringError(
            f"scope {item.scope!r}",
            f"'all': {engine} acts on every token",
            "export to EasySteer, which selects tokens, or steer here: fgsteer.steer",
        )
    if not item.bos:
        raise SteeringError(
            f"{called(item)} that spares position 0",
            f"bos=True: {engine} acts on every token, the first one too",
            "pass bos=True; EasySteer and fgsteer.steer can spare it",
        )


def called(item: Intervention) -> str:
    """An intervention's kind in a sentence: "an Add", "a Clamp"."""
    kind = type(item).__name__
    return f"a{'n' if kind[0] == 'A' else ''} {kind}"
