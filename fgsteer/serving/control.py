"""What an engine serves, by name: loading and unloading while it runs, admission, the canary.

It stands in the process that takes requests. Admission turns a name into the numbers that
workers write into a batch's plan, so nothing that a client sends is looked up in a worker.

    llm.steering.load("love", "love.safetensors"); llm.steering.unload("love")
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from safetensors.torch import save

from fgsteer.errors import HookpointError, SteeringError
from fgsteer.files import text_sha256
from fgsteer.hookpoints import Hookpoint
from fgsteer.models import ids_of_ends
from fgsteer.serving.request import PLAN, parse, steering
from fgsteer.serving.served import Served, Source, served_from

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
        self._tags = itertools.count(1)
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

        A name that is loaded is replaced; requests under way end as they began. Raises
        HookpointError for a layer without a table, SteeringError for a full table,
        PairingError for another width, and as ``read_served`` does.
        """
        served = served_from(source)
        if served.layer not in self.layers:
            raise HookpointError(
                f"{name} at layer {served.layer}",
                f"a layer of {', '.join(map(str, self.layers))}",
                "start the engine with this layer among layers=",
            )
        with self._lock:
            self._sweep()
            tag = next(self._tags)
            replies = self.engine.call("steering_load", tag, served.layer, save(served.tensors))
            if errors := [reply for reply in replies if reply]:
                self.engine.call("steering_clear", tag)
                raise SteeringError(f"{name} was not loaded: {errors[0]}")
            if name in self._entries:
                self._retired.append(self._entries[name].tag)
            self._entries[name] = _Entry(tag, served)

    def unload(self, name: str) -> None:
        """Refuse ``name`` from now on; its rows are freed after the last request that uses it. Raises SteeringError."""
        with self._lock:
            if name not in self._entries:
                raise self._unknown(name)
            self._retired.append(self._entries.pop(name).tag)
            self._sweep()

    def _sweep(self) -> None:
        live = self.engine.live_requests()
        for tag in list(self._retired):
            if not any(request.endswith(_suffix(tag)) for request in live):
                self.engine.call("steering_clear", tag)
                self._retired.remove(tag)

    def _unknown(self, name: str) -> SteeringError:
        return SteeringError(f"nothing is loaded as {name!r}", f"one of {', '.join(self.names) or 'none yet'}")

    def admit(self, request: Any) -> None:
        """Plan the steering of an ``EngineCoreRequest``, in place. Raises SteeringError for one that cannot be.

        Its cache salt then names the steering: a prefix cache shares nothing between
        requests that are steered differently.
        """
        params = request.sampling_params
        wanted = parse(params.extra_args) if params is not None else None
        if wanted is None:
            return
        entry = self._entries.get(wanted.name)
        if entry is None:
            raise self._unknown(wanted.name)
        const, gain = entry.served.amounts(wanted.operation, wanted.scale)
        ids = request.prompt_token_ids
        length = len(request.prompt_embeds if ids is None else ids)
        span = wanted.span(length, None if ids is None else ids[0] in self._start_ids)
        params.extra_args = {**params.extra_args, PLAN: [entry.tag, const, gain, *span]}
        request.request_id += _suffix(entry.tag)
        how = [entry.served.sha256, const, gain, wanted.scope, wanted.bos]
        request.cache_salt = text_sha256([request.cache_salt, *how])

    @cached_property
    def _start_ids(self) -> frozenset[int]:
        """What may stand before a text, as ``steer`` asks of a model."""
        config = self.engine.config.model_config
        generation = config.try_get_generation_config()
        return ids_of_ends(config.hf_config, config.hf_text_config, generation)

    def canary(self) -> None:
        """Prove that steering changes outputs at every layer with a table, when prompts are read and in decoding.

        Raises SteeringError, which means that something compiled without hooks runs.
        """
        probes = {layer: _probe(layer, self.engine.config.model_config.get_hidden_size()) for layer in self.layers}
        names = {layer: f"canary {layer}" for layer in probes}
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


def attach(engine: Any, control: Control) -> None:
    """Have every request of an ``LLMEngine`` or ``AsyncLLM`` pass ``control.admit`` before it is sent.

    ``assign_request_id`` is the last step of both that sees the request whole; what is
    raised there is the client's error, not the engine's end.
    """
    from vllm.exceptions import VLLMValidationError

    processor = engine.input_processor
    assign: Callable[[Any], None] = processor.assign_request_id

    def admit(request: Any) -> None:
        assign(request)
        try:
            control.admit(request)
        except SteeringError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error

    processor.assign_request_id = admit
