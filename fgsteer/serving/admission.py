"""The door of an engine: every request passes ``admit`` before it is sent, and none that asks for steering goes round.

attach(llm.llm_engine, control.admit)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fgsteer.errors import FgsteerError, SteeringError
from fgsteer.serving.request import PLAN, steering_keys

_SUFFIX = re.compile(r"-steered-(\d+(?:\.\d+)*)\Z")


def suffix_of(tags: Iterable[int]) -> str:
    """What ends the id of a request that is steered by these tags."""
    return f"-steered-{'.'.join(map(str, tags))}"


def tags_of(request_id: str) -> frozenset[int]:
    """The tags by which a request with this id is steered."""
    found = _SUFFIX.search(request_id)
    return frozenset(map(int, found[1].split("."))) if found else frozenset()


def extra_args_of(request: Any) -> Mapping[str, Any] | None:
    """The arguments for extensions such as this one in an ``EngineCoreRequest``."""
    if request.sampling_params is not None:
        extra: Mapping[str, Any] | None = request.sampling_params.extra_args
        return extra
    return getattr(request.pooling_params, "extra_kwargs", None)


def check_planned(request: Any) -> None:
    """Raises SteeringError for a request to the engine that asks for steering and that ``admit`` did not plan."""
    extra = extra_args_of(request) or {}
    if not steering_keys(extra):
        return
    plan = extra.get(PLAN)
    if (
        not plan
        or getattr(request, "resumable", False)
        or not request.request_id.endswith(suffix_of(int(slot[0]) for slot in plan))
    ):
        raise SteeringError(
            "steering for an input that is streamed", "a complete prompt", "send the whole prompt in one request"
        )


@dataclass
class SteeringOutcome:
    """What became of an HTTP request that asks for steering: whether it was admitted, or why it was refused."""

    admitted: bool = False
    refusal: str = ""


OUTCOME: ContextVar[SteeringOutcome | None] = ContextVar("fgsteer_outcome", default=None)
"""The outcome of the HTTP request that is being answered; admission writes to it."""


def attach(engine: Any, admit: Callable[[Any], bool]) -> None:
    """Make every request of an ``LLMEngine`` or ``AsyncLLM`` pass ``admit`` before it is sent.

    ``assign_request_id`` is the last step of both engines that has the complete request; an error that is raised there
    is answered as the client's, and the engine goes on. Streamed inputs do not pass it, but go to
    ``output_processor.add_request``, where a request that ``admit`` has not planned is refused.
    """
    from vllm.exceptions import VLLMValidationError

    processor, outputs = engine.input_processor, engine.output_processor
    assign: Callable[[Any], None] = processor.assign_request_id
    add: Callable[..., None] = outputs.add_request

    def report_refusal(step: Callable[[Any], Any], request: Any) -> Any:
        try:
            return step(request)
        except FgsteerError as error:
            if outcome := OUTCOME.get():
                outcome.refusal = str(error)
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error

    def admit_after(request: Any) -> None:
        assign(request)
        if report_refusal(admit, request) and (outcome := OUTCOME.get()):
            outcome.admitted = True

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        report_refusal(check_planned, request)
        add(request, *args, **kwargs)

    processor.assign_request_id = admit_after
    outputs.add_request = add_request
