"""How well the conditions of conditional defences tell prompts of a concept from others, on the embedded default.

For each of six shipped concepts, its sentences are prompts to act on, and as many of all other concepts are to be left
alone. Each rule is built on every other prompt and reported on the rest: where its gate opens, and whether steering
behind it leaves the others bit for bit as they were.

    python benchmarks/gates.py             writes results/gates.json and gates.md
    python benchmarks/gates.py --docs      puts the table into docs/guides/conditional.md
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from subject import ROOT, TUNING_CONCEPTS, run_benchmark

import fgsteer as fg

PAGE = ROOT / "docs" / "guides" / "conditional.md"
PROMPTS = 20  # of either kind, for each concept
LAYER = 3  # where one layer is read
STEERED, STRENGTH = 4, 1.0  # the layer and coefficient of the vector behind each gate
NAMES = {
    "cast": "CAST: cosine of the mean",
    "cast_last": "CAST: cosine of the last token",
    "published": "CAST: published similarity of the mean",
    "scans": "SCANS: σ, best θ",
    "adasteer": "AdaSteer: t, best threshold",
    "infer_aligner": "InferAligner: one layer's gate",
}
FIELDS = ("precision", "recall", "f1", "auroc", "kl_act_on", "kl_leave", "unchanged_leave")


def gates(model: Any, tokenizer: Any, act_on: list[Any], leave: list[Any], vector: fg.SteeringVector) -> dict[str, Any]:
    """The gate of each rule, all built on every other prompt."""
    stats = fg.prompt_statistics(model, tokenizer, leave[::2], act_on[::2])
    t = fg.adasteer_coordinate(stats, LAYER)
    own = fg.prompt_statistics(model, tokenizer, act_on[::2], leave[::2])
    return {
        "cast": fg.cast(model, tokenizer, act_on, leave, vector).gate,
        "cast_last": fg.cast(model, tokenizer, act_on, leave, vector, pooling="last").gate,
        "published": fg.cast(model, tokenizer, act_on, leave, vector, similarity="published").gate,
        "scans": fg.scans(model, tokenizer, act_on, leave, threshold=None).gate,
        "adasteer": fg.fit_gate(model, tokenizer, t, act_on, leave).gate,
        "infer_aligner": fg.infer_aligner(own, own, layers=[LAYER])[0].when,
    }


def measure() -> dict[str, Any]:
    """Every rule on every concept, on the half of the prompts that built nothing."""
    model, tokenizer = fg.load_model("default")
    names = list(fg.shipped_contrasts())
    sentences = {name: list(fg.load_contrast(name).positives) for name in names}
    rows: dict[str, list[dict[str, float]]] = {rule: [] for rule in NAMES}
    for name in TUNING_CONCEPTS:
        act_on = sentences[name][:PROMPTS]
        rest = [one for group in zip(*(s for n, s in sentences.items() if n != name), strict=False) for one in group]
        leave = rest[:PROMPTS]
        other = names[names.index(name) - 1]
        vector = fg.caa(fg.collect(model, tokenizer, fg.load_contrast(other), hookpoints=[STEERED], progress=False))
        for rule, gate in gates(model, tokenizer, act_on, leave, vector).items():
            held_out = act_on[1::2], leave[1::2]
            scores = fg.score_gate(model, tokenizer, gate, *held_out)
            effect = fg.gate_effect(model, tokenizer, vector.add(STRENGTH, when=gate), *held_out)
            rows[rule].append({**vars(scores), **vars(effect), "concept": name})
        print(name, {rule: round(found[-1]["auroc"], 2) for rule, found in rows.items()}, flush=True)
    return {"prompts": PROMPTS, "concepts": list(TUNING_CONCEPTS), "rows": rows}


def table(content: Mapping[str, Any]) -> str:
    """Means over concepts, in Markdown."""
    lines = [
        "| gate | precision | recall | AUROC, least | KL where meant | KL elsewhere | left bit for bit |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule, rows in content["rows"].items():
        means = {field: mean(row[field] for row in rows if row[field] == row[field]) for field in FIELDS}
        least = min(row["auroc"] for row in rows)
        lines.append(
            f"| {NAMES[rule]} | {means['precision']:.2f} | {means['recall']:.2f} | {means['auroc']:.2f}, {least:.2f} | "
            f"{means['kl_act_on']:.3f} | {means['kl_leave']:.3f} | {means['unchanged_leave']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark("gates", __doc__, PAGE, measure, table, model="default")
