"""AxBench's protocol, from its files to a table: vectors, detection, answers, ratings, and the choice of factors.

result = axbench(model, tokenizer, load_axbench(folder), "run", sae=sae, rater=EmbeddingRater())
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.display.progress import Progress, Report, reporting
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.errors import ArgumentError, DataError, PairingError
from fgsteer.errors.checks import checked, describe_value
from fgsteer.evaluation.axbench.building import Entry, VectorMaker
from fgsteer.evaluation.axbench.contestants import Contestant, available, contestant
from fgsteer.evaluation.axbench.detection import detection
from fgsteer.evaluation.axbench.files import AxBenchConcept, AxBenchData, load_axbench
from fgsteer.evaluation.axbench.folders import RunFolder
from fgsteer.evaluation.axbench.protocol import (
    AxBenchPlan,
    choose_factor,
    instructions_of,
    selection_size,
    text_score,
)
from fgsteer.evaluation.axbench.ratings import RatedAnswer, Rater, Ratings
from fgsteer.evaluation.axbench.report import AxBenchResult, mean_of, published_of
from fgsteer.evaluation.axbench.writing import Answers, AnswerWriter
from fgsteer.evaluation.metrics.intervals import mean_interval
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.pairing import check_pairing, model_identity
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.storage.locks import exclusive_lock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN = "axbench"
NOT_NOTED = ("methods", "settings", "batch_rows")  # methods may be added to a run; each has a note of its own settings


@checked
def axbench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: AxBenchData | str | Path,
    out: str | Path,
    *,
    sae: SAE | None = None,
    effects: EffectApproximator | None = None,
    hookpoint: Hookpoint | str | int | None = None,
    rater: Rater | None = None,
    plan: AxBenchPlan | None = None,
    limit: int | None = None,
    write: bool = True,
    fresh: bool = False,
    progress: Progress = None,
) -> AxBenchResult:
    """Run AxBench's protocol (arXiv 2501.17148) with the methods of this package.

    For each concept and method a vector v is made of the training texts, and ``a_max`` is its largest reading on the
    concept's texts of the evaluation (50 where that is not above 0). The concept's instructions are answered under
    ``h + f·a_max·v`` at every factor f; vectors that were trained at factors of their own have a_max = 1. An answer's
    score is the harmonic mean of three ratings from 0 to 2. The factor with the best mean on the first half of the
    instructions is chosen for each concept, and the other half reports.

    Without a rater there are vectors, detection (AUROC with hard negatives), answers and their perplexity. What is
    done is kept in the folder ``out``: a call that was stopped goes on from there, and one with another rater rates
    the same answers.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        data: What ``load_axbench`` returns, or the folder that it loads.
        out: A folder for vectors, readings, answers and results.
        sae: An SAE of the residual stream, for methods that need one.
        effects: The SAE's measured effects, for SAE-TS, and for FGAA's projection.
        hookpoint: Where vectors act, where there is no SAE.
        rater: What rates answers: ``EndpointRater``, ``EmbeddingRater`` or your own; None for what needs no judge.
        plan: The settings; the published ones by default.
        limit: How many concepts, the first ones.
        write: Whether answers are written; without them there is detection alone.
        fresh: Whether the run starts over.
        progress: As in ``collect``; a function is called with the pairs of method and concept that are done.

    Returns:
        The result, which ``out`` holds as results.json and table.md too.

    Raises:
        DataError: The data lack something, there are fewer instructions than asked for, or a value is out of range.
        PairingError: The SAE or the effects do not fit, ``out`` holds another run, or a method lacks its SAE.
        SelectionError: A method finds nothing to steer with.
        HookpointError: The model lacks the hookpoint.
        JudgeError: A rating cannot be had.
        FormatError: The folder cannot be written to, or a file in it is damaged.
        BusyError: Another process is at work in the folder.
    """
    plan = AxBenchPlan() if plan is None else plan
    if not isinstance(plan, AxBenchPlan):
        raise ArgumentError(f"{describe_value(plan)} for plan", "an AxBenchPlan", "write fg.AxBenchPlan(...)")
    if not (rater is None or isinstance(rater, Rater)):
        raise ArgumentError(f"{describe_value(rater)} for rater", "an EndpointRater, an EmbeddingRater, or None")
    data = data if isinstance(data, AxBenchData) else load_axbench(data)
    data = data if limit is None else data.limit(limit)
    rows = _methods(plan, sae, effects)
    at = _place(model, sae, effects, hookpoint)
    if write:
        for concept in data.concepts:
            instructions_of(data.instructions, plan.instructions, concept.id)
    _check_features(data, sae, rows)
    noted = {
        "run": RUN,
        **run_fingerprint(model, tokenizer),
        "data": data.sha256,
        "hookpoint": str(at),
        "sae": sae_identity(sae),
        "effects": None if effects is None else effects.sha256,
        "plan": {key: value for key, value in plan.as_dict().items() if key not in NOT_NOTED},
    }
    folder = RunFolder(out, noted, fresh=fresh)
    units = len(rows) * len(data.concepts) * (2 if write else 1)
    with exclusive_lock(folder.path, RUN), reporting(progress, "running AxBench", units) as report:
        for row in rows:
            folder.check_settings(row.name, plan.settings.get(row.name, {}))
        run = _Run(model, tokenizer, data, rows, folder, plan, at, sae, effects, report)
        run.build()
        answers = run.write() if write else {}
        content = run.result(answers, rater)
    result = AxBenchResult(content)
    result.save(folder.path)
    return result


def _methods(plan: AxBenchPlan, sae: SAE | None, effects: EffectApproximator | None) -> list[Contestant]:
    """The methods of a run, the unsteered model first. Raises PairingError for one that lacks what it needs."""
    able = available(sae=sae is not None, effects=effects is not None)
    names = able if plan.methods is None else plan.methods
    if lacking := [name for name in names if name not in able]:
        what = "an SAE" if contestant(lacking[0]).needs_sae and sae is None else "measured effects"
        raise PairingError(
            f"the method {lacking[0]} without {what}", f"{what}", "pass sae= (and effects=), or leave the method out"
        )
    return [contestant(name) for name in dict.fromkeys(("none", *names))]


def _place(
    model: Any, sae: SAE | None, effects: EffectApproximator | None, hookpoint: Hookpoint | str | int | None
) -> Hookpoint:
    """Where vectors act. Raises DataError, PairingError and HookpointError for what does not fit."""
    if sae is None:
        if hookpoint is None:
            raise DataError("no hookpoint", "where vectors are to act", "pass hookpoint=12, or an SAE")
        at = Hookpoint.parse(hookpoint)
        resolve(model, at)
        return at
    if sae.reads is not None:
        raise PairingError("a transcoder", "an SAE, which reads where it steers", "pass an SAE of the residual stream")
    if hookpoint is not None and Hookpoint.parse(hookpoint) != sae.hookpoint:
        raise DataError(f"hookpoint={hookpoint} and an SAE of {sae.hookpoint}", "the SAE's", "leave hookpoint out")
    check_pairing(model, sae.hookpoint, sae.d_model, sae.model_name, "SAE")
    if effects is not None:
        effects.check(sae)
    return sae.hookpoint


def _check_features(data: AxBenchData, sae: SAE | None, rows: Sequence[Contestant]) -> None:
    """Raise PairingError for a concept whose feature the SAE lacks, where a method takes it."""
    if sae is None or not any(row.name in ("sae", "sae_ts") for row in rows):
        return
    for concept in data.concepts:
        if concept.feature >= sae.d_sae:
            raise PairingError(
                f"feature {concept.feature} of concept {concept.id} and an SAE of {sae.d_sae} features",
                "the SAE that the metadata name",
                "pass that SAE, or leave out sae and sae_ts",
            )


@dataclass(eq=False)
class _Run:
    """One run: its parts, and the order of its work."""

    model: Any
    tokenizer: Any
    data: AxBenchData
    rows: Sequence[Contestant]
    folder: RunFolder
    plan: AxBenchPlan
    hookpoint: Hookpoint
    sae: SAE | None
    effects: EffectApproximator | None
    report: Report
    done: int = 0

    def __post_init__(self) -> None:
        self.maker = VectorMaker(
            self.model, self.tokenizer, self.folder, self.plan, self.hookpoint, self.sae, self.effects
        )
        self.writer = AnswerWriter(self.model, self.tokenizer, self.folder, self.plan)
        self.entries: dict[tuple[str, int], Entry] = {}

    def _tick(self) -> None:
        self.done += 1
        self.report(self.done)

    def build(self) -> None:
        """Make every vector and read the texts of the evaluation with it."""
        for row in self.rows:
            if row.kind == "trained":
                self.maker.train(row, self.data.concepts)
        for concept in self.data.concepts:
            for row in self.rows:
                self.entries[row.name, concept.id] = self.maker.entry(row, concept)
                self._tick()

    def instructions(self, concept: AxBenchConcept) -> list[str]:
        """A concept's instructions."""
        return instructions_of(self.data.instructions, self.plan.instructions, concept.id)

    def write(self) -> dict[tuple[str, int], Answers]:
        """Write and measure every answer; those of the unsteered model first, which the others are measured against."""
        written: dict[tuple[str, int], Answers] = {}
        for row in self.rows:
            for concept in self.data.concepts:
                entry = self.entries[row.name, concept.id]
                written[row.name, concept.id] = self.writer.answers(row, concept, self.instructions(concept), entry)
                self._tick()
        unsteered = [(self.instructions(c), written["none", c.id]) for c in self.data.concepts]
        coherence = self.writer.fit_coherence(unsteered)
        return {
            (row.name, concept.id): self.writer.measured(
                row, concept, self.instructions(concept), written[row.name, concept.id], coherence
            )
            for row in self.rows
            for concept in self.data.concepts
        }

    def _rated(self, concept: AxBenchConcept, answers: Answers) -> list[list[RatedAnswer]]:
        """A method's answers for a concept as they are rated, by factor."""
        asked = self.instructions(concept)
        return [
            [RatedAnswer(*part) for part in zip(asked, texts, values, strict=True)]
            for texts, values in zip(answers.texts, answers.coherences, strict=True)
        ]

    def result(self, answers: dict[tuple[str, int], Answers], rater: Rater | None) -> dict[str, Any]:
        """Rate the answers, choose factors, and put the result together."""
        rater = rater if answers else None
        facts: dict[str, Any] = {}
        if rater is not None:
            unsteered = [part for c in self.data.concepts for part in self._rated(c, answers["none", c.id])[0]]
            facts = dict(rater.prepare(self.data.concepts, unsteered))
        methods = []
        for row in self.rows:
            concepts = [self._concept(row, c, answers.get((row.name, c.id)), rater) for c in self.data.concepts]
            methods.append(_method(row, concepts))
        identity = model_identity(self.model)
        return {
            "model": str(identity["name"]),
            "hookpoint": str(self.hookpoint),
            "layer": self.hookpoint.layer,
            "site": self.hookpoint.site,
            "sae": None if self.sae is None else self.sae.source,
            "judge": None if rater is None else rater.name,
            "judge_identity": None if rater is None else dict(rater.identity),
            "judge_facts": facts,
            "data": self.data.name,
            "concepts": len(self.data.concepts),
            "concepts_of_the_folder": self.data.total,
            "chosen_on": selection_size(self.plan.instructions),
            "plan": self.plan.as_dict(),
            "methods": methods,
        }

    def _concept(
        self, row: Contestant, concept: AxBenchConcept, answers: Answers | None, rater: Rater | None
    ) -> dict[str, Any]:
        """What a method does for one concept."""
        entry = self.entries[row.name, concept.id]
        found: dict[str, Any] = {"id": concept.id, "concept": concept.concept, "feature": entry.feature}
        if entry.readings:
            categories = [text.category for text in concept.evaluation]
            found |= {"a_max": entry.a_max, "detection": asdict(detection(entry.readings, categories))}
        if answers is None:
            return found
        first = selection_size(self.plan.instructions)
        best = 0
        if rater is not None:
            rated = self._rated(concept, answers)
            flat = rater.rate(concept, [answer for part in rated for answer in part])
            size = len(rated[0])
            ratings = [flat[n : n + size] for n in range(0, len(flat), size)]
            scores = [[text_score(*three, self.plan.mode) for three in part] for part in ratings]
            best = choose_factor(scores, first)
            found |= _reported(ratings[best][first:], scores[best][first:])
            found["scores_that_chose"] = [mean_of(part[:first]) for part in scores]
        found["factor"] = answers.factors[best]
        # without a judge no factor can be chosen: what is told is the mean over all
        parts = answers.cross_entropies if rater is None else answers.cross_entropies[best : best + 1]
        found["cross_entropy"] = mean_of([value for part in parts for value in part[first:]])
        if rater is None:
            found["factor"] = None
        return found


def _reported(ratings: Sequence[Ratings], scores: Sequence[float]) -> dict[str, Any]:
    """Means over the instructions that report."""
    names = ("concept", "instruction", "fluency")
    means = {name: mean_of([three[n] for three in ratings]) for n, name in enumerate(names)}
    return {"score": mean_of(list(scores)), "ratings": means}


def _method(row: Contestant, concepts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a method does on average over concepts."""
    scores = {found["id"]: found["score"] for found in concepts if "score" in found}
    score = None
    if scores:
        mean, low, high = (
            mean_interval([scores], lambda unit: unit) if len(scores) > 1 else (*scores.values(), None, None)
        )
        score = {"mean": mean, "low": low, "high": high}
    losses = mean_of([found.get("cross_entropy") for found in concepts])
    read = [found["detection"] for found in concepts if "detection" in found]
    return {
        "method": row.name,
        "label": row.label,
        "score": score,
        "ratings": {
            name: mean_of([found["ratings"][name] for found in concepts])
            for name in ("concept", "instruction", "fluency")
        }
        if scores
        else None,
        "perplexity": None if losses is None else math.exp(losses),
        "detection": {name: mean_of([one[name] for one in read]) for name in ("auroc", "auroc_plain", "hard_average")}
        if read
        else None,
        "published": published_of(row.name),
        "by_concept": list(concepts),
    }
