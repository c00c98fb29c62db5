"""Which features selections choose: how well each of them tells held-out texts apart, and moves what a model writes.

For each of the sixteen shipped concepts, a selection chooses one feature of the SAE of the embedded default's middle
layer on the concept's training texts. Reported, on its held-out texts, is the AUROC of its largest activation, and, for
its decoder row as a vector, at the strength at which neutral texts cost RISE nats a token more, the change of log p in
nats a token of held-out positives less that of held-out negatives. Both with 95 % intervals over concepts (bootstrap),
beside a feature that is drawn from those that fire.

    python benchmarks/selection.py             writes results/selection.json and selection.md
    python benchmarks/selection.py --docs      puts the table into docs/guides/choose-features.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subject import ROOT, published, results_folder

import fgsteer as fg
from fgsteer.selection.separation import auroc
from fgsteer.storage.json_files import read_json, write_json

PAGE = ROOT / "docs" / "guides" / "choose-features.md"
NAME = "default"
RISE, NEUTRAL = 0.1, 12  # nats a token, and the neutral texts that are read
RESAMPLES = 2000
SUPPORT = 10  # positive texts that F1 asks for: a concept has 40
MASKED = {"features": 32, "epochs": 4, "strength": 4.0}
SELECTIONS = {
    "max_auc": "MaxAUC",
    "calibrated_f1": "calibrated F1",
    "mean_difference": "mean difference",
    "pearson": "correlation with the side (pearson)",
    "causal_effect": "causal effect on the MaxAUC feature",
    "confidence_change": "Δ confidence, of the 64 first by MaxAUC",
    "learned_mask": "learned mask",
    "random": "a feature at random",
}


def choose(name: str, parts: tuple[Any, Any, fg.SAE], contrast: fg.ContrastSet, effects: Any) -> fg.FeatureRanking:
    """The ranking of a concept's features by a selection; the held-out part chooses nothing."""
    if name == "learned_mask":
        return fg.learned_mask(*parts, contrast, **MASKED)
    extra: dict[str, Any] = {"min_support": SUPPORT} if name == "calibrated_f1" else {}
    effects = effects if name == "causal_effect" else None
    return fg.rank_features(*parts, contrast, by=name, effects=effects, progress=False, **extra)


def push(model: Any, tokenizer: Any, held_out: fg.ContrastSet, entries: Sequence[Any]) -> torch.Tensor:
    """Mean log p of positives less that of negatives under each entry, in nats a token, over the unsteered model's."""
    sides = []
    for side in (True, False):
        found = fg.log_probabilities(model, tokenizer, list(held_out.side(side)), [None, *entries])
        means = (found.sums / found.counts).mean(1)
        sides.append(means[1:] - means[0])
    return sides[0] - sides[1]


def measure(concepts: Sequence[str]) -> dict[str, Any]:
    """Every selection on every concept."""
    model, tokenizer = fg.load_model(NAME, device="cpu")
    sae, effects = fg.load_sae(NAME), fg.load_effects(NAME)
    parts = (model, tokenizer, sae)
    neutral = list(fg.load_neutral()[0])[:NEUTRAL]
    random = torch.Generator().manual_seed(0)
    rows: dict[str, Any] = {}
    for concept in concepts:
        contrast = fg.load_contrast(concept)
        assert contrast.held_out is not None
        seconds, chosen, compared = {}, {}, {}
        for name in SELECTIONS:
            began = time.monotonic()
            if name == "random":
                ids = list(choose("max_auc", parts, contrast, effects))
                chosen[name] = ids[int(torch.randint(len(ids), (), generator=random))]
            else:
                ranking = choose(name, parts, contrast, effects)
                chosen[name], compared[name] = ranking[0], ranking.compared
            seconds[name] = time.monotonic() - began
        held_out = fg.max_activations(*parts, contrast, progress=False).half(False)
        areas = auroc(held_out[0][:, list(chosen.values())], held_out[1][None])[0]
        vectors = [fg.from_features(sae, j) for j in chosen.values()]
        makes = [vector.add for vector in vectors]
        strengths = fg.calibrate_many(model, tokenizer, makes, neutral, target_ce_rise=RISE)
        entries = [make(strength) for make, strength in zip(makes, strengths, strict=True)]
        pushes = push(model, tokenizer, contrast.held_out, entries)
        rows[concept] = {
            name: {
                "feature": j,
                "label": sae.labels.get(j, ""),
                "auroc": float(areas[n]),
                "push": float(pushes[n]),
                "strength": float(strengths[n]),
                "compared": compared.get(name),
                "seconds": seconds[name],
            }
            for n, (name, j) in enumerate(chosen.items())
        }
        print(
            concept, {name: (row["feature"], round(row["auroc"], 2)) for name, row in rows[concept].items()}, flush=True
        )
    return {"model": NAME, "sae": sae.source, "rise": RISE, "concepts": rows}


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over concepts, with a bootstrap interval."""
    array = np.array(values)
    means = array[np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def table(content: Mapping[str, Any]) -> str:
    """Selections with the AUROC and the push of the features that they chose, in Markdown."""
    concepts = content["concepts"]
    first = next(iter(concepts.values()))
    lines = [
        f"One feature of {content['sae']} for each of {len(concepts)} concepts, chosen on 40 + 40 texts, and "
        "reported on 20 + 20 others; means with 95 % intervals over concepts. As MaxAUC: for how many concepts it is the "
        "same feature.\n",
        "| selection | AUROC on held-out texts | change of the margin, nats a token | as MaxAUC | seconds |",
        "|---|---|---|---|---|",
    ]
    for name in first:
        rows = [concept[name] for concept in concepts.values()]
        cells = []
        for key, sign in (("auroc", ""), ("push", "+")):
            found = interval([row[key] for row in rows])
            cells.append(f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]")
        same = sum(concept[name]["feature"] == concept["max_auc"]["feature"] for concept in concepts.values())
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        lines.append(f"| {SELECTIONS[name]} | {' | '.join(cells)} | {same} of {len(rows)} | {seconds:.1f} |")
    compared = [concept["max_auc"]["compared"] for concept in concepts.values()]
    lines.append(
        f"\nMaxAUC compared {min(compared):,} to {max(compared):,} features that fire. The margin is log p of positive "
        f"texts less that of negative ones, at a cost of {content['rise']:g} nats a token on neutral texts."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", action="append", help="a concept; repeat for several; by default all")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--docs", action="store_true", help="only put the table into docs/guides/choose-features.md")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder(NAME)
    if not arguments.docs:
        command = shlex.join(["python", "benchmarks/selection.py", *sys.argv[1:]])
        content = {"command": command, **measure(arguments.concept or fg.shipped_contrasts())}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "selection.json", content)
        (folder / "selection.md").write_text(table(content), "utf-8")
    text = table(read_json(folder / "selection.json"))
    if arguments.docs:
        PAGE.write_text(published(PAGE, "selection", text), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
