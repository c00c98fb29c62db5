"""Who generates a benchmark's texts: transformers in this process, or another engine such as vLLM.

bench = Bench(model, tokenizer, saes, effects, judge, plan, generator=VllmWriter(llm, tokenizer))
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.chat import Text
from fgsteer.effects.rollouts import Sampling, rollout
from fgsteer.interventions import Intervention


@runtime_checkable
class Generator(Protocol):
    """What generates for a benchmark.

    Another engine draws other samples, so its ``name`` is noted in the run, and a run begun by one engine does not go
    on with another.
    """

    @property
    def name(self) -> str:
        """What the run calls the engine, with its version."""

    def __call__(
        self, prompts: Sequence[Text], steering: Sequence[Intervention | None], sampling: Sampling, number: int, /
    ) -> list[str]:
        """Continue every prompt under every intervention.

        Args:
            prompts: The prompts, texts or chat messages.
            steering: Interventions; None is the unsteered model.
            sampling: How texts are drawn.
            number: Which sample of a prompt is drawn: the same number gives the same text again.

        Returns:
            The continuations without their prompts: ``len(steering) · len(prompts)`` texts, ordered by intervention,
            then prompt.
        """


class TransformersGenerator:
    """Generates with a transformers model in this process; the samples are those of ``rollout``."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"transformers {version('transformers')}"

    def __call__(
        self, prompts: Sequence[Text], steering: Sequence[Intervention | None], sampling: Sampling, number: int, /
    ) -> list[str]:
        """Continuations by intervention, then prompt; see ``Generator``."""
        encoded = encode_prompts(self.tokenizer, prompts)
        ids, _ = rollout(self.model, encoded, steering, sampling, number)
        return list(self.tokenizer.batch_decode(ids[:, encoded[0].shape[1] :], skip_special_tokens=True))
