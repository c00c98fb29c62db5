"""The benchmark: methods × concepts × layers × strengths, every text a record.

Strength is set by cost: each method's coefficients are those at which the cross-entropy of neutral text rises by a
given number of nats a token, so that every method is tried over its own useful range and all can be compared at one
cost. Prompts and seeds are in two halves, one to choose on, one to report. A run that was killed goes on where its
last whole batch ended, to the same file. What a benchmark composes stands in modules of its own: what is asked
(``plan``), what is generated (``conditions``), who generates (``generators``), what scores (``judges``), what is
written (``run_files``); who spreads the work (``distributors``) runs benchmarks.

    bench = Bench(model, tokenizer, saes, effects, judge, BenchPlan(concepts=("love",)))
    bench.run("bench.jsonl")
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fgsteer.data.chat import Text
from fgsteer.data.contrast_files import load_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.data.shipped import load_neutral, shipped_contrasts, shipped_path
from fgsteer.display.progress import Progress, reporting
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked, warn
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.bench.conditions import ConceptConditions, Make, bench_methods, steers
from fgsteer.evaluation.bench.generators import Generator, TransformersGenerator
from fgsteer.evaluation.bench.own_costs import OwnTextMeter, Written, check_own_texts, own_strengths, write_own
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.bench.run_files import (
    Condition,
    append,
    check_run,
    load_conditions,
    pack_run,
    plain_path,
    resume,
    save_conditions,
    strengths_path,
    unpack_run,
)
from fgsteer.evaluation.judges.learning import plain_text, validation_auc
from fgsteer.evaluation.judges.protocols import CoherenceJudge, Judge
from fgsteer.evaluation.metrics.answers import text_cross_entropies
from fgsteer.evaluation.metrics.coherence import Coherence
from fgsteer.evaluation.runs.records import HALVES, EvalRecord
from fgsteer.likelihood.calibration import calibrate_grid
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.pairing import model_identity
from fgsteer.saes.fingerprints import density_sha256, sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.locks import exclusive_lock
from fgsteer.storage.targets import file_target

UNSTEERED_SAMPLES = 1_000_000  # samples from this number on are those that coherence is fitted on


@dataclass(frozen=True)
class Batch:
    """Texts generated together: conditions of a concept, for all prompts of a half with one seed."""

    half: str
    seed: int
    conditions: tuple[Condition, ...]


@dataclass(eq=False, repr=False)
class Bench(OneLineRepr):
    """A benchmark of a model with SAEs and effects.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        saes: SAEs by layer.
        effects: Effect approximators by layer, for the methods that need them.
        judge: What scores behavior.
        plan: What is run.
        generator: What generates the texts, such as ``serving.VllmWriter``; the model then sets strengths and scores
            texts. None: transformers in this process.
        contrasts: Contrast sets besides the shipped ones, for concepts that the plan names. The judge must know them
            too.
        coherence: What scores coherence. None: ``Coherence``, fitted on unsteered samples of this benchmark.
        writer: The former name of ``generator``.

    Raises:
        DataError: Two contrast sets have one name.
    """

    model: Any
    tokenizer: Any
    saes: Mapping[int, SAE]
    effects: Mapping[int, EffectApproximator]
    judge: Judge
    plan: BenchPlan
    generator: Generator | None = None
    contrasts: Sequence[ContrastSet] = ()
    coherence: CoherenceJudge | None = None
    writer: InitVar[Generator | None] = None
    _concepts: dict[str, ConceptConditions] = field(default_factory=dict)
    _coherences: dict[str, Coherence] = field(default_factory=dict)  # by what their samples depend on, of all plans

    def __post_init__(self, writer: Generator | None) -> None:
        if writer is not None:
            warn("Bench(writer=...) is now called Bench(generator=...).", DeprecationWarning)
            self.generator = writer
        names = [contrast.name for contrast in self.contrasts]
        if len(set(names)) < len(names):
            raise DataError(
                f"contrasts named {', '.join(names)}", "each name once", "give one of the contrast sets another name"
            )

    def with_plan(self, plan: BenchPlan) -> Bench:
        """The benchmark of another plan, which shares with this one what does not depend on the plan.

        Shared are the statistics of concepts whose conditions this one has, hashes, and fitted coherence where prompts,
        seeds and sampling are the same: for a search that runs many plans.
        """
        other = copy.copy(self)
        other.plan = plan
        other._concepts = {name: built.with_settings(plan.settings) for name, built in self._concepts.items()}
        return other

    def contrast(self, name: str) -> ContrastSet:
        """The contrast set of a concept. Raises DataError for one that is neither here nor shipped."""
        if own := [contrast for contrast in self.contrasts if contrast.name == name]:
            return own[0]
        if shipped_path(name) is None:
            raise DataError(
                f"There is no contrast set {name!r}.",
                f"one of {', '.join(shipped_contrasts() + shipped_contrasts(chat=True))}, or one of Bench's own",
                "pass contrasts=[fg.load_contrast(path)] to Bench, and to its judge",
            )
        return load_contrast(name)

    def concept(self, name: str) -> ConceptConditions:
        """The vectors of a concept, which are built once."""
        if name not in self._concepts:
            self._concepts[name] = ConceptConditions(
                self.model, self.tokenizer, self.contrast(name), self.saes, self.effects, self.plan.settings
            )
        return self._concepts[name]

    @property
    def neutral(self) -> list[str]:
        """The neutral texts that strength is set on."""
        return list(self.plan.neutral or load_neutral()[0])[: self.plan.texts]

    def conditions(self, concept: str) -> list[Condition]:
        """Every condition of a concept, its strengths calibrated. Raises what the methods raise."""
        plan, built = self.plan, self.concept(concept)
        plain = [method for method in bench_methods() if method in plan.methods and not steers(method)]
        conditions = [Condition(concept, method) for method in plain]
        makes = [built.make(method, layer) for method, layer in plan.method_layers]
        grids = self._strengths(makes)
        for number, cost in enumerate(plan.costs):
            for (method, layer), coefficients in zip(plan.method_layers, grids, strict=True):
                if not math.isnan(coefficients[number]):  # nan: no coefficient costs that much
                    of_kind = {"kl" if plan.kls else "ce_rise": cost}
                    conditions.append(Condition(concept, method, layer, coefficients[number], **of_kind))
        return conditions

    def _strengths(self, makes: Sequence[Make]) -> list[list[float]]:
        """For each function from a strength to an intervention, the strength of each cost of the plan."""
        if not self.plan.kls:
            return calibrate_grid(self.model, self.tokenizer, makes, self.neutral, target_ce_rises=self.plan.ce_rises)
        tuning = self.plan.prompts_of(HALVES[0])
        meter = OwnTextMeter(self.model, self.tokenizer, tuning, self.plan.sampling, self.plan.batch_rows)
        return own_strengths(meter, makes, self.plan.kls)

    def batches(self, conditions: Sequence[Condition]) -> Iterator[Batch]:
        """The batches of a concept's conditions, in the order in which they are written."""
        size = max(1, self.plan.batch_rows // self.plan.prompts)
        for half in self.plan.halves:
            number = HALVES.index(half)
            for seed in range(number * self.plan.seeds, (number + 1) * self.plan.seeds):
                for start in range(0, len(conditions), size):
                    yield Batch(half, seed, tuple(conditions[start : start + size]))

    @property
    @checked
    def fitted_coherence(self) -> Coherence:
        """``Coherence`` fitted on unsteered samples of all prompts, which have seeds of their own."""
        plan, prompts = self.plan, [prompt for half in HALVES for prompt in self.plan.prompts_of(half)]
        generator = "" if self.generator is None else self.generator.name
        samples = text_sha256([prompts, plan.seeds, asdict(plan.sampling), generator, id(self.model)])
        if samples not in self._coherences:
            texts = []
            for number in range(plan.seeds):
                texts += self._generate(prompts, [None], UNSTEERED_SAMPLES + number)
            fitted = Coherence.fit(self.model, self.tokenizer, texts, prompts=prompts * plan.seeds)
            self._coherences[samples] = fitted
        return self._coherences[samples]

    def _generate(self, prompts: Sequence[Text], steering: Sequence[Any], number: int) -> list[str]:
        """Continuations by intervention, then prompt."""
        generator = self.generator or TransformersGenerator(self.model, self.tokenizer)
        return generator(prompts, steering, self.plan.sampling, number)

    @checked
    def generate_texts(self, batch: Batch) -> list[str]:
        """Generate the texts of the batch's conditions, by condition, then prompt."""
        return [written.text for written in self._written(batch)]

    def _written(self, batch: Batch) -> list[Written]:
        """The batch's texts, each with its KL and distinct 3-grams where the plan's costs are those of own texts."""
        prompts, built = self.plan.prompts_of(batch.half), self.concept(batch.conditions[0].concept)
        with_same_prompts: dict[str, tuple[list[Text], list[Condition]]] = {}
        for condition in batch.conditions:
            own_prompts = built.prompts(condition.method, prompts)
            with_same_prompts.setdefault(repr(own_prompts), (own_prompts, []))[1].append(condition)
        texts_of: dict[Condition, list[Written]] = {}
        for own_prompts, conditions in with_same_prompts.values():
            steering = [None if c.layer is None else built.make(c.method, c.layer)(c.coefficient) for c in conditions]
            texts = self._write(own_prompts, prompts, steering, batch.seed)
            for place, condition in enumerate(conditions):
                texts_of[condition] = texts[place * len(prompts) : (place + 1) * len(prompts)]
        return [text for condition in batch.conditions for text in texts_of[condition]]

    def _write(
        self, prompts: Sequence[Text], plain: Sequence[Text], steering: Sequence[Any], number: int
    ) -> list[Written]:
        """Continuations by intervention, then prompt, each with its KL and distinct 3-grams where they are measured."""
        if not self.plan.kls:
            return [Written(text) for text in self._generate(prompts, steering, number)]
        return write_own(self.model, self.tokenizer, prompts, plain, steering, self.plan.sampling, number)

    @checked
    def records(self, batch: Batch) -> list[EvalRecord]:
        """The batch's texts with their scores; a text at the matched cost is listed for both comparisons.

        Raises DataError for a score that is not a number in its range, as of an empty text.
        """
        prompts = self.plan.prompts_of(batch.half)
        written = self._written(batch)
        texts = [one.text for one in written]
        prompt_of_text = prompts * len(batch.conditions)
        coherence, cross_entropy = self._coherence(texts, prompt_of_text)
        behavior = self.judge.score(list(map(_judged_text, prompt_of_text, texts)), batch.conditions[0].concept)
        first_prompt = HALVES.index(batch.half) * self.plan.prompts
        records: list[EvalRecord] = []
        for place, text in enumerate(texts):
            condition, prompt = batch.conditions[place // len(prompts)], place % len(prompts)
            record = EvalRecord(
                concept=condition.concept,
                method=condition.method,
                layer=condition.layer,
                coefficient=condition.coefficient,
                matched=None,
                prompt=first_prompt + prompt,
                seed=batch.seed,
                half=batch.half,
                text=text,
                behavior=round(float(behavior[place]), 6),
                coherence=round(float(coherence[place]), 6),
                ce=round(float(cross_entropy[place]), 6),
                ce_rise=condition.ce_rise,
                kl=written[place].kl,
                distinct=written[place].distinct,
            )
            records.append(record)
            if self._is_matched(condition):
                records.append(replace(record, matched=condition.cost))
        return records

    def _coherence(self, texts: Sequence[str], prompts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Coherence and cross-entropy of texts after their prompts; ``Coherence`` measures both in one pass."""
        if self.coherence is None:
            scores = self.fitted_coherence.measure(texts, prompts)
            return scores.coherence, scores.cross_entropy
        losses = text_cross_entropies(self.model, self.tokenizer, texts, prompts=prompts, joint="")
        plain = [prompt if isinstance(prompt, str) else f"{plain_text(prompt)}\n" for prompt in prompts]
        return self.coherence.coherence(texts, plain), losses

    def _is_matched(self, condition: Condition) -> bool:
        return condition.cost is not None and condition.cost == self.plan.matched

    @cached_property
    def _made_of(self) -> dict[str, Any]:
        """What the run is made of besides its plan and texts: what takes time to hash, once for all concepts."""
        layers = {str(layer): _sae_identity(sae) for layer, sae in self.saes.items()}
        effects = {str(layer): approximator.sha256 for layer, approximator in self.effects.items()}
        judges = {"judge": _judge_identity(self.judge)}
        if self.coherence is not None:
            judges["coherence"] = _judge_identity(self.coherence)
        return {**run_fingerprint(self.model, self.tokenizer), "saes": layers, "effects": effects, **judges}

    @property
    def identity(self) -> dict[str, Any]:
        """All that the records depend on, as plain JSON: runs with equal ones may share a file."""
        plan = {key: value for key, value in asdict(self.plan).items() if key not in ("neutral", "own_prompts")}
        if not self.plan.kls:  # as runs of earlier versions have it
            del plan["kls"]
        plan["prompts"] = [prompt for half in HALVES for prompt in self.plan.prompts_of(half)]
        if self.generator is not None:
            plan["engine"] = self.generator.name
        if self.coherence is not None:
            plan["coherence"] = self.coherence.name
        contrasts = {}
        for name in self.plan.concepts:
            contrast = self.contrast(name)
            held_out = None if contrast.held_out is None else contrast.held_out.sha256
            contrasts[name] = {"sha256": contrast.sha256, "held_out": held_out}
        texts = {"neutral": text_sha256(self.neutral), "contrasts": contrasts}
        identity: dict[str, Any] = json.loads(json.dumps({"plan": plan, **self._made_of, **texts}))
        return identity

    def header(self, command: str) -> dict[str, Any]:
        """The first line of a run: what was run, on what, with which versions."""
        import platform
        from importlib.metadata import version

        identity = self.identity
        plan, library = identity.pop("plan"), identity["versions"]["fgsteer"]
        validated = {name: validation_auc(self.judge, self.contrast(name)) for name in self.plan.concepts}
        return {
            "fgsteer": "bench",
            "version": library,
            "command": command,
            "plan": {**plan, "judge": {"name": self.judge.name, "auc": validated}},
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
            "sha256": {f"sae at layer {layer}": sae.sha256 for layer, sae in self.saes.items()},
            "model": model_identity(self.model),
            "identity": identity,
        }

    @checked
    def run(
        self,
        path: str | Path,
        command: str = "",
        progress: Progress = None,
        *,
        fresh: bool = False,
    ) -> None:
        """Write all records to a file, after those of an earlier run of the same benchmark.

        A batch is appended in one write and synced; what a killed run left of one is cut off first. Strengths are
        kept beside the file.

        Args:
            path: The file, such as bench.jsonl; one such as bench.jsonl.gz is written without .gz, and compressed when
                the run is done.
            command: How the run was started, for its header.
            progress: As in ``collect``; a function is called with (records done, records in all) after each batch.
            fresh: Start over.

        Raises:
            PairingError: The file is of another run; the error says what differs.
            BusyError: Another process is writing the file.
            FormatError: The file is damaged, or cannot be written.
            DataError: A method lacks its SAE or effects at a layer.

        All of these, and what the methods raise, come before anything is generated.
        """
        path = Path(path)
        file_target(path)
        plain = plain_path(path)
        if self.plan.kls:
            check_own_texts(self.model, self.plan.sampling, self.generator)
        with exclusive_lock(plain), reporting(progress, "generating texts") as report:
            check_run(path, self.identity, fresh=fresh)
            unpack_run(path)
            header = self.header(command)
            conditions = self._kept_conditions(strengths_path(path))
            batches = [batch for concept in self.plan.concepts for batch in self.batches(conditions[concept])]
            counts = [self._count(batch) for batch in batches]
            done = resume(plain, header, counts)
            for number in range(done, len(batches)):
                report(sum(counts[:number]), sum(counts))
                append(plain, [record.as_row() for record in self.records(batches[number])])
            pack_run(path)
            report(sum(counts), sum(counts))

    def _count(self, batch: Batch) -> int:
        """Records of a batch: a condition at the matched cost has two of each text."""
        return self.plan.prompts * sum(1 + self._is_matched(condition) for condition in batch.conditions)

    def _kept_conditions(self, path: Path) -> dict[str, list[Condition]]:
        """Every concept's conditions, from the file beside the run where it has them, else calibrated and kept."""
        identity = self.identity
        conditions = load_conditions(path, identity)
        for concept in self.plan.concepts:
            if concept not in conditions:
                conditions[concept] = self.conditions(concept)
                save_conditions(path, identity, conditions)
        return conditions


def _former_writer(bench: Bench) -> Generator | None:
    warn("Bench.writer is now called Bench.generator.", DeprecationWarning)
    return bench.generator


def _set_former_writer(bench: Bench, generator: Generator | None) -> None:
    warn("Bench.writer is now called Bench.generator.", DeprecationWarning)
    bench.generator = generator


Bench.writer = property(_former_writer, _set_former_writer)  # type: ignore[attr-defined]


def _judged_text(prompt: Text, text: str) -> str:
    """What a judge reads of a generated text: the text that it continues with it, but of a chat the reply alone."""
    return prompt + text if isinstance(prompt, str) else text


def _sae_identity(sae: SAE) -> dict[str, Any]:
    """What a benchmark's SAE is, with the density that its features are filtered by."""
    return {**(sae_identity(sae) or {}), "density": density_sha256(sae.density)}


def _judge_identity(judge: Judge | CoherenceJudge) -> Any:
    """What a judge's scores depend on, as far as it says so, else its name."""
    return getattr(judge, "identity", judge.name)
