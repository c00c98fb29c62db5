"""The texts that steered models write, and what the unsteered model makes of them.

writer = AnswerWriter(model, tokenizer, folder, plan)
writer.answers(row, concept, instructions, entry)                         texts by factor and instruction
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fgsteer.data.chat import Text
from fgsteer.effects.rollouts import Sampling, choose
from fgsteer.evaluation.axbench.building import Entry
from fgsteer.evaluation.axbench.contestants import Contestant
from fgsteer.evaluation.axbench.files import AxBenchConcept
from fgsteer.evaluation.axbench.folders import RunFolder
from fgsteer.evaluation.axbench.protocol import AxBenchPlan
from fgsteer.evaluation.axbench.reading import as_prompt
from fgsteer.evaluation.metrics.coherence import Coherence
from fgsteer.steering.entries import Entry as Steered
from fgsteer.steering.generation import generate
from fgsteer.storage.files import refuse_damaged


@dataclass(frozen=True)
class Answers:
    """The answers of one method for one concept.

    Attributes:
        factors: The factors, signed, rising.
        texts: The answers, by factor and instruction.
        cross_entropies: Nats a token under the unsteered model; None for an empty answer.
        coherences: Coherence by the unsteered model, in [0, 1].
    """

    factors: tuple[float, ...]
    texts: tuple[tuple[str, ...], ...]
    cross_entropies: tuple[tuple[float | None, ...], ...] = ()
    coherences: tuple[tuple[float, ...], ...] = ()


def factors_of(row: Contestant, plan: AxBenchPlan) -> tuple[float, ...]:
    """The signed factors at which a method is tried, rising; 0 alone for what steers nothing."""
    if not row.steers:
        return (0.0,)
    factors = plan.trained_factors if row.strength == "own" else plan.factors
    return tuple(sorted(plan.sign * factor for factor in factors))


class Drawing:
    """A logits processor that samples with the same random numbers for all factors and methods.

    The token is ``argmax(log p + g)`` with Gumbel noise g of concept, step and instruction, so that answers part only
    where steering parts them; it is a sample of p all the same. An answer ends where the model ends it.

    Args:
        plan: The settings.
        concept: The concept's id.
        count: The number of instructions, of which each row's is its number modulo this.
    """

    def __init__(self, plan: AxBenchPlan, concept: int, count: int) -> None:
        self.sampling = Sampling(plan.max_new_tokens, plan.temperature, plan.top_k, 1.0, plan.seed)
        self.concept, self.count = concept, count
        self.length: int | None = None  # of the prompts

    def __call__(self, so_far: Tensor, logits: Tensor) -> Tensor:
        """Leave one token to choose from in each row."""
        self.length = so_far.shape[1] if self.length is None else self.length
        noise = self.sampling.noise(self.concept, so_far.shape[1] - self.length, self.count, logits.shape[-1])
        chosen = choose(logits, noise, self.sampling)
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class AnswerWriter:
    """Writes the answers of a run, each once, and measures them by the unsteered model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where they are kept.
        plan: The settings.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: RunFolder, plan: AxBenchPlan) -> None:
        self.model, self.tokenizer, self.folder, self.plan = model, tokenizer, folder, plan

    def prompts(self, row: Contestant, concept: AxBenchConcept, instructions: Sequence[str]) -> list[Text]:
        """What is asked: the instruction, after a request for the concept where it is asked for in the prompt."""
        asks = row.kind == "prompt" or self.plan.mode == "suppress"
        request = f"Write your answer so that it shows this: {concept.concept}.\n\n" if asks else ""
        return [as_prompt(self.tokenizer, request + instruction) for instruction in instructions]

    def answers(self, row: Contestant, concept: AxBenchConcept, instructions: Sequence[str], entry: Entry) -> Answers:
        """The answers at every factor, written now or kept. Raises FormatError for a damaged file."""
        name, factors = f"{row.name}-{concept.id}", factors_of(row, self.plan)

        def write() -> dict[str, Any]:
            prompts = self.prompts(row, concept, instructions)
            size = max(1, self.plan.batch_rows // len(prompts))
            texts: list[list[str]] = []
            for start in range(0, len(factors), size):
                texts += self._generate(prompts, factors[start : start + size], entry, concept.id)
            return {"factors": list(factors), "texts": texts}

        kept = self.folder.kept("texts", name, write)
        path = self.folder.path / "texts" / f"{name}.json"
        with refuse_damaged(path, "texts of this run", "delete it, and they are written again"):
            texts = tuple(tuple(map(str, row_texts)) for row_texts in kept["texts"])
            if tuple(kept["factors"]) != factors or {len(part) for part in texts} != {len(instructions)}:
                raise ValueError("it has other factors or instructions")
        return Answers(factors, texts)

    def _generate(
        self, prompts: Sequence[Text], factors: Sequence[float], entry: Entry, concept: int
    ) -> list[list[str]]:
        """Answers by factor and prompt."""
        steering: list[Steered] = [
            None if entry.vector is None else [entry.vector.add(factor * entry.a_max)]
            for factor in factors
            for _ in prompts
        ]
        texts = generate(
            self.model,
            self.tokenizer,
            list(prompts) * len(factors),
            steering=steering,
            per_row=True,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.plan.max_new_tokens,
            logits_processor=[Drawing(self.plan, concept, len(prompts))],
        )
        return [texts[n * len(prompts) : (n + 1) * len(prompts)] for n in range(len(factors))]

    def measured(
        self,
        row: Contestant,
        concept: AxBenchConcept,
        instructions: Sequence[str],
        answers: Answers,
        coherence: Coherence,
    ) -> Answers:
        """The answers with their cross-entropy and coherence after the plain instruction, measured now or kept."""
        plain = [as_prompt(self.tokenizer, instruction) for instruction in instructions]
        name = f"{row.name}-{concept.id}"

        def measure() -> dict[str, Any]:
            texts = [text for part in answers.texts for text in part]
            scores = coherence.measure(texts, plain * len(answers.factors))
            entropies = [None if math.isnan(v) else round(v, 6) for v in scores.cross_entropy.tolist()]
            coherences = [round(v, 6) for v in scores.coherence.tolist()]
            parts = [slice(n, n + len(plain)) for n in range(0, len(texts), len(plain))]
            return {
                "cross_entropies": [entropies[part] for part in parts],
                "coherences": [coherences[part] for part in parts],
            }

        kept = self.folder.kept("measures", name, measure)
        path = self.folder.path / "measures" / f"{name}.json"
        with refuse_damaged(path, "measures of this run", "delete it, and they are made again"):
            entropies = tuple(tuple(part) for part in kept["cross_entropies"])
            return Answers(
                answers.factors, answers.texts, entropies, tuple(tuple(map(float, part)) for part in kept["coherences"])
            )

    def fit_coherence(self, unsteered: Sequence[tuple[Sequence[str], Answers]]) -> Coherence:
        """Coherence as the unsteered answers have it, given with their instructions, by concept."""
        samples = [text for _, answers in unsteered for text in answers.texts[0]]
        prompts = [as_prompt(self.tokenizer, asked) for instructions, _ in unsteered for asked in instructions]
        return Coherence.fit(self.model, self.tokenizer, samples, prompts=prompts)
