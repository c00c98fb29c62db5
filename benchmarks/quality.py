"""SAE methods against plain CAA: settings tuned on one half of the prompts, measured on the other.

Each method's layer, then a small grid of its settings, is tried on the tuning half alone. The setting with the best
mean BCS over the tuning concepts is kept, where every concept stands at its best strength. Then all methods run on both
halves. The reason for two halves: a method that is tuned on the texts that it is reported on beats anything.

    python benchmarks/quality.py                           the embedded default, all sixteen concepts
    python benchmarks/quality.py --model smollm2           SmolLM2, whose settings are chosen on six of them
    python benchmarks/quality.py --model smollm2 --behaviors chat     formal, cheerful, long-winded and Spanish replies
    python benchmarks/quality.py ... --method ace --add    measures these beside the methods that the results have
    python benchmarks/quality.py ... --estimate            says how long the command would take, and ends
    python benchmarks/quality.py ... --tables              makes tables, page and pictures of the records again
    python benchmarks/quality.py --docs                    puts the tables and the sentence into docs and README.md

    torchrun --nproc-per-node 8 benchmarks/quality.py ...  shares the concepts among eight processes

A smaller version is the same command with --concept, --method, --prompts, --settings and so on. A command that was
killed goes on where it ended. Results lie in results/, or in a folder there by model and behaviors: tuning.json, the
records, table.md, report.html and pictures.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from subject import (
    PAGE,
    README,
    RESULTS,
    ROOT,
    TUNING_CONCEPTS,
    Behaviors,
    Subject,
    command_of,
    load_behaviors,
    load_subject,
    published,
    results_folder,
    verdict,
)

import fgsteer as fg
from fgsteer.display.progress import Progress
from fgsteer.errors.wording import count
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.distributors import OneProcess, Torchrun
from fgsteer.evaluation.bench.generators import TransformersGenerator
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.bench.run_files import strengths_path
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.runs.joining import join_runs, write_run
from fgsteer.evaluation.runs.plots import save_all
from fgsteer.evaluation.runs.records import Run
from fgsteer.evaluation.runs.report import markdown
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.evaluation.runs.tables import average_table, best_sae_method, compare
from fgsteer.likelihood.calibration import calibrate_grid
from fgsteer.methods import method_name, spec, specs
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.json_files import read_json, write_json
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.shards import wait_for_file

RUN, NEARBY, ADDED = "bench.jsonl.gz", "same_layer.jsonl.gz", "added.jsonl.gz"
WIDE = {"max_density": 1.0, "n_positive": 256, "n_negative": 128}  # no density filter, many features of both signs
PLAIN = {"bias_weight": 1.0, "unit_effects": False, "decoder_weight": 0.0}  # FGAA's paper, but for its infinite mu
MIXED = {"mu": 0.1, "bias_weight": 0.0, "unit_effects": True, "decoder_weight": 0.5}
# tried besides the defaults; the most promising ones first
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "caa_denoised": (
        {"threshold": 1.5},
        {"shrinkage": "hard", "threshold": 2.0},
        {"threshold": 0.5},
        {"threshold": 2.0},
        {"shrinkage": "hard", "threshold": 1.0},
        {"shrinkage": "hard", "threshold": 1.5},
    ),
    "sta": (
        {"p": 0.05, "keep_error": True},
        {"p": 0.05},
        {"p": 0.01},
        {"p": 0.7},
        {"keep_error": True},
    ),
    "sae_ts": (
        MIXED,
        *({"mu": mu, "bias_weight": 0.0} for mu in (0.1, 0.3, 1.0)),
        *({"bias_weight": weight} for weight in (0.0, 0.3)),
    ),
    "fgaa": (
        {**WIDE, "score": "welch_t"},
        {"n_positive": 16},
        *({"n_positive": n} for n in (4, 8, 32)),
        {"n_positive": 32, "n_negative": 32},
        WIDE,
    ),
    "fgaa_error": (
        {**WIDE, "score": "welch_t"},
        {"n_positive": 64, "n_negative": 32, "max_density": 1.0, "score": "welch_t"},
        WIDE,
    ),
    "fgaa_effects": (
        {**WIDE, **MIXED, "keep_error": True, "score": "welch_t"},
        {**WIDE, **MIXED},
        *({**PLAIN, "mu": mu} for mu in (0.1, 0.3, 1.0)),
        {**PLAIN, "mu": 1.0, "bias_weight": 0.0},
        {**WIDE, **MIXED, "decoder_weight": 0.0},
        {**WIDE, **MIXED, "score": "welch_t"},
        {**WIDE, **MIXED, "mu": 0.3},
        {**WIDE, **MIXED, "keep_error": True},
        {**MIXED, "max_density": 1.0, "n_positive": 64, "n_negative": 32},
        {**MIXED, "n_positive": 64, "n_negative": 32},
    ),
    "trained": ({"objective": "lm_relative"},),
    "trained_features": ({"objective": "lm_relative"}, {"features": 1024}),
}
CONTROLS = {"random": "caa", "minus_bias": "fgaa_effects"}  # measured at the layer of the method that they stand beside
TUNING_RISES, CE_RISES = (0.25, 0.5, 1.0), (0.125, 0.25, 0.5, 1.0)
MATCHED = 0.5
PROBE_PROMPTS = 16  # texts by which the time of a run is estimated


@dataclass(frozen=True)
class Trial:
    """One setting of a method on the tuning half: mean BCS over concepts, each at its best strength."""

    layer: int
    settings: dict[str, Any]
    bcs: float


@dataclass(frozen=True)
class Tuning:
    """Runs methods on the tuning half of the tuning concepts; ``root`` has the plan that all trials share.

    At most ``most`` settings of a method are tried besides its defaults.
    """

    subject: Subject
    root: Bench
    layers: Sequence[int]
    work: Path
    fresh: bool
    most: int | None = None

    def settings_of(self, method: str) -> tuple[dict[str, Any], ...]:
        """What is tried of a method besides its defaults."""
        return SETTINGS.get(method, ())[: self.most]

    def layers_of(self, method: str) -> list[int]:
        """Where a method can run."""
        return self.subject.layers(spec(method).needs, self.layers)

    def trials_of(self, method: str) -> int:
        """How many settings of a method are tried."""
        return len(self.layers_of(method)) + len(self.settings_of(method))

    def trial(self, method: str, layer: int, settings: dict[str, Any]) -> Trial:
        """Measure one setting."""
        plan = replace(self.root.plan, methods=(method,), layers=(layer,), settings={method: settings})
        name = "-".join([method, str(layer), *(f"{key}={value}" for key, value in settings.items())])
        run = run_shared(self.root.with_plan(plan), self.work / f"{name}.jsonl", fresh=self.fresh)
        chosen = [run.mean(setting, "tune") for setting in best_settings(run).values()]
        trial = Trial(layer, settings, sum(chosen) / len(chosen))
        print(f"{name:50} {trial.bcs:.4f}", flush=True)
        return trial

    def tune(self, method: str) -> list[Trial]:
        """Trials of a method, the best first: its defaults at each layer, then its settings at the best of them."""
        trials = [self.trial(method, layer, {}) for layer in self.layers_of(method)]
        layer = max(trials, key=lambda t: t.bcs).layer
        trials += [self.trial(method, layer, settings) for settings in self.settings_of(method)]
        return sorted(trials, key=lambda t: -t.bcs)


def run_shared(bench: Bench, path: Path, command: str = "", progress: Progress = None, *, fresh: bool) -> Run:
    """Run a benchmark whose concepts the processes of one job share, and load it in each of them."""
    distributor = Torchrun() if Ranks.from_env().world > 1 else OneProcess()
    if not distributor.run(bench, path, command, progress, fresh=fresh):
        wait_for_file(path, 0)
    return fg.load_run(path)


@cache
def runs_in(folder: Path = RESULTS) -> tuple[Run, Run, int]:
    """The run of a results folder, the one with CAA at the layer of the best SAE method, and that layer.

    Both are one where CAA's own best layer is that one.
    """
    run = fg.load_run(folder / RUN)
    if not (folder / NEARBY).exists():
        return run, run, run.header["plan"]["layers"]["caa"][0]
    near = fg.load_run(folder / NEARBY)
    (layer,) = near.header["plan"]["layers"]["caa"]
    return run, Run(run.header, [*(r for r in run.records if r.method != "caa"), *near.records]), layer


def compared_runs(folder: Path = RESULTS) -> dict[str, Run]:
    """The run as it is, and with CAA at the layer of the best SAE method, each with its title."""
    run, near, layer = runs_in(folder)
    at = ", ".join(f"{method_name(method)} {layer}" for method, (layer,) in run.header["plan"]["layers"].items())
    found = {f"Each at its own best layer ({at})": run}
    return found if near is run else {**found, f"CAA at layer {layer} too": near}


def difference(run: Run, one: str, other: str, matched: float | None = None) -> str:
    """``one`` less ``other`` in BCS, with its interval."""
    gain = compare(run, one, other, matched)
    words = f"{method_name(one)} less {method_name(other)} {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return words.replace(" -", " −").replace("[-", "[−")


def comparisons(folder: Path) -> list[str]:
    """The differences that stand beside a table, in words."""
    run, near, layer = runs_in(folder)
    best = best_sae_method(run) or "fgaa"
    lines = [] if near is run else [f"With CAA at layer {layer}: {difference(near, best, 'caa')}."]
    lines.append(f"All at {MATCHED} nats: {difference(run, best, 'caa', MATCHED)}.")
    if {"fgaa", "fgaa_effects"} <= set(run.methods):
        lines.append(f"At the best coefficient: {difference(run, 'fgaa_effects', 'fgaa')}.")
    chose = read_json(folder / "tuning.json").get("concepts", run.concepts)
    if others := [concept for concept in run.concepts if concept not in chose]:
        on_others = difference(run.only(concepts=others), best, "caa")
        lines.append(f"On {count(len(others), 'concept')} that chose nothing: {on_others}.")
    return lines


def summary(folder: Path = RESULTS) -> str:
    """The table of a results folder for docs/benchmarks.md, and the differences beside it in words."""
    return "\n".join([markdown(runs_in(folder)[0]), *comparisons(folder)]) + "\n"


def sentence() -> str:
    """What README says of the results: wins and losses, with intervals."""
    run, *_ = runs_in(results_folder("smollm2"))
    scores = {row.method: row.bcs for row in average_table(run)}
    best = best_sae_method(run) or "fgaa"

    def shown(value: Interval) -> str:
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"

    def gain(of: Run, method: str) -> str:
        found = compare(of, method, "caa")
        said = verdict(found.mean, found.low, found.high)
        return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {said}".replace("-", "−")

    return textwrap.fill(
        f"On SmolLM2-135M-Instruct, over {len(run.header['plan']['concepts'])} concepts and on prompts and seeds that "
        f"chose nothing, behavior × coherence (0 to 1, with 95 % intervals) is {shown(scores[best])} for "
        f"{method_name(best)} and {shown(scores['caa'])} for CAA, each at its own best layer: {gain(run, best)}. "
        f"Examples of the concept before the prompt, without any steering, have {shown(scores['prompt'])}. On the "
        f"embedded model {method_name('fgaa_effects')} less CAA is {gain(runs_in()[0], 'fgaa_effects')}.",
        120,
    )


def publish_docs() -> None:
    """Put the tables for which docs/benchmarks.md has marks, and the sentence, into docs and README.md."""
    for name in ("default", "smollm2"):
        for kind in ("concepts", "chat"):
            folder = results_folder(name, kind)
            mark = " ".join(["quality", *folder.relative_to(RESULTS).parts])
            if f"<!-- {mark} -->" in PAGE.read_text("utf-8"):
                PAGE.write_text(published(PAGE, mark, summary(folder)), "utf-8")
    README.write_text(published(README, "result", sentence() + "\n"), "utf-8")


def section(title: str, run: Run) -> str:
    """Both comparisons of a run, and what the approximator is worth, in Markdown."""
    parts = [f"## {title}\n"]
    for name, matched in (("best coefficient", None), (f"matched at {MATCHED} nats", MATCHED)):
        parts += [f"### {name}\n", markdown(run, matched)]
        if {"fgaa", "fgaa_effects"} <= set(run.methods):
            parts.append(difference(run, "fgaa_effects", "fgaa", matched) + "\n")
    return "\n".join(parts)


def publish(folder: Path, subject: Subject) -> None:
    """Write tables, page and pictures of the records of a results folder."""
    run, *_ = runs_in(folder)
    best = best_sae_method(run)
    layer = run.header["plan"]["layers"][best][0] if best else next(iter(subject.saes))
    seen = partial(fg.seen_features, subject.model, subject.tokenizer, subject.saes[layer])
    with atomic_write(folder / "table.md") as beside:
        beside.write_text("\n".join(section(title, run) for title, run in compared_runs(folder).items()), "utf-8")
    fg.write_report(run, folder / "report.html", features=seen)
    save_all(run, folder)


def seconds_of(bench: Bench) -> tuple[float, float]:
    """Seconds a text, and seconds of calibration a vector and cost, of a few texts and one vector of CAA."""
    layer = min(bench.saes)
    concept = bench.concept(bench.plan.concepts[0])
    make = concept.make("caa", layer)  # the statistics are collected before the clock starts
    began = time.monotonic()
    prompts = bench.plan.prompts_of("tune")[:PROBE_PROMPTS]
    TransformersGenerator(bench.model, bench.tokenizer)(prompts, [make(1.0), None], bench.plan.sampling, 0)
    generated = time.monotonic()
    calibrate_grid(bench.model, bench.tokenizer, [make], bench.neutral, target_ce_rises=CE_RISES)
    a_text = (generated - began) / (2 * len(prompts))
    return a_text, (time.monotonic() - generated) / len(CE_RISES)


def estimate(tuning: Tuning, methods: Sequence[str], plan: BenchPlan) -> str:
    """What is left to be generated and calibrated, and about how long it takes."""
    tuned = [method for method in methods if spec(method).needs != "nothing" and method not in CONTROLS]
    trials = sum(tuning.trials_of(method) for method in tuned)
    own = tuning.root.plan
    steered = sum(spec(method).needs != "nothing" for method in methods)
    searched = trials * len(own.concepts) * len(own.ce_rises)
    measured = (steered + 1) * len(plan.concepts) * len(plan.ce_rises)  # one more: CAA at another layer
    texts = searched * own.prompts + (measured + (len(methods) - steered) * len(plan.concepts)) * 2 * plan.prompts
    a_text, a_cost = seconds_of(tuning.root)
    minutes = (texts * a_text + (searched + measured) * a_cost) / 60
    return (
        f"{trials} trials and {len(methods)} methods: {texts:,} texts at {a_text:.2f} s and {searched + measured:,} "
        f"calibrations at {a_cost:.2f} s, about {minutes:.0f} minutes in all, and more where other programs compute"
    )


def measure(
    tuning: Tuning, methods: Sequence[str], plan: BenchPlan, folder: Path, command: str, *, add: bool = False
) -> None:
    """Tune, and write the records of all methods and of CAA at the layer of the best SAE method.

    With ``add`` the methods join those that the folder has.
    """
    for needed in (tuning.work, folder):
        needed.mkdir(parents=True, exist_ok=True)
    earlier = fg.load_run(folder / RUN) if add else None
    layers = dict(earlier.header["plan"]["layers"]) if earlier else {}
    steered = [method for method in methods if spec(method).needs != "nothing" and method not in CONTROLS]
    tuned = {method: tuning.tune(method) for method in steered}
    best = {method: trials[0] for method, trials in tuned.items()}
    layers |= {method: (trial.layer,) for method, trial in best.items()}
    layers |= {
        control: layers[method] for control, method in CONTROLS.items() if control in methods and method in layers
    }
    settings = {method: trial.settings for method, trial in best.items() if trial.settings}
    kept = tuple(method for method in methods if spec(method).needs == "nothing" or method in layers)
    plan = replace(plan, methods=kept, layers={m: layers[m] for m in kept if m in layers}, settings=settings)
    bench, path = tuning.root.with_plan(plan), folder / (ADDED if add else RUN)
    run = run_shared(bench, path, command, lambda done, of: print(done, of, flush=True), fresh=tuning.fresh)
    if Ranks.from_env().rank == 0:
        write_tuning(folder / "tuning.json", tuning, tuned, add=add)
    if earlier:
        run = join_runs(earlier, run)
    near = layers[best_sae_method(run) or "caa"]
    if Ranks.from_env().rank == 0 and earlier:
        join_added(folder, run)
    if near == layers.get("caa"):
        (folder / NEARBY).unlink(missing_ok=True)
        return
    other = replace(plan, methods=("caa",), layers={"caa": near}, settings={})
    run_shared(bench.with_plan(other), folder / NEARBY, command, fresh=tuning.fresh)


def write_tuning(path: Path, tuning: Tuning, tuned: Mapping[str, Sequence[Trial]], *, add: bool) -> None:
    """Write the trials, after those of methods that were measured before."""
    found = {method: [asdict(trial) for trial in trials] for method, trials in tuned.items()}
    earlier = read_json(path) if add else {}
    write_json(path, {**earlier, "concepts": list(tuning.root.plan.concepts), **found})


def join_added(folder: Path, run: Run) -> None:
    """Write the joined run and its strengths, and remove what was added to it."""
    kept, added = (read_json(strengths_path(folder / name)) for name in (RUN, ADDED))
    plan = {key: value for key, value in run.header["plan"].items() if key != "judge"}
    arms = {concept: [*arms, *added["arms"][concept]] for concept, arms in kept["arms"].items()}
    write_json(strengths_path(folder / RUN), {"identity": {**kept["identity"], "plan": plan}, "arms": arms})
    write_run(folder / RUN, run)
    for path in (folder / ADDED, strengths_path(folder / ADDED)):
        path.unlink()


def chosen_methods(subject: Subject, asked: Sequence[str]) -> list[str]:
    """The methods that can be run: all of the benchmark's, or those that were asked for."""
    rows = [row for row in specs("bench") if not asked or row.name in asked]
    able = {"nothing": True, "layer": True, "sae": True, "effects": bool(subject.effects)}
    return [row.name for row in rows if able[row.needs] and (subject.chats or not row.instructs)]


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="default, smollm2, or the folder of a model, with --sae")
    parser.add_argument("--sae", action="append", default=[], help="folder of an SAE; effects are looked for beside it")
    parser.add_argument("--layer", type=int, action="append", default=[], help="a layer without an SAE, tried by CAA")
    parser.add_argument("--behaviors", choices=("concepts", "chat"), default="concepts", help="what is measured")
    parser.add_argument("--concept", action="append", default=[], help="measure these alone")
    parser.add_argument("--tuning-concept", action="append", default=[], help="choose settings on these alone")
    parser.add_argument("--method", action="append", default=[], help="measure these alone")
    parser.add_argument("--prompts", type=int, help="prompts of each half: 24 of the default, 32 of other models")
    parser.add_argument("--tuning-prompts", type=int, default=8, help="prompts on which settings are chosen")
    parser.add_argument("--settings", type=int, help="try at most so many settings of a method besides its defaults")
    parser.add_argument("--cost", type=float, action="append", default=[], help="measure at these costs alone")
    parser.add_argument("--work", type=Path, help="folder of the tuning runs")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--estimate", action="store_true", help="only say how long it takes")
    parser.add_argument("--tables", action="store_true", help="only make tables, page and pictures of the records")
    parser.add_argument("--fresh", action="store_true", help="start over what earlier versions or settings began")
    parser.add_argument("--add", action="store_true", help="measure methods beside those that the results have")
    parser.add_argument("--docs", action="store_true", help="only put tables and the sentence into docs and README.md")
    arguments = parser.parse_args()
    if Ranks.from_env().world > 1:  # one of them could read what another is about to remove
        if arguments.fresh:
            parser.error("--fresh is for one process: name another --work and --out, or remove what is there")
        if arguments.add:
            parser.error("--add is for one process")
    return arguments


def tuning_concepts(arguments: argparse.Namespace, behaviors: Behaviors, concepts: Sequence[str]) -> tuple[str, ...]:
    """The concepts that settings are chosen on: those asked for, six of the sixteen, or all."""
    dear = arguments.model != "default" and arguments.behaviors == "concepts" and not arguments.concept
    return tuple(arguments.tuning_concept or (TUNING_CONCEPTS if dear else concepts))


def main() -> None:
    """Tune, measure, write."""
    arguments = parse()
    if arguments.docs:
        publish_docs()
        return
    began = time.monotonic()
    subject, behaviors = load_subject(arguments.model, arguments.sae), load_behaviors(arguments.behaviors)
    folder = arguments.out or results_folder(subject.name, arguments.behaviors)
    if arguments.tables:
        publish(folder, subject)
        return
    concepts = tuple(arguments.concept) or behaviors.names
    methods = chosen_methods(subject, arguments.method)
    if arguments.add:
        methods = [method for method in methods if method not in fg.load_run(folder / RUN).methods]
    prompts = arguments.prompts or (24 if arguments.model == "default" else 32)
    chosen_on = tuning_concepts(arguments, behaviors, concepts)
    texts: dict[str, Any] = {"max_new_tokens": behaviors.max_new_tokens}
    if arguments.behaviors == "chat":
        texts |= {"own_prompts": behaviors.prompts}
    root = BenchPlan(
        chosen_on,
        methods=("unsteered",),
        ce_rises=TUNING_RISES,
        matched=None,
        halves=("tune",),
        prompts=arguments.tuning_prompts,
        **texts,
    )
    bench = subject.bench(root)
    for name in dict.fromkeys([*concepts, *chosen_on]):
        print(f"{name}: the judge's area under the ROC curve is {subject.judge.validate(name):.3f}", flush=True)
        bench.concept(name)  # so that all plans share its statistics
    work = arguments.work or ROOT / "build" / "quality" / subject.name / arguments.behaviors
    tuning = Tuning(subject, bench, arguments.layer, work, arguments.fresh, arguments.settings)
    costs = tuple(arguments.cost) or CE_RISES
    plan = BenchPlan(concepts, methods=("unsteered",), ce_rises=costs, prompts=prompts, **texts)
    print(estimate(tuning, methods, plan), flush=True)
    if not arguments.estimate:
        command = command_of("quality")
        measure(tuning, methods, plan, folder, command, add=arguments.add)
        if Ranks.from_env().rank == 0:
            publish(folder, subject)
        print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
