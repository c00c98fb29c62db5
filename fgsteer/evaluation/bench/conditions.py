"""The methods that a benchmark compares, each as a function from a coefficient to an intervention.

arms = ConceptArms(model, tokenizer, fg.load_contrast("wedding"), saes, effects, settings={})
arms.make("fgaa", layer=2)(8.0)
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch

from fgsteer.data.contrasts import ContrastSet
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import DataError, SelectionWarning
from fgsteer.evaluation.judges.judges import plain_text
from fgsteer.evaluation.runs.records import SPECS
from fgsteer.interventions import Intervention
from fgsteer.methods import build, pca, select_features
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.statistics.collecting import collect
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.vector import SteeringVector

Make = Callable[[float], Intervention]

UNSTEERED, PROMPT = "unsteered", "prompt"
RESIDUAL_METHODS = tuple(name for name, method in SPECS.items() if method.needs == "layer")
NEEDS_EFFECTS = tuple(name for name, method in SPECS.items() if method.needs == "effects")
SAE_METHODS = tuple(name for name, method in SPECS.items() if method.needs in ("sae", "effects"))
BENCH_METHODS = (UNSTEERED, PROMPT, *RESIDUAL_METHODS, *SAE_METHODS)
PREFIX_EXAMPLES = 4


class ConceptArms:
    """Vectors of one concept by method and layer, each built once; statistics are collected once a layer.

    ``saes`` and ``effects`` by layer; ``settings`` are keywords by method, such as
    {"fgaa": {"n_positive": 32}}.
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

    def stats(self, layer: int) -> ContrastStatistics:
        """Statistics at a layer: with features where there is an SAE, of the same contexts where there is none."""
        if layer not in self._stats:
            sae = self.saes.get(layer)
            at = sae.hookpoint if sae is not None else Hookpoint(layer)
            prepend = next((sae.prepend_bos for sae in self.saes.values()), None)
            self._stats[layer] = collect(
                self.model,
                self.tokenizer,
                self.contrast,
                sae=sae,
                hookpoints=at,
                prepend_bos=prepend,
                keep_pooled=True,
            )
        return self._stats[layer]

    @cached_property
    def prefix(self) -> str:
        """In-context examples of the concept: the first training positives, a sentence a line."""
        texts = [plain_text(completion) for _, completion in self.contrast.side(True)][:PREFIX_EXAMPLES]
        return "".join(f"{text}\n" for text in texts)

    def make(self, method: str, layer: int) -> Make:
        """The function from a coefficient to the method's intervention; for ace the coefficient is α.

        Raises DataError for a method without its SAE or effects at the layer, SelectionError as the methods do.
        """
        if (method, layer) not in self._vectors:
            self._vectors[method, layer] = self.vector(method, layer)
        vector = self._vectors[method, layer]
        return vector.affine if method == "ace" else vector.unit().add

    def vector(self, method: str, layer: int) -> SteeringVector:
        """The method's vector at a layer; ``sae_feature`` and ``sae_ts`` take the one best feature by Welch's t."""
        given = dict(self.settings.get(method, {}))
        if method == "random":
            return self._random(layer)
        if method in RESIDUAL_METHODS:
            stats = self.stats(layer)
            return pca(stats, **given) if method == "pca" else build(method, stats=stats, **given)
        sae, effects = self._needed(method, layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SelectionWarning)  # 40 texts a side: said in the report's plan
            if method in ("sae_feature", "sae_ts"):
                best = self._best_feature(sae, layer)
                name = "from_features" if method == "sae_feature" else "sae_ts"
                return build(name, sae=sae, features=best, effects=effects, **given)
            if method == "minus_bias":
                assert effects is not None
                return SteeringVector(-(effects.M @ effects.b).float(), sae.hookpoint)
            name = "fgaa" if method == "fgaa_effects" else method
            return build(name, stats=self.stats(layer), sae=sae, effects=effects, **given)

    def _needed(self, method: str, layer: int) -> tuple[SAE, EffectApproximator | None]:
        if layer not in self.saes:
            raise DataError(f"{method} at layer {layer} without an SAE", f"one of layers {sorted(self.saes)}")
        if method in NEEDS_EFFECTS and layer not in self.effects:
            raise DataError(
                f"{method} at layer {layer} without effects",
                f"one of layers {sorted(self.effects) or 'none'}",
                "measure them with fgsteer effects",
            )
        return self.saes[layer], self.effects[layer] if method in NEEDS_EFFECTS else None

    def _best_feature(self, sae: SAE, layer: int) -> int:
        contrast = self.stats(layer).at("feature", sae.hookpoint)[1]
        weights, _ = select_features(contrast, sae, score="welch_t", n_positive=1, n_negative=0)
        return int(weights.argmax())

    def _random(self, layer: int) -> SteeringVector:
        """A standard normal direction, drawn from the hash of concept and layer."""
        at = self.saes[layer].hookpoint if layer in self.saes else Hookpoint(layer)
        seed = int.from_bytes(hashlib.sha256(f"{self.contrast.name}/{layer}".encode()).digest()[:7], "big")
        width = self.model.config.get_text_config().hidden_size
        return SteeringVector(torch.randn(width, generator=torch.Generator().manual_seed(seed)), at)


def check_methods(methods: tuple[str, ...]) -> None:
    """Raises DataError for an unknown method."""
    unknown = [name for name in methods if name not in BENCH_METHODS]
    if unknown:
        raise DataError(f"methods {', '.join(unknown)}", f"among {', '.join(BENCH_METHODS)}")
