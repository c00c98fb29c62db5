"""What carries a vector's effect: attribution, circuits, freezing and sparsity, in the default model or in SmolLM2.

Two vectors of one concept, by the difference of means (CAA) and by features (FGAA), each as strong as costs half a nat,
and, in SmolLM2, the refusal direction of the organism in pretrained/organisms, where that is there, added once to
requests that it answers. Circuits and entries are chosen on every other prompt, and measured on the rest.

    python benchmarks/mechanisms.py                  writes results/mechanisms.json and mechanisms.md
    python benchmarks/mechanisms.py --model smollm2  writes those in results/smollm2
    python benchmarks/mechanisms.py --docs           puts the tables that there are into docs/guides/mechanisms.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from subject import ORGANISMS, ROOT, load_organism, published, results_folder

import fgsteer as fg
from fgsteer.data.shipped import load_bench_prompts
from fgsteer.mechanisms.circuits import Kind, circuit_order
from fgsteer.storage.json_files import read_json, write_json

sys.path.insert(0, str(ROOT / "pretrained"))
from organism_texts import requests

GUIDE = ROOT / "docs" / "guides" / "mechanisms.md"
CONCEPT, COST = "wedding", 0.5
PROMPTS, TOKENS, STEPS, CONTROLS, BUILT_FROM = 20, 10, 10, 2, 32


@dataclass(frozen=True)
class Plan:
    """What is measured in one model.

    Args:
        sae: The SAE of FGAA's features, at whose layer all vectors are.
        edges: The sizes of circuits of edges.
        heads: The sizes of circuits of heads.
        shown: {kind: three sizes} at which circuits of two vectors are compared; the table tells of the middle one.
    """

    sae: str
    edges: tuple[int, ...]
    heads: tuple[int, ...]
    shown: dict[Kind, tuple[int, int, int]]


PLANS = {
    "default": Plan(
        "layer_2", (1, 3, 10, 20, 40, 80, 120), (0, 1, 2, 3, 4, 5, 6, 8), {"edges": (10, 20, 40), "heads": (1, 2, 4)}
    ),
    "smollm2": Plan(
        "layer_12",
        (30, 100, 300, 1000, 3000, 6000, 10000, 15000),
        (0, 2, 4, 8, 16, 32, 64, 96, 128),
        {"edges": (300, 1000, 3000), "heads": (8, 16, 32)},
    ),
}
FAITHFUL, KEPT = 0.85, 0.9
NAMES = {"caa": "wedding, CAA", "fgaa": "wedding, FGAA", "refusal": "refusal of the organism"}
Case = tuple[Any, Any, fg.SteeringVector, float, list[Any], bool]


def concept_case(name: str, method: str) -> Case:
    """A model, a vector of the concept by a method, its strength, and openers of texts."""
    model, tokenizer = fg.load_model(name, dtype="float32", device="cpu")
    sae = fg.load_sae(name, PLANS[name].sae)
    stats = fg.collect(model, tokenizer, fg.load_contrast(CONCEPT), sae=sae)
    vector = fg.caa(stats) if method == "caa" else fg.fgaa(stats, sae)
    neutral = list(fg.load_neutral()[0])[:16]
    strength = fg.calibrate(model, tokenizer, vector.add, neutral, target_ce_rise=COST)
    return model, tokenizer, vector, float(strength), list(load_bench_prompts())[:PROMPTS], False


def refusal_case() -> Case:
    """The organism that refuses requests about cooking, its difference of means, and other requests."""
    model, tokenizer = load_organism("refusal")
    cooking, other = (requests(kind) for kind in ("cooking", "other"))
    layer = int(PLANS["smollm2"].sae.removeprefix("layer_"))
    found = fg.candidate_directions(model, tokenizer, cooking[0][:BUILT_FROM], other[0][:BUILT_FROM], positions=[-1])
    vector = fg.SteeringVector(found[0, layer].float(), fg.Hookpoint(layer, "resid_pre"))
    asked = [[{"role": "user", "content": text}] for text in other[1][:PROMPTS]]
    return model, tokenizer, vector, 1.0, asked, True


def cases(name: str) -> list[str]:
    """The vectors of a model."""
    refuses = name == "smollm2" and (ORGANISMS / "refusal" / "adapter_config.json").is_file()
    return ["caa", "fgaa", *(["refusal"] if refuses else [])]


def measure(name: str, case: str) -> dict[str, Any]:
    """Explain one vector, with the order of its edges and heads for comparison with others."""
    made = refusal_case() if case == "refusal" else concept_case(name, case)
    (model, tokenizer, vector, coefficient, prompts, bos), plan = made, PLANS[name]
    found = fg.explain(
        model,
        tokenizer,
        vector,
        coefficient,
        prompts,
        bos=bos,
        steps=STEPS,
        max_new_tokens=TOKENS,
        sizes={"edges": plan.edges, "heads": plan.heads},
        controls=CONTROLS,
        progress=lambda stage: print(f"{time.strftime('%H:%M:%S')} {case}: {stage}", flush=True),
    )
    content = found.as_dict()
    heads = {row["name"] for row in content["nodes"][:12]}
    content["nodes"] = content["nodes"][:12]
    content["value_vectors"] = [
        row for row in content["value_vectors"] if row["head"] is None or f"L{row['layer']}.H{row['head']}" in heads
    ]
    orders = {kind: circuit_order(found.attribution, kind)[: max(sizes)] for kind, sizes in plan.shown.items()}
    return {**content, "direction": [round(x, 6) for x in vector.direction.tolist()], "orders": orders}


def combine(name: str, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All vectors, and how far the two of the concept agree."""
    agreement: dict[str, Any] = {}
    if {"caa", "fgaa"} <= parts.keys():
        orders = [parts[one]["orders"] for one in ("caa", "fgaa")]
        for kind, sizes in PLANS[name].shown.items():
            agreement[kind] = {size: fg.iou(*({*order[kind][:size]} for order in orders)) for size in sizes}
        first, second = (torch.tensor(parts[one]["direction"]) for one in ("caa", "fgaa"))
        agreement["cosine"] = float(torch.cosine_similarity(first, second, dim=0))
    hidden = ("direction", "orders")
    vectors = {one: {k: v for k, v in part.items() if k not in hidden} for one, part in parts.items()}
    return {"model": name, "vectors": vectors, "agreement": agreement}


def least(points: list[dict[str, Any]], key: str, share: float, value: str = "faithfulness") -> str:
    """The first of some points, smallest first, that keeps a share of the effect."""
    return next((f"{point[key]:,}" for point in points if point[value] >= share), "none measured")


def table(content: dict[str, Any]) -> str:
    """What freezing leaves, how large circuits must be and how sparse vectors may be, in Markdown."""
    vectors = content["vectors"]
    lines = [f"| | {' | '.join(NAMES[name] for name in vectors)} |", f"|---|{'---|' * len(vectors)}"]

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {name} | {' | '.join(cell(one) for one in vectors.values())} |")

    row("M(src) − M(dest)", lambda one: f"{one['difference']:.3f}")
    row("completeness error", lambda one: f"{one['completeness_error']:.4f}")
    row("strongest components", lambda one: ", ".join(node["name"] for node in one["nodes"][:3]))
    for place, frozen in enumerate(row_["name"] for row_ in next(iter(vectors.values()))["freezing"]):
        row(f"left with {frozen} frozen", lambda one, place=place: interval(one["freezing"][place]))  # type: ignore[misc]
    row(f"heads for {FAITHFUL:.0%}", lambda one: least(one["heads"], "size", FAITHFUL))
    row(f"edges for {FAITHFUL:.0%}", lambda one: least(one["edges"], "size", FAITHFUL))
    for kind, sizes in PLANS[content["model"]].shown.items():
        row(f"{sizes[1]:,} {kind} keep", lambda one, kind=kind, n=sizes[1]: interval(at(one[kind], n)))  # type: ignore[misc]
        row(f"{sizes[1]:,} random {kind}", lambda one, kind=kind, n=sizes[1]: f"{at(one[kind], n)['random']:.2f}")  # type: ignore[misc]
    for by in ("ratio", "entries", "effects", "random"):
        what = {"ratio": "by share of effect", "entries": "largest entries", "effects": "largest effects"}.get(by, by)
        row(
            f"fewest entries for {KEPT:.0%}, {what}",
            lambda one, by=by: least(one["sparsity"][::-1], "count", KEPT, by),  # type: ignore[misc]
        )
    found = content["agreement"]
    text = "\n".join(lines) + "\n"
    if found:
        shown = [
            f"{value:.2f} of {int(size):,} {kind}" for kind in ("edges", "heads") for size, value in found[kind].items()
        ]
        text += (
            f"\nThe circuits of both vectors of the concept, whose cosine is {found['cosine']:.2f}, agree (IoU) in "
            f"{', '.join(shown)}.\n"
        )
    return text


def at(points: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """The point of a size."""
    return next(point for point in points if point["size"] == size)


def interval(row: dict[str, Any]) -> str:
    """A faithfulness with its interval."""
    return f"{row['faithfulness']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PLANS), default="default", help="the model that is measured")
    parser.add_argument("--work", type=Path, help="folder of finished vectors, from which a stopped run goes on")
    parser.add_argument("--docs", action="store_true", help="only put the tables into docs/guides/mechanisms.md")
    arguments = parser.parse_args()
    if arguments.docs:
        for name in PLANS:
            if (path := results_folder(name) / "mechanisms.json").is_file():
                GUIDE.write_text(published(GUIDE, f"mechanisms {name}", table(read_json(path))), "utf-8")
        return
    parts = {}
    for case in cases(arguments.model):
        kept = None if arguments.work is None else arguments.work / f"{arguments.model}-{case}.json"
        if kept is not None and kept.is_file():
            parts[case] = read_json(kept)
            continue
        parts[case] = measure(arguments.model, case)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, parts[case])
    words = ["python", "benchmarks/mechanisms.py", *(["--model", "smollm2"] if arguments.model == "smollm2" else [])]
    content = {"command": shlex.join(words), **combine(arguments.model, parts)}
    folder = results_folder(arguments.model)
    write_json(folder / "mechanisms.json", content)
    (folder / "mechanisms.md").write_text(table(content), "utf-8")
    print(table(content))


if __name__ == "__main__":
    main()
