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
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from fgsteer.brief import Brief
from fgsteer.calibration import calibrate_grid
from fgsteer.checks import MOST, check_range
from fgsteer.data import load_bench_prompts, load_contrast, load_neutral
from fgsteer.effects import EffectApproximator
from fgsteer.errors import DataError, FormatError
from fgsteer.evaluation.arms import BENCH_METHODS, PROMPT, UNSTEERED, ConceptArms, check_methods
from fgsteer.evaluation.coherence import Coherence
from fgsteer.evaluation.judges import Judge, validation_auc
from fgsteer.evaluation.records import HALVES
from fgsteer.files import append_bytes, parse_json, read_json, write_json
from fgsteer.interventions import Intervention
from fgsteer.models import identity
from fgsteer.rollouts import Sampling, rollout
from fgsteer.sae import SAE
from fgsteer.tokens import encode_prompts
from fgsteer.wording import count

BEGINNING = 19  # bytes of {"fgsteer": "bench", by which a header that was cut off is known
REFERENCE = 1_000_000  # rollout numbers from here are the unsteered samples that coherence is fitted on


class Writer(Protocol):
    """Something that generates for a benchmark."""

    name: str

    def __call__(
        self, prompts: Sequence[str], steering: Sequence[Intervention | None], how: Sampling, number: int
    ) -> list[str]:
        """Continuations by intervention, then prompt, the ``number``-th drawn."""


@dataclass(frozen=True, repr=False)
class BenchPlan(Brief):
    """What is run. ``prompts`` and ``seeds`` are of each half; ``ce_rises`` in nats a token of neutral text.

    Intervals are over prompts, and the texts of one resemble each other: for one cost, more prompts with one seed
    tell more than few prompts with several.

    ``layers`` are those of every method that steers, or of each by its name. ``matched``, one of
    ``ce_rises`` or None, is the cost at which methods are compared besides at their best;
    ``settings`` are keywords by method. Raises DataError for what cannot be run.
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

    def __post_init__(self) -> None:
        check_methods(self.methods)
        for name in ("prompts", "seeds", "texts", "batch_rows"):
            check_range(name, getattr(self, name), 1, MOST, whole=True)
        for rise in self.ce_rises:
            check_range("a ce_rise", rise, 0, sys.float_info.max)
        available = len(load_bench_prompts()) // len(HALVES)
        if not 2 <= self.prompts <= available:
            raise DataError(
                f"{count(self.prompts, 'prompt')} a half",
                f"2 to {available}, half of the neutral prompts",
                "intervals are over prompts: one has none, and another seed of a prompt tells less than another prompt",
            )
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
    def places(self) -> list[tuple[str, int]]:
        """(method, layer) for all that steers."""
        steered = [method for method in self.methods if method not in (UNSTEERED, PROMPT)]
        layers = self.layers if isinstance(self.layers, Mapping) else dict.fromkeys(steered, self.layers)
        return [(method, layer) for method in steered for layer in layers.get(method, ())]

    @property
    def sampling(self) -> Sampling:
        """How texts are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)


@dataclass(frozen=True)
class Arm:
    """One way in which a concept's texts are made."""

    concept: str
    method: str
    layer: int | None = None
    coefficient: float = 0.0
    ce_rise: float | None = None


@dataclass(frozen=True)
class Part:
    """Texts made in one batch: arms of a concept, for all prompts of a half with one seed."""

    half: str
    seed: int
    arms: tuple[Arm, ...]


@dataclass(eq=False, repr=False)
class Bench(Brief):
    """A benchmark of a model with SAEs and effects by layer, judged by ``judge``.

    ``writer`` generates in another engine, such as ``serving.VllmWriter``; the model then reads and sets strengths.
    Methods that no layer can run (no SAE, no effects) raise DataError before anything is generated.
    """

    model: Any
    tokenizer: Any
    saes: Mapping[int, SAE]
    effects: Mapping[int, EffectApproximator]
    judge: Judge
    plan: BenchPlan
    writer: Writer | None = None
    _concepts: dict[str, ConceptArms] = field(default_factory=dict)

    def concept(self, name: str) -> ConceptArms:
        """Vectors of a concept."""
        if name not in self._concepts:
            self._concepts[name] = ConceptArms(
                self.model, self.tokenizer, load_contrast(name), self.saes, self.effects, self.plan.settings
            )
        return self._concepts[name]

    def prompts(self, half: str) -> list[str]:
        """The half's neutral prompts."""
        start = HALVES.index(half) * self.plan.prompts
        return load_bench_prompts()[start : start + self.plan.prompts]

    def arms(self, concept: str) -> list[Arm]:
        """Every arm of a concept, its strengths set."""
        plan, vectors = self.plan, self.concept(concept)
        arms = [Arm(concept, method) for method in (UNSTEERED, PROMPT) if method in plan.methods]
        makes = [vectors.make(method, layer) for method, layer in plan.places]
        texts = load_neutral()[0][: plan.texts]
        found = calibrate_grid(self.model, self.tokenizer, makes, texts, target_ce_rises=plan.ce_rises)
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

    def header(self, command: str) -> dict[str, Any]:
        """The first line of a run: what was run, on what, with which versions."""
        import platform
        from importlib.metadata import version

        from fgsteer.methods.provenance import library_version

        plan = json.loads(json.dumps(asdict(self.plan)))
        if self.writer is not None:  # other engines draw other samples
            plan["engine"] = self.writer.name
        prompts = [prompt for half in HALVES for prompt in self.prompts(half)]
        validated = {name: validation_auc(self.judge, load_contrast(name)) for name in self.plan.concepts}
        return {
            "fgsteer": "bench",
            "version": library_version(),
            "command": command,
            "plan": {**plan, "prompts": prompts, "judge": {"name": self.judge.name, "auc": validated}},
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
            "sha256": {f"sae at layer {layer}": sae.sha256 for layer, sae in self.saes.items()},
            "model": identity(self.model),
        }

    def run(self, path: str | Path, command: str = "", progress: Callable[[int, int], None] | None = None) -> None:
        """Write all records to ``path``, after those of an earlier run of the same plan.

        A batch is appended whole and synced; what a killed run left of one is cut off first. Strengths are kept
        beside it. ``progress`` gets (records done, records in all). Raises DataError when the file is
        of another plan, FormatError when it is damaged, and what the methods raise.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = self.header(command)
        arms = self._arms(strengths_path(path), header)
        parts = [part for concept in self.plan.concepts for part in self.parts(arms[concept])]
        counts = [sum(1 + (a.ce_rise is not None and a.ce_rise == self.plan.matched) for a in p.arms) for p in parts]
        counts = [count * self.plan.prompts for count in counts]
        done = resume(path, header, counts)
        for number in range(done, len(parts)):
            if progress is not None:
                progress(sum(counts[:number]), sum(counts))
            append(path, self.records(parts[number]))
        if progress is not None:
            progress(sum(counts), sum(counts))

    def _arms(self, path: Path, header: Mapping[str, Any]) -> dict[str, list[Arm]]:
        """Every concept's arms, from the file beside the run where it holds them, else calibrated and kept there."""
        plan = {key: header[key] for key in ("plan", "sha256", "model")}
        known = read_arms(path, plan)
        for concept in self.plan.concepts:
            if concept not in known:
                known[concept] = self.arms(concept)
                arms = {name: [asdict(arm) for arm in entries] for name, entries in known.items()}
                write_json(path, {"plan": plan, "arms": arms})
        return known


def strengths_path(path: Path) -> Path:
    """Where the strengths of the run ``path`` are kept."""
    return path.with_suffix(".strengths.json")


def read_arms(path: Path, plan: Mapping[str, Any]) -> dict[str, list[Arm]]:
    """Every concept's arms that a run of this plan kept; none without one. Raises FormatError."""
    kept = read_json(path) if path.is_file() else None
    if not isinstance(kept, dict) or kept.get("plan") != plan:
        return {}
    try:
        arms = {concept: [Arm(**entry) for entry in entries] for concept, entries in kept["arms"].items()}
        for arm in (arm for entries in arms.values() for arm in entries):
            texts, numbers = (arm.concept, arm.method), (arm.coefficient, arm.layer or 0, arm.ce_rise or 0.0)
            if not all(isinstance(text, str) for text in texts) or not all(math.isfinite(n) for n in numbers):
                raise ValueError(f"no arm: {arm}")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FormatError(f"{path} is damaged: {error}", "strengths of fgsteer bench", "delete it") from error
    return arms


def line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a run."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a file in one write, to disk. Raises FormatError."""
    append_bytes(path, b"".join(map(line, rows)))


def resume(path: Path, header: Mapping[str, Any], counts: Sequence[int]) -> int:
    """How many batches of ``counts`` records a file holds; what follows them is cut off, a missing file is begun.

    A file with a header that was cut off was killed while it was begun. Raises DataError for a
    file of another plan, FormatError for one that is no run: both are left as they are.
    """
    if not path.exists():
        append(path, [header])
        return 0
    with open(path, "rb") as file:
        first = file.readline()
        begun = line(header)[:BEGINNING]
        if not first.endswith(b"\n") and first[:BEGINNING] == begun[: len(first)]:
            path.unlink()
            append(path, [header])
            return 0
        try:
            found = parse_json(first)
            if not isinstance(found, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise FormatError(f"{path}, line 1 is not JSON: {error}", "a run of fgsteer bench") from error
        same = [key for key in ("plan", "sha256", "model") if found.get(key) != header[key]]
        if same:
            raise DataError(f"{path} is a run with another {', '.join(same)}", "the same plan", "write elsewhere")
        done, end = 0, file.tell()
        for count in counts:
            lines = list(islice(file, count))
            if len(lines) < count or not lines[-1].endswith(b"\n"):
                break
            done, end = done + 1, file.tell()
    os.truncate(path, end)
    return done
