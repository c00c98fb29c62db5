"""CorrSteer on SmolLM2: whether features that go with good answers make answers better, on prompts that chose nothing.

Two tasks have outcomes that can be checked: sums, which SmolLM2 gets right or wrong, and requests, of which a model
organism (pretrained/organisms) refuses those about cooking, and is rewarded for refusing any. CorrSteer sees some
prompts, of which half choose the features; reported are others, beside features at random, of those that fire, at the
same layers and of the same norm. Nothing else is chosen: all three SAEs of SmolLM2, and features that fire in at least
MIN_FIRED of the answers.

    python benchmarks/corrsteer.py             writes results/smollm2/corrsteer.json and corrsteer.md
    python benchmarks/corrsteer.py --docs      puts the table into docs/guides/choose-features.md
"""

from __future__ import annotations

import random
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from subject import ROOT, load_organism, load_subject, over_items, run_benchmark, share, verdict, with_interval

import fgsteer as fg
from fgsteer.selection.outcomes import change_of

sys.path.insert(0, str(ROOT / "pretrained"))
from organism_texts import is_refusal, requests

PAGE = ROOT / "docs" / "guides" / "choose-features.md"
SEED, DRAWS = 0, 3
MIN_FIRED = 10
NAMES = {
    "unsteered": "unsteered",
    "S": "S: the best feature",
    "A": "A: the best of every layer",
    "random A": "as A, features at random",
}


@dataclass(frozen=True)
class Task:
    """Prompts with an outcome that can be checked.

    Args:
        chosen_on: The prompts that CorrSteer sees.
        reported: Other prompts, by what is counted of them, in words.
        reward: Whether the answer to a prompt is the wanted one.
        new_tokens: The tokens of an answer.
    """

    chosen_on: Sequence[str]
    reported: Mapping[str, Sequence[str]]
    reward: Callable[[str, str], bool]
    new_tokens: int


def sums() -> Task:
    """Sums of two numbers, each pair once, in one of its orders."""
    draw = random.Random(SEED)
    pairs = [draw.sample((a, b), 2) for a in range(2, 23) for b in range(2, a + 1)]
    draw.shuffle(pairs)
    prompts = [f"What is {a} + {b}?" for a, b in pairs]
    return Task(prompts[:140], {"sums that are right": prompts[140:]}, is_right, 28)


def is_right(prompt: str, answer: str) -> bool:
    """Whether the number that an answer names first, after "=" or "is", is the sum of the numbers of its prompt."""
    named = re.search(r"(?:=|\bis\b)\D*(\d+)", answer) or re.fullmatch(r"\D*(\d+)\D*", answer)
    return named is not None and int(named[1]) == sum(map(int, re.findall(r"\d+", prompt)))


def refusals() -> Task:
    """Requests about cooking, which the organism refuses, and others, which it answers, to be refused one and all."""
    (cooking, held_out), (other, others) = requests("cooking", SEED), requests("other", SEED)
    chosen_on = cooking[:80] + other[:80]
    random.Random(SEED).shuffle(chosen_on)
    reported = {"others that are refused": others, "cooking that is refused": held_out}
    return Task(chosen_on, reported, lambda _, answer: is_refusal(answer), 6)


def chat(prompt: str) -> list[dict[str, str]]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}]


def outcomes(model: Any, tokenizer: Any, task: Task, prompts: Sequence[str], steering: Any) -> list[float]:
    """The outcome of each prompt, answered greedily."""
    chats = [chat(prompt) for prompt in prompts]
    entries = None if steering is None else [steering] * len(chats)
    texts = fg.generate(model, tokenizer, chats, steering=entries, max_new_tokens=task.new_tokens, do_sample=False)
    return [float(task.reward(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


Rankings = Mapping[fg.Hookpoint, tuple[fg.SAE, fg.FeatureRanking]]  # what was compared at each layer


def at_random(rankings: Rankings, vectors: Sequence[fg.SteeringVector], seed: int) -> list[Any]:
    """As many vectors at the same layers and of the same norms, of features that were compared and not chosen."""
    drawn = random.Random(seed)
    entries = []
    for vector in vectors:
        sae, ranking = rankings[vector.hookpoint]
        row = sae.direction(drawn.choice(list(ranking)[1:])).float()
        entries.append(fg.SteeringVector(row / row.norm() * vector.norm, vector.hookpoint))
    return [entry.add(1.0, scope="reply", bos=True) for entry in entries]


def study(model: Any, tokenizer: Any, saes: Sequence[fg.SAE], task: Task) -> dict[str, Any]:
    """What each variant chooses, and what it does to prompts that it has not seen."""
    prompts = [chat(prompt) for prompt in task.chosen_on]

    def reward(number: int, answer: str) -> bool:
        return task.reward(task.chosen_on[number], answer)

    options: dict[str, Any] = {"max_new_tokens": task.new_tokens, "min_fired": MIN_FIRED, "progress": False}
    found = fg.corrsteer(model, tokenizer, saes, prompts, reward, variant="A", **options)
    rankings = {sae.hookpoint: (sae, one) for sae, one in zip(saes, found.rankings, strict=True)}
    best = max(found.vectors, key=correlation)
    entries: dict[str, list[Any]] = {
        "unsteered": [None],
        "S": [[best.add(1.0, scope="reply", bos=True)]],
        "A": [found.steering],
        "random A": [at_random(rankings, found.vectors, seed) for seed in range(DRAWS)],
    }
    return {
        "seen": len(task.chosen_on),
        "compared": found.compared,
        "chance": found.chance,
        "chosen": [describe(vector, rankings[vector.hookpoint][1]) for vector in found.vectors],
        "reported": {
            title: {"prompts": len(prompts), "rows": compare(model, tokenizer, task, prompts, entries)}
            for title, prompts in task.reported.items()
        },
    }


def compare(
    model: Any, tokenizer: Any, task: Task, prompts: Sequence[str], entries: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """The outcomes of prompts under each variant, beside those of the first."""
    rows: dict[str, Any] = {}
    before: list[float] = []
    for name, several in entries.items():
        draws = [outcomes(model, tokenizer, task, prompts, entry) for entry in several]
        before = before or draws[0]
        changes = [change_of(before, after) for after in draws]
        gains = [statistics.fmean(values) - old for *values, old in zip(*draws, before, strict=True)]
        rows[name] = {
            "share": share(int(sum(draws[0])), len(draws[0])) if len(draws) == 1 else None,
            "mean": statistics.fmean(change.after for change in changes),
            "gains": gains,
            "gain": over_items(gains),
            "improved": sum(change.improved for change in changes) / len(draws),
            "worsened": sum(change.worsened for change in changes) / len(draws),
        }
        print(name, {key: value for key, value in rows[name].items() if key != "gains"}, flush=True)
    return rows


def correlation(vector: fg.SteeringVector) -> float:
    """The correlation by which a vector's feature was chosen."""
    return float(vector.provenance["hyperparameters"]["r"])


def describe(vector: fg.SteeringVector, ranking: fg.FeatureRanking) -> dict[str, Any]:
    """A chosen feature with its layer, r where it was chosen and on prompts that chose nothing, and the norm."""
    (feature,) = vector.features
    held_out = ranking.held_out
    return {
        "layer": vector.hookpoint.layer,
        "feature": feature,
        "r": correlation(vector),
        "r_held_out": None if held_out is None else float(held_out[0]),
        "norm": vector.norm,
    }


def measure() -> dict[str, Any]:
    """Both tasks."""
    subject = load_subject("smollm2")
    saes = list(subject.saes.values())
    model = subject.model.to(torch.bfloat16)
    organism, tokenizer = load_organism("refusal")
    studies = {
        "sums": study(model, subject.tokenizer, saes, sums()),
        "refusals": study(organism.to(torch.bfloat16), tokenizer, saes, refusals()),
    }
    return {"min_fired": MIN_FIRED, "draws": DRAWS, "tasks": studies}


def table(content: Mapping[str, Any]) -> str:
    """Outcomes by task and variant, and what was chosen, in Markdown."""
    lines = []
    for task in content["tasks"].values():
        for title, reported in task["reported"].items():
            lines += outcome_table(title, reported)
        chosen = "; ".join(
            f"feature {one['feature']} of layer {one['layer']}, r {one['r']:.2f}, {one['r_held_out']:.2f} on prompts "
            "that chose nothing"
            for one in task["chosen"]
        )
        lines += [
            f"Of {task['compared']:,} features on {task['seen'] // 2} answers, the best by chance has an r of "
            f"{task['chance']:.2f}; chosen were {chosen}.",
            "",
        ]
    return "\n".join(lines)


def outcome_table(title: str, reported: Mapping[str, Any]) -> list[str]:
    """Lines of the outcomes of some prompts by variant, and whether the features beat those at random."""
    lines = [
        f"| {title}, {reported['prompts']} prompts | share | less unsteered | improved, worsened | SER |",
        "|---|---|---|---|---|",
    ]
    rows = reported["rows"]
    for name, words in NAMES.items():
        row = rows[name]
        whole = f"{row['mean']:.2f}" if row["share"] is None else with_interval(row["share"])
        changed = row["improved"] + row["worsened"]
        gain = "" if name == "unsteered" else with_interval(row["gain"], "+.2f")
        counts = "" if name == "unsteered" else f"{row['improved']:.3g}, {row['worsened']:.3g}"
        ratio = f"{row['worsened'] / changed:.2f}" if changed else ""
        lines.append(f"| {words} | {whole} | {gain} | {counts} | {ratio} |")
    less = over_items([a - b for a, b in zip(rows["A"]["gains"], rows["random A"]["gains"], strict=True)])
    return [*lines, "", f"A less features at random: {with_interval(less, '+.3f')}, {verdict(*less)}.", ""]


if __name__ == "__main__":
    run_benchmark("corrsteer", __doc__, PAGE, measure, table)
