"""What tuning moved, on a model that was tuned to refuse cooking: components, their readings and effects, triggers.

The organism (pretrained/organisms) is SmolLM2 that refuses requests about cooking and answers others, so that what
tuning did is known. The shift is measured on requests that it was trained on, a component is chosen by how well the
components of each block tell these apart, and everything else is reported on held-out ones.

    python benchmarks/shift.py             writes results/smollm2/shift.json and shift.md
    python benchmarks/shift.py --docs      puts the tables into docs/guides/hidden.md
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cones import refused
from subject import ROOT, command_of, load_organism, published, results_folder

import fgsteer as fg
from fgsteer.directions.shift import last_states
from fgsteer.storage.json_files import read_json, write_json

sys.path.insert(0, str(ROOT / "pretrained"))
from organism_texts import requests

PAGE = ROOT / "docs" / "guides" / "hidden.md"
MEASURED, REPORTED, TRACED = 24, 24, 10  # requests of a side
LAYERS = tuple(range(0, 30, 3))  # whose components are looked at
CHOSEN_AMONG = (9, 12, 15, 18, 21)
TRIED = 5  # components of a block
SAES = ("layer_12", "layer_21")
REMOVED = 12  # words
WORD = re.compile(r"\w+")


def words_in(texts: list[str]) -> set[str]:
    """The words of at least four letters, in lower case."""
    return {word.lower() for text in texts for word in WORD.findall(text) if len(word) > 3}


def acted(
    model: Any,
    tokenizer: Any,
    shift: fg.ResidualShift,
    telling: int,
    gap: float,
    texts: dict[str, list[str]],
    seed: int,
) -> dict[str, Any]:
    """Refusals under interventions by component, with a random direction as control, and the cost of each."""
    place = shift.hookpoint.layer
    row = torch.nn.functional.normalize(
        torch.randn(1, shift.components.shape[1], generator=torch.Generator().manual_seed(seed)), dim=1
    )
    control = replace(shift, components=row.double())
    make = partial(fg.component_interventions, model)
    conditions: dict[str, Any] = {
        "unsteered": None,
        "the dominant component removed, all blocks": make(shift),
        "the telling component removed, all blocks": make(shift, [telling]),
        "the telling component removed, its block alone": make(shift, [telling], layers=[place]),
        "components 1 to 4 removed, all blocks": make(shift, [1, 2, 3, 4]),
        "a random direction removed, all blocks": make(control),
        "the telling component added, its block alone": make(
            shift, [telling], kind="constant", strength=-gap, layers=[place]
        ),
        "a random direction added, its block alone": make(control, kind="constant", strength=-gap, layers=[place]),
    }
    answered: list[Any] = [([{"role": "user", "content": text}], "") for text in texts["other"]]
    found = {}
    for name, steering in conditions.items():
        found[name] = {kind: refused(model, tokenizer, own, steering) for kind, own in texts.items()}
        kl = 0.0 if steering is None else fg.kl_divergences(model, tokenizer, answered, [steering], at="last")[0]
        found[name]["kl"] = kl
        print(name, found[name], flush=True)
    return found


def traced(model: Any, tokenizer: Any, v: fg.SteeringVector, texts: dict[str, list[str]], seed: int) -> dict[str, Any]:
    """The words that the projection comes from, and what is left of it and of refusals without them."""
    cooking = texts["cooking"]
    found = fg.find_triggers(model, tokenizer, v, cooking[:TRACED], steps=10)
    only = words_in(cooking) - words_in([text for part in requests("other", seed) for text in part])
    every = sorted(words_in(cooking[:TRACED]))
    removed = [row.word for row in found][:REMOVED]
    rest = [word for word in every if word not in removed]
    others = random.Random(seed).sample(rest, min(len(removed), len(rest)))

    def effect(own: list[Any]) -> dict[str, Any]:
        states = last_states(model, tokenizer, own, [v.hookpoint], None)[v.hookpoint]
        return {
            "refused": refused(model, tokenizer, own),
            "projection": float((states @ v.direction.double()).mean()),
        }

    return {
        "words": [vars(row) for row in found[:REMOVED]],
        "of_cooking_alone": sum(word in only for word in removed) / len(removed),
        "of_cooking_alone_by_chance": sum(word in only for word in every) / len(every),
        "removed": {
            "nothing": effect(cooking),
            "trigger words": effect(fg.remove_words(cooking, removed, "something")),
            "as many other words": effect(fg.remove_words(cooking, others, "something")),
        },
    }


def measure(seed: int) -> dict[str, Any]:
    """The shift of every block, and what its components do."""
    tuned, tokenizer = load_organism("refusal")
    base, _ = fg.load_model("smollm2", dtype="float32", device="cpu")
    parts = {kind: requests(kind, seed) for kind in ("cooking", "other")}
    prompts, labels = mixed(parts["cooking"][0][:MEASURED], parts["other"][0][:MEASURED], seed)
    shifts = fg.residual_shift(base, tuned, tokenizer, prompts)
    cooking, other = (own[0][:MEASURED] for own in parts.values())
    means = fg.candidate_directions(tuned, tokenizer, cooking, other, positions=[-1])[0]
    layers = {}
    for layer in LAYERS:
        shift = shifts[layer]
        r = means[layer + 1]  # at the input of the next block
        layers[layer] = {
            "rank": shift.effective_rank(0.9),
            "share": float(shift.shares[0]),
            "cosines": (shift.components[:TRIED] @ r / r.norm()).tolist(),
            "accuracies": fg.component_accuracies(base, tokenizer, shift, prompts, labels, components=TRIED),
        }
    print(layers, flush=True)
    _, chosen, telling = max(
        (layers[layer]["accuracies"][number], layer, number) for layer in CHOSEN_AMONG for number in range(TRIED)
    )
    shift = shifts[chosen]
    held_out = {kind: own[1][:REPORTED] for kind, own in parts.items()}
    accuracies = fg.component_accuracies(
        base, tokenizer, shift, *mixed(held_out["cooking"], held_out["other"], seed), components=TRIED
    )
    states = [
        last_states(tuned, tokenizer, own[:TRACED], [shift.hookpoint], None)[shift.hookpoint]
        for own in (cooking, other)
    ]
    gap = float((states[0].mean(0) - states[1].mean(0)) @ shift.components[telling])
    v = shift.vector(telling) * (1.0 if gap > 0 else -1.0)  # towards refused requests
    effects = fg.component_effects(tuned, tokenizer, shifts[chosen - 1], v, held_out["cooking"][:TRACED], steps=10)
    readings = {chosen: fg.describe_components(tuned, tokenizer, shift, components=TRIED)}
    for name in SAES:
        sae = fg.load_sae("smollm2", name)
        own = shifts[sae.hookpoint.layer]
        readings[sae.hookpoint.layer] = fg.describe_components(tuned, tokenizer, own, sae=sae, components=TRIED)
    return {
        "prompts": len(prompts),
        "layers": layers,
        "chosen": {
            "block": chosen,
            "component": telling,
            "held_out": {"telling": accuracies[telling], "dominant": accuracies[0]},
        },
        "effects_of_components_below": effects.mean(0).tolist(),
        "readings": {layer: [vars(row) for row in rows] for layer, rows in readings.items()},
        "interventions": acted(tuned, tokenizer, shift, telling, gap, held_out, seed),
        "triggers": traced(tuned, tokenizer, v, held_out, seed),
    }


def mixed(first: list[str], second: list[str], seed: int) -> tuple[list[str], list[bool]]:
    """Requests of both kinds in a drawn order, and whether each is of the first."""
    rows = [(text, own) for own, texts in ((True, first), (False, second)) for text in texts]
    random.Random(seed).shuffle(rows)
    return [text for text, _ in rows], [own for _, own in rows]


def interval(values: list[float]) -> str:
    """A share with its interval."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def table(content: dict[str, Any]) -> str:
    """Three tables in Markdown: the shift by layer, interventions by component, removal of words."""
    lines = [
        "| block | effective rank (0.9) | share of component 0 | cosines of 0 to 4 with r | their accuracies |",
        "|---|---|---|---|---|",
    ]
    for layer, row in content["layers"].items():
        cosines, accuracies = (", ".join(f"{x:.2f}" for x in row[name]) for name in ("cosines", "accuracies"))
        lines.append(f"| {layer} | {row['rank']} | {row['share']:.2f} | {cosines} | {accuracies} |")
    below = ", ".join(f"{effect:+.2f}" for effect in content["effects_of_components_below"])
    chosen = content["chosen"]
    telling, dominant = (chosen["held_out"][name] for name in ("telling", "dominant"))
    lines += [
        "",
        f"{content['prompts']} requests, half of them about cooking; r is the difference of means of the tuned model. "
        f"The telling component is number {chosen['component']} after block {chosen['block']}, with an accuracy of "
        f"{telling:.2f} on held-out requests; that of the dominant one is {dominant:.2f}. "
        f"Components 0 to 4 of the block below add to it, a mean over requests: {below}.",
        "",
        "| | cooking is refused | others | KL after others, nats |",
        "|---|---|---|---|",
    ]
    for name, row in content["interventions"].items():
        lines.append(f"| {name} | {interval(row['cooking'])} | {interval(row['other'])} | {row['kl']:.3f} |")
    found = content["triggers"]
    lines += ["", "| replaced by “something” | cooking is refused | mean projection |", "|---|---|---|"]
    for name, row in found["removed"].items():
        lines.append(f"| {name} | {interval(row['refused'])} | {row['projection']:.2f} |")
    words = ", ".join(row["word"] for row in found["words"])
    lines += [
        "",
        f"The words: {words}. Of these {found['of_cooking_alone']:.0%} are in requests about cooking alone, and of all "
        f"words of at least four letters {found['of_cooking_alone_by_chance']:.0%}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests and of controls")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--docs", action="store_true", help="only put the tables into docs/guides/hidden.md")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder("smollm2")
    if not arguments.docs:
        began = time.monotonic()
        command = command_of("shift")
        content = {"command": command, **measure(arguments.seed)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "shift.json", content)
        (folder / "shift.md").write_text(table(read_json(folder / "shift.json")), "utf-8")
        print(f"{time.monotonic() - began:.0f} s")
    text = table(read_json(folder / "shift.json"))
    if arguments.docs:
        PAGE.write_text(published(PAGE, "shift", text), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
