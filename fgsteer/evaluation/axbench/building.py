"""The vectors of concepts from their training texts, and what each reads on the texts of the evaluation.

vectors = VectorMaker(model, tokenizer, folder, plan, hookpoint, sae, effects)
entry = vectors.entry(contestant("diffmean"), concept)                    vector, a_max, readings
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import SelectionError, SelectionWarning
from fgsteer.evaluation.axbench.contestants import Contestant, recipe
from fgsteer.evaluation.axbench.detection import aurocs
from fgsteer.evaluation.axbench.files import AxBenchConcept, AxBenchText
from fgsteer.evaluation.axbench.folders import RunFolder
from fgsteer.evaluation.axbench.protocol import AxBenchPlan
from fgsteer.evaluation.axbench.reading import as_prompt, token_activations
from fgsteer.evaluation.judges.embedding import logistic
from fgsteer.learning.settings import VectorTraining
from fgsteer.learning.train import train_many
from fgsteer.methods import build
from fgsteer.methods.provenance import provenance
from fgsteer.methods.sae_methods import from_features
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import width_at
from fgsteer.saes.sae import SAE
from fgsteer.statistics.collecting import collect
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.steering.generation import generate
from fgsteer.storage.json_files import text_sha256
from fgsteer.vector import SteeringVector

A_MAX_OF_NOTHING = 50.0  # where the largest reading is not above 0, as the published code has it
PROBE_RIDGE = 1.0
FEATURES = 256  # whose weights are trained in an SAE's space
COMPARING = ("bipo", "reps", "simpo")  # objectives that learn from losing answers to the same instructions
ROWS_OF_ANSWERS = 16  # that are written together


def mean_difference(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "m d_model"]
) -> Float[Tensor, " d_model"]:
    """DiffMean: ``mean_t h⁺_t − mean_t h⁻_t`` over tokens, scaled to norm 1, in float64."""
    difference = positive.double().mean(0) - negative.double().mean(0)
    return _unit(difference)


def first_component(
    positive: Float[Tensor, "n d_model"], towards: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """PCA: the first principal component of the positive tokens about their mean, of norm 1, in float64.

    A component has no sign of its own: it is turned ``towards`` a direction, where the published code leaves it.
    """
    centred = positive.double() - positive.double().mean(0)
    component: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    return component if component @ towards >= 0 else -component


def probe_direction(
    positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "m d_model"], ridge: float = PROBE_RIDGE
) -> Float[Tensor, " d_model"]:
    """A linear probe: the weights of logistic regression that tells positive tokens from negative ones, of norm 1."""
    x = torch.cat([positive, negative]).double()
    y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    return _unit(logistic(x, y, torch.ones_like(y), ridge)[0])


def _unit(direction: Tensor) -> Tensor:
    unit: Tensor = direction / direction.norm()
    return unit


def max_auc_feature(largest: Float[Tensor, "texts d_sae"], positive: Sequence[bool]) -> tuple[int, float]:
    """MaxAUC: the feature whose largest activation on a text tells positives from negatives best; of equals the first.

    Returns its id and its AUROC on these texts, the best of ``d_sae`` that were compared.
    """
    areas = aurocs(largest, torch.tensor(list(positive)))
    best = int((areas == areas.max()).nonzero()[0, 0])
    return best, float(areas[best])


def a_max(readings: Iterable[float]) -> float:
    """The largest reading on a concept's texts; 50 where it is not above 0."""
    largest = max(readings)
    return largest if largest > 0 else A_MAX_OF_NOTHING


@dataclass(frozen=True)
class Entry:
    """A method's vector for one concept.

    Attributes:
        vector: The vector; None for what steers nothing.
        a_max: What factors are multiplied by.
        readings: The largest reading on each text of the evaluation; () where nothing reads.
        feature: The SAE's feature that reads, where one does.
    """

    vector: SteeringVector | None = None
    a_max: float = 1.0
    readings: tuple[float, ...] = ()
    feature: int | None = None


class VectorMaker:
    """Makes the vectors of a run, each once, and reads the texts of the evaluation with them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where vectors and readings are kept.
        plan: The settings.
        hookpoint: Where vectors act.
        sae: An SAE of that hookpoint, for the methods that need one.
        effects: Its measured effects, for the methods that need them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: RunFolder,
        plan: AxBenchPlan,
        hookpoint: Hookpoint,
        sae: SAE | None,
        effects: EffectApproximator | None,
    ) -> None:
        self.model, self.tokenizer, self.folder, self.plan = model, tokenizer, folder, plan
        self.hookpoint, self.sae, self.effects = hookpoint, sae, effects
        self._tokens: dict[str, list[Tensor]] = {}  # of the texts that were read last, by their hash
        self._stats: tuple[int, ContrastStatistics] | None = None

    def train(self, row: Contestant, concepts: Sequence[AxBenchConcept]) -> None:
        """Train the vectors of a method that are not there yet, several in common batches."""
        settings = dict(self.plan.settings.get(row.name, {}))
        features = settings.pop("features", FEATURES)
        chosen = recipe(row, settings, self.plan.seed)
        for start in range(0, len(concepts), self.plan.together):
            # as a whole, so that a run that was stopped while it saved one goes on from its checkpoint
            group = concepts[start : start + self.plan.together]
            if all(self.folder.vector_path(row.name, concept.id).exists() for concept in group):
                continue
            checkpoint = self.folder.checkpoint_path(row.name)
            vectors = train_many(
                self.model,
                self.tokenizer,
                {str(concept.id): self._training_set(chosen, concept) for concept in group},
                objective=chosen,
                space=row.space,
                hookpoint=self.hookpoint,
                sae=self.sae if row.space == "sae" else None,
                features=features,
                work=checkpoint,
                progress=False,
            )
            for concept in group:
                self._scaled(row, vectors[str(concept.id)]).save(self.folder.vector_path(row.name, concept.id))
            checkpoint.unlink(missing_ok=True)

    def _scaled(self, row: Contestant, vector: SteeringVector) -> SteeringVector:
        """A trained vector, of norm 1 where its strength comes from readings."""
        return vector.unit() if row.strength == "a_max" else vector

    def _training_set(self, training: VectorTraining, concept: AxBenchConcept) -> ContrastSet:
        """What a vector is trained on: pairs of answers for objectives that compare, else both kinds of texts."""
        name = f"axbench-{concept.id}"
        chats = getattr(self.tokenizer, "chat_template", None) is not None
        if training.objective == "reft_r1" and chats:
            size = min(len(concept.positives), len(concept.negatives))
            sides = [[self._conversation(t) for t in part[:size]] for part in (concept.positives, concept.negatives)]
            return ContrastSet(name, positives=sides[0], negatives=sides[1])
        losers = self._losers(concept) if training.objective in COMPARING else self._others(concept)
        pairs = [
            ContrastPair(text.output, loser, as_prompt(self.tokenizer, text.input))
            for text, loser in zip(concept.positives, losers, strict=True)
            if loser.strip()
        ]
        return ContrastSet(name, pairs)

    @staticmethod
    def _others(concept: AxBenchConcept) -> list[str]:
        """Answers without the concept, over and over, for objectives that read none of them or no prompt of theirs."""
        outputs = [text.output for text in concept.negatives]
        return [outputs[n % len(outputs)] for n in range(len(concept.positives))]

    def _losers(self, concept: AxBenchConcept) -> list[str]:
        """The losing answers: those of the file, else what the model itself answers, greedily."""
        if all(text.losing is not None for text in concept.positives):
            return [text.losing or "" for text in concept.positives]

        def write() -> dict[str, list[str]]:
            prompts = [as_prompt(self.tokenizer, text.input) for text in concept.positives]
            answers: list[str] = []
            for start in range(0, len(prompts), ROWS_OF_ANSWERS):
                part = prompts[start : start + ROWS_OF_ANSWERS]
                answers += generate(
                    self.model, self.tokenizer, part, do_sample=False, max_new_tokens=self.plan.max_new_tokens
                )
            return {"answers": answers}

        return list(self.folder.kept("losers", str(concept.id), write)["answers"])

    def _conversation(self, text: AxBenchText) -> Any:
        prompt: Any = as_prompt(self.tokenizer, text.input)
        return [*prompt, {"role": "assistant", "content": text.output}]

    def entry(self, row: Contestant, concept: AxBenchConcept) -> Entry:
        """The vector of a method for a concept, with its readings. Trained vectors must be there.

        Raises SelectionError where the method finds nothing to steer with.
        """
        if not row.steers:
            return Entry()
        vector = self.folder.vector(row.name, concept.id)
        if vector is None:
            vector = self._made(row, concept)
            vector.save(self.folder.vector_path(row.name, concept.id))
        feature = int(next(iter(vector.features))) if row.kind == "feature" else None
        kept = self.folder.kept("readings", f"{row.name}-{concept.id}", lambda: self._read(row, concept, vector))
        strength = float(kept["a_max"]) if row.strength == "a_max" else 1.0
        return Entry(vector, strength, tuple(map(float, kept["readings"])), feature)

    def _read(self, row: Contestant, concept: AxBenchConcept, vector: SteeringVector) -> dict[str, Any]:
        """The largest reading on each text of the evaluation, and a_max.

        A random direction is tried at the strengths of DiffMean, as a control of equal size.
        """
        tokens = self.tokens(concept.evaluation)
        direction = vector.direction / vector.direction.norm()
        if row.kind == "feature":
            assert self.sae is not None
            ids = [int(next(iter(vector.features)))]
            readings = [float(self.sae.encode_selected(h.to(self.sae.W_enc.device), ids).max()) for h in tokens]
        else:
            readings = [float((h @ direction).max()) for h in tokens]
        strengths = readings
        if row.kind == "random":
            difference = mean_difference(*self._sides(concept)).float()
            strengths = [float((h @ difference).max()) for h in self.tokens(concept.evaluation)]
        return {"readings": readings, "a_max": a_max(strengths)}

    def tokens(self, texts: Sequence[AxBenchText]) -> list[Float[Tensor, "tokens d_model"]]:
        """The activations of each text's tokens, on the CPU; those of the last three lists are kept."""
        key = text_sha256([[text.input, text.output] for text in texts])
        if key in self._tokens:
            self._tokens[key] = self._tokens.pop(key)  # the last that is dropped
        else:
            found: dict[int, Tensor] = {}
            prepend = None if self.sae is None else self.sae.prepend_bos
            reader = token_activations(self.model, self.tokenizer, texts, self.hookpoint, prepend_bos=prepend)
            for number, values in reader:
                found[number] = values.cpu()
            self._tokens[key] = [found[number] for number in range(len(texts))]
            while len(self._tokens) > 3:
                self._tokens.pop(next(iter(self._tokens)))
        return self._tokens[key]

    def _sides(self, concept: AxBenchConcept) -> tuple[Tensor, Tensor]:
        """All tokens of the training texts with the concept, and of those without it."""
        return torch.cat(self.tokens(concept.positives)), torch.cat(self.tokens(concept.negatives))

    def _made(self, row: Contestant, concept: AxBenchConcept) -> SteeringVector:
        """Build a vector that is not trained."""
        settings = dict(self.plan.settings.get(row.name, {}))
        if row.kind == "tokens":
            positive, negative = self._sides(concept)
            direction = mean_difference(positive, negative)
            if row.name == "pca":
                direction = first_component(positive, direction)
            if row.name == "probe":
                direction = probe_direction(positive, negative, **settings)
            return self._vector(row, direction, settings)
        if row.kind == "random":
            seed = self.plan.seed * 1_000_003 + concept.id
            draw = torch.randn(
                width_at(self.model, self.hookpoint), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            return self._vector(row, draw / draw.norm(), {"seed": self.plan.seed})
        assert self.sae is not None
        if row.kind == "feature":
            feature = concept.feature if row.name == "sae" else self._max_auc(concept)
            return from_features(self.sae, feature, normalize=False)
        if row.kind == "effects":
            inputs = {"sae": self.sae, "features": [concept.feature], "effects": self.effects}
            return build(row.name, **inputs, **settings)
        inputs = {"stats": self._statistics(concept), "sae": self.sae}
        if row.name == "fgaa" and self.effects is not None:
            inputs["effects"] = self.effects
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SelectionWarning)  # of 72 texts a side, and of an SAE without density
            return build(row.name, **inputs, **settings).unit()

    def _vector(self, row: Contestant, direction: Tensor, settings: dict[str, Any]) -> SteeringVector:
        if not bool(direction.isfinite().all()):
            raise SelectionError(f"the same activations with and without the concept for {row.label}", "two kinds")
        return SteeringVector(direction.float(), self.hookpoint, provenance=provenance(row.name, settings))

    def _max_auc(self, concept: AxBenchConcept) -> int:
        """The feature that MaxAUC chooses on the training texts."""
        assert self.sae is not None
        device, largest = self.sae.W_enc.device, []
        for texts in (concept.positives, concept.negatives):
            largest += [self.sae.encode(h.to(device)).amax(0).float().cpu() for h in self.tokens(texts)]
        positive = [True] * len(concept.positives) + [False] * len(concept.negatives)
        return max_auc_feature(torch.stack(largest), positive)[0]

    def _statistics(self, concept: AxBenchConcept) -> ContrastStatistics:
        """Statistics of the answers with and without the concept, of the last concept kept."""
        if self._stats is None or self._stats[0] != concept.id:
            chats = getattr(self.tokenizer, "chat_template", None) is not None
            if chats:
                sides = [[self._conversation(t) for t in part] for part in (concept.positives, concept.negatives)]
                contrast = ContrastSet(f"axbench-{concept.id}", positives=sides[0], negatives=sides[1])
            else:
                outputs = [[t.output for t in part] for part in (concept.positives, concept.negatives)]
                contrast = ContrastSet(f"axbench-{concept.id}", positives=outputs[0], negatives=outputs[1])
            rule: Any = "answer" if chats else "all"
            found = collect(self.model, self.tokenizer, contrast, sae=self.sae, tokens=rule, progress=False)
            self._stats = (concept.id, found)
        return self._stats[1]
