"""What most engines require of interventions: one model's, at the output of a block, on every token.

layer = block_output(vec.add(8.0), "llama.cpp")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.interventions import Intervention
from fgsteer.steering.ranges import change_bound, check_amount

Interventions = Intervention | Sequence[Intervention]


def kind_of(item: object) -> str:
    """The kind of an intervention, or of what stands in place of one, with its article: "an Add", "a Clamp"."""
    return a(type(item).__name__)


def listed(interventions: Interventions) -> list[Intervention]:
    """The interventions as a list that later changes of their vectors do not reach.

    Raises:
        SteeringError: There is none, one is no intervention, or one changes entries by more than float32 holds.
        PairingError: They are made for different models.
    """
    items: list[Any] = [*interventions] if isinstance(interventions, Sequence) else [interventions]
    for item in items:
        if not isinstance(item, Intervention):
            raise SteeringError(
                kind_of(item), "an intervention", "call .add(coefficient) on a vector, which makes one of it"
            )
    if not items:
        raise SteeringError("an empty list", "at least one intervention")
    if len(widths := {item.d_model for item in items}) > 1:
        raise PairingError(
            f"interventions of the widths {', '.join(map(str, sorted(widths)))}",
            "interventions of one model, which all have its width",
            "export the interventions of each model to a file of their own",
        )
    if len(names := {item.model_name for item in items if item.model_name}) > 1:
        raise PairingError(
            f"interventions made for {' and '.join(sorted(names))}",
            "interventions made for one model",
            "export the interventions of each model to a file of their own",
        )
    for item in items:
        refuse_gate(item)
        check_amount(change_bound(item.update()), torch.float32, item.d_model, kind_of(item))
    return [item.detach() for item in items]


def refuse_gate(item: Intervention) -> None:
    """Raises SteeringError for an intervention with a gate or a strength that prompts decide, which engines lack."""
    if item.strength_reading is not None:
        raise SteeringError(
            f"{kind_of(item)}, whose strength each prompt decides",
            "a strength that is a number, where other engines steer",
            "steer with fgsteer.steer, or export an Add",
        )
    if item.when is not None:
        raise SteeringError(
            f"{kind_of(item)} with a gate (when=…)",
            "an intervention that always acts, where other engines steer",
            "steer with fgsteer.steer, or leave when= out",
        )


def block_output(item: Intervention, engine: str) -> int:
    """The block ℓ at whose output an intervention acts: ``resid_post`` of ℓ is ``resid_pre`` of ℓ + 1.

    Raises:
        SteeringError: It acts elsewhere.
    """
    layer, site = item.hookpoint.layer, item.hookpoint.site
    if site == "resid_post":
        return layer
    if site == "resid_pre" and layer > 0:
        return layer - 1
    raise SteeringError(
        f"{kind_of(item)} at {item.hookpoint}",
        "an intervention at resid_post",
        f"{_engine_only(engine, 'on the outputs of blocks')}: build the vector at the output of a block, "
        "or steer with fgsteer.steer",
    )


def every_token(item: Intervention, engine: str) -> None:
    """Check that an intervention is for every token, that at position 0 too.

    Raises:
        SteeringError: It is for some tokens only.
    """
    if item.scope != "all":
        raise SteeringError(
            f"scope={item.scope!r}",
            'scope="all"',
            f"{_engine_only(engine, 'on all tokens alike')}: export to EasySteer, which selects tokens, "
            "or steer with fgsteer.steer",
        )
    if not item.bos:
        raise SteeringError(
            f"{kind_of(item)} with bos=False, which leaves the token at position 0 alone",
            "bos=True",
            f"{_engine_only(engine, 'on all tokens alike')}: pass bos=True, or export to EasySteer or steer with "
            "fgsteer.steer, which can leave position 0 alone",
        )


def _engine_only(engine: str, where: str) -> str:
    return f"The engine ({engine}) acts {where}"
