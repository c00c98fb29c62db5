"""Methods × concepts × layers × strengths, every text a record: ``fgsteer bench``.

Strength is set by cost: each method's coefficients are those at which neutral text becomes a
given number of nats a token dearer, so that every method is tried over its own useful range
and all can be compared at one cost. Prompts and seeds are in two halves, one to choose on,
one to report. A run that was killed goes on where its last whole batch ended, to the same file.

    bench = Bench(model, tokenizer, saes, effects, judge, BenchPlan(concepts=("love",)))
    bench.run("bench.jsonl")
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.contrasts import (
    ContrastSet,
    check_name,
    load_bench_prompts,
    load_contrast,
    load_neutral,
    shipped_contrasts,
)
from fgsteer.display.progress import Progress, reporting
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.effects.fingerprints import effects_sha256
from fgsteer.effects.rollouts import Sampling, rollout
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.evaluation.bench.conditions import BENCH_METHODS, PROMPT, UNSTEERED, ConceptArms, check_methods
from fgsteer.evaluation.bench.records import HALVES
from fgsteer.evaluation.bench.run_files import (
    Arm,
    append,
    check_run,
    read_arms,
    resume,
    strengths_path,
)
from fgsteer.evaluation.judges.judges import Judge, validation_auc
from fgsteer.evaluation.metrics.coherence import Coherence
from fgsteer.interventions import Intervention
from fgsteer.likelihood.calibration import calibrate_grid
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.pairing import model_identity
from fgsteer.saes.fingerprints import density_sha256, sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.storage.json_files import text_sha256, write_json
from fgsteer.storage.locks import exclusive_lock
from fgsteer.storage.targets import file_target

REFERENCE = 1_000_000  # rollout numbers from here are the unsteered samples that coherence is fitted on


class Writer(Protocol):
    """Something that generates for a benchmark."""

    name: str

    def __call__(
        self, prompts: Sequence[str], steering: Sequence[Intervention | None], how: Sampling, number: int
    ) -> list[str]:
        """Continuations by intervention, then prompt, the ``number``-th drawn."""


@dataclass(frozen=True, repr=False)
class BenchPlan(OneLineRepr):
    """What is run. ``prompts`` and ``seeds`` are of each half; ``ce_rises`` in nats a token of neutral text.

    Intervals are over prompts, and the texts of one resemble each other: for one cost, more prompts with one seed
    tell more than few prompts with several.

    ``concepts`` are names of shipped contrast sets, or of ``Bench``'s own. ``layers`` are those of every method that
    steers, or of each by its name. ``matched``, one of ``ce_rises`` or None, is the cost at which methods are compared
    besides at their best; ``settings`` are keywords by method. ``neutral`` texts, of which the first ``texts`` count,
    and ``own_prompts`` stand for the shipped ones. Raises DataError for what cannot be run.
    """

    concepts: tuple[str, ...]
    methods: tuple[str, ...] = BENCH_METHODS
    layers: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    ce_rises: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    matched: float | None = 0.5
    halves: tuple[str, ...] = HALVES
    prompts: int = 16
    seeds: int = 1
    texts: int = 16  # neutral ones, that strength is set on
    max_new_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    seed: int = 0
    batch_rows: int = 256
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    own_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_methods(self.methods)
        for name in ("prompts", "seeds", "texts", "batch_rows"):
            check_range(name, getattr(self, name), 1, MAX_COUNT, whole=True)
        for rise in self.ce_rises:
            check_range("a ce_rise", rise, 0, sys.float_info.max)
        _check_texts("neutral", self.neutral)
        _check_texts("own_prompts", self.own_prompts)
        available = len(self.all_prompts) // len(HALVES)
        if not 2 <= self.prompts <= available:
            raise DataError(
                f"{count(self.prompts, 'prompt')} a half",
                f"2 to {available}, half of the {len(self.all_prompts)} prompts there are",
                "intervals are over prompts: one has none, and another seed of a prompt tells less than another prompt",
            )
        for name in self.concepts:
            check_name(name)
        if len({name.casefold() for name in self.concepts}) < len(self.concepts):
            raise DataError(f"concepts {', '.join(self.concepts)}", "each name once, in any case", "rename one")
        if not self.concepts:
            raise DataError("no concepts", "a concept at least")
        if not self.ce_rises or list(self.ce_rises) != sorted(set(self.ce_rises)) or not self.ce_rises[0] > 0:
            raise DataError(f"ce_rises {self.ce_rises}", "rising numbers > 0")
        if self.matched is not None and self.matched not in self.ce_rises:
            raise DataError(f"matched {self.matched}", f"one of the ce_rises {self.ce_rises}")
        nowhere = set(self.methods) - {UNSTEERED, PROMPT} - {method for method, _ in self.places}
        if nowhere:
            raise DataError(
                f"no layer for {', '.join(sorted(nowhere))}",
                "an SAE of a layer, and for methods through effects those of it",
            )
        _ = self.sampling  # refuses what cannot be drawn

    @property
    def all_prompts(self) -> Sequence[str]:
        """The prompts that both halves are drawn from."""
        return self.own_prompts or load_bench_prompts()

    @property
    def places(self) -> list[tuple[str, int]]:
        """(method, layer) for all that steers."""
        steered = [method for method in self.methods if method not in (UNSTEERED, PROMPT)]
        layers = self.layers if isinstance(self.layers, Mapping) else dict.fromkeys(steered, self.layers)
        return [(method, layer) for method in steered for layer in layers.get(method, ())]

    @property
    def sampling(self) -> Sampling:
        """How texts are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)


def _check_texts(name: str, texts: Sequence[str]) -> None:
    """Raises DataError for a text that is none, is empty, or stands there twice."""
    if isinstance(texts, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{name} with an entry that is no text, or empty", "a tuple of texts")
    if twice := [text for text, times in Counter(texts).items() if times > 1]:
        raise DataError(f"{name} with {twice[0]!r:.60} twice", "each text once: what is repeated tells nothing more")


@dataclass(frozen=True)
class Part:
    """Texts made in one batch: arms of a concept, for all prompts of a half with one seed."""

    half: str
    seed: int
    arms: tuple[Arm, ...]


@dataclass(eq=False, repr=False)
class Bench(OneLineRepr):
    """A benchmark of a model with SAEs and effects by layer, judged by ``judge``.

    ``writer`` generates in another engine, such as ``serving.VllmWriter``; the model then reads and sets strengths.
    ``contrasts`` are sets besides the shipped ones, which the plan's concepts name; the judge must know them too.
    Methods that no layer can run (no SAE, no effects) raise DataError before anything is generated.
    """

    model: Any
    tokenizer: Any
    saes: Mapping[int, SAE]
    effects: Mapping[int, EffectApproximator]
    judge: Judge
    plan: BenchPlan
    writer: Writer | None = None
    contrasts: Sequence[ContrastSet] = ()
    _concepts: dict[str, ConceptArms] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [contrast.name for contrast in self.contrasts]
        if len(set(names)) < len(names):
            raise DataError(f"contrasts named {', '.join(names)}", "each name once", "give one another name")

    def contrast(self, name: str) -> ContrastSet:
        """The contrast set of a concept. Raises DataError for one that is neither here nor shipped."""
        if own := [contrast for contrast in self.contrasts if contrast.name == name]:
            return own[0]
        if name not in shipped_contrasts():
            raise DataError(
                f"no contrast set {name!r}",
                f"one of {', '.join(shipped_contrasts())}, or one of Bench's own",
                "pass contrasts=[fg.load_contrast(path)] to Bench, and to its judge",
            )
        return load_contrast(name)

    def concept(self, name: str) -> ConceptArms:
        """Vectors of a concept."""
        if name not in self._concepts:
            self._concepts[name] = ConceptArms(
                self.model, self.tokenizer, self.contrast(name), self.saes, self.effects, self.plan.settings
            )
        return self._concepts[name]

    def prompts(self, half: str) -> list[str]:
        """The half's prompts."""
        start = HALVES.index(half) * self.plan.prompts
        return list(self.plan.all_prompts[start : start + self.plan.prompts])

    @property
    def neutral(self) -> list[str]:
        """The texts that strength is set on."""
        return list(self.plan.neutral or load_neutral()[0])[: self.plan.texts]

    def arms(self, concept: str) -> list[Arm]:
        """Every arm of a concept, its strengths set."""
        plan, vectors = self.plan, self.concept(concept)
        arms = [Arm(concept, method) for method in (UNSTEERED, PROMPT) if method in plan.methods]
        makes = [vectors.make(method, layer) for method, layer in plan.places]
        found = calibrate_grid(self.model, self.tokenizer, makes, self.neutral, target_ce_rises=plan.ce_rises)
        for number, rise in enumerate(plan.ce_rises):
            reached = [(*at, c[number]) for at, c in zip(plan.places, found, strict=True) if not math.isnan(c[number])]
            arms += [Arm(concept, method, layer, c, rise) for method, layer, c in reached]
        return arms

    def parts(self, arms: Sequence[Arm]) -> Iterator[Part]:
        """A concept's batches, in the order in which they are written."""
        size = max(1, self.plan.batch_rows // self.plan.prompts)
        for half in self.plan.halves:
            number = HALVES.index(half)
            for seed in range(number * self.plan.seeds, (number + 1) * self.plan.seeds):
                for start in range(0, len(arms), size):
                    yield Part(half, seed, tuple(arms[start : start + size]))

    @cached_property
    def coherence(self) -> Coherence:
        """Fitted on unsteered samples of all prompts, with seeds of their own."""
        prompts = [prompt for half in HALVES for prompt in self.prompts(half)]
        texts = []
        for number in range(self.plan.seeds):
            texts += self._write(prompts, [None], REFERENCE + number)
        return Coherence.fit(self.model, self.tokenizer, texts, prompts=prompts * self.plan.seeds)

    def _write(self, prompts: Sequence[str], steering: Sequence[Any], number: int) -> list[str]:
        """Continuations by intervention, then prompt."""
        if self.writer is not None:
            return self.writer(prompts, steering, self.plan.sampling, number)
        encoded = encode_prompts(self.tokenizer, prompts)
        ids, _ = rollout(self.model, encoded, steering, self.plan.sampling, number)
        return list(self.tokenizer.batch_decode(ids[:, encoded[0].shape[1] :], skip_special_tokens=True))

    def texts(self, part: Part) -> list[str]:
        """What the part's arms write, by arm, then prompt."""
        prompts, vectors = self.prompts(part.half), self.concept(part.arms[0].concept)
        by_prefix = {True: [a for a in part.arms if a.method == PROMPT]}
        by_prefix[False] = [a for a in part.arms if a.method != PROMPT]
        written: dict[Arm, list[str]] = {}
        for prefixed, arms in by_prefix.items():
            if not arms:
                continue
            given = [vectors.prefix + prompt for prompt in prompts] if prefixed else prompts
            steering = [
                None if arm.layer is None else vectors.make(arm.method, arm.layer)(arm.coefficient) for arm in arms
            ]
            texts = self._write(given, steering, part.seed)
            for place, arm in enumerate(arms):
                written[arm] = texts[place * len(prompts) : (place + 1) * len(prompts)]
        return [text for arm in part.arms for text in written[arm]]

    def records(self, part: Part) -> list[dict[str, Any]]:
        """The part's texts with their scores; an arm at the matched cost is listed for both comparisons."""
        prompts = self.prompts(part.half)
        texts = self.texts(part)
        asked = prompts * len(part.arms)
        measured = self.coherence.measure(texts, asked)
        behavior = self.judge.score([p + t for p, t in zip(asked, texts, strict=True)], part.arms[0].concept)
        offset = HALVES.index(part.half) * self.plan.prompts
        rows: list[dict[str, Any]] = []
        for place, text in enumerate(texts):
            arm, prompt = part.arms[place // len(prompts)], place % len(prompts)
            row = {
                "concept": arm.concept,
                "method": arm.method,
                "layer": arm.layer,
                "coefficient": arm.coefficient,
                "matched": None,
                "prompt": offset + prompt,
                "seed": part.seed,
                "half": part.half,
                "text": text,
                "behavior": round(float(behavior[place]), 6),
                "coherence": round(float(measured.coherence[place]), 6),
                "ce": round(float(measured.cross_entropy[place]), 6),
                "ce_rise": arm.ce_rise,
            }
            rows.append(row)
            if arm.ce_rise is not None and arm.ce_rise == self.plan.matched:
                rows.append({**row, "matched": arm.ce_rise})
        return rows

    @cached_property
    def _things(self) -> dict[str, Any]:
        """What the run is made of besides its plan and texts: what takes time to hash, once for all concepts."""
        layers = {str(layer): {**_identity(sae)} for layer, sae in self.saes.items()}
        effects = {str(layer): effects_sha256(found) for layer, found in self.effects.items()}
        judge = getattr(self.judge, "identity", self.judge.name)
        return {**run_fingerprint(self.model, self.tokenizer), "saes": layers, "effects": effects, "judge": judge}

    @property
    def identity(self) -> dict[str, Any]:
        """All that the records depend on, as plain JSON: runs with equal ones may share a file."""
        plan = {key: value for key, value in asdict(self.plan).items() if key not in ("neutral", "own_prompts")}
        plan["prompts"] = [prompt for half in HALVES for prompt in self.prompts(half)]
        if self.writer is not None:  # other engines draw other samples
            plan["engine"] = self.writer.name
        contrasts = {}
        for name in self.plan.concepts:
            contrast = self.contrast(name)
            held_out = None if contrast.held_out is None else contrast.held_out.sha256
            contrasts[name] = {"sha256": contrast.sha256, "held_out": held_out}
        texts = {"neutral": text_sha256(self.neutral), "contrasts": contrasts}
        made: dict[str, Any] = json.loads(json.dumps({"plan": plan, **self._things, **texts}))
        return made

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

    def run(
        self,
        path: str | Path,
        command: str = "",
        progress: Progress = None,
        *,
        fresh: bool = False,
    ) -> None:
        """Write all records to ``path``, after those of an earlier run of the same plan.

        A batch is appended whole and synced; what a killed run left of one is cut off first. Strengths are kept
        beside it. ``fresh`` starts over. ``progress`` as in ``collect``; a function gets
        (records done, records in all). Raises PairingError, saying
        what differs, when the file is of another run, BusyError while another process writes it, FormatError when it
        is damaged, and what the methods raise; all before anything is generated.
        """
        path = Path(path)
        file_target(path)
        with exclusive_lock(path), reporting(progress, "writing texts") as report:
            check_run(path, self.identity, fresh=fresh)
            header = self.header(command)
            arms = self._arms(strengths_path(path))
            parts = [part for concept in self.plan.concepts for part in self.parts(arms[concept])]
            counts = [self._count(part) for part in parts]
            done = resume(path, header, counts)
            for number in range(done, len(parts)):
                report(sum(counts[:number]), sum(counts))
                append(path, self.records(parts[number]))
            report(sum(counts), sum(counts))

    def _count(self, part: Part) -> int:
        """Records of a part: an arm at the matched cost has two of each text."""
        matched = self.plan.matched
        return self.plan.prompts * sum(1 + (a.ce_rise is not None and a.ce_rise == matched) for a in part.arms)

    def _arms(self, path: Path) -> dict[str, list[Arm]]:
        """Every concept's arms, from the file beside the run where it holds them, else calibrated and kept there."""
        identity = self.identity
        known = read_arms(path, identity)
        for concept in self.plan.concepts:
            if concept not in known:
                known[concept] = self.arms(concept)
                arms = {name: [asdict(arm) for arm in entries] for name, entries in known.items()}
                write_json(path, {"identity": identity, "arms": arms})
        return known


def _identity(sae: SAE) -> dict[str, Any]:
    """What a benchmark's SAE is, with the density that its features are filtered by."""
    return {**(sae_identity(sae) or {}), "density": density_sha256(sae.density)}
