"""How many texts a method needs: 5, 10 and 40 a side, sentences and short phrases, with settings that stay the same.

Every variant of a method is measured on eight concepts: four on which defaults may be chosen, and four on which they
are reported. Strengths are chosen on one half of the prompts, scores are of the other. Differences to CAA of the same
texts have intervals over prompts.

    python benchmarks/texts.py --model smollm2             at the layer of the best SAE method in tuning.json
    python benchmarks/texts.py --layer 2                   the embedded default, at this layer
    python benchmarks/texts.py ... --tables                prints the tables of the scores that are there

It writes texts.json and texts.md to the results folder of the model. A command that was killed goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from subject import ROOT, Subject, load_subject, results_folder

import fgsteer as fg
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import paired_differences
from fgsteer.evaluation.runs.records import Unit
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.evaluation.runs.tables import over_prompts
from fgsteer.methods import spec
from fgsteer.storage.json_files import read_json, write_json

PHRASES = Path(__file__).with_name("phrases.json")
CHOOSING, REPORTED = ("anger", "food", "london", "wedding"), ("fear", "love", "sea", "war")
SIDES = (5, 10, 40)
KINDS = ("sentences", "phrases")
WIDE = {"n_positive": 256, "n_negative": 128, "max_density": 1.0}
MIXED = {"mu": 0.1, "bias_weight": 0.0, "unit_effects": True, "decoder_weight": 0.5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CAA": ("caa", {}),
    "CAA denoised, soft 0.5": ("caa_denoised", {"threshold": 0.5}),
    "CAA denoised, soft 1": ("caa_denoised", {}),
    "CAA denoised, hard 1.5": ("caa_denoised", {"shrinkage": "hard", "threshold": 1.5}),
    "CAA denoised, hard 2": ("caa_denoised", {"shrinkage": "hard", "threshold": 2.0}),
    "FGAA, 16 features": ("fgaa", {}),
    "FGAA, 64 and 32": ("fgaa", {**WIDE, "n_positive": 64, "n_negative": 32}),
    "FGAA, 256 and 128": ("fgaa", WIDE),
    "FGAA, 256 and 128 by t": ("fgaa", {**WIDE, "score": "welch_t"}),
    "FGAA, 256 and 128 + error": ("fgaa_error", WIDE),
    "FGAA, 256 and 128 by t + error": ("fgaa_error", {**WIDE, "score": "welch_t"}),
    "FGAA, 256 and 128 + effects": ("fgaa_effects", {**WIDE, **MIXED}),
    "FGAA, 256 and 128 + effects + error": ("fgaa_effects", {**WIDE, **MIXED, "keep_error": True}),
    "STA": ("sta", {}),
    "STA + error": ("sta", {"keep_error": True}),
}
Scores = Mapping[str, Mapping[str, Any]]  # by concept: {"setting", "units": [[prompt, seed, BCS]]}


def small_set(concept: str, kind: str, size: int) -> fg.ContrastSet:
    """The first texts of a side of a shipped set, or as many phrases; the judge learns from the set's held-out part."""
    shipped = fg.load_contrast(concept)
    positives, negatives = shipped.positives, shipped.negatives
    if kind == "phrases":
        phrases = read_json(PHRASES)
        positives, negatives = phrases["concepts"][concept], phrases["neutral"]
    return fg.ContrastSet(concept, (), positives[:size], negatives[:size], shipped.held_out, shipped.description)


def measure(bench: Bench, variant: str, path: Path, fresh: bool) -> dict[str, Any]:
    """Each concept's BCS by prompt on the half "report", at the strength that is best on "tune"."""
    method, settings = VARIANTS[variant]
    plan = replace(bench.plan, methods=(method,), settings={method: settings})
    bench.with_plan(plan).run(path, fresh=fresh)
    run = fg.load_run(path)
    return {
        concept: {
            "coefficient": setting.coefficient,
            "units": [[*unit, bcs] for unit, bcs in run.values(setting).items()],
        }
        for (concept, _), setting in best_settings(run).items()
    }


def study(subject: Subject, layer: int, plan: BenchPlan, work: Path, fresh: bool) -> dict[str, Scores]:
    """Scores by kind, size and variant, as "phrases/10/CAA"."""
    variants = [name for name, (method, _) in VARIANTS.items() if method != "fgaa_effects" or layer in subject.effects]
    found: dict[str, Scores] = {}
    total, began = len(KINDS) * len(SIDES) * len(variants), time.monotonic()
    for kind in KINDS:
        for size in SIDES:
            sets = [small_set(concept, kind, size) for concept in plan.concepts]
            bench = subject.bench(plan, sets)
            for concept in plan.concepts:
                bench.concept(concept)
            for variant in variants:
                file = f"{kind}-{size}-{variant.replace(' ', '_').replace(',', '')}.jsonl"
                found[f"{kind}/{size}/{variant}"] = measure(bench, variant, work / file, fresh)
                spent = time.monotonic() - began
                print(f"{len(found)} of {total}, {spent:.0f} s: {kind}, {size}, {variant}", flush=True)
    return found


def strata(scores: Scores, concepts: Iterable[str]) -> list[dict[Unit, float]]:
    """{(prompt, seed): BCS} of each concept."""
    return [{Unit(prompt, seed): bcs for prompt, seed, bcs in scores[concept]["units"]} for concept in concepts]


def table(scores: Mapping[str, Scores], concepts: Sequence[str]) -> str:
    """BCS of every variant less that of CAA on the same texts, in Markdown."""
    lines = [
        "| variant | " + " | ".join(f"{kind}, {size} a side" for kind in KINDS for size in SIDES) + " | mean |",
        "|---" * (len(KINDS) * len(SIDES) + 2) + "|",
    ]
    for variant in VARIANTS:
        cells, means = [], []
        for kind in KINDS:
            for size in SIDES:
                name = f"{kind}/{size}/{variant}"
                if name not in scores:
                    continue
                own, base = strata(scores[name], concepts), strata(scores[f"{kind}/{size}/CAA"], concepts)
                means.append(sum(sum(values.values()) / len(values) for values in own) / len(own))
                if variant == "CAA":
                    cells.append(f"{means[-1]:.3f}")
                    continue
                gain = over_prompts([paired_differences(a, b) for a, b in zip(own, base, strict=True)])
                cells.append(f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]".replace("-", "−"))
        if cells:
            lines.append(f"| {variant} | {' | '.join(cells)} | {sum(means) / len(means):.3f} |")
    return "\n".join(lines) + "\n"


def page(content: Mapping[str, Any]) -> str:
    """Both tables, in Markdown."""
    parts = [f"# Texts a side: {content['model']}, layer {content['layer']}\n"]
    parts.append(f"`{content['command']}`. CAA's BCS, and the others' less that of CAA on the same texts.\n")
    for title, concepts in (("Concepts on which defaults are chosen", CHOOSING), ("The others", REPORTED)):
        parts += [f"## {title}: {', '.join(concepts)}\n", table(content["scores"], concepts)]
    return "\n".join(parts)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="default, smollm2, or the folder of a model, with --sae")
    parser.add_argument("--sae", action="append", default=[], help="folder of an SAE; effects are looked for beside it")
    parser.add_argument("--layer", type=int, help="by default that of the best SAE method in tuning.json")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of each half")
    parser.add_argument("--work", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="start over what earlier versions or settings began")
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder(Path(arguments.model).name)
    if not arguments.tables:
        subject = load_subject(arguments.model, arguments.sae)
        layer = best_layer(folder) if arguments.layer is None else arguments.layer
        work = arguments.work or ROOT / "build" / "texts" / subject.name
        for needed in (work, folder):
            needed.mkdir(parents=True, exist_ok=True)
        plan = BenchPlan(
            CHOOSING + REPORTED,
            methods=("caa",),
            layers=(layer,),
            ce_rises=(0.25, 0.5, 1.0),
            matched=None,
            prompts=arguments.prompts,
        )
        scores = study(subject, layer, plan, work, arguments.fresh)
        command = shlex.join(["python", "benchmarks/texts.py", *sys.argv[1:]])
        plain = json.loads(json.dumps(asdict(plan)))
        content = {"model": subject.name, "layer": layer, "command": command, "plan": plain, "scores": scores}
        write_json(folder / "texts.json", content)
        (folder / "texts.md").write_text(page(content), "utf-8")
    print(page(read_json(folder / "texts.json")))


def best_layer(folder: Path) -> int:
    """The layer of the best trial of an SAE method in a folder's tuning.json."""
    tuned = read_json(folder / "tuning.json")
    sae_methods = [name for name in tuned if name != "concepts" and spec(name).needs in ("sae", "effects")]
    return int(max((tuned[name][0] for name in sae_methods), key=lambda trial: trial["bcs"])["layer"])


if __name__ == "__main__":
    main()
