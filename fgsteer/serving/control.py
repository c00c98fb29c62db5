"""What an engine serves, by name: loading and unloading while it runs, admission, the canary.

It stands in the process that takes requests. Admission turns a name into the numbers that
workers write into a batch's plan, so nothing that a client sends is looked up in a worker.

    llm.steering.load("love", "love.safetensors"); llm.steering.unload("love")
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from safetensors.torch import save

from fgsteer.errors import HookpointError, SteeringError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.properties import bos_eos_ids
from fgsteer.serving.request import PLAN, parse, said, steering
from fgsteer.serving.served import Served, Source, check_name, served_from
from fgsteer.storage.json_files import text_sha256

_CANARY_TOKENS = 2  # one from the prompt's pass, one from a decoding pass
_CANARY_CHANGE = 0.01  # nats; rounding of a repeated bfloat16 pass stays far below


class Engine(Protocol):
    """What is needed of a vLLM engine, offline or serving."""

    @property
    def config(self) -> Any:
        """Its VllmConfig."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """Run a method of every worker."""

    def live_requests(self) -> list[str]:
        """Internal ids of the requests that have not ended."""

    def continuations(self, extras: Sequence[Mapping[str, Any]], tokens: int) -> list[list[tuple[int, float]]]:
        """Greedy (token, log-probability) of one short prompt in one batch, steered as each of ``extras`` says."""


@dataclass(frozen=True)
class _Entry:
    tag: int
    served: Served


class Control:
    """Names and tables of one engine, whose ``layers`` are instrumented."""

    def __init__(self, engine: Engine, layers: Sequence[int]) -> None:
        self.engine, self.layers = engine, tuple(layers)
        self._entries: dict[str, _Entry] = {}
        self._retired: list[int] = []
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """What requests may name now."""
        return sorted(self._entries)

    def hookpoints(self) -> dict[str, str]:
        """Where each name acts."""
        return {name: str(entry.served.hookpoint) for name, entry in sorted(self._entries.items())}

    def load(self, name: str, source: Source) -> None:
        """Serve a vector, a feature clamp or a file of either as ``name`` from now on.

        A name that is loaded is replaced; requests under way end as they began. Where the table has no room
        for both, the old rows make way, once no request uses them. Raises HookpointError for a layer
        without a table, SteeringError for another name than letters and digits, for a full table, for amounts
        at which the engine's dtype overflows and for another width, and as ``read_served`` does.
        """
        check_name(name)
        served = served_from(source)
        served.check(self.dtype)
        if served.layer not in self.layers:
            raise HookpointError(
                f"{name} at layer {served.layer}",
                f"a layer of {', '.join(map(str, self.layers))}",
                "start the engine with this layer among layers=",
            )
        with self._lock:
            self._sweep()
            used = {*self._retired, *(entry.tag for entry in self._entries.values())}
            entry = _Entry(
                next(tag for tag in itertools.count(1) if tag not in used), served
            )  # small: float32 holds it
            old = self._entries.get(name)
            error = self._fill(entry)
            if error and old is not None and old.served.layer == served.layer:
                error = self._fill_in_place(name, old, entry)
            elif not error and old is not None:
                self._retired.append(old.tag)
            if error:
                raise SteeringError(f"{name} was not loaded: {error}")
            self._entries[name] = entry

    def _fill(self, entry: _Entry) -> str | None:
        """Give rows to an entry on every worker, or on none; the error in words, if any."""
        replies = self.engine.call("steering_load", entry.tag, entry.served.layer, save(entry.served.tensors))
        errors = [reply for reply in replies if reply]
        if errors:
            self.engine.call("steering_clear", entry.tag)
        return errors[0] if errors else None

    def _fill_in_place(self, name: str, old: _Entry, entry: _Entry) -> str | None:
        """Give the rows of an entry that has the name to another; the error in words, if any, with all as it was."""
        del self._entries[name]  # no request begins to use it meanwhile
        if self._used(old.tag):
            error: str | None = f"the table is full, and requests under way use the rows of the {name} that is there"
        else:
            self.engine.call("steering_clear", old.tag)
            error = self._fill(entry)
            if error:
                self._fill(old)
        if error:
            self._entries[name] = old
        return error

    def unload(self, name: str) -> None:
        """Refuse ``name`` from now on; its rows are freed after the last request that uses it. Raises SteeringError."""
        with self._lock:
            if name not in self._entries:
                raise self._unknown(name)
            self._retired.append(self._entries.pop(name).tag)
            self._sweep()

    def _sweep(self) -> None:
        for tag in list(self._retired):
            if not self._used(tag):
                self.engine.call("steering_clear", tag)
                self._retired.remove(tag)

    def _used(self, tag: int) -> bool:
        return any(request.endswith(_suffix(tag)) for request in self.engine.live_requests())

    def _unknown(self, name: str) -> SteeringError:
        return SteeringError(f"nothing is loaded as {name!r}", f"one of {', '.join(self.names) or 'none yet'}")

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the engine's activations."""
        found: torch.dtype = self.engine.config.model_config.dtype
        return found

    def admit(self, request: Any) -> bool:
        """Plan the steering of an ``EngineCoreRequest``, in place; whether it asks for any.

        Its cache salt then names the steering: a prefix cache shares nothing between
        requests that are steered differently. Raises SteeringError for one that cannot be
        steered: an unknown name, an amount at which the engine's dtype overflows, a request that generates nothing.
        """
        params = request.sampling_params
        if params is None:
            if said(_extra(request)):
                raise SteeringError("steering of a request that generates nothing", "completions")
            return False
        wanted = parse(params.extra_args)
        if wanted is None:
            return False
        entry = self._entries.get(wanted.name)
        if entry is None:
            raise self._unknown(wanted.name)
        const, gain = entry.served.amounts(wanted.operation, wanted.scale)
        entry.served.check_const(const, self.dtype)
        ids = request.prompt_token_ids
        length = len(request.prompt_embeds if ids is None else ids)
        span = wanted.span(length, None if ids is None else ids[0] in self._start_ids)
        params.extra_args = {**params.extra_args, PLAN: [entry.tag, const, gain, *span]}
        request.request_id += _suffix(entry.tag)
        how = [entry.served.sha256, const, gain, wanted.scope, wanted.bos]
        request.cache_salt = text_sha256([request.cache_salt, *how])
        return True

    @cached_property
    def _start_ids(self) -> frozenset[int]:
        """What may stand before a text, as ``steer`` asks of a model."""
        config = self.engine.config.model_config
        generation = config.try_get_generation_config()
        return bos_eos_ids(config.hf_config, config.hf_text_config, generation)

    def canary(self) -> None:
        """Prove that steering changes outputs at every layer with a table, when prompts are read and in decoding.

        Raises SteeringError, which means that something compiled without hooks runs.
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
                if name in self._entries:
                    self.unload(name)
        for number, layer in enumerate(probes):
            read, decoded = steered[2 * number : 2 * number + 2]
            if not (_differ(plain[0], read[0]) and _differ(plain[1], decoded[1])):
                raise SteeringError(
                    f"an engine whose output does not change when layer {layer} is steered",
                    "another output",
                    "clear vLLM's compile cache (VLLM_CACHE_ROOT), and report this model",
                )


def _suffix(tag: int) -> str:
    return f"-steered-{tag}"


def _differ(a: tuple[int, float], b: tuple[int, float]) -> bool:
    return a[0] != b[0] or not abs(a[1] - b[1]) <= _CANARY_CHANGE


def _probe(layer: int, width: int) -> Served:
    """Writes 100 times what it reads along a random direction: a change of the stream's own size, whatever that is."""
    read, write = torch.nn.functional.normalize(torch.randn(2, width, generator=torch.Generator().manual_seed(layer)))
    zero = torch.zeros(1)
    return Served(Hookpoint(layer), read[None], -100.0 * write[None], zero, zero - torch.inf, zero)


def _extra(request: Any) -> Mapping[str, Any] | None:
    """What an ``EngineCoreRequest`` holds for extensions such as this one."""
    if request.sampling_params is not None:
        extra: Mapping[str, Any] | None = request.sampling_params.extra_args
        return extra
    return getattr(request.pooling_params, "extra_kwargs", None)


def refuse_unplanned(request: Any) -> None:
    """Raises SteeringError for a request to the engine that asks for steering, and that ``admit`` did not plan."""
    extra = _extra(request) or {}
    if not said(extra):
        return
    plan = extra.get(PLAN)
    if not plan or getattr(request, "resumable", False) or not request.request_id.endswith(_suffix(plan[0])):
        raise SteeringError("steering of an input that is streamed", "a whole prompt", "send it at once")


@dataclass
class Asked:
    """What became of an HTTP request that asks for steering, where the engine is reached in its course."""

    admitted: bool = False
    refusal: str = ""


ASKED: ContextVar[Asked | None] = ContextVar("fgsteer_asked", default=None)


def attach(engine: Any, control: Control) -> None:
    """Have every request of an ``LLMEngine`` or ``AsyncLLM`` pass ``control.admit`` before it is sent.

    ``assign_request_id`` is the last step of both that sees the request whole; what is
    raised there is the client's error, not the engine's end. Inputs that are streamed come round it, to
    ``output_processor.add_request``, where what ``admit`` has not planned is refused.
    """
    from vllm.exceptions import VLLMValidationError

    processor, outputs = engine.input_processor, engine.output_processor
    assign: Callable[[Any], None] = processor.assign_request_id
    add: Callable[..., None] = outputs.add_request

    def refusing(step: Callable[[Any], Any], request: Any) -> Any:
        try:
            return step(request)
        except SteeringError as error:
            if asked := ASKED.get():
                asked.refusal = str(error)
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error

    def admit(request: Any) -> None:
        assign(request)
        if refusing(control.admit, request) and (asked := ASKED.get()):
            asked.admitted = True

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        refusing(refuse_unplanned, request)
        add(request, *args, **kwargs)

    processor.assign_request_id = admit
    outputs.add_request = add_request
