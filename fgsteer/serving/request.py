"""The steering that a request asks for, in vLLM's ``extra_args`` (over HTTP: ``vllm_xargs``).

A request names what is loaded, or lists several in JSON, or carries the file of a vector in base64 (``steer_vector``):

    {"steer": "love", "steer_scale": 2.0, "steer_scope": "generated"}
    {"steer": '[{"name": "love", "scale": 2.0}, {"name": "sea", "op": "ablate"}]'}
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fgsteer.errors import SteeringError
from fgsteer.errors.checks import check_flags, describe_value
from fgsteer.interventions.scopes import RENAMED_SCOPES, Scope, counted, is_of_prompt
from fgsteer.interventions.table import OPERATIONS
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.serving.inline import encode_vector, inline_name
from fgsteer.serving.rows import check_name
from fgsteer.serving.sources import MAX_RUNS, check_runs, runs_of
from fgsteer.storage.json_files import parse_json
from fgsteer.vector import SteeringVector

KEYS = ("steer", "steer_vector", "steer_op", "steer_scale", "steer_scope", "steer_bos")
ENTRY_KEYS = ("name", "op", "scale", "scope", "bos")
MAX_ENTRIES = 16
"""How many steerings the list of a request may hold; an engine may have room for fewer."""
MAX_LIST_CHARS = 4096
PLAN = "steer_plan"
"""The key under which admission leaves what workers need. It is never taken from a client."""


@dataclass(frozen=True)
class RequestedSteering:
    """One steering of a request: a name, an operation or None, its amount, and which tokens it is for.

    Without a scope or ``bos`` (None) it has those of what is loaded under the name. ``vector`` is the text of a vector
    that the request carries, whose name is made of it.
    """

    name: str
    operation: str | None
    scale: float
    scope: Scope | None = None
    bos: bool | None = None
    vector: str | None = None

    def with_defaults(self, scope: Scope, bos: bool) -> RequestedSteering:
        """The same with a scope and ``bos``, where it has none of its own."""
        own_bos = bos if self.bos is None else self.bos
        return replace(self, scope=scope if self.scope is None else self.scope, bos=own_bos)

    def runs(self, prompt_length: int, start_token: bool | None) -> list[tuple[float, float]]:
        """The runs of positions (first, end) that are steered, where the end is not.

        ``start_token`` says whether a start token is at position 0. Raises SteeringError where it is not known (None)
        and the answer depends on it, and for positions that the prompt does not have.
        """
        scope = self.scope or "all"
        kind, numbers = counted(scope) or (scope, ())
        if kind == "at":
            if max(numbers) >= prompt_length:
                raise SteeringError(
                    f"the scope {scope} for a prompt of {prompt_length} tokens",
                    f"positions from 0 to {prompt_length - 1}",
                    "leave positions out that the prompt does not have",
                )
            return list(runs_of(n for n in numbers if n or not self._skipped(start_token)))
        if kind in ("last", "ends"):
            last: tuple[float, float] = max(0, prompt_length - numbers[-1]), prompt_length
        else:
            first = {"generated": prompt_length, "reply": prompt_length - 1, "last_prompt": prompt_length - 1}.get(
                kind, 0
            )
            last = first, prompt_length if is_of_prompt(scope) else math.inf
        if kind in ("first", "ends") or last[0] == 0:
            begin = self._skipped(start_token)
            last = max(last[0], begin), last[1]
            if kind in ("first", "ends"):
                head = begin, min(prompt_length, begin + numbers[0])
                return [head, last] if kind == "ends" else [head]
        return [last]

    def _skipped(self, start_token: bool | None) -> int:
        """How many tokens at the beginning are not steered: 1 for a start token. Raises SteeringError as ``runs``."""
        if self.bos:
            return 0
        if start_token is None:
            raise SteeringError(
                "a prompt of embeddings, whose first may or may not be that of a start token",
                "a prompt of token ids",
                'send steer_bos = 1 to steer position 0 too, or steer_scope = "generated"',
            )
        return int(start_token)

    def slot(self, prompt_length: int, start_token: bool | None) -> list[float]:
        """The runs as a plan's slot holds them: two numbers each, and (0, 0) for those that there are not."""
        runs = self.runs(prompt_length, start_token)
        return [float(bound) for run in runs + [(0.0, 0.0)] * (MAX_RUNS - len(runs)) for bound in run]


def steering(
    name: str | SteeringVector | Sequence[Mapping[str, Any]],
    *,
    op: str | None = None,
    scale: float = 1.0,
    scope: Scope | None = None,
    bos: bool | None = None,
) -> dict[str, Any]:
    """The ``extra_args`` of ``SamplingParams`` that steer a request by what is loaded under a name, or several names.

    Args:
        name: The name of what is loaded; or a list of dictionaries with the keys ``name``, ``op``, ``scale``, ``scope``
            and ``bos``, which act in their order. All but ``name`` may be left out. A vector itself goes with the
            request, where the engine allows it (``inline_vectors``).
        op: What is done with a vector: "add" (the default), "add_relative", "add_keeping_norm", "ablate", "clamp",
            "at_least", "at_most" or "affine". Anything else that is loaded takes none.
        scale: The operation's amount: add's coefficient, clamp's target, affine's alpha. The coefficients, targets and
            bounds of what is not a vector are multiplied by it.
        scope: Which tokens are steered, as in ``Intervention``; by default those that what is loaded names, for a
            vector all.
        bos: Whether a start token at position 0 is steered too, as in ``Intervention``; by default as what is loaded
            says, for a vector not.

    Returns:
        A dictionary for ``SamplingParams(extra_args=…)``, or for "vllm_xargs" over HTTP.

    Raises:
        SteeringError: An argument is not one of these.
    """
    tokens = None if scope is None else str(parse_scope(scope))  # engines serialise no other class
    if bos is not None:
        check_flags(bos=bos)
    if isinstance(name, list | tuple):
        if (op, scale, scope, bos) != (None, 1.0, None, None):
            raise SteeringError(
                "a list of steerings beside op, scale, scope or bos", "these in each entry", "move them into the list"
            )
        extra: dict[str, Any] = {"steer": _as_json(name)}
    else:
        given = {"scale": scale, "op": op, "scope": tokens, "bos": None if bos is None else int(bos)}
        asked = {"steer_vector": encode_vector(name)} if isinstance(name, SteeringVector) else {"steer": name}
        extra = {**asked, **{f"steer_{key}": value for key, value in given.items() if value is not None}}
    parse_request(extra)
    return extra


def _as_json(entries: Sequence[Any]) -> str:
    """A list of steerings as JSON. Raises SteeringError for what JSON cannot hold."""
    try:
        return json.dumps([dict(entry) if isinstance(entry, Mapping) else entry for entry in entries])
    except (TypeError, ValueError) as error:
        raise SteeringError(
            f"a list that JSON cannot hold: {error}", "dictionaries of texts and numbers", "leave other objects out"
        ) from error


def steering_keys(extra: object) -> list[str]:
    """The keys of a mapping that are about steering; none for anything else."""
    if not isinstance(extra, Mapping):
        return []
    return [key for key in extra if isinstance(key, str) and key.startswith("steer")]


def parse_request(extra: Mapping[str, Any] | None) -> tuple[RequestedSteering, ...]:
    """Parse the steerings of a request, none where it asks for none. Raises SteeringError for what makes no sense."""
    keys = steering_keys(extra)
    if extra is None or not keys:
        return ()
    _refuse_unknown(keys, KEYS, "in a request")
    asked, vector = extra.get("steer"), extra.get("steer_vector")
    options = {key[6:]: extra[key] for key in keys if key not in ("steer", "steer_vector")}
    if asked is None and isinstance(vector, str):
        return (replace(_parse_entry(options, "steer_"), name=inline_name(vector), vector=vector),)
    if vector is not None:
        raise SteeringError(
            f"steer_vector = {describe_value(vector)}" if asked is None else "steer and steer_vector in one request",
            "the file of a vector in base64 as steer_vector, or a name as steer",
            "send one of them; what is to compose with others is loaded by name",
        )
    if asked is None:
        raise SteeringError(
            f"a request with {', '.join(keys)} and without steer",
            "steer = the name of a loaded vector",
            "add the key steer, or leave the others out",
        )
    if not isinstance(asked, str) or not asked.startswith("["):
        return (replace(_parse_entry(options, "steer_"), name=check_name(asked)),)
    if len(keys) > 1:
        raise SteeringError(
            f"a request with a list as steer and with {', '.join(sorted(set(keys) - {'steer'}))}",
            f"the keys {', '.join(ENTRY_KEYS[1:])} in each entry of the list",
            "move them into the list",
        )
    entries = _parse_list(asked)
    return tuple(
        replace(_parse_entry(entry, f"steer[{n}]."), name=check_name(entry["name"])) for n, entry in enumerate(entries)
    )


def _refuse_unknown(keys: Sequence[str], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(keys) - set(known)):
        raise SteeringError(
            f"the keys {', '.join(unknown)!a:.60} {where}", f"keys among {', '.join(known)}", "correct the key"
        )


def _parse_list(text: str) -> list[dict[str, Any]]:
    """The entries of a list in JSON. Raises SteeringError for another text, and for too long a list."""
    expected = f"a JSON list of 1 to {MAX_ENTRIES} objects in at most {MAX_LIST_CHARS} characters"
    if len(text) > MAX_LIST_CHARS:
        raise SteeringError(f"steer of {len(text):,} characters", expected, "ask for less, or under shorter names")
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise SteeringError(f"steer that cannot be read: {str(error)!a:.100}", expected, "correct the JSON") from error
    if not entries or len(entries) > MAX_ENTRIES:
        raise SteeringError(f"{len(entries)} entries in steer", expected, "name between one and so many")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise SteeringError(f"steer[{number}] = {describe_value(entry)}", expected, 'write {"name": "love"}')
        _refuse_unknown(list(entry), ENTRY_KEYS, f"in steer[{number}]")
        if "name" not in entry:
            raise SteeringError(f"steer[{number}] without a name", "the name of what is loaded", 'add "name"')
    return list(entries)


def _parse_entry(entry: Mapping[str, Any], prefix: str) -> RequestedSteering:
    """One steering without its name, whose keys have a prefix in errors. Raises SteeringError for no sense."""
    operation, scope = entry.get("op"), entry.get("scope")
    scale, bos = entry.get("scale", 1.0), entry.get("bos")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= sys.float_info.max:
        raise SteeringError(f"{prefix}scale = {describe_value(scale)}", f"a finite number as {prefix}scale")
    if not isinstance(operation, str | None) or operation not in (None, *OPERATIONS):
        raise SteeringError(
            f"{prefix}op = {describe_value(operation)}", f"one of {', '.join(OPERATIONS)} as {prefix}op"
        )
    if scope is not None:
        scope = RENAMED_SCOPES.get(scope, scope) if isinstance(scope, str) else scope
        try:
            scope = check_runs(parse_scope(scope), f"{prefix}scope")
        except SteeringError as error:
            raise SteeringError(
                f"{prefix}scope = {describe_value(scope)}", f"a scope as {prefix}scope", str(error)
            ) from error
    if bos not in (None, 0, 1) or isinstance(bos, str):
        raise SteeringError(f"{prefix}bos = {describe_value(bos)}", f"0 or 1 as {prefix}bos")
    return RequestedSteering("", operation, float(scale), scope, None if bos is None else bool(bos))
