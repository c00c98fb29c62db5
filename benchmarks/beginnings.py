"""ActAdd and cache steering against CAA at one cost: what acts on a prompt once, beside what acts on every token.

ActAdd adds to the first tokens of a prompt, and cache steering changes the cached values of its last token but one.
Both, and CAA at every token, are brought to the strength at which neutral texts cost COST nats a token more; this is
measured as texts are generated, one forced token after the other, since caches are steered there alone. Each writes
texts to the openers of the benchmark, which are scored by its embedding judge, beside random vectors of the same shape
and cost. Nothing is chosen: CAA is at block 21, where quality.py found it best, and ActAdd at two blocks.

    python benchmarks/beginnings.py             writes results/smollm2/beginnings.json and beginnings.md
    python benchmarks/beginnings.py --docs      puts the table into docs/guides/interventions.md

A command that was killed goes on with the concept at which it ended; --fresh measures all of them again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from subject import ROOT, command_of, published, results_folder
from torch.nn.functional import cross_entropy

import fgsteer as fg
from fgsteer.data.shipped import load_bench_prompts
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval, paired_differences
from fgsteer.storage.json_files import read_json, write_json

PAGE = ROOT / "docs" / "guides" / "interventions.md"
WORDS = {"love": ("Love", "Hate"), "anger": ("Anger", "Calm"), "wedding": ("Weddings", "Everything")}  # of ActAdd
CAA_BLOCK, ACT_ADD_BLOCKS = 21, (4, 12)
COST, TOLERANCE = 0.5, 0.03  # nats a token, and the relative error that is accepted
MOST, TRIALS = 1024.0, 16  # the largest strength, and how many are tried
STARTS = {"caa": 32.0, "act_add": 4.0, "cache": 16.0}  # strengths that are tried first
NEUTRAL, READ, FORCED = 16, 4, 20  # texts, their first tokens, and those that are forced after them
PROMPTS, NEW_TOKENS, SEEDS = 32, 32, 2
BEFORE = 32  # openers that cache steering reads behind sentences of both sides
NAMES = {
    "unsteered": "unsteered",
    "caa": "CAA, every token",
    "random caa": "random vector, every token",
    **{f"act_add {block}": f"ActAdd at the input of block {block}" for block in ACT_ADD_BLOCKS},
    f"random act_add {ACT_ADD_BLOCKS[0]}": f"random vectors, as ActAdd at block {ACT_ADD_BLOCKS[0]}",
    "cache": "cache steering",
    "random cache": "random values in the cache",
}
Make = Callable[[float], Any]
"""From a strength to an entry of ``steering``."""


def like(values: torch.Tensor, seed: int) -> torch.Tensor:
    """Random entries whose rows have the norms of these."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    rows = values.flatten(1) if values.dim() > 1 else values[None]
    scale = rows.norm(dim=1) / noise.view_as(rows).norm(dim=1)
    return (noise.view_as(rows) * scale[:, None]).view_as(values)


def entries(model: Any, tokenizer: Any, concept: str) -> dict[str, Make]:
    """What is compared, from strengths, of unit size where that is one number."""
    contrast = fg.load_contrast(concept)
    vector = fg.caa(fg.collect(model, tokenizer, contrast, hookpoints=[CAA_BLOCK], progress=False)).unit()
    noise = fg.SteeringVector(like(vector.direction, 0), vector.hookpoint)
    made: dict[str, Make] = {"caa": vector.add, "random caa": noise.add}
    for block in ACT_ADD_BLOCKS:
        act = fg.act_add(model, tokenizer, *WORDS[concept], f"blocks.{block}.hook_resid_pre")
        made[f"act_add {block}"] = scaled(act)
    first = fg.act_add(model, tokenizer, *WORDS[concept], f"blocks.{ACT_ADD_BLOCKS[0]}.hook_resid_pre")
    drawn = [replace(one, direction=like(one.direction, n)) for n, one in enumerate(first)]
    made[f"random act_add {ACT_ADD_BLOCKS[0]}"] = scaled(drawn)
    openers = load_bench_prompts()[PROMPTS:][:BEFORE]
    sides = {
        side: [f"{text} {openers[n % len(openers)]}" for n, text in enumerate(texts)]
        for side, texts in (("positive", contrast.positives), ("negative", contrast.negatives))
    }
    cache = fg.cache_steering(model, tokenizer, sides)
    for name, one in (("cache", cache), ("random cache", replace(cache, values=like(cache.values, 0)))):
        made[name] = lambda c, one=one: replace(one, value_coefficient=c)  # type: ignore[misc]
    return made


def scaled(act: list[Any]) -> Make:
    """The Adds of ActAdd from their coefficient, without those that add nothing."""
    return lambda c: [replace(one, coefficient=c) for one in act if one.direction.any()]


def forced_ids(tokenizer: Any) -> torch.Tensor:
    """Neutral texts, two sentences each, of one number of tokens."""
    texts = list(fg.load_neutral()[0])
    pairs = [f"{texts[n]} {texts[n + NEUTRAL]}" for n in range(NEUTRAL)]
    return torch.tensor([tokenizer(text)["input_ids"][: READ + FORCED] for text in pairs])


@torch.no_grad()
def forced_loss(model: Any, ids: torch.Tensor, steering: Any) -> float:
    """The cross-entropy, in nats a token, of texts that are generated token by token after their first ones."""
    with fg.steer(model, steering, per_row=False) if steering is not None else torch.no_grad():
        found = model.generate(
            ids[:, :READ],
            attention_mask=torch.ones_like(ids[:, :READ]),
            max_new_tokens=FORCED,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda row, before: [int(ids[row, len(before)])],
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(found.logits, 1).float()
    return float(cross_entropy(logits.flatten(0, 1), ids[:, READ:].flatten()))


def strength(cost: Callable[[float], float], start: float = 1.0, wanted: float = COST) -> tuple[float, float]:
    """The strength that costs what is wanted and its cost, or the strongest that was tried, where none does.

    It is doubled until it costs enough, or divided by four until it costs less, and then interpolated on a line between
    logarithms.
    """
    tried = {start: cost(start)}
    c = start
    while abs(tried[c] - wanted) > TOLERANCE * wanted and len(tried) < TRIALS:
        enough = [c for c, found in tried.items() if found > wanted]
        less = [c for c, found in tried.items() if found < wanted and c < min(enough, default=math.inf)]
        if not enough and max(less) >= MOST:
            return max(less), tried[max(less)]
        if enough and less:
            low, high = max(less), min(enough)
            ends = [math.log(max(tried[one], wanted / 64) / wanted) for one in (low, high)]
            c = low * (high / low) ** min(max(ends[0] / (ends[0] - ends[1]), 0.2), 0.8)
        else:
            c = min(enough) / 4 if enough else 2 * max(less)
        tried[c] = cost(c)
    return c, tried[c]


def measure(model: Any, tokenizer: Any, judge: Any, concept: str) -> dict[str, Any]:
    """Each condition's strength, cost, and scores by prompt and seed."""
    ids, prompts = forced_ids(tokenizer), load_bench_prompts()[:PROMPTS]
    base = forced_loss(model, ids, None)
    rows: dict[str, Any] = {}
    conditions: dict[str, Make | None] = {"unsteered": None, **entries(model, tokenizer, concept)}
    for name, make in conditions.items():
        c, cost, steering = 0.0, 0.0, None
        if make is not None:
            start = STARTS[name.removeprefix("random ").split()[0]]
            c, cost = strength(lambda c, make=make: forced_loss(model, ids, make(c)) - base, start)  # type: ignore[misc]
            steering = make(c)
        scores, shown = [], []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            texts = fg.generate(
                model, tokenizer, prompts, steering=steering, max_new_tokens=NEW_TOKENS, do_sample=True, top_p=0.9
            )
            scores += [[n, seed, float(x)] for n, x in enumerate(judge.score(texts, concept))]
            shown += texts[:2]
        rows[name] = {"strength": c, "cost": cost, "scores": scores, "texts": shown}
        mean = sum(score for *_, score in scores) / len(scores)
        print(f"{concept}, {name}: strength {c:.3g}, cost {cost:.3f}, score {mean:.3f}", flush=True)
        print(f"   {shown[0]!r}", flush=True)
    return rows


def by_unit(row: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """{(prompt, seed): score}."""
    return {(prompt, seed): score for prompt, seed, score in row["scores"]}


def shown(found: Interval, sign: str = "") -> str:
    """A mean with its interval."""
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def table(content: Mapping[str, Any]) -> str:
    """Scores by condition over all concepts, and less CAA's, in Markdown."""
    concepts = content["concepts"]
    lines = [
        f"| | cost, nats a token | mean [95 %] | less CAA | {' | '.join(concepts)} |",
        "|---" * (len(concepts) + 4) + "|",
    ]
    for name, label in NAMES.items():
        rows = [rows[name] for rows in concepts.values()]
        units = [by_unit(row) for row in rows]
        means = [sum(one.values()) / len(one) for one in units]
        caa = [by_unit(of["caa"]) for of in concepts.values()]
        gains = [paired_differences(one, other) for one, other in zip(units, caa, strict=True)]
        less = "" if name == "caa" else shown(mean_interval(gains, lambda unit: unit[0]), "+")
        costs = [row["cost"] for row in rows]
        cost = f"{min(costs):.2f}" if max(costs) - min(costs) < 0.05 else f"{min(costs):.2f} to {max(costs):.2f}"
        whole = shown(mean_interval(units, lambda unit: unit[0]))
        lines.append(f"| {label} | {cost} | {whole} | {less} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not there yet, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--docs", action="store_true", help="only put the table into docs/guides/interventions.md")
    arguments = parser.parse_args()
    path = (arguments.out or results_folder("smollm2")) / "beginnings.json"
    content: dict[str, Any] = read_json(path) if path.is_file() and not arguments.fresh else {"concepts": {}}
    if arguments.docs:
        PAGE.write_text(published(PAGE, "beginnings", table(content)), "utf-8")
        return
    content["command"] = command_of("beginnings")
    model, tokenizer = fg.load_model("smollm2", dtype="bfloat16", device="cpu")
    judge = fg.EmbeddingJudge()
    for concept in WORDS:
        if concept not in content["concepts"]:
            content["concepts"][concept] = measure(model, tokenizer, judge, concept)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            path.with_suffix(".md").write_text(table(content), "utf-8")
    print(table(content))


if __name__ == "__main__":
    main()
