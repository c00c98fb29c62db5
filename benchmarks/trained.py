"""Trained vectors against CAA, FGAA through effects and examples before the prompt, on concepts that chose nothing.

The recipe of training was chosen on the six concepts of ``subject.TUNING_CONCEPTS``. Others are measured here: all
methods at one layer, each concept at the cost that is best on one half of the prompts, with scores of the other half.
Beside the scores stands what training takes: seconds a vector, alone and several in common batches.

    python benchmarks/trained.py --model smollm2      at the layer of the best SAE method in tuning.json
    python benchmarks/trained.py --seconds            only how long training takes, beside the scores that are there
    python benchmarks/trained.py --docs               puts the tables into docs/guides/train.md

It writes trained.json and trained.md to the results folder of the model. A killed command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from subject import (
    ROOT,
    TUNING_CONCEPTS,
    Subject,
    command_of,
    load_behaviors,
    load_subject,
    published,
    results_folder,
    verdict,
)
from texts import best_layer

import fgsteer as fg
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import paired_differences
from fgsteer.evaluation.runs.records import Unit
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.evaluation.runs.tables import over_prompts
from fgsteer.methods import method_name
from fgsteer.storage.json_files import read_json, write_json

GUIDE = ROOT / "docs" / "guides" / "train.md"
METHODS = ("caa", "fgaa_effects", "prompt", "trained", "trained_features")
COMPARED = (
    ("trained_features", "caa"),
    ("trained_features", "prompt"),
    ("trained_features", "trained"),
    ("trained", "caa"),
)
TOGETHER = 4  # vectors in common batches
COSTS = (0.03, 0.06, 0.125, 0.25, 0.5, 1.0)  # nats a token


def seconds_of_training(subject: Subject, layer: int, repeats: int) -> dict[str, Any]:
    """Seconds a vector of the default recipe, alone and of ``TOGETHER`` in common batches, and their ratio by round."""
    contrasts = {name: fg.load_contrast(name) for name in TUNING_CONCEPTS[:TOGETHER]}
    model, tokenizer = subject.model, subject.tokenizer
    alone, together = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        for contrast in contrasts.values():
            fg.train(model, tokenizer, contrast, hookpoint=layer)
        middle = time.perf_counter()
        fg.train_many(model, tokenizer, contrasts, hookpoint=layer)
        alone.append((middle - began) / TOGETHER)
        together.append((time.perf_counter() - middle) / TOGETHER)
    ratios = [one / other for one, other in zip(together, alone, strict=True)]
    return {"alone": alone, "together": together, "ratios": ratios, "threads": torch.get_num_threads()}


def scores(run: fg.Run) -> dict[str, dict[str, list[list[Any]]]]:
    """{method: {concept: [[prompt, seed, BCS]]}} on the half "report", at the strengths that are best on "tune"."""
    found: dict[str, dict[str, list[list[Any]]]] = {}
    for (concept, method), setting in best_settings(run).items():
        units = [[*unit, bcs] for unit, bcs in run.values(setting).items()]
        found.setdefault(method, {})[concept] = units
    return found


def curves(run: fg.Run) -> dict[str, dict[str, list[float]]]:
    """{method: {cost: [behavior, coherence]}}: means over all texts of the half "report"."""
    texts: dict[tuple[str, float], list[Any]] = {}
    for record in run.records:
        if record.half == "report" and record.ce_rise is not None:
            texts.setdefault((record.method, record.ce_rise), []).append(record)
    found: dict[str, dict[str, list[float]]] = {}
    for (method, cost), own in sorted(texts.items(), key=lambda item: item[0][1]):
        means = [statistics.fmean(getattr(record, measure) for record in own) for measure in ("behavior", "coherence")]
        found.setdefault(method, {})[str(cost)] = means
    return found


def curve_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Behavior and coherence by cost, in lines of Markdown."""
    costs = list(next(iter(found.values())))
    lines = [
        f"| behavior / coherence | {' | '.join(f'{cost} nats' for cost in costs)} |",
        "|---" * (len(costs) + 1) + "|",
    ]
    for method, by_cost in found.items():
        cells = [f"{behavior:.2f} / {coherence:.2f}" for behavior, coherence in by_cost.values()]
        lines.append(f"| {method_name(method)} | {' | '.join(cells)} |")
    return lines


def table(content: Mapping[str, Any]) -> str:
    """Mean BCS by method, differences with intervals over prompts, behavior by cost, and the seconds, in Markdown."""
    by_method = {
        method: {name: {Unit(p, s): bcs for p, s, bcs in units} for name, units in concepts.items()}
        for method, concepts in content["scores"].items()
    }
    lines = ["| | BCS [95 %] | by concept |", "|---|---|---|"]
    for method in METHODS:
        whole = over_prompts(list(by_method[method].values()))
        cells = ", ".join(f"{name} {statistics.fmean(own.values()):.2f}" for name, own in by_method[method].items())
        lines.append(f"| {method_name(method)} | {whole.mean:.3f} [{whole.low:.3f}, {whole.high:.3f}] | {cells} |")
    lines += ["", f"At block {content['layer']} of {content['model']}, by `{content['command']}`:", ""]
    for one, other in COMPARED:
        gains = [paired_differences(own, by_method[other][name]) for name, own in by_method[one].items()]
        gain = over_prompts(gains)
        words = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]".replace("-", "−")
        lines.append(
            f"- {method_name(one)} less {method_name(other)}: {words}, {verdict(gain.mean, gain.low, gain.high)}."
        )
    lines += ["", *curve_table(content["curves"])]
    if "seconds" in content:
        lines.append("")
        took = content["seconds"]
        alone, together, ratio = (statistics.median(took[key]) for key in ("alone", "together", "ratios"))
        spread = f"{min(took['ratios']):.2f} to {max(took['ratios']):.2f}"
        lines.append(
            f"- A vector takes {alone:.0f} s alone and {together:.0f} s of {TOGETHER} in common batches (ratio "
            f"{ratio:.2f}, {spread}; float32, {took['threads']} of the processor's threads)."
        )
    return "\n".join(lines) + "\n"


def publish_docs() -> None:
    """Put the tables that are there into the guide."""
    for name in ("default", "smollm2"):
        path = results_folder(name) / "trained.json"
        if path.exists():
            GUIDE.write_text(published(GUIDE, f"trained {name}", table(read_json(path))), "utf-8")


def measure(subject: Subject, plan: BenchPlan, work: Path, *, fresh: bool) -> dict[str, Any]:
    """Scores and curves of all methods, concept by concept in one file that a stopped run goes on with."""
    path = work / "trained.jsonl"
    subject.bench(plan).run(path, progress=lambda done, of: print(done, of, flush=True), fresh=fresh)
    run = fg.load_run(path)
    return {"scores": scores(run), "curves": curves(run)}


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="default or smollm2")
    parser.add_argument("--layer", type=int, help="by default that of the best SAE method in tuning.json")
    parser.add_argument("--concepts", type=int, default=6, help="how many of the concepts that chose nothing")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of each half")
    parser.add_argument("--cost", type=float, action="append", help="nats a token; six by default")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing")
    parser.add_argument("--seconds", action="store_true", help="only time training, beside the scores that are there")
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--docs", action="store_true", help="only put the tables into the guide")
    return parser.parse_args()


def main() -> None:
    """Measure, write, print."""
    arguments = parse()
    if arguments.docs:
        publish_docs()
        return
    subject, folder = load_subject(arguments.model), results_folder(arguments.model)
    layer = best_layer(folder) if arguments.layer is None else arguments.layer
    out = folder / "trained.json"
    if arguments.seconds:
        content: dict[str, Any] = read_json(out)
        content["seconds"] = seconds_of_training(subject, content["layer"], arguments.repeats)
    else:
        concepts = [name for name in load_behaviors("concepts").names if name not in TUNING_CONCEPTS]
        plan = BenchPlan(
            tuple(concepts[: arguments.concepts]),
            methods=METHODS,
            layers=(layer,),
            ce_rises=tuple(arguments.cost or COSTS),
            matched=None,
            prompts=arguments.prompts,
        )
        work = ROOT / "build" / "trained" / subject.name
        for needed in (work, folder):
            needed.mkdir(parents=True, exist_ok=True)
        content = {
            "model": subject.name,
            "layer": layer,
            "command": command_of("trained"),
            "plan": json.loads(json.dumps(asdict(plan))),
            **measure(subject, plan, work, fresh=arguments.fresh),
        }
    write_json(out, content)
    (folder / "trained.md").write_text(f"# Trained vectors: {content['model']}\n\n{table(content)}", "utf-8")
    print(table(content))


if __name__ == "__main__":
    main()
