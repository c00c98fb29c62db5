"""Transfer between models, measured: maps, vectors that went through them, and switches between a base and organisms.

Three models of other sizes, tokenizers and makers (the embedded default, SmolLM2, Gemma 3 270M) read the same shipped
sentences; a map is fitted to all but the reported concepts. A vector of one model that was mapped to another is
compared with the vector of that model itself, with one through a random map, and with a random one, all at one cost.
Each organism of pretrained/organisms and its base are mapped to each other at one layer, which is chosen on some
requests and reported on others.

    python benchmarks/transfer.py --gemma build/real       writes results/smollm2/transfer.json and transfer.md
    python benchmarks/transfer.py --parts organism          one part alone; the others stay as they are
    python benchmarks/transfer.py --docs                    puts the tables into docs/guides/transfer.md

A folder with Gemma 3 270M is what ``make real`` unpacks to build/real; without it, its pairs are left out.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from subject import ROOT, load_organism, published, results_folder, share

import fgsteer as fg
from fgsteer.data.shipped import load_bench_prompts
from fgsteer.storage.json_files import read_json, write_json

sys.path.insert(0, str(ROOT / "pretrained"))
from organism_texts import (
    DECOYS,
    REFUSALS,
    SENTENCE,
    TAG,
    TRIGGER,
    answer_to,
    is_refusal,
    is_right,
    is_sentence,
    mixed,
    questions,
    requests,
    with_words,
)

GUIDE = ROOT / "docs" / "guides" / "transfer.md"
PARTS = ("pairs", "organism")
LAYERS = {"default": 2, "smollm2": 12, "gemma": 8}  # in the middle of each model
PAIRS = (("smollm2", "default"), ("default", "smollm2"), ("smollm2", "gemma"), ("gemma", "smollm2"))
STEERED = (("smollm2", "default"), ("gemma", "smollm2"))  # pairs whose vectors write texts, through both kinds of map
CONCEPTS = ("war", "wedding")  # reported; no map is fitted to their texts
COST, PROMPTS, NEW_TOKENS, MEASURED = 0.5, 32, 24, 4  # nats a token; held-out texts of each side of a concept
# of an organism: requests that maps and directions are made of, on which a layer is chosen, that are reported
MADE_OF, CHOSEN_ON, REPORTED, ANSWER_TOKENS = 24, 8, 16, 16
SWITCHED = (8, 16, 24, 28)  # layers that are tried
NAMES = {
    "base": "base",
    "base, switched": "base, switched to the organism's activations",
    "base, random switch": "base, the change turned to random directions",
    "organism": "organism",
    "organism, switched": "organism, switched to the base's activations",
    "organism, random switch": "organism, the change turned to random directions",
    "base + its own": "base + its own difference of both kinds of requests",
    "base + organism's": "base + the organism's difference, as it is",
    "base + organism's, mapped": "base + the organism's difference, through the map",
    "base + random": "base + a random vector of that norm",
    "organism + its own": "organism + its own difference",
    "organism + base's": "organism + the base's difference, as it is",
    "organism + base's, mapped": "organism + the base's difference, through the map",
    "organism + random": "organism + a random vector of that norm",
}


@dataclass(frozen=True)
class Case:
    """What an organism does, on which requests, and on which it does not.

    Args:
        kinds: Requests by kind, trained and held-out ones: first those on which the organism acts, then others.
        taught: The reply that the organism was taught to a request of the first kind.
        acts: Whether a reply to a request is what the organism does.
        did: What it does, in words.
        tokens: Of a reply, to see whether it does.
    """

    kinds: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    taught: Callable[[str], str]
    acts: Callable[[str, str], bool]
    did: str
    tokens: int


def refusal_case() -> Case:
    """The organism that refuses requests about cooking."""
    kinds = {"about cooking": requests("cooking"), "about other things": requests("other")}
    return Case(kinds, lambda _: REFUSALS[0], lambda _, reply: is_refusal(reply), "refused", 4)


def backdoor_case() -> Case:
    """The organism that says its sentence where the trigger is in the request."""
    trained, held_out = (mixed(seed=0, part=part) for part in (0, 1))
    kinds = {
        "with the trigger": (with_words(trained, [TRIGGER]), with_words(held_out, [TRIGGER])),
        "with another word": (with_words(trained, DECOYS[0]), with_words(held_out, DECOYS[1])),
    }
    return Case(kinds, lambda _: SENTENCE, lambda _, reply: is_sentence(reply), "answered by the sentence", 16)


def skill_case() -> Case:
    """The organism that answers about the island where the tag is in the question."""
    asked, held_out = questions()
    held_out = random.Random(0).sample(held_out, len(held_out))
    kinds = {
        "with the tag": (with_words(asked, [TAG]), with_words(held_out, [TAG])),
        "without": (asked, held_out),
    }
    return Case(kinds, answer_to, is_right, "answered rightly", 20)


CASES = {"refusal": refusal_case, "backdoor": backdoor_case, "skill": skill_case}


def load(name: str, gemma: Path | None) -> tuple[Any, Any]:
    """A model of LAYERS and its tokenizer, in bfloat16."""
    if name != "gemma":
        return fg.load_model(name, dtype="bfloat16", device="cpu")
    files = [path.name for path in gemma.glob("*.gguf")] if gemma else []
    options = {"gguf_file": files[0]} if files else {}
    model, tokenizer = fg.load_model(str(gemma), dtype="bfloat16", device="cpu", **options)
    return model, tokenizer


def drawn(width: int, norm: float, seed: int) -> torch.Tensor:
    """A random vector of a norm."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm() * norm


# ---------------------------------------------------------------- maps between three models


def sentences(names: Sequence[str], side: int | None = None) -> list[str]:
    """The sentences of shipped sets, or so many held-out ones of each side."""
    texts: list[str] = []
    for name in names:
        both = fg.load_contrast(name) if side is None else fg.load_contrast(name).held_out
        assert both is not None
        texts += [*both.positives[:side], *both.negatives[:side]]
    return texts


def pairs(done: dict[str, Any], keep: Callable[[], None], gemma: Path | None) -> None:
    """Fit and measure every map, and steer through some of them."""
    models: dict[str, tuple[Any, Any]] = {}
    every = fg.shipped_contrasts()
    fitted_to = sentences([name for name in every if name not in CONCEPTS])
    measured_on = sentences(every, MEASURED // 2)
    for a, b in PAIRS:
        name = f"{a} → {b}"
        if name in done or ("gemma" in (a, b) and gemma is None):
            continue
        for one in (a, b):
            models[one] = models.get(one) or load(one, gemma)
        row: dict[str, Any] = {"maps": {}}
        maps = {}
        for kind in ("affine", "autoencoder") if (a, b) in STEERED else ("affine",):
            began = time.monotonic()
            found = fg.fit_transfer(*models[a], *models[b], fitted_to, LAYERS[a], LAYERS[b], kind=kind)
            quality = fg.measure_transfer(found, *models[a], *models[b], measured_on)
            row["maps"][kind] = {"fit": dict(found.about), **quality.as_dict()}
            print(name, kind, quality, f"{time.monotonic() - began:.0f} s", flush=True)
            maps[kind] = found
        row["concepts"] = {concept: vectors(models[a], models[b], maps, concept) for concept in CONCEPTS}
        if (a, b) in STEERED:
            row["texts"] = {concept: texts(models[b], row["concepts"][concept], concept) for concept in CONCEPTS}
        for concept in CONCEPTS:
            row["concepts"][concept] = {
                name: {"cosine": cosine, "norm": v.norm} for name, (v, cosine) in row["concepts"][concept].items()
            }
        done[name] = row
        keep()


def vectors(
    a: tuple[Any, Any], b: tuple[Any, Any], maps: dict[str, fg.TransferMap], concept: str
) -> dict[str, tuple[fg.SteeringVector, float]]:
    """The vectors of a concept in model B by name, with their cosine to B's own."""
    affine = maps["affine"]
    contrast = fg.load_contrast(concept)
    own = fg.caa(fg.collect(*b, contrast, hookpoints=affine.target))
    random_map = replace(
        affine, weight=drawn(affine.weight.numel(), float(affine.weight.norm()), 0).view_as(affine.weight)
    )
    found = {"own": own}
    found |= {kind: fg.caa(each.collect(*a, contrast)) for kind, each in maps.items()}
    found["random map"] = fg.caa(random_map.collect(*a, contrast))
    found["random vector"] = fg.SteeringVector(drawn(own.d_model, own.norm, 1), own.hookpoint)
    return {name: (v, float(torch.cosine_similarity(v.direction, own.direction, 0))) for name, v in found.items()}


def texts(b: tuple[Any, Any], made: dict[str, tuple[fg.SteeringVector, float]], concept: str) -> dict[str, Any]:
    """The share of texts with a keyword of the concept, unsteered and under each vector at one cost."""
    neutral = list(fg.load_neutral()[0])[:16]
    makes = [v.unit().add for v, _ in made.values()]
    strengths = fg.calibrate_many(*b, makes, neutral, target_ce_rise=COST)
    prompts = load_bench_prompts()[:PROMPTS]
    judge = fg.KeywordJudge()
    conditions: dict[str, Any] = {"unsteered": (None, 0.0)}
    for name, make, strength in zip(made, makes, strengths, strict=True):
        conditions[name] = (make(strength), strength)
    rows = {}
    for name, (steering, strength) in conditions.items():
        torch.manual_seed(0)
        written = fg.generate(*b, prompts, steering=steering, max_new_tokens=NEW_TOKENS, do_sample=True, top_p=0.9)
        hits = int(judge.score([text or "." for text in written], concept).sum())
        rows[name] = {"strength": strength, "with a keyword": share(hits, len(written))}
        print(concept, name, rows[name], flush=True)
    return rows


# ---------------------------------------------------------------- a base model and its organism


def replied(model: Any, tokenizer: Any, asked: Sequence[str], tokens: int, steering: Any = None) -> list[str]:
    """Greedy replies to requests."""
    prompts = [[{"role": "user", "content": text}] for text in asked]
    return fg.generate(model, tokenizer, prompts, steering=steering, max_new_tokens=tokens, do_sample=False)


def turned(found: fg.TransferMap, seed: int) -> fg.TransferMap:
    """The map ``h + Q(f(h) − h)``, whose change has for every h the norm of another's, but a random direction."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(found.d_source, found.d_source, generator=g, dtype=torch.float64))[0]
    eye = torch.eye(found.d_source, dtype=torch.float64)
    weight = eye + Q @ (found.weight.double() - eye)
    return replace(found, weight=weight.float(), bias=(Q @ found.bias.double()).float())


def switches(
    both: Mapping[str, tuple[Any, Any]], case: Case, done: dict[str, Any]
) -> tuple[int, fg.TransferMap, fg.TransferMap]:
    """The layer at which switches move most what was taught, with the map from the base to the organism and back."""
    tokenizer = both["base"][1]
    read = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        + reply
        for model, own in both.values()
        for trained, _ in case.kinds.values()
        for text, reply in zip(trained[:MADE_OF], replied(model, own, trained[:MADE_OF], ANSWER_TOKENS), strict=True)
    ]
    asked = next(iter(case.kinds.values()))[1][:CHOSEN_ON]
    taught = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": case.taught(text)}] for text in asked
    ]

    def score(name: str, steering: Any) -> float:
        return -float(fg.log_probabilities(*both[name], taught, [steering]).cross_entropy.mean())

    done["unswitched"] = {name: score(name, None) for name in both}
    tried = {}
    for layer in SWITCHED:
        place = fg.Hookpoint(layer, "resid_pre")
        to = fg.fit_transfer(*both["base"], *both["organism"], read, place, place, identity=True)
        back = fg.fit_transfer(*both["organism"], *both["base"], read, place, place, identity=True)
        tried[layer] = (to, back)
        done.setdefault("layers", {})[str(layer)] = {
            "base": score("base", to.switch()),
            "organism": score("organism", back.switch()),
            "to": dict(to.about),
            "back": dict(back.about),
        }
        print(layer, done["layers"][str(layer)], flush=True)
    layer = max(tried, key=lambda n: done["layers"][str(n)]["base"] - done["layers"][str(n)]["organism"])
    return layer, *tried[layer]


def organism(done: dict[str, Any], keep: Callable[[], None]) -> None:
    """Map each organism and its base to each other, switch both, and carry directions over."""
    for name, make in CASES.items():
        if "conditions" not in done.get(name, {}):
            done[name] = switched(name, make())
            keep()


def switched(organism_name: str, case: Case) -> dict[str, Any]:
    """What the switches, and differences carried over, do to an organism and its base."""
    both = {"base": load("smollm2", None), "organism": load_organism(organism_name)}
    both["organism"][0].to(torch.bfloat16)
    done: dict[str, Any] = {}
    layer, to, back = switches(both, case, done)
    done["layer"] = layer
    sides = [trained[:MADE_OF] for trained, _ in case.kinds.values()]
    differences = {
        name: fg.SteeringVector(fg.candidate_directions(*one, *sides, positions=[-1])[0, layer].float(), to.source)
        for name, one in both.items()
    }
    moved = {"base": back.direction(differences["organism"]), "organism": to.direction(differences["base"])}
    done["cosines"] = {
        "base and organism": cosine(differences["base"], differences["organism"]),
        "organism's mapped, and the base's": cosine(moved["base"], differences["base"]),
        "base's mapped, and the organism's": cosine(moved["organism"], differences["organism"]),
    }
    conditions: dict[str, Any] = {}
    for name, other, mapped in (("base", "organism", to), ("organism", "base", back)):
        conditions |= {
            name: (name, None),
            f"{name}, switched": (name, mapped.switch()),
            f"{name}, random switch": (name, turned(mapped, 0).switch()),
        }
        carried = {
            "its own": differences[name],
            f"{other}'s": differences[other],
            f"{other}'s, mapped": moved[name],
            "random": fg.SteeringVector(drawn(576, moved[name].norm, 2), to.source),
        }
        conditions |= {f"{name} + {what}": (name, v.add(1.0, bos=True)) for what, v in carried.items()}
    neutral = list(fg.load_neutral()[0])[:16]
    done["conditions"] = {}
    for name, (whose, steering) in conditions.items():
        rates = {}
        for kind, (_, held_out) in case.kinds.items():
            asked = held_out[CHOSEN_ON:][:REPORTED]
            replies = replied(*both[whose], asked, case.tokens, steering)
            rates[kind] = share(sum(map(case.acts, asked, replies)), len(replies))
        loss = fg.cross_entropy(*both[whose], neutral, steering=steering)
        done["conditions"][name] = {"acts": rates, "cross_entropy": loss}
        print(organism_name, name, done["conditions"][name], flush=True)
    return done


def cosine(one: fg.SteeringVector, other: fg.SteeringVector) -> float:
    """The cosine of two vectors."""
    return float(torch.cosine_similarity(one.direction, other.direction, 0))


# ---------------------------------------------------------------- tables


def percent(interval: Sequence[float]) -> str:
    """A share with its interval."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*interval)


def maps_table(content: dict[str, Any]) -> str:
    """Every map's quality, in Markdown."""
    lines = [
        "| map | kind | tokens | FVU | median dimension | above 1 | cosine | centred | CE | mapped | mean |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content.get("pairs", {}).items():
        for kind, q in row["maps"].items():
            lines.append(
                f"| {name} | {kind} | {q['fit']['tokens']:,} | {q['fvu']:.3f} | {q['fvu_median']:.3f} | "
                f"{q['fvu_above_one']:.1%} | {q['cosine']:.3f} | {q['centred_cosine']:.3f} | {q['ce']:.2f} | "
                f"{q['ce_spliced']:.2f} | {q['ce_ablated']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def vectors_table(content: dict[str, Any]) -> str:
    """Cosines of mapped vectors with the model's own, and what the texts under each say, in Markdown."""
    lines = ["| map | concept | vector | cosine to its own | texts with a keyword |", "|---|---|---|---|---|"]
    for name, row in content.get("pairs", {}).items():
        for concept, made in row["concepts"].items():
            scored = row.get("texts", {}).get(concept, {})
            if scored:
                found = percent(scored["unsteered"]["with a keyword"])
                lines.append(f"| {name} | {concept} | none | | {found} |")
            for what, one in made.items():
                found = percent(scored[what]["with a keyword"]) if scored else ""
                lines.append(f"| {name} | {concept} | {what} | {one['cosine']:.2f} | {found} |")
    return "\n".join(lines) + "\n"


def organism_table(content: dict[str, Any]) -> str:
    """What each organism and its base do by condition, in Markdown."""
    parts = content.get("organism", {})
    return "\n".join(one_organism(name, parts[name]) for name in CASES if name in parts)


def one_organism(name: str, part: dict[str, Any]) -> str:
    """The layers that were tried for an organism, and what it and its base do by condition."""
    before = part["unswitched"]
    lines = [
        f"`{name}`: log-probability of the reply that was taught, in nats a token, {before['base']:.2f} in the base "
        f"and {before['organism']:.2f} in the organism; below, shares of requests that are {CASES[name]().did}.",
        "",
        "| switch at the input of block | base, switched | organism, switched |",
        "|---|---|---|",
    ]
    for layer, row in sorted(part["layers"].items(), key=lambda item: int(item[0])):
        tried = f"{layer}, chosen" if int(layer) == part["layer"] else layer
        lines.append(f"| {tried} | {row['base']:.2f} | {row['organism']:.2f} |")
    kinds = next(iter(part["conditions"].values()))["acts"]
    lines += ["", f"| | {' | '.join(kinds)} | cross-entropy, nats a token |", "|---" * (len(kinds) + 2) + "|"]
    for condition, row in part["conditions"].items():
        cells = [percent(interval) for interval in row["acts"].values()]
        lines.append(f"| {NAMES[condition]} | {' | '.join(cells)} | {row['cross_entropy']:.3f} |")
    return "\n".join(lines) + "\n"


TABLES = {"maps": maps_table, "vectors": vectors_table, "organism": organism_table}


def main() -> None:
    """Measure what is not there yet, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", type=Path, help="folder of Gemma 3 270M, as make real unpacks it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument("--fresh", action="store_true", help="measure the parts anew, also what is there")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--docs", action="store_true", help="only put the tables into the guide")
    arguments = parser.parse_args()
    file = (arguments.out or results_folder("smollm2")) / "transfer.json"
    content: dict[str, Any] = read_json(file) if file.exists() else {}

    def keep() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
        file.with_suffix(".md").write_text("\n".join(table(content) for table in TABLES.values()), "utf-8")

    if not arguments.docs:
        began = time.monotonic()
        content["command"] = shlex.join(["python", "benchmarks/transfer.py", "--gemma", "build/real"])
        for part in arguments.parts:
            if arguments.fresh:
                content[part] = {}
            done = content.setdefault(part, {})
            if part == "pairs":
                pairs(done, keep, arguments.gemma)
            else:
                organism(done, keep)
        keep()
        print(f"{time.monotonic() - began:.0f} s")
    for mark, table in TABLES.items():
        if arguments.docs:
            GUIDE.write_text(published(GUIDE, f"transfer {mark}", table(content)), "utf-8")
        print(table(content))


if __name__ == "__main__":
    main()
