"""What a benchmark runs: concepts, methods, layers, costs, prompts and sampling.

plan = BenchPlan(concepts=("love",), layers=(2,), ce_rises=(0.25, 0.5))
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fgsteer.data.chat import Text, check_text
from fgsteer.data.contrasts import check_name
from fgsteer.data.shipped import load_bench_prompts
from fgsteer.effects.rollouts import Sampling
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.evaluation.bench.conditions import check_methods, default_methods, steers
from fgsteer.evaluation.runs.records import HALVES


@dataclass(frozen=True, repr=False)
class BenchPlan(OneLineRepr):
    """What a benchmark runs.

    Prompts and seeds are in two halves. On "tune" each method's coefficient and layer are chosen, on "report" what
    they score is read. Intervals are over prompts, and the texts of one prompt resemble each other: for one cost,
    more prompts with one seed tell more than few prompts with several seeds.

    Args:
        concepts: Names of shipped contrast sets, or of those passed to ``Bench(contrasts=...)``.
        methods: Names of methods of the table that the benchmark offers; by default all but those that need a chat
            template and those that are trained.
        layers: The layers of every method that steers, or {method: its layers}.
        ce_rises: Costs at which strength is set: nats a token by which the cross-entropy of neutral texts rises.
        kls: Costs at which strength is set in place of ``ce_rises``: nats a text of KL on the steered model's own text
            (``own_text_kl``). Texts must then be drawn at temperature 1 with nothing cut off, and each record has what
            its text cost.
        matched: The one of ``costs`` at which methods are compared besides at their best, or None.
        halves: Which halves are run.
        prompts: Number of prompts of each half.
        seeds: Number of seeds of each half, for every prompt.
        texts: The number of neutral texts on which strength is set, the first ones of them.
        max_new_tokens: Tokens of each generated text.
        temperature: Sampling temperature.
        top_k: Tokens are drawn from this many most probable ones.
        top_p: Tokens are drawn from the most probable ones that together have this probability.
        seed: Seed of all samples.
        batch_rows: Texts that are generated in one batch, at most.
        settings: Keyword arguments by method, such as {"fgaa": {"n_positive": 32}}.
        neutral: Neutral texts in place of the shipped ones.
        own_prompts: Prompts in place of the shipped ones, texts or chat messages.

    Raises:
        DataError: The plan cannot be run, or contradicts itself.
        ArgumentError: A number is of another type.
    """

    concepts: tuple[str, ...]
    methods: tuple[str, ...] = field(default_factory=default_methods)
    layers: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    ce_rises: tuple[float, ...] = (0.015625, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
    kls: tuple[float, ...] = ()
    matched: float | None = 0.5
    halves: tuple[str, ...] = HALVES
    prompts: int = 16
    seeds: int = 1
    texts: int = 16
    max_new_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    seed: int = 0
    batch_rows: int = 256
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    own_prompts: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        check_methods(self.methods)
        for name in ("prompts", "seeds", "texts", "batch_rows"):
            check_range(name, getattr(self, name), 1, MAX_COUNT, whole=True)
        _check_texts("neutral", self.neutral)
        _check_texts("own_prompts", self.own_prompts, chat=True)
        self._check_prompts()
        self._check_concepts()
        self._check_costs()
        without_layer = set(filter(steers, self.methods)) - {method for method, _ in self.method_layers}
        if without_layer:
            raise DataError(
                f"no layer for {', '.join(sorted(without_layer))}",
                "a layer for every method that steers, with an SAE there (and effects, for methods through them)",
                "pass layers=, or leave these methods out of methods=",
            )
        _ = self.sampling  # refuses what cannot be drawn

    def _check_prompts(self) -> None:
        available = len(self.all_prompts) // len(HALVES)
        if not 2 <= self.prompts <= available:
            raise DataError(
                f"{count(self.prompts, 'prompt')} a half",
                f"2 to {available} prompts a half (there are {len(self.all_prompts)} in all)",
                "Change prompts=, or pass more of own_prompts=. Intervals are over prompts: one prompt has none, and "
                "another seed of a prompt tells less than another prompt",
            )

    def _check_concepts(self) -> None:
        if not self.concepts:
            raise DataError("no concepts", "at least one concept", "name contrast sets with concepts=")
        for name in self.concepts:
            check_name(name)
        if len({name.casefold() for name in self.concepts}) < len(self.concepts):
            listed = ", ".join(self.concepts)
            raise DataError(f"concepts {listed}", "each name once, in upper or lower case", "rename one of them")

    def _check_costs(self) -> None:
        for name, costs in (("ce_rises", self.ce_rises), ("kls", self.kls)):
            for cost in costs:
                check_range(f"a cost of {name}", cost, 0, sys.float_info.max)
            rising = list(costs) == sorted(set(costs))
            if (name == "ce_rises" and not costs) or not rising or (costs and not costs[0] > 0):
                raise DataError(f"{name} {costs}", "rising numbers above 0", "sort them, each one once")
        name = "kls" if self.kls else "ce_rises"
        if self.matched is not None and self.matched not in self.costs:
            raise DataError(
                f"matched {self.matched}",
                f"one of the {name} {self.costs}",
                f"add it to {name}=, or pass matched=None to compare methods only at their best",
            )
        if self.kls and (self.temperature != 1 or self.top_p != 1):
            raise DataError(
                f"kls with temperature = {self.temperature:g} and top_p = {self.top_p:g}",
                "temperature=1, top_p=1 and top_k of the whole vocabulary",
                "KL on the steered model's own text is that of the distribution that it draws from: cut nothing off",
            )

    @property
    def costs(self) -> tuple[float, ...]:
        """The costs at which strength is set: ``kls`` where there are any, else ``ce_rises``."""
        return self.kls or self.ce_rises

    @property
    def all_prompts(self) -> Sequence[Text]:
        """The prompts that both halves are drawn from."""
        return self.own_prompts or load_bench_prompts()

    @property
    def method_layers(self) -> list[tuple[str, int]]:
        """(method, layer) for all that steers."""
        steered = [method for method in self.methods if steers(method)]
        layers = self.layers if isinstance(self.layers, Mapping) else dict.fromkeys(steered, self.layers)
        return [(method, layer) for method in steered for layer in layers.get(method, ())]

    @property
    def sampling(self) -> Sampling:
        """How texts are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    def prompts_of(self, half: str) -> list[Text]:
        """The prompts of a half."""
        start = HALVES.index(half) * self.prompts
        return list(self.all_prompts[start : start + self.prompts])


def _check_texts(name: str, texts: Sequence[Text], *, chat: bool = False) -> None:
    """Raises DataError for an entry that is not a text (or chat messages), is empty, or stands there twice."""
    if isinstance(texts, str) or not all(text.strip() if isinstance(text, str) else chat for text in texts):
        kinds = "texts, or of lists of chat messages" if chat else "texts"
        raise DataError(f"{name} with an entry that is empty or is not a text", f"a tuple of {kinds}")
    for number, text in enumerate(texts):
        check_text(text, f"{name}[{number}]")
    if repeated := [text for text, times in Counter(map(repr, texts)).items() if times > 1]:
        raise DataError(
            f"{name} with {repeated[0]:.60} twice",
            "each text once",
            "remove the repetition: a repeated text tells nothing more",
        )
