"""What an engine serves, by name: loading and unloading while it runs, admitting requests, and the canary.

All of it runs in the process that takes requests. Admission turns a name into the numbers that workers write into the
plan of a batch, so nothing that a client sends is looked up in a worker.

    llm.steering.load("love", "love.safetensors"); llm.steering.unload("love")
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save

from fgsteer.errors import HookpointError, SteeringError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.properties import bos_eos_ids
from fgsteer.serving.request import PLAN, parse_request, steering, steering_keys
from fgsteer.serving.rows import Source, TableRows, check_name, rows_from
from fgsteer.storage.json_files import text_sha256

_CANARY_TOKENS = 2  # one from the prompt's pass, one from a decoding pass
_CANARY_NATS = 0.01  # by how much a log-probability must change; rounding of a repeated bfloat16 pass stays far below


@runtime_checkable
class Engine(Protocol):
    """What ``Control`` needs of a vLLM engine, offline or serving."""

    @property
    def config(self) -> Any:
        """The engine's VllmConfig."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """Run a method of every worker, and return what each replies."""

    def live_requests(self) -> list[str]:
        """The internal ids of the requests that have not ended."""

    def continuations(self, extras: Sequence[Mapping[str, Any]], tokens: int) -> list[list[tuple[int, float]]]:
        """Greedy (token, log-probability) pairs of one short prompt, in one batch with each of the ``extras``."""


@dataclass(frozen=True)
class _Loaded:
    """Rows that are loaded, and the tag by which the tokens of a batch name them."""

    tag: int
    rows: TableRows


class Control:
    """The names that one engine serves, and the rows that they stand for in the tables of its ``layers``."""

    def __init__(self, engine: Engine, layers: Sequence[int]) -> None:
        self.engine, self.layers = engine, tuple(layers)
        self._by_name: dict[str, _Loaded] = {}
        self._unloaded_tags: list[int] = []
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The names that requests may use now."""
        return sorted(self._by_name)

    def hookpoints(self) -> dict[str, str]:
        """{name: the hookpoint at which it acts}."""
        return {name: str(loaded.rows.hookpoint) for name, loaded in sorted(self._by_name.items())}

    def load(self, name: str, source: Source) -> None:
        """Serve a vector, a feature clamp or a file of either under a name from now on.

        What was loaded under the name is replaced; requests that have begun end as they began. Where a table has no
        room for both, the former rows are freed first, if no request uses them.

        Args:
            name: 1 to 64 letters, digits, underscores, hyphens and dots; the first is no dot.
            source: What to serve.

        Raises:
            HookpointError: The engine has no table at this layer.
            SteeringError: The name has other characters, the table is full, the width is another one, or activations
                of the engine's dtype would overflow.
            FormatError: The file is damaged, or of another kind.
        """
        check_name(name)
        rows = rows_from(source)
        rows.check(self.dtype)
        if rows.layer not in self.layers:
            raise HookpointError(
                f"{name} at layer {rows.layer}",
                f"something at one of the layers {', '.join(map(str, self.layers))}",
                "this engine has no table at other layers: start it with this layer among layers=",
            )
        with self._lock:
            self._free_unused()
            new = _Loaded(self._unused_tag(), rows)
            former = self._by_name.get(name)
            error = self._fill(new)
            if error and former is not None and former.rows.layer == rows.layer:
                error = self._fill_in_place(name, former, new)
            elif not error and former is not None:
                self._unloaded_tags.append(former.tag)
            if error:
                raise SteeringError(f"{name} was not loaded. {error}")
            self._by_name[name] = new

    def _unused_tag(self) -> int:
        """The smallest tag that nothing has; small enough for float32 to hold it exactly."""
        used = {*self._unloaded_tags, *(loaded.tag for loaded in self._by_name.values())}
        return next(tag for tag in itertools.count(1) if tag not in used)

    def _fill(self, new: _Loaded) -> str | None:
        """Give rows of the tables to what is loaded, on every worker or on none; the error as a sentence, if any."""
        replies = self.engine.call("steering_load", new.tag, new.rows.layer, save(new.rows.tensors))
        errors = [reply for reply in replies if reply]
        if errors:
            self.engine.call("steering_clear", new.tag)
        return errors[0] if errors else None

    def _fill_in_place(self, name: str, former: _Loaded, new: _Loaded) -> str | None:
        """Give the rows of what has the name to something else; the error as a sentence, if any, and then no change."""
        del self._by_name[name]  # so that no request begins to use it meanwhile
        if self._in_use(former.tag):
            error: str | None = (
                f"The table is full, and requests that have not ended use the rows that are loaded as {name!r}. "
                "Try again when they have ended, or start the engine with more rows."
            )
        else:
            self.engine.call("steering_clear", former.tag)
            error = self._fill(new)
            if error:
                self._fill(former)
        if error:
            self._by_name[name] = former
        return error

    def unload(self, name: str) -> None:
        """Refuse requests for a name from now on; its rows are freed after the last request that uses them.

        Raises:
            SteeringError: Nothing is loaded under this name.
        """
        with self._lock:
            if name not in self._by_name:
                raise self._unknown(name)
            self._unloaded_tags.append(self._by_name.pop(name).tag)
            self._free_unused()

    def _free_unused(self) -> None:
        """Free the rows of what is unloaded and no longer used."""
        for tag in list(self._unloaded_tags):
            if not self._in_use(tag):
                self.engine.call("steering_clear", tag)
                self._unloaded_tags.remove(tag)

    def _in_use(self, tag: int) -> bool:
        """Whether a request that has not ended is steered by this tag."""
        return any(request.endswith(_suffix(tag)) for request in self.engine.live_requests())

    def _unknown(self, name: str) -> SteeringError:
        if not self.names:
            return SteeringError(f"Nothing is loaded as {name!r}, or under any other name.", "", "load a vector first")
        return SteeringError(
            f"Nothing is loaded as {name!r}.", f"one of {', '.join(self.names)}", "correct the name, or load it first"
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the engine's activations."""
        dtype: torch.dtype = self.engine.config.model_config.dtype
        return dtype

    def admit(self, request: Any) -> bool:
        """Plan the steering of an ``EngineCoreRequest``, in place.

        Its cache salt then names the steering, so that a prefix cache shares nothing between requests that are steered
        differently.

        Args:
            request: vLLM's request, before it is sent to the engine.

        Returns:
            Whether the request asks for steering.

        Raises:
            SteeringError: The name is unknown, activations of the engine's dtype would overflow, or the request
                generates nothing.
        """
        params = request.sampling_params
        if params is None:
            if steering_keys(_extra_args(request)):
                raise SteeringError(
                    "steering for a request that generates nothing",
                    "a request for completions",
                    "leave the steering out of requests for embeddings and scores",
                )
            return False
        requested = parse_request(params.extra_args)
        if requested is None:
            return False
        loaded = self._by_name.get(requested.name)
        if loaded is None:
            raise self._unknown(requested.name)
        amounts = loaded.rows.amounts(requested.operation, requested.scale)
        loaded.rows.check_const(amounts[0], self.dtype)
        ids = request.prompt_token_ids
        length = len(request.prompt_embeds if ids is None else ids)
        span = requested.span(length, None if ids is None else ids[0] in self._start_ids)
        params.extra_args = {**params.extra_args, PLAN: [loaded.tag, *amounts, *span]}
        request.request_id += _suffix(loaded.tag)
        salt = [request.cache_salt, loaded.rows.sha256, *amounts, requested.scope, requested.bos, *span]
        request.cache_salt = text_sha256(salt)
        return True

    @cached_property
    def _start_ids(self) -> frozenset[int]:
        """The ids of tokens that may start a text, as ``steer`` knows them of a model."""
        config = self.engine.config.model_config
        generation = config.try_get_generation_config()
        return bos_eos_ids(config.hf_config, config.hf_text_config, generation)

    def canary(self) -> None:
        """Prove that steering changes the output at every layer with a table, when prompts are read and in decoding.

        Raises:
            SteeringError: It does not, which means that something runs that was compiled without hooks.
        """
        probes = {layer: _probe(layer, self.engine.config.model_config.get_hidden_size()) for layer in self.layers}
        names = {layer: f"canary-{layer}" for layer in probes}
        try:
            for layer, probe in probes.items():
                self.load(names[layer], probe)
            extras = [steering(name, scope=scope) for name in names.values() for scope in ("all", "generated")]
            plain, *steered = self.engine.continuations([{}, *extras], _CANARY_TOKENS)
        finally:
            for name in names.values():
                if name in self._by_name:
                    self.unload(name)
        for number, layer in enumerate(probes):
            read, decoded = steered[2 * number : 2 * number + 2]
            if not (_differ(plain[0], read[0]) and _differ(plain[1], decoded[1])):
                raise SteeringError(
                    f"The engine's output does not change when layer {layer} is steered.",
                    "another output, which every start of a steering engine checks",
                    "it probably runs a graph that was compiled without hooks: clear vLLM's compile cache "
                    "(VLLM_CACHE_ROOT), and report the model if that does not help",
                )


def _suffix(tag: int) -> str:
    """What ends the id of a request that is steered by a tag."""
    return f"-steered-{tag}"


def _differ(a: tuple[int, float], b: tuple[int, float]) -> bool:
    """Whether two generated (token, log-probability) pairs differ by more than rounding."""
    return a[0] != b[0] or not abs(a[1] - b[1]) <= _CANARY_NATS


def _probe(layer: int, width: int) -> TableRows:
    """Rows that write 100 times what they read along a random direction: a change as large as the stream itself is."""
    read, write = torch.nn.functional.normalize(torch.randn(2, width, generator=torch.Generator().manual_seed(layer)))
    zero, inf = torch.zeros(1), torch.full((1,), torch.inf)
    return TableRows(Hookpoint(layer), read[None], -100.0 * write[None], zero, -inf, zero, zero + 1, -inf, inf)


def _extra_args(request: Any) -> Mapping[str, Any] | None:
    """The arguments for extensions such as this one in an ``EngineCoreRequest``."""
    if request.sampling_params is not None:
        extra: Mapping[str, Any] | None = request.sampling_params.extra_args
        return extra
    return getattr(request.pooling_params, "extra_kwargs", None)


def check_planned(request: Any) -> None:
    """Raises SteeringError for a request to the engine that asks for steering and that ``admit`` did not plan."""
    extra = _extra_args(request) or {}
    if not steering_keys(extra):
        return
    plan = extra.get(PLAN)
    if not plan or getattr(request, "resumable", False) or not request.request_id.endswith(_suffix(plan[0])):
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


def attach(engine: Any, control: Control) -> None:
    """Make every request of an ``LLMEngine`` or ``AsyncLLM`` pass ``control.admit`` before it is sent.

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
        except SteeringError as error:
            if outcome := OUTCOME.get():
                outcome.refusal = str(error)
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error

    def admit(request: Any) -> None:
        assign(request)
        if report_refusal(control.admit, request) and (outcome := OUTCOME.get()):
            outcome.admitted = True

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        report_refusal(check_planned, request)
        add(request, *args, **kwargs)

    processor.assign_request_id = admit
    outputs.add_request = add_request
