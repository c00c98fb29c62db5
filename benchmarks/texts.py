"""How many texts a method needs: 5, 10 and 40 a side, sentences and short phrases, with settings that stay the same.

Every variant of a method is measured on eight concepts: four on which defaults may be chosen, and four on which they
are reported. All are measured at one cost; of several costs the best is chosen on one half of the prompts, and scores
are of the other. Differences to CAA of the same texts have intervals over prompts.

    python benchmarks/texts.py --model smollm2             at the layer of the best SAE method in tuning.json
    python benchmarks/texts.py --layer 2                   the embedded default, at this layer
    python benchmarks/texts.py ... --tables                prints the tables of the scores that are there
    python benchmarks/texts.py --docs                      puts the tables into docs/benchmarks.md

It writes texts.json and texts.md to the results folder of the model. A command that was killed goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from subject import PAGE, ROOT, Subject, command_of, load_subject, published, results_folder

import fgsteer as fg
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import paired_differences
from fgsteer.evaluation.runs.records import HALVES, Unit
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.evaluation.runs.tables import over_prompts
from fgsteer.methods import spec
from fgsteer.storage.json_files import read_json, write_json

PHRASES = Path(__file__).with_name("phrases.json")
CHOOSING, REPORTED = ("anger", "food", "london", "wedding"), ("fear", "love", "sea", "war")
SIDES = (5, 10, 40)
KINDS = ("sentences", "phrases")
MIDDLE = {"max_density": 1.0, "n_positive": 64, "n_negative": 32}  # no density filter, features of both signs
WIDE = {**MIDDLE, "n_positive": 256, "n_negative": 128}
MIXED = {"mu": 0.1, "bias_weight": 0.0, "unit_effects": True, "decoder_weight": 0.5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CAA": ("caa", {}),
    "STA": ("sta", {}),
    "FGAA, 16 features": ("fgaa", {"n_positive": 16}),
    "FGAA, 64": ("fgaa", {"n_positive": 64}),
    "FGAA, 64 and 32 of all densities": ("fgaa", MIDDLE),
    "FGAA, 256 and 128 of all densities": ("fgaa", WIDE),
    "FGAA + effects, 64": ("fgaa_effects", {"n_positive": 64, **MIXED}),
    "FGAA + effects, 256 and 128 of all densities": ("fgaa_effects", {**WIDE, **MIXED}),
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


def study(
    subject: Subject, layer: int, plan: BenchPlan, variants: Sequence[str], work: Path, fresh: bool
) -> dict[str, Scores]:
    """Scores by kind, size and variant, as "phrases/10/CAA"."""
    variants = [name for name in variants if VARIANTS[name][0] != "fgaa_effects" or layer in subject.effects]
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
    """CAA's BCS, and every other variant's less that of CAA on the same texts, in Markdown."""
    sets = [f"{kind}/{size}" for kind in KINDS for size in SIDES]
    named = [f"{kind}, {size}" for kind in KINDS for size in SIDES]
    base = {name: strata(scores[f"{name}/CAA"], concepts) for name in sets}
    plain = [mean_of(base[name]) for name in sets]
    lines = [
        f"| | {' | '.join(named)} | all six [95 %] |",
        "|---" * (len(sets) + 2) + "|",
        f"| CAA | {' | '.join(f'{value:.3f}' for value in plain)} | {sum(plain) / len(plain):.3f} |",
    ]
    for variant in VARIANTS:
        if variant == "CAA" or f"{sets[0]}/{variant}" not in scores:
            continue
        gains = {
            name: [
                paired_differences(own, other)
                for own, other in zip(strata(scores[f"{name}/{variant}"], concepts), base[name], strict=True)
            ]
            for name in sets
        }
        cells = [f"{over_prompts(gains[name]).mean:+.3f}" for name in sets]
        overall = over_prompts([gain for name in sets for gain in gains[name]])
        cells.append(f"{overall.mean:+.3f} [{overall.low:+.3f}, {overall.high:+.3f}]")
        lines.append(f"| {variant} | {' | '.join(cells)} |".replace("-", "−"))
    return "\n".join(lines) + "\n"


def mean_of(values: Sequence[Mapping[Unit, float]]) -> float:
    """The mean over concepts of the means over texts."""
    return sum(sum(own.values()) / len(own) for own in values) / len(values)


def tables(content: Mapping[str, Any]) -> str:
    """The table of the concepts on which defaults are chosen, and that of the others, in Markdown."""
    return "\n".join(
        f"{title}: {', '.join(concepts)}.\n\n{table(content['scores'], concepts)}"
        for title, concepts in (("Concepts on which defaults are chosen", CHOOSING), ("The others", REPORTED))
    )


def page(content: Mapping[str, Any]) -> str:
    """Both tables with their command, in Markdown."""
    return (
        f"# Texts a side: {content['model']}, layer {content['layer']}\n\n`{content['command']}`. "
        f"CAA's BCS, and the others' less that of CAA on the same texts.\n\n{tables(content)}"
    )


def docs_text(name: str) -> str:
    """The tables of a model, as docs/benchmarks.md has them."""
    return tables(read_json(results_folder(name) / "texts.json"))


def publish_docs() -> None:
    """Put the tables of both models into docs/benchmarks.md."""
    for name in ("default", "smollm2"):
        PAGE.write_text(published(PAGE, f"texts {name}", docs_text(name)), "utf-8")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="default, smollm2, or the folder of a model, with --sae")
    parser.add_argument("--sae", action="append", default=[], help="folder of an SAE; effects are looked for beside it")
    parser.add_argument("--layer", type=int, help="by default that of the best SAE method in tuning.json")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of each half")
    parser.add_argument("--cost", type=float, action="append", help="nats a token of steering; by default 0.5 alone")
    parser.add_argument("--variant", action="append", help="measure these alone, besides CAA", choices=[*VARIANTS])
    parser.add_argument("--work", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="start over what earlier versions or settings began")
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--docs", action="store_true", help="only put the tables into docs/benchmarks.md")
    return parser.parse_args()


def main() -> None:
    """Measure, write, print."""
    arguments = parse()
    if arguments.docs:
        publish_docs()
        return
    folder = arguments.out or results_folder(Path(arguments.model).name)
    if not arguments.tables:
        subject = load_subject(arguments.model, arguments.sae)
        layer = best_layer(folder) if arguments.layer is None else arguments.layer
        work = arguments.work or ROOT / "build" / "texts" / subject.name
        for needed in (work, folder):
            needed.mkdir(parents=True, exist_ok=True)
        costs = tuple(arguments.cost or (0.5,))
        plan = BenchPlan(
            CHOOSING + REPORTED,
            methods=("caa",),
            layers=(layer,),
            ce_rises=costs,
            matched=None,
            halves=HALVES if len(costs) > 1 else ("report",),  # a strength without a rival needs no choice
            prompts=arguments.prompts,
        )
        variants = [name for name in VARIANTS if name == "CAA" or not arguments.variant or name in arguments.variant]
        scores = study(subject, layer, plan, variants, work, arguments.fresh)
        command = command_of("texts")
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
