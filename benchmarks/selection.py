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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from subject import ROOT, command_of, published, results_folder

import fgsteer as fg
from fgsteer.selection.separation import auroc
from fgsteer.storage.json_files import read_json, write_json

PAGE = ROOT / "docs" / "guides" / "choose-features.md"
NAME = "default"
RISE, NEUTRAL = 0.1, 12  # nats a token, and the neutral texts that are read
RESAMPLES = 2000
SUPPORT = 10  # positive texts that F1 asks for: a concept has 40
CANDIDATES = 64  # the first by MaxAUC, among which Δ confidence chooses
MASKED: dict[str, Any] = {"features": 32, "epochs": 3, "strength": 4.0}
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


def choose(parts: tuple[Any, Any, fg.SAE], contrast: fg.ContrastSet, effects: Any) -> dict[str, fg.FeatureRanking]:
    """The ranking of a concept's features by each selection; the held-out part chooses nothing."""
    activations = fg.max_activations(*parts, contrast, progress=False)
    first = fg.max_auc(activations)
    rankings = {"max_auc": first, "calibrated_f1": fg.calibrated_f1(activations, min_support=SUPPORT, permutations=0)}
    for name in ("mean_difference", "pearson"):
        rankings[name] = fg.rank_features(*parts, contrast, by=name, progress=False)
    rankings["causal_effect"] = fg.causal_effect(parts[2], effects, first[:1])
    rankings["confidence_change"] = fg.confidence_change(*parts, first[:CANDIDATES], progress=False)
    rankings["learned_mask"] = fg.learned_mask(*parts, contrast, progress=False, **MASKED)
    return rankings


def push(model: Any, tokenizer: Any, held_out: fg.ContrastSet, entries: Sequence[Any]) -> torch.Tensor:
    """Mean log p of positives less that of negatives under each entry, in nats a token, over the unsteered model's."""
    sides = []
    for side in (True, False):
        found = fg.log_probabilities(model, tokenizer, list(held_out.side(side)), [None, *entries])
        means = (found.sums / found.counts).mean(1)
        sides.append(means[1:] - means[0])
    return sides[0] - sides[1]


def measure(concepts: Sequence[str], done: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Every selection on every concept that is not done; ``keep`` gets what is done after each."""
    model, tokenizer = fg.load_model(NAME, device="cpu")
    sae, effects = fg.load_sae(NAME), fg.load_effects(NAME)
    neutral = list(fg.load_neutral()[0])[:NEUTRAL]
    for number, concept in enumerate(concepts):
        if concept in done:
            continue
        contrast = fg.load_contrast(concept)
        assert contrast.held_out is not None
        rankings = choose((model, tokenizer, sae), contrast, effects)
        chosen = {name: ranking[0] for name, ranking in rankings.items()}
        fire = list(rankings["max_auc"])
        random = torch.Generator().manual_seed(number)
        chosen["random"] = fire[int(torch.randint(len(fire), (), generator=random))]
        values, positive = fg.max_activations(model, tokenizer, sae, contrast, progress=False).half(False)
        areas = auroc(values[:, list(chosen.values())], positive[None])[0]
        makes = [fg.from_features(sae, j).add for j in chosen.values()]
        strengths = fg.calibrate_many(model, tokenizer, makes, neutral, target_ce_rise=RISE)
        entries = [make(strength) for make, strength in zip(makes, strengths, strict=True)]
        pushes = push(model, tokenizer, contrast.held_out, entries)
        done[concept] = {
            name: {
                "feature": j,
                "label": sae.labels.get(j, ""),
                "auroc": float(areas[n]),
                "push": float(pushes[n]),
                "strength": float(strengths[n]),
                "compared": rankings[name].compared if name in rankings else None,
            }
            for n, (name, j) in enumerate(chosen.items())
        }
        done[concept]["max_auc"]["chance"] = rankings["max_auc"].chance
        keep(done)
        print(concept, {name: row["feature"] for name, row in done[concept].items()}, flush=True)


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over concepts, with a bootstrap interval."""
    array = np.array(values)
    means = array[np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def table(content: Mapping[str, Any]) -> str:
    """Selections with the AUROC and the push of the features that they chose, in Markdown."""
    concepts = content["concepts"]
    lines = [
        f"One feature of {content['sae']} for each of {len(concepts)} concepts, chosen on 40 + 40 texts, reported on "
        "20 + 20 others; means with 95 % intervals over concepts.\n",
        "| selection | AUROC on held-out texts | change of the margin, nats a token | the feature of MaxAUC |",
        "|---|---|---|---|",
    ]
    for name, title in SELECTIONS.items():
        rows = [concept[name] for concept in concepts.values()]
        cells = []
        for key, sign in (("auroc", ""), ("push", "+")):
            found = interval([row[key] for row in rows])
            cells.append(f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]")
        same = sum(concept[name]["feature"] == concept["max_auc"]["feature"] for concept in concepts.values())
        lines.append(f"| {title} | {' | '.join(cells)} | {same} of {len(rows)} |")
    first = [concept["max_auc"] for concept in concepts.values()]
    compared, chance = [row["compared"] for row in first], [row["chance"] for row in first]
    lines.append(
        f"\nMaxAUC compared {min(compared):,} to {max(compared):,} features, of which the best would have an AUROC of "
        f"{min(chance):.2f} to {max(chance):.2f} by chance on the texts that choose. The margin is log p of positive "
        f"texts less that of negative ones, at a cost of {content['rise']:g} nats a token on neutral texts."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="start over, where results of some concepts are there")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--docs", action="store_true", help="only put the table into docs/guides/choose-features.md")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder(NAME)
    path = folder / "selection.json"
    if not arguments.docs:
        command = command_of("selection")
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "command": command,
            "model": NAME,
            "sae": f"{NAME}/layer_2",
            "rise": RISE,
            "concepts": {},
        }
        if path.is_file() and not arguments.fresh:
            content = read_json(path)
        measure(
            fg.shipped_contrasts(), content["concepts"], lambda done: write_json(path, {**content, "concepts": done})
        )
        (folder / "selection.md").write_text(table(content), "utf-8")
    text = table(read_json(path))
    if arguments.docs:
        PAGE.write_text(published(PAGE, "selection", text), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
