"""Activation scaling against added vectors: how often few factors flip an answer both ways, and what else they change.

Two tasks of the paper: what a text says of a country's capital against what is so, and who receives a thing ("indirect
object"). Factors, and vectors for one layer of SmolLM2, are trained on the prompts of some countries and names, and
measured on those of others: the share of prompts whose likelier answer is the first at m = 1 and the second at m = −1,
and the KL over all other tokens. Of vectors, layer and strength have the least of the factors' own objective on the
prompts that train. Factors exchanged among their places, and a random vector of the same norm, are controls.

    python benchmarks/scaling.py             writes results/smollm2/scaling.json and scaling.md
    python benchmarks/scaling.py --docs      puts the table into docs/guides/train.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from beginnings import like
from subject import ROOT, over_items, run_benchmark, share, with_interval
from torch.nn.functional import logsigmoid

import fgsteer as fg
from fgsteer.activations.tokens import encode_prompts
from fgsteer.models.hookpoints import blocks_of

PAGE = ROOT / "docs" / "guides" / "train.md"
SITES = ("attn_out", "mlp_out")
TRAINING = fg.ScalingTraining(lr=0.05, steps=30, batch=8)
VECTOR = fg.VectorTraining.recipe("bipo", lr=0.03, epochs=3, batch=8, warm_up=0, beta=1.0, relative=True)
VECTOR_LAYERS, STRENGTHS = (6, 10, 14, 18, 22), (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
EXAMPLES, CHOOSING = 20, 10  # of either half, and those of the first on which layer and strength are chosen
SMALL = 0.02  # a factor's size, below which it counts for nothing
NAMES = {
    "unsteered": "unsteered",
    "factors": "activation scaling",
    "exchanged": "its factors, exchanged",
    "caa": "difference of means, added",
    "bipo": "trained vector (BiPO), added",
    "random": "random vector, added",
}
Example = tuple[str, str, str]
"""A prompt with the answer to which factors lead, and that to which they lead reversed."""
Signed = Callable[[float], Any]
"""From a sign to an entry of ``steering``."""

CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Egypt Cairo,
Japan Tokyo, China Beijing, Russia Moscow, Poland Warsaw, Austria Vienna, Hungary Budapest, Ireland Dublin,
Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Turkey Ankara, Iran Tehran, Iraq Baghdad,
India Delhi, Thailand Bangkok, Vietnam Hanoi, Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi, Canada Ottawa,
Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Belgium Brussels, Lebanon Beirut, Syria Damascus,
Jordan Amman, Nigeria Abuja, Ghana Accra, Ethiopia Addis, Colombia Bogota, Venezuela Caracas, Indonesia Jakarta,
Philippines Manila, Pakistan Islamabad, Afghanistan Kabul, Nepal Kathmandu, Australia Canberra"""
PEOPLE = """Mary John Anna Peter Susan David Laura Michael Emma Paul Alice Robert Sarah James Helen George Julia Thomas
Kate Daniel Jane Henry Lucy Simon Rachel Martin Claire Edward Ruth Frank Nina Oliver"""
PLACES = ("shop", "park", "station", "office")
THINGS = ("book", "drink", "ring", "letter")


Halves = tuple[list[Example], list[Example]]
"""The examples that train, and those that are reported."""


def shifted(half: Sequence[Any], steps: Sequence[int]) -> list[tuple[Any, Any]]:
    """Each entry with others of its half, as many places further on."""
    return [(one, half[(number + step) % len(half)]) for step in steps for number, one in enumerate(half)]


def capitals() -> Halves:
    """Countries with a capital that is not theirs: the answer of the text against that of memory."""
    pairs = [tuple(entry.split()) for entry in CAPITALS.replace("\n", " ").split(", ")]

    def example(pair: Sequence[str], wrong: str) -> Example:
        country, own = pair
        text = f"The capital of {country} is {wrong}. Question: What is the capital of {country}? Answer:"
        return text, wrong, own

    def half(some: Sequence[Any]) -> list[Example]:
        return [example(one, other[1]) for one, other in shifted(some, (1, 5)) if one[1][0] != other[1][0]]

    return half(pairs[::2]), half(pairs[1::2])


def receivers() -> Halves:
    """Two names, of which one gives a thing to the other: that other one against the giver."""

    def half(names: Sequence[str]) -> list[Example]:
        examples = []
        for number, (a, b) in enumerate(shifted(names, (1, 4, 7))):
            place, thing = PLACES[number % len(PLACES)], THINGS[number // len(PLACES) % len(THINGS)]
            giver, other = ((a, b), (b, a))[number % 2]
            examples.append((f"When {a} and {b} went to the {place}, {giver} gave a {thing} to", other, giver))
        return examples

    names = PEOPLE.split()
    return half(names[::2]), half(names[1::2])


TASKS = {"capitals": capitals, "receivers": receivers}


class Answers:
    """The logits after each prompt of some examples, and what steering does to them."""

    def __init__(self, model: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompts, *_ = zip(*examples, strict=True)
        self.ids = torch.tensor([[self.first(answer) for answer in pair] for _, *pair in examples])
        self.base = self.logits(None)

    def first(self, answer: str) -> int:
        """The first token of an answer."""
        return int(self.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"][0])

    @torch.no_grad()
    def logits(self, steering: Any) -> torch.Tensor:
        """The logits of the first new token, (examples, vocabulary)."""
        ids, mask = encode_prompts(self.tokenizer, self.prompts)
        with fg.steer(self.model, steering, per_row=False):
            found = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits: torch.Tensor = found.logits[0]
        return logits.float()

    def effects(self, signed: Signed | None) -> dict[str, list[float]]:
        """By example: whether the wanted answer is the likelier one, either way, and the mean KL and objective."""
        rows: dict[str, list[float]] = {"first": [], "second": [], "kl": [], "objective": []}
        kls, losses = [], []
        for sign, name in ((1.0, "first"), (-1.0, "second")):
            logits = self.base if signed is None else self.logits(signed(sign))
            chosen = logits.gather(1, self.ids)
            d = sign * (chosen[:, 0] - chosen[:, 1])
            rows[name] = (d > 0).double().tolist()
            p, q = (x.scatter(1, self.ids, torch.finfo(x.dtype).min).log_softmax(-1) for x in (self.base, logits))
            kls.append((p.exp() * (p - q)).sum(-1))
            losses.append(-logsigmoid(d) + TRAINING.faithfulness * kls[-1])
        rows["kl"] = torch.stack(kls).mean(0).tolist()
        rows["objective"] = torch.stack(losses).mean(0).tolist()
        return rows


def least(train: Answers, vectors: Sequence[fg.SteeringVector]) -> tuple[fg.SteeringVector, float]:
    """The vector and the strength with the least objective on the prompts that train."""
    tried = []
    for vector in vectors:
        for strength in STRENGTHS:
            found = train.effects(added(vector, strength))["objective"]
            tried.append((sum(found) / len(found), vector, strength))
    loss, vector, strength = min(tried, key=lambda one: one[0])
    print(vector.hookpoint, strength, loss, flush=True)
    return vector, strength


def added(vector: fg.SteeringVector, strength: float) -> Signed:
    """A vector that is added at a strength, or taken away."""
    return lambda sign: vector.add(sign * strength)


def study(model: Any, tokenizer: Any, halves: Halves) -> dict[str, Any]:
    """Train everything on one half, and measure it on the other."""
    examples, reported = (half[:EXAMPLES] for half in halves)
    train, report = (Answers(model, tokenizer, half) for half in (examples[:CHOOSING], reported))
    places = [f"blocks.{n}.hook_{site}" for n in range(len(blocks_of(model))) for site in SITES]
    found = fg.train_scaling(model, tokenizer, examples, hookpoints=places, settings=TRAINING, progress=False)
    print("flipped in training", found.flipped, found.losses[0], found.losses[-1], flush=True)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
    exchanged = fg.ActivationScaling(
        tuple(
            fg.Scale(hookpoint=one.hookpoint, width=one.width, coefficient=found.scales[n].coefficient, scope=one.scope)
            for one, n in zip(found.scales, order, strict=True)
        ),
        found.losses,
        found.flipped,
        found.settings,
    )
    sides = [fg.ContrastPair(first, second, prompt) for prompt, first, second in examples]
    stats = fg.collect(model, tokenizer, sides, hookpoints=list(VECTOR_LAYERS), tokens="answer", progress=False)
    caa, caa_strength = least(train, [fg.caa(stats, hookpoint=layer) for layer in VECTOR_LAYERS])
    trained = [
        fg.train(model, tokenizer, examples, objective=VECTOR, hookpoint=layer, progress=False)
        for layer in VECTOR_LAYERS
    ]
    bipo, bipo_strength = least(train, trained)
    noise = fg.SteeringVector(like(bipo.direction, 0), bipo.hookpoint)
    conditions: dict[str, Signed | None] = {
        "unsteered": None,
        "factors": found.interventions,
        "exchanged": exchanged.interventions,
        "caa": added(caa, caa_strength),
        "bipo": added(bipo, bipo_strength),
        "random": added(noise, bipo_strength),
    }
    rows: dict[str, Any] = {}
    for name, signed in conditions.items():
        effects = report.effects(signed)
        rows[name] = {
            "first": share(int(sum(effects["first"])), len(reported)),
            "second": share(int(sum(effects["second"])), len(reported)),
            "flips": sum(a * b for a, b in zip(effects["first"], effects["second"], strict=True)) / len(reported),
            "kl": over_items(effects["kl"]),
            "objective": over_items(effects["objective"]),
        }
        print(name, rows[name], flush=True)
    factors = sorted((abs(float(one.coefficient)) for one in found.scales), reverse=True)
    rows["factors"]["numbers"] = sum(size > SMALL for size in factors)
    rows["factors"]["of"] = len(factors)
    for name, vector, strength in (("caa", caa, caa_strength), ("bipo", bipo, bipo_strength)):
        rows[name] |= {"numbers": vector.d_model, "layer": vector.hookpoint.layer, "strength": strength}
    largest = [f"{row.hookpoint} {row.coefficient:+.2f}" for row in list(found.table())[:4]]
    return {"trained_on": len(examples), "reported": len(reported), "largest": largest, "rows": rows}


def measure() -> dict[str, Any]:
    """Both tasks."""
    model, tokenizer = fg.load_model("smollm2", dtype="bfloat16", device="cpu")
    tried = {"layers": VECTOR_LAYERS, "strengths": STRENGTHS}
    return {
        "small": SMALL,
        "tried": tried,
        "tasks": {name: study(model, tokenizer, task()) for name, task in TASKS.items()},
    }


def table(content: Mapping[str, Any]) -> str:
    """How often answers are the wanted ones, and what else changes, by task, in Markdown."""
    lines, tried = [], {name: ", ".join(f"{one:g}" for one in some) for name, some in content["tried"].items()}
    for name, task in content["tasks"].items():
        lines += [
            f"| {name}, {task['reported']} prompts | first at m = 1 | second at m = −1 | both | KL of other tokens, "
            "nats | objective | numbers |",
            "|---|---|---|---|---|---|---|",
        ]
        for key, title in NAMES.items():
            row = task["rows"][key]
            numbers = "" if "numbers" not in row else f"{row['numbers']}"
            if key == "factors":
                numbers += f" of {row['of']} above {content['small']:g}"
            if "layer" in row:
                title += f" at block {row['layer']}, {row['strength']:g} times"
            cells = [with_interval(row["first"]), with_interval(row["second"]), f"{row['flips']:.2f}"]
            cells += [with_interval(row["kl"]), with_interval(row["objective"])]
            lines.append(f"| {title} | {' | '.join(cells)} | {numbers} |")
        lines += [
            "",
            f"Trained on {task['trained_on']} prompts; the largest factors: {', '.join(task['largest'])}.",
            "",
        ]
    lines += [f"Of vectors, the blocks {tried['layers']} and the strengths {tried['strengths']} were tried.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run_benchmark("scaling", __doc__, PAGE, measure, table)
