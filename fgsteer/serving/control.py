"""What an engine serves, by name: loading and unloading while it runs, admitting requests, and the canary.

All of it runs in the process that takes requests. Admission turns a name into the numbers that workers write into the
plan of a batch, so nothing that a client sends is looked up in a worker.

    llm.steering.load("love", "love.safetensors"); llm.steering.unload("love")
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save

from fgsteer.errors import HookpointError, SteeringError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.properties import bos_eos_ids
from fgsteer.saes.sae import SAE
from fgsteer.serving.admission import extra_args_of, suffix_of, tags_of
from fgsteer.serving.encoders import groups_of, topk_encoders
from fgsteer.serving.inline import Leases, decode_vector, inline_chars, inline_name, is_inline
from fgsteer.serving.request import PLAN, RequestedSteering, parse_request, steering, steering_keys
from fgsteer.serving.rows import TableRows, check_name
from fgsteer.serving.sources import Source, Stage, stages_from
from fgsteer.storage.json_files import text_sha256

_CANARY_TOKENS = 2  # one from the prompt's pass, one from a decoding pass
_CANARY_NATS = 0.01  # by how much a log-probability must change; rounding of a repeated bfloat16 pass stays far below


@runtime_checkable
class Engine(Protocol):
    """What ``Control`` needs of a vLLM engine, offline or serving."""

    calls_while_admitting: bool
    """Whether workers can be called while a request is admitted, or the process that admits would wait for itself."""

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
    """Stages that are loaded, and for each the tag by which the tokens of a batch name its rows."""

    tags: tuple[int, ...]
    stages: tuple[Stage, ...]

    @property
    def tagged(self) -> list[tuple[int, Stage]]:
        """The stages with their tags."""
        return list(zip(self.tags, self.stages, strict=True))

    @property
    def rows(self) -> list[TableRows]:
        """The rows of all stages."""
        return [rows for stage in self.stages for rows in stage.rows]

    @property
    def layers(self) -> set[int]:
        """The layers at whose output they act."""
        return {rows.layer for rows in self.rows}


class Control:
    """The names that one engine serves, and the rows that they stand for in the tables of its ``layers``.

    ``slots`` is how many steerings a request may have, one after the other; ``saes`` are those whose features can be
    clamped by files that do not hold them. With ``inline`` requests may carry vectors.
    """

    def __init__(
        self, engine: Engine, layers: Sequence[int], slots: int = 1, saes: Sequence[SAE] = (), inline: bool = False
    ) -> None:
        self.engine, self.layers, self.slots, self.saes = engine, tuple(layers), slots, tuple(saes)
        self._encoders = topk_encoders(saes)
        self.inline, self.leases = inline, Leases()
        self._by_name: dict[str, _Loaded] = {}
        self._unloaded_tags: list[int] = []
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The names that requests may use now."""
        return sorted(name for name in self._by_name if not is_inline(name))

    def hookpoints(self) -> dict[str, str]:
        """{name: the hookpoint at which it acts}."""
        return {
            name: ", ".join(dict.fromkeys(str(rows.hookpoint) for rows in loaded.rows))
            for name, loaded in sorted(self._by_name.items())
            if not is_inline(name)
        }

    def stages(self, asked: RequestedSteering) -> tuple[Stage, ...]:
        """What a steering of a request does, one step after the other. Raises SteeringError as ``admit`` does."""
        return self._loaded(asked).stages

    def load_encoders(self) -> None:
        """Send the encoders of TopK SAEs to the workers. Raises SteeringError for an SAE of another width."""
        for encoder in self._encoders:
            for start, tensors in encoder.pieces():
                replies = self.engine.call("steering_encoder", encoder.layer, encoder.number, start, tensors)
                if errors := [reply for reply in replies if reply]:
                    raise SteeringError(errors[0])

    def load(self, name: str, source: Source) -> None:
        """Serve a vector, interventions or a file of either under a name from now on.

        What was loaded under the name is replaced; requests that have begun end as they began. Where a table has no
        room for both, the former rows are freed first, if no request uses them.

        Args:
            name: 1 to 64 letters, digits, underscores, hyphens and dots; the first is no dot.
            source: What to serve.

        Raises:
            HookpointError: The engine has no table at this layer.
            SteeringError: The name has other characters, the table is full, the width is another one, a request would
                need more slots than the engine has, or activations of the engine's dtype would overflow.
            PairingError: It reads features of an SAE that the engine was not started with.
            FormatError: The file is damaged, or of another kind.
        """
        check_name(name)
        stages = stages_from(source, self.saes)
        self._check(name, stages)
        with self._lock:
            self._load(name, stages)

    def _load(self, name: str, stages: tuple[Stage, ...]) -> None:
        """Give rows to stages that are checked. Raises SteeringError where they find no room."""
        self._free_unused()
        new = _Loaded(self._unused_tags(len(stages)), stages)
        former = self._by_name.get(name)
        error = self._fill(new)
        if error and former is not None and former.layers & new.layers:
            error = self._fill_in_place(name, former, new)
        elif not error and former is not None:
            self._unloaded_tags += former.tags
        if error:
            raise SteeringError(f"{'steer_vector' if is_inline(name) else name} was not loaded. {error}")
        self._by_name[name] = new

    def load_inline(self, text: str, *, lease: bool = False) -> str:
        """Serve the vector that a request carries, if it is not served already, and return its name.

        Args:
            text: The file of a vector in base64.
            lease: Whether its rows are kept until ``leases.give_back(name)``; else they are from when the request is
                sent to the engine until it ends.

        Raises:
            SteeringError: The engine takes no vectors with requests, or the text is too long or damaged; else as
                ``load`` does.
            HookpointError: The engine has no table at the vector's layer.
        """
        if not self.inline:
            raise SteeringError(
                "steer_vector in a request",
                "the name of what is loaded as steer",
                "start the engine so that it takes vectors with requests (inline_vectors=True, or fgsteer serve "
                "--inline-vectors), or have the vector loaded",
            )
        name = inline_name(text)
        with self._lock:
            if name not in self._by_name:
                width = self.engine.config.model_config.get_hidden_size()
                stages = stages_from(decode_vector(text, inline_chars(width)))
                self._check("steer_vector", stages)
                self._load(name, stages)
            if lease:
                self.leases.take(name)
        return name

    def _check(self, name: str, stages: Sequence[Stage]) -> None:
        """Raises SteeringError and HookpointError for what this engine cannot serve."""
        if len(stages) > self.slots:
            raise self._too_many(f"{name}, which is {len(stages)} steerings one after the other,")
        for rows in _Loaded((), tuple(stages)).rows:
            rows.check(self.dtype)
            groups_of(rows, self._encoders)
            if rows.layer not in self.layers:
                raise HookpointError(
                    f"{name} at layer {rows.layer}",
                    f"something at one of the layers {', '.join(map(str, self.layers))}",
                    "this engine has no table at other layers: start it with this layer (layers=, or --layers)",
                )

    def _too_many(self, what: str) -> SteeringError:
        return SteeringError(
            f"{what} in one request",
            f"at most {self.slots}, which this engine can do one after the other",
            "ask for fewer, or start it with more (vectors_per_request=, or fgsteer serve --vectors-per-request)",
        )

    def _unused_tags(self, count: int) -> tuple[int, ...]:
        """The smallest tags that nothing has; small enough for float32 to hold them exactly."""
        used = {*self._unloaded_tags, *(tag for loaded in self._by_name.values() for tag in loaded.tags)}
        return tuple(itertools.islice((tag for tag in itertools.count(1) if tag not in used), count))

    def _fill(self, new: _Loaded) -> str | None:
        """Give rows of the tables to what is loaded, on every worker or on none; the error as a sentence, if any."""
        for tag, stage in new.tagged:
            for rows in stage.rows:
                tensors = rows.table_tensors(groups_of(rows, self._encoders))
                replies = self.engine.call("steering_load", tag, rows.layer, save(tensors))
                if errors := [reply for reply in replies if reply]:
                    self._clear(new.tags)
                    return str(errors[0])
        return None

    def _clear(self, tags: Sequence[int]) -> None:
        """Free the rows of tags."""
        for tag in tags:
            self.engine.call("steering_clear", tag)

    def _fill_in_place(self, name: str, former: _Loaded, new: _Loaded) -> str | None:
        """Give the rows of what has the name to something else; the error as a sentence, if any, and then no change."""
        del self._by_name[name]  # so that no request begins to use it meanwhile
        if self._in_use(former.tags):
            error: str | None = (
                f"The table is full, and requests that have not ended use the rows that are loaded as {name!r}. "
                "Try again when they have ended, or start the engine with more rows."
            )
        else:
            self._clear(former.tags)
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
            self._unloaded_tags += self._by_name.pop(name).tags
            self._free_unused()

    def _free_unused(self) -> None:
        """Free the rows of what is no longer used, of what is unloaded and what requests carried."""
        for name in [name for name in self._by_name if is_inline(name) and name not in self.leases]:
            if not self._in_use(self._by_name[name].tags):
                self._clear(self._by_name.pop(name).tags)
        for tag in list(self._unloaded_tags):
            if not self._in_use([tag]):
                self._clear([tag])
                self._unloaded_tags.remove(tag)

    def _in_use(self, tags: Sequence[int]) -> bool:
        """Whether a request that has not ended is steered by one of these tags."""
        return any(tags_of(request) & set(tags) for request in self.engine.live_requests())

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
            if steering_keys(extra_args_of(request)):
                raise SteeringError(
                    "steering for a request that generates nothing",
                    "a request for completions",
                    "leave the steering out of requests for embeddings and scores",
                )
            return False
        asked = parse_request(params.extra_args)
        if not asked:
            return False
        ids = request.prompt_token_ids
        length = len(request.prompt_embeds if ids is None else ids)
        starts = None if ids is None else ids[0] in self._start_ids
        stages = [(tag, stage, one) for one in asked for tag, stage in self._loaded(one).tagged]
        if len(stages) > self.slots:
            raise self._too_many(f"{len(stages)} steerings")
        plan: list[list[float]] = []
        salt: list[Any] = [request.cache_salt]
        for tag, stage, one in sorted(stages, key=lambda entry: entry[1].is_late):
            numbers = self._numbers(one, stage, length, starts)
            plan.append([tag, *numbers])
            salt += [stage.sha256, *numbers]
        others = {key: value for key, value in params.extra_args.items() if key != "steer_vector"}
        params.extra_args = {**others, PLAN: plan}
        request.request_id += suffix_of(int(tag) for tag, *_ in plan)
        request.cache_salt = text_sha256(salt)
        return True

    def _loaded(self, asked: RequestedSteering) -> _Loaded:
        """What a steering asks for. Raises SteeringError for an unknown name, and for a vector that does not load."""
        if asked.vector is not None and self.engine.calls_while_admitting:
            self.load_inline(asked.vector)
        loaded = self._by_name.get(asked.name)
        if loaded is None and asked.vector is not None:
            raise SteeringError(
                "steer_vector in a request of this kind",
                "a request to /v1/completions or /v1/chat/completions of a server that takes vectors with requests",
                "start it with fgsteer serve --inline-vectors, or have the vector loaded",
            )
        if loaded is None:
            raise self._unknown(asked.name)
        return loaded

    def _numbers(self, asked: RequestedSteering, stage: Stage, length: int, starts: bool | None) -> list[float]:
        """The numbers of a slot after its tag: the amounts, then the first position and the end of each run."""
        amounts = stage.amounts(asked.operation, asked.scale, self.dtype)
        return [*amounts, *asked.with_defaults(stage.scope, stage.bos).slot(length, starts)]

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


def _differ(a: tuple[int, float], b: tuple[int, float]) -> bool:
    """Whether two generated (token, log-probability) pairs differ by more than rounding."""
    return a[0] != b[0] or not abs(a[1] - b[1]) <= _CANARY_NATS


def _probe(layer: int, width: int) -> TableRows:
    """Rows that write 100 times what they read along a random direction: a change as large as the stream itself is."""
    read, write = torch.nn.functional.normalize(torch.randn(2, width, generator=torch.Generator().manual_seed(layer)))
    zero, inf = torch.zeros(1), torch.full((1,), torch.inf)
    return TableRows(Hookpoint(layer), read[None], -100.0 * write[None], zero, -inf, zero, zero + 1, -inf, inf)
