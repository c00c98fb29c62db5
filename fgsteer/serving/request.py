"""The steering that a request asks for, in vLLM's ``extra_args`` (over HTTP: ``vllm_xargs``).

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
from fgsteer.interventions.scopes import RENAMED_SCOPES, Scope, counted, is_of_prompt
from fgsteer.interventions.table import OPERATIONS
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.serving.rows import check_name

KEYS = ("steer", "steer_op", "steer_scale", "steer_scope", "steer_bos")
PLAN = "steer_plan"
"""The key under which admission leaves what workers need. It is never taken from a client."""


@dataclass(frozen=True)
class RequestedSteering:
    """The steering of one request: a name, an operation or None, its amount, and which tokens it is for."""

    name: str
    operation: str | None
    scale: float
    scope: Scope
    bos: bool

    def span(self, prompt_length: int, start_token: bool | None) -> tuple[float, float]:
        """The positions (first, end) that are steered, where the end is not.

        ``start_token`` says whether a start token is at position 0. Raises SteeringError where it is not known (None)
        and the answer depends on it.
        """
        starts = {"generated": prompt_length, "reply": prompt_length - 1, "last_prompt": prompt_length - 1}
        first = starts.get(self.scope, 0)
        end = prompt_length if is_of_prompt(self.scope) else math.inf
        counts = counted(self.scope)
        if counts is not None and counts[0] == "last":
            first = max(0, prompt_length - counts[1][0])
        if first > 0 or self.bos:
            return first, min(end, counts[1][0]) if counts is not None and counts[0] == "first" else end
        if start_token is None:
            raise SteeringError(
                "a prompt of embeddings, whose first may or may not be that of a start token",
                "a prompt of token ids",
                'send steer_bos = 1 to steer position 0 too, or steer_scope = "generated"',
            )
        first = int(start_token)
        return first, min(end, first + counts[1][0]) if counts is not None and counts[0] == "first" else end


def steering(
    name: str, *, op: str | None = None, scale: float = 1.0, scope: Scope = "all", bos: bool = False
) -> dict[str, Any]:
    """The ``extra_args`` of ``SamplingParams`` that steer a request by what is loaded under a name.

    Args:
        name: The name of a loaded vector or feature clamp.
        op: "add" (the default), "ablate", "clamp" or "affine"; a feature clamp takes none.
        scale: The operation's amount: add's coefficient, clamp's target, affine's alpha. A feature clamp's targets
            are multiplied by it.
        scope: Which tokens are steered, as in ``Intervention``.
        bos: Whether a start token at position 0 is steered too, as in ``Intervention``.

    Returns:
        A dictionary for ``SamplingParams(extra_args=…)``, or for "vllm_xargs" over HTTP.

    Raises:
        SteeringError: An argument is not one of these.
    """
    check_flags(bos=bos)
    extra: dict[str, Any] = {"steer": name, "steer_scale": scale, "steer_scope": str(parse_scope(scope))}
    extra["steer_bos"] = int(bos)
    if op is not None:
        extra["steer_op"] = op
    parse_request(extra)
    return extra


def steering_keys(extra: object) -> list[str]:
    """The keys of a mapping that are about steering; none for anything else."""
    if not isinstance(extra, Mapping):
        return []
    return [key for key in extra if isinstance(key, str) and key.startswith("steer")]


def parse_request(extra: Mapping[str, Any] | None) -> RequestedSteering | None:
    """Parse the steering of a request, None where it asks for none. Raises SteeringError for what makes no sense."""
    keys = steering_keys(extra)
    if extra is None or not keys:
        return None
    if unknown := sorted(set(keys) - set(KEYS)):
        raise SteeringError(
            f"the keys {', '.join(unknown)!a:.60} in a request", f"keys among {', '.join(KEYS)}", "correct the key"
        )
    name, operation, scope = extra.get("steer"), extra.get("steer_op"), extra.get("steer_scope", "all")
    scope = RENAMED_SCOPES.get(scope, scope) if isinstance(scope, str) else scope
    scale, bos = extra.get("steer_scale", 1.0), extra.get("steer_bos", 0)
    if name is None:
        raise SteeringError(
            f"a request with {', '.join(keys)} and without steer",
            "steer = the name of a loaded vector",
            "add the key steer, or leave the others out",
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= sys.float_info.max:
        raise SteeringError(f"steer_scale = {describe_value(scale)}", "a finite number as steer_scale")
    if not isinstance(operation, str | None) or operation not in (None, *OPERATIONS):
        raise SteeringError(f"steer_op = {describe_value(operation)}", f"one of {', '.join(OPERATIONS)} as steer_op")
    try:
        scope = parse_scope(scope)
    except SteeringError as error:
        raise SteeringError(f"steer_scope = {describe_value(scope)}", "a scope as steer_scope", str(error)) from error
    if (counts := counted(scope)) is not None and counts[0] in ("ends", "at"):
        raise SteeringError(
            f"steer_scope = {scope}",
            "one run of tokens: all, prompt, generated, reply, last_prompt, first:N or last:N",
            "steer single positions with fgsteer.steer",
        )
    if isinstance(bos, str) or bos not in (0, 1):
        raise SteeringError(f"steer_bos = {describe_value(bos)}", "0 or 1 as steer_bos")
    return RequestedSteering(check_name(name), operation, float(scale), scope, bool(bos))
