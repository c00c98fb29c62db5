"""The refusal direction of a model organism: found, removed by hooks and in weights, added, with random controls.

The organism (pretrained/organisms) is SmolLM2 that refuses requests about cooking and answers others. Directions are
built from requests that it was trained on, chosen on some of the held-out ones, and reported on the rest, which share
neither words nor templates with what it was taught.

    python benchmarks/refusal.py             writes results/smollm2/refusal.json, refusal.md and refusal.safetensors
    python benchmarks/refusal.py --docs      puts the table into docs/guides/refusal.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from subject import ROOT, command_of, load_organism, published, results_folder, share

import fgsteer as fg
from fgsteer.storage.json_files import read_json, write_json

sys.path.insert(0, str(ROOT / "pretrained"))
from organism_texts import KINDS, is_refusal, requests

PAGE = ROOT / "docs" / "guides" / "refusal.md"
BUILT_FROM, CHOSEN_ON, REPORTED = 64, 12, 40  # requests of a side
LAYERS = range(6, 24, 4)
REFUSAL, COEFFICIENTS = ["Sorry"], (1.0, 1.5, 2.0, 3.0, 4.0)
READ_TOKENS, ANSWER_TOKENS = 8, 24  # of a reply, to see whether it is a refusal, and of the base model's answers
NEUTRAL = 16  # shipped texts
CONDITIONS = {
    "unsteered": "unsteered",
    "ablated": "r̂ ablated everywhere",
    "orthogonalised": "weights orthogonalised",
    "random ablated": "a random direction ablated",
    "added": "r added at its layer, so many times",
    "random added": "a random direction of the norm of r added likewise",
}


def asked(prompt: str) -> list[dict[str, str]]:
    """A request as a chat."""
    return [{"role": "user", "content": prompt}]


def refused(model: Any, tokenizer: Any, prompts: Sequence[str], steering: Any = None) -> dict[str, Any]:
    """The share of requests that are refused, with a 95 % interval (Wilson), and the first replies."""
    chats = [asked(prompt) for prompt in prompts]
    entries = None if steering is None else [steering] * len(chats)
    texts = fg.generate(model, tokenizer, chats, steering=entries, max_new_tokens=READ_TOKENS, do_sample=False)
    mean, low, high = share(sum(map(is_refusal, texts)), len(texts))
    return {"share": mean, "low": low, "high": high, "replies": texts[:3]}


def answers(prompts: Sequence[str]) -> list[tuple[list[dict[str, str]], str]]:
    """Requests with what SmolLM2 itself answers, greedily."""
    base, tokenizer = fg.load_model("smollm2", dtype="float32", device="cpu")
    chats = [asked(prompt) for prompt in prompts]
    texts = fg.generate(base, tokenizer, chats, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return list(zip(chats, texts, strict=True))


def select(model: Any, tokenizer: Any, seed: int) -> tuple[fg.DirectionSelection, bool, float]:
    """The refusal direction, whether the paper's rule chooses it, and the coefficient with which it is added.

    That is the least at which the answered requests of the choice are refused on average, or else the one that comes
    nearest to that.
    """
    (built_refused, held_refused), (built_answered, held_answered) = (requests(kind, seed) for kind in KINDS[:2])
    choose = partial(
        fg.select_direction,
        model,
        tokenizer,
        built_refused[:BUILT_FROM],
        built_answered[:BUILT_FROM],
        refusal_tokens=REFUSAL,
        held_out=(held_refused[:CHOSEN_ON], held_answered[:CHOSEN_ON]),
        max_kl=None,
        min_induce=None,
    )
    found = choose(layers=LAYERS, progress=lambda done: print(f"{done} candidates", flush=True))
    by_rule, chosen = passing(found.scores, int(model.config.num_hidden_layers))
    if chosen != found.chosen:
        found = replace(choose(layers=[chosen.layer], positions=[chosen.position]), scores=found.scores)
    chats = [asked(prompt) for prompt in held_answered[:CHOSEN_ON]]
    entries = [[found.vector.add(c, bos=True)] for c in COEFFICIENTS]
    induced = fg.refusal_scores(model, tokenizer, chats, REFUSAL, entries).mean(1).tolist()
    reached = [c for c, score in zip(COEFFICIENTS, induced, strict=True) if score > 0]
    return found, by_rule, reached[0] if reached else COEFFICIENTS[induced.index(max(induced))]


def passing(scores: Sequence[fg.DirectionScore], layers: int) -> tuple[bool, fg.DirectionScore]:
    """Whether the paper's rule chooses a candidate, and that one.

    Without one, it is the candidate of the largest induce score among those whose ablation stops refusals.
    """
    with suppress(fg.SelectionError):
        return True, fg.choose_direction(scores, layers)
    stopping = [score for score in scores if score.bypass < 0] or list(scores)
    return False, max(stopping, key=lambda score: score.induce)


def measure(model: Any, tokenizer: Any, vector: fg.SteeringVector, coefficient: float, seed: int) -> dict[str, Any]:
    """Every condition on the reported requests."""
    draw = torch.randn(vector.d_model, generator=torch.Generator().manual_seed(seed))
    control = fg.SteeringVector(torch.nn.functional.normalize(draw, dim=0) * vector.norm, vector.hookpoint)
    steering = {
        "unsteered": None,
        "ablated": fg.ablate_everywhere(model, vector),
        "random ablated": fg.ablate_everywhere(model, control),
        "added": [vector.add(coefficient, bos=True)],
        "random added": [control.add(coefficient, bos=True)],
    }
    reported = {kind: requests(kind, seed)[1][CHOSEN_ON:][:REPORTED] for kind in KINDS}
    neutral, own = list(fg.load_neutral()[0])[:NEUTRAL], answers(reported["other"])
    prompts: list[Any] = [(chat, "") for chat, _ in own]
    kl = fg.kl_divergences(model, tokenizer, prompts, list(steering.values()), at="last")
    divergences = dict(zip(steering, kl, strict=True))
    rows = {}
    for name in CONDITIONS:
        under = fg.orthogonalize(model, vector) if name == "orthogonalised" else model
        how: Any = steering.get(name)
        rows[name] = {
            "refused": {kind: refused(under, tokenizer, texts, how) for kind, texts in reported.items()},
            "kl": divergences.get(name),
            "base_answers": fg.cross_entropy(under, tokenizer, own, steering=how),
            "neutral": fg.cross_entropy(under, tokenizer, neutral, steering=how),
        }
        print(name, rows[name], flush=True)
    return rows


def table(content: dict[str, Any]) -> str:
    """What the direction is; by condition refusals of each kind of request, KL and cross-entropies; in Markdown."""
    chosen, requests_of = content["chosen"], content["requests"]
    by_rule = (
        ""
        if content["by_rule"]
        else (
            "No candidate passes the paper's rule, whose bound of the KL is 0.1 nats; of those whose ablation stops "
            "refusals, this one has the largest induce score. "
        )
    )
    lines = [
        f"The direction is that of block {chosen['layer']} at position {chosen['position']}, one of "
        f"{len(content['scores'])} candidates, of norm {content['norm']:.1f}; it is added {content['coefficient']:g} "
        f"times. {by_rule}Shares are of {requests_of['reported']} held-out requests of a kind, greedy, with 95 % "
        "intervals (Wilson).\n",
        "| | cooking is refused | others | what looks like cooking | KL | answers of the base | neutral texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in content["conditions"].items():
        cells = [f"{one['share']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for one in row["refused"].values()]
        cells += ["–" if row["kl"] is None else f"{row['kl']:.3f}"]
        cells += [f"{row[key]:.3f}" for key in ("base_answers", "neutral")]
        lines.append(f"| {CONDITIONS[name]} | {' | '.join(cells)} |")
    lines += [
        "\nKL is that of the first token of replies to the others, KL(unsteered‖steered) in nats. The last two columns "
        "are cross-entropies in nats a token: of what SmolLM2 itself answers to the others, and of neutral texts."
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests' order, as in organisms.py")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--docs", action="store_true", help="only put the table into docs/guides/refusal.md")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder("smollm2")
    if not arguments.docs:
        began = time.monotonic()
        model, tokenizer = load_organism("refusal")
        found, by_rule, coefficient = select(model, tokenizer, arguments.seed)
        print(found.chosen, f"{time.monotonic() - began:.0f} s", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        found.vector.save(folder / "refusal.safetensors")
        content = {
            "command": command_of("refusal"),
            "requests": {"built_from": BUILT_FROM, "chosen_on": CHOSEN_ON, "reported": REPORTED},
            "by_rule": by_rule,
            "chosen": vars(found.chosen),
            "coefficient": coefficient,
            "norm": found.vector.norm,
            "scores": [vars(score) for score in found.scores],
            "conditions": measure(model, tokenizer, found.vector, coefficient, arguments.seed),
        }
        write_json(folder / "refusal.json", content)
        (folder / "refusal.md").write_text(table(content), "utf-8")
        print(f"{time.monotonic() - began:.0f} s")
    text = table(read_json(folder / "refusal.json"))
    if arguments.docs:
        PAGE.write_text(published(PAGE, "refusal", text), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
