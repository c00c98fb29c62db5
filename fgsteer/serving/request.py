"""What a request says of its steering, in vLLM's ``extra_args`` (``vllm_xargs`` over HTTP).

{"steer": "love", "steer_scale": 2.0, "steer_scope": "generated"}
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fgsteer.errors import SteeringError
from fgsteer.errors.checks import check_flags, describe_value
from fgsteer.interventions.scopes import SCOPES, Scope
from fgsteer.interventions.table import OPERATIONS
from fgsteer.serving.served import check_name

KEYS = ("steer", "steer_op", "steer_scale", "steer_scope", "steer_bos")
PLAN = "steer_plan"  # where admission leaves what workers need; never taken from a client


@dataclass(frozen=True)
class Wanted:
    """One request's steering: a name, an operation or None, its argument, and which tokens."""

    name: str
    operation: str | None
    scale: float
    scope: Scope
    bos: bool

    def span(self, prompt_length: int, start_token: bool | None) -> tuple[float, float]:
        """(first, end) of the positions that are steered; ``start_token`` says whether one stands at position 0.

        Raises SteeringError where that is not known (None) and matters.
        """
        first = {"generated": prompt_length, "last_prompt_on": prompt_length - 1}.get(self.scope, 0)
        end = prompt_length if self.scope == "prompt" else math.inf
        if first > 0 or self.bos:
            return first, end
        if start_token is None:
            raise SteeringError(
                "a prompt of embeddings, whose first may be a start token's or not",
                "token ids",
                "say steer_bos = 1 to steer position 0 too, or steer_scope = generated",
            )
        return int(start_token), end


def steering(
    name: str, *, op: str | None = None, scale: float = 1.0, scope: Scope = "all", bos: bool = False
) -> dict[str, Any]:
    """``extra_args`` of ``SamplingParams`` that steer a request by what is loaded as ``name``.

    ``op`` is add (the default), ablate, clamp or affine, ``scale`` its argument: add's
    coefficient, clamp's target, affine's alpha; a feature clamp takes no ``op`` and
    multiplies its targets by ``scale``. ``scope`` and ``bos`` as in Intervention.
    Raises SteeringError.
    """
    check_flags(bos=bos)
    extra: dict[str, Any] = {"steer": name, "steer_scale": scale, "steer_scope": scope, "steer_bos": int(bos)}
    if op is not None:
        extra["steer_op"] = op
    parse(extra)
    return extra


def said(extra: object) -> list[str]:
    """The keys of a mapping that speak of steering; none of anything else."""
    return (
        [key for key in extra if isinstance(key, str) and key.startswith("steer")] if isinstance(extra, Mapping) else []
    )


def parse(extra: Mapping[str, Any] | None) -> Wanted | None:
    """A request's steering, None where it asks for none. Raises SteeringError for what cannot be meant."""
    keys = said(extra)
    if extra is None or not keys:
        return None
    if unknown := sorted(set(keys) - set(KEYS)):
        raise SteeringError(f"{', '.join(unknown)!a:.60} in a request", f"keys among {', '.join(KEYS)}")
    name, operation, scope = extra.get("steer"), extra.get("steer_op"), extra.get("steer_scope", "all")
    scale, bos = extra.get("steer_scale", 1.0), extra.get("steer_bos", 0)
    if name is None:
        raise SteeringError("steering without a name", "steer = the name of a loaded vector")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= sys.float_info.max:
        raise SteeringError(f"steer_scale = {describe_value(scale)}", "a finite number")
    for key, value, known in (("steer_op", operation, (None, *OPERATIONS)), ("steer_scope", scope, SCOPES)):
        if not isinstance(value, str | None) or value not in known:
            raise SteeringError(f"{key} = {describe_value(value)}", f"one of {', '.join(filter(None, known))}")
    if isinstance(bos, str) or bos not in (0, 1):
        raise SteeringError(f"steer_bos = {describe_value(bos)}", "0 or 1")
    return Wanted(check_name(name), operation, float(scale), scope, bool(bos))
