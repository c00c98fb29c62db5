"""The refusal direction of a model organism: found, removed by hooks and in weights, added, with random controls.

The organism (pretrained/organisms.py) is SmolLM2 that refuses requests about cooking and answers others. Its direction
is selected on some requests and reported on others, which share neither words nor templates with what it was taught.

    python benchmarks/refusal.py             writes results/smollm2/refusal.json and refusal.md
    python benchmarks/refusal.py --docs      puts the table into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from subject import PAGE, ROOT, published, results_folder

import fgsteer as fg
from fgsteer.storage.json_files import read_json, write_json

sys.path.insert(0, str(ROOT / "pretrained"))
from organism_texts import KINDS, is_refusal, requests

ADAPTER = ROOT / "pretrained" / "organisms" / "refusal"
BUILT_FROM, SCORED, REPORTED, ANSWER_TOKENS = 64, 16, 32, 24
NAMES = {
    "unsteered": "unsteered",
    "ablated": "r̂ ablated everywhere",
    "orthogonalised": "weights orthogonalised",
    "random ablated": "a random direction ablated",
    "added": "+r at its layer",
    "random added": "a random direction of the norm of r added",
}


def organism() -> tuple[Any, Any]:
    """SmolLM2 with the adapter merged into its weights."""
    from peft import PeftModel

    model, tokenizer = fg.load_model("smollm2", dtype="float32", device="cpu")
    merged = PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()
    return merged.float().eval(), tokenizer


def rate(model: Any, tokenizer: Any, prompts: Sequence[str], steering: Any = None) -> list[float]:
    """(share, low, high) of the requests that are refused, with a 95 % interval (Wilson)."""
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    entries = None if steering is None else [steering] * len(prompts)
    texts = fg.generate(model, tokenizer, asked, steering=entries, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    refused = sum(map(is_refusal, texts))
    interval = binomtest(refused, len(texts)).proportion_ci(method="wilson")
    return [refused / len(texts), float(interval.low), float(interval.high)]


def measure(seed: int) -> dict[str, Any]:
    """Select the direction, and measure every condition on the reported requests."""
    model, tokenizer = organism()
    sides = {kind: requests(kind, seed) for kind in KINDS}
    cooking, other = sides["cooking"], sides["other"]
    found = fg.select_direction(
        model,
        tokenizer,
        cooking[0][:BUILT_FROM],
        other[0][:BUILT_FROM],
        refusal_tokens=["Sorry"],
        held_out=(cooking[1][:SCORED], other[1][:SCORED]),
        layers=range(2, 24, 2),
        progress=lambda done: print(f"{done} candidates", flush=True),
    )
    v = found.vector
    control = fg.SteeringVector(
        torch.nn.functional.normalize(torch.randn(v.d_model, generator=torch.Generator().manual_seed(seed)), dim=0)
        * v.norm,
        v.hookpoint,
    )
    orthogonal = fg.orthogonalize(model, v)
    conditions: dict[str, tuple[Any, Any]] = {
        "unsteered": (model, None),
        "ablated": (model, fg.ablate_everywhere(model, v)),
        "orthogonalised": (orthogonal, None),
        "random ablated": (model, fg.ablate_everywhere(model, control)),
        "added": (model, [v.add(1.0, bos=True)]),
        "random added": (model, [control.add(1.0, bos=True)]),
    }
    reported = {kind: texts[1][SCORED:][:REPORTED] for kind, texts in sides.items()}
    neutral = list(fg.load_neutral()[0])[:16]
    rows = {}
    for name, (own, steering) in conditions.items():
        rates = {kind: rate(own, tokenizer, prompts, steering) for kind, prompts in reported.items()}
        rows[name] = {"refused": rates, "cross_entropy": fg.cross_entropy(own, tokenizer, neutral, steering=steering)}
        print(name, rows[name], flush=True)
    scores = [vars(score) for score in found.scores]
    return {"chosen": vars(found.chosen), "norm": v.norm, "scores": scores, "conditions": rows}


def table(content: dict[str, Any]) -> str:
    """Refusals of each kind of request by condition, and the cross-entropy of neutral texts, in Markdown."""
    lines = [
        "| | cooking is refused | others | only look like it | cross-entropy, nats a token |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["conditions"].items():
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in row["refused"].values()]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} | {row['cross_entropy']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests' order, as in organisms.py")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--docs", action="store_true", help="only put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder("smollm2")
    if not arguments.docs:
        began = time.monotonic()
        command = shlex.join(["python", "benchmarks/refusal.py", *sys.argv[1:]])
        content = {"command": command, **measure(arguments.seed)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "refusal.json", content)
        (folder / "refusal.md").write_text(table(content), "utf-8")
        print(f"{time.monotonic() - began:.0f} s")
    text = table(read_json(folder / "refusal.json"))
    if arguments.docs:
        PAGE.write_text(published(PAGE, "refusal", text), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
