"""The conditions of a benchmark: methods of the table, each as a function from a strength to an intervention.

conditions = ConceptConditions(model, tokenizer, fg.load_contrast("wedding"), saes, effects, settings={})
conditions.make("fgaa", layer=2)(8.0)
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from fgsteer.data.chat import Message, Text
from fgsteer.data.contrasts import ContrastSet
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import DataError, SelectionWarning
from fgsteer.evaluation.judges.learning import plain_text
from fgsteer.interventions import Intervention
from fgsteer.methods import MethodSpec, spec, specs
from fgsteer.methods.selection import select_features
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.statistics.collecting import collect
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector

Make = Callable[[float], Intervention]

PREFIX_EXAMPLES = 4
CONTINUE = "Begin a text, and go on with it."  # what a chat model is asked where the benchmark's prompts are texts


def bench_methods() -> tuple[str, ...]:
    """Names of all methods that the benchmark offers, those that apply no vector first."""
    return tuple(method.name for method in sorted(specs("bench"), key=steers))


def default_methods() -> tuple[str, ...]:
    """The methods that a benchmark runs unless others are named: those without training, for every tokenizer."""
    rows = [spec(name, "bench") for name in bench_methods()]
    return tuple(row.name for row in rows if not row.instructs and not row.trains)


def check_methods(methods: Iterable[str]) -> None:
    """Raise DataError for a method that the benchmark does not offer."""
    for name in methods:
        spec(name, "bench")


def steers(method: str | MethodSpec) -> bool:
    """Whether a method applies a vector. Raises DataError for one that the benchmark does not offer."""
    return (spec(method, "bench") if isinstance(method, str) else method).needs != "nothing"


class ConceptConditions:
    """The vectors of one concept by method and layer, each built once from statistics that are collected once a layer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        contrast: The concept's contrast set.
        saes: SAEs by layer.
        effects: Effects by layer, each measured on the SAE of that layer.
        settings: Keywords by method, such as {"fgaa": {"n_positive": 32}}.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        contrast: ContrastSet,
        saes: Mapping[int, SAE],
        effects: Mapping[int, EffectApproximator],
        settings: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.model, self.tokenizer, self.contrast = model, tokenizer, contrast
        self.saes, self.effects, self.settings = saes, effects, settings
        self._stats: dict[int, ContrastStatistics] = {}
        self._vectors: dict[tuple[str, int], SteeringVector] = {}

    def with_settings(self, settings: Mapping[str, Mapping[str, Any]]) -> ConceptConditions:
        """The same concept with other settings: vectors are built anew, statistics are shared with this one."""
        other = copy.copy(self)
        other.settings, other._vectors = settings, {}
        return other

    def stats(self, layer: int) -> ContrastStatistics:
        """Collect statistics at a layer: with features where it has an SAE, always of the same contexts."""
        if layer not in self._stats:
            prepend = next((sae.prepend_bos for sae in self.saes.values()), None)
            self._stats[layer] = collect(
                self.model,
                self.tokenizer,
                self.contrast,
                sae=self.saes.get(layer),
                hookpoints=self._hookpoint(layer),
                prepend_bos=prepend,
                keep_pooled=True,
            )
        return self._stats[layer]

    @cached_property
    def prefix(self) -> str:
        """In-context examples of the concept: the first training positives, a sentence a line."""
        return "".join(f"{plain_text(completion)}\n" for _, completion in self._examples)

    @property
    def _examples(self) -> list[tuple[Text, Text]]:
        return list(self.contrast.side(True))[:PREFIX_EXAMPLES]

    def prompts(self, method: str, prompts: Sequence[Text]) -> list[Text]:
        """The prompts as a method has them: after examples of the concept, or an instruction, where it steers by those.

        Examples come before a chat as turns of it where they answer prompts of their own, else in its first message.
        """
        row = spec(method, "bench")
        if row.in_context:
            return [self._after_examples(prompt) for prompt in prompts]
        return [self._instructed(prompt) for prompt in prompts] if row.instructs else list(prompts)

    def _after_examples(self, prompt: Text) -> Text:
        if isinstance(prompt, str):
            return self.prefix + prompt
        turns: list[Message] = []
        for asked, completion in self._examples:
            if isinstance(asked, str):
                first, *others = prompt
                return [{**first, "content": f"{self.prefix}\n{first['content']}"}, *others]
            turns += [*asked, {"role": "assistant", "content": plain_text(completion)}]
        return [*turns, *prompt]

    def _instructed(self, prompt: Text) -> Text:
        """The prompt after a system message that asks for the behavior; a text is begun in the assistant's turn."""
        behavior = self.contrast.description or self.contrast.name
        system = {"role": "system", "content": f"Whatever you write, write it like this. {behavior}."}
        if not isinstance(prompt, str):
            return [system, *prompt]
        return [system, {"role": "user", "content": CONTINUE}, {"role": "assistant", "content": prompt}]

    def make(self, method: str, layer: int) -> Make:
        """Return the function from a strength to the method's intervention at a layer.

        Raises:
            DataError: The layer has no SAE, or no effects, that the method needs.
            SelectionError: The method finds nothing to steer with.
        """
        if (method, layer) not in self._vectors:
            self._vectors[method, layer] = self.vector(method, layer)
        return spec(method, "bench").maker(self._vectors[method, layer])

    def vector(self, method: str, layer: int) -> SteeringVector:
        """Build the method's vector at a layer; as ``features`` it gets the one that Welch's t ranks first."""
        row = spec(method, "bench")
        names = _inputs(row)
        self._check_layer(row, names, layer)
        offers: dict[str, Callable[[int], Any]] = {
            "stats": self.stats,
            "sae": self.saes.__getitem__,
            "effects": self.effects.__getitem__,
            "features": self._best_feature,
            "hookpoint": self._hookpoint,
            "d_model": lambda _: self.model.config.get_text_config().hidden_size,
            "seed": self._seed,
            "model": lambda _: self.model,
            "tokenizer": lambda _: self.tokenizer,
            "contrast": lambda _: self.contrast,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SelectionWarning)  # 40 texts a side: said in the report's plan
            inputs = {name: offers[name](layer) for name in names if name in offers}
            return row.build(**{**inputs, **self.settings.get(method, {})})

    def _check_layer(self, row: MethodSpec, inputs: Collection[str], layer: int) -> None:
        """Raise DataError for a layer without the SAE or the effects that a method needs."""
        needs_sae = row.needs != "layer" or "sae" in inputs or "features" in inputs
        for what, needed, by_layer, change in (
            ("an SAE", needs_sae, self.saes, f"Pass an SAE of layer {layer}"),
            ("measured effects", "effects" in inputs, self.effects, "Measure them with fgsteer effects"),
        ):
            if needed and layer not in by_layer:
                raise DataError(
                    f"{row.label} needs {what}, and layer {layer} has none.",
                    f"one of the layers that have: {', '.join(map(str, sorted(by_layer)))}" if by_layer else "",
                    f"{change}, or leave {row.name} out of the methods",
                )

    def _best_feature(self, layer: int) -> int:
        sae = self.saes[layer]
        contrast = self.stats(layer).at("feature", sae.hookpoint)[1]
        weights, _ = select_features(contrast, sae, score="welch_t", n_positive=1, n_negative=0)
        return int(weights.argmax())

    def _hookpoint(self, layer: int) -> Hookpoint:
        return self.saes[layer].hookpoint if layer in self.saes else Hookpoint(layer)

    def _seed(self, layer: int) -> int:
        """A seed from the hash of concept and layer."""
        return int.from_bytes(hashlib.sha256(f"{self.contrast.name}/{layer}".encode()).digest()[:7], "big")


def _inputs(row: MethodSpec) -> list[str]:
    """Names of the parameters that a method is given: those it requires, and effects where it needs them."""
    return list(dict.fromkeys([*row.required, *(["effects"] if row.needs == "effects" else [])]))
