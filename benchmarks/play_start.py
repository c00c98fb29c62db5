"""Where the slider of ``fgsteer play`` begins: how often the text then speaks of the word that was searched for.

A stranger types a word and adds a feature of the list. The page chooses the first strength, by a rule. For each word
the first features of the page's own search are added at the strength of each rule, and several texts are written as
the page writes them. A text is good where it has a keyword of the word and does not repeat itself. The rule is chosen
on some words and reported on others.

    python benchmarks/play_start.py             writes results/smollm2/play_start.json and play_start.md
    python benchmarks/play_start.py --docs      puts the table into docs/guides/play.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from subject import ROOT, run_benchmark

import fgsteer as fg
from fgsteer.evaluation.metrics.coherence import distinct_share
from fgsteer.evaluation.metrics.intervals import mean_interval
from fgsteer.play.actions import ACTIONS, FIRST_PROMPT
from fgsteer.play.building import build_intervention
from fgsteer.play.measuring import dose_at, strength_curve
from fgsteer.play.plan import parse_item
from fgsteer.play.session import PlaySession, sae_sources

PAGE = ROOT / "docs" / "guides" / "play.md"
COSTS, DOSES = (0.25, 0.5, 0.75, 1.0, 1.5), (0.3, 0.4, 0.5, 0.6)
FEATURES, SEEDS, TOKENS, TEMPERATURE = 2, 2, 48, 0.8
LEAST_DISTINCT = 0.9  # of a text's trigrams: below, the page says that it repeats itself
PROMPTS = (FIRST_PROMPT, "I think that", "The next day", "My friend told me that")
CHOOSE = {
    "sea": "sea seas ocean oceans wave waves beach shore coast ship ships boat boats sail sailing tide sailor sailors",
    "love": "love loves loved lover lovers loving romance romantic kiss kissed heart hearts beloved marry married",
    "music": "music musical song songs sing singing sang singer band piano guitar melody concert orchestra tune tunes",
    "crime": "crime crimes criminal criminals murder murdered police thief thieves theft robbery prison killer guilty",
    "london": "london thames england english british britain westminster uk",
    "anger": "anger angry angrily rage furious fury mad outraged annoyed yelled shouted",
}
CHECK = {
    "food": "food foods eat eating ate meal meals dinner lunch cook cooking cooked dish dishes bread restaurant",
    "war": "war wars soldier soldiers battle battles army armies enemy troops military weapon weapons fighting fought",
    "wedding": "wedding weddings bride groom marriage married marry ceremony bridesmaid bridesmaids",
    "animals": "animal animals dog dogs cat cats bird birds horse horses wild wildlife zoo pet pets creature creatures",
    "fear": "fear fears feared afraid scared scary frightened frightening terrified terror horror panic",
    "winter": "winter snow snowy snowing cold ice icy frozen frost freezing christmas",
    "money": "money dollar dollars cash bank banks pay paid rich wealth income price prices cost costs buy bought",
    "school": "school schools teacher teachers student students class classes classroom college university homework",
}


def has_keyword(text: str, keywords: str) -> bool:
    """Whether one of the keywords is a word of the text."""
    return bool(set(keywords.split()) & set(re.findall(r"[a-z]+", text.lower())))


def is_fluent(tokenizer: Any, text: str) -> bool:
    """Whether nearly all trigrams of a text differ, as the page says it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return not trigrams or distinct_share(trigrams, len(trigrams)) >= LEAST_DISTINCT


def strengths(session: PlaySession, item: Any) -> dict[str, float]:
    """The dose at which each rule begins, of those that this feature has."""
    curve = strength_curve(session, item, chat=False)
    points = [(point["dose"], point["cost"]) for point in curve["points"]]
    by_cost = {f"{cost:g} nat{'' if cost == 1 else 's'} a token": dose_at(points, cost) for cost in COSTS}
    by_dose = {f"{dose:g} ‖h‖": dose for dose in DOSES}
    return {"nothing": 0.0} | {name: dose for name, dose in (by_cost | by_dose).items() if dose is not None}


def texts_of(session: PlaySession, item: Any, unit: float, doses: Sequence[float]) -> list[list[str]]:
    """The texts at each dose, drawn alike."""
    entries = [
        [build_intervention(session, item, chat=False, amount=dose * unit)] if dose else None
        for dose in doses
        for _ in PROMPTS
    ]
    made: list[list[str]] = [[] for _ in doses]
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        texts = fg.generate(
            session.model, session.tokenizer, list(PROMPTS) * len(doses), steering=entries, max_new_tokens=TOKENS,
            do_sample=True, temperature=TEMPERATURE,
        )  # fmt: skip
        for number in range(len(doses)):
            made[number] += texts[number * len(PROMPTS) : (number + 1) * len(PROMPTS)]
    return made


def measure() -> dict[str, Any]:
    """Every word, feature and rule."""
    torch.set_num_threads(1)
    sources, key = sae_sources("smollm2", None, [])
    session = PlaySession(*fg.load_model("smollm2", device="cpu"), "smollm2", sources, first_sae=key)
    rows = []
    for word, keywords in (CHOOSE | CHECK).items():
        (found,) = ACTIONS["search"](session, {"sae": key, "by": "word", "words": word})
        for row in found["rows"][:FEATURES]:
            item = parse_item({"kind": "feature", "sae": key, "feature": row["id"], "amount": 1.0})
            doses = strengths(session, item)
            unit = strength_curve(session, item, chat=False)["unit"]
            for (rule, dose), texts in zip(
                doses.items(), texts_of(session, item, unit, list(doses.values())), strict=True
            ):
                speaks = [has_keyword(text, keywords) for text in texts]
                fluent = [is_fluent(session.tokenizer, text) for text in texts]
                rows.append(
                    {
                        "word": word,
                        "feature": row["id"],
                        "rule": rule,
                        "dose": dose,
                        "speaks": sum(speaks) / len(texts),
                        "fluent": sum(fluent) / len(texts),
                        "good": sum(map(all, zip(speaks, fluent, strict=True))) / len(texts),
                        "text": texts[0],
                    }
                )
                print(
                    word,
                    row["id"],
                    rule,
                    *(f"{rows[-1][k]:.2f}" for k in ("dose", "speaks", "fluent", "good")),
                    flush=True,
                )
    return {
        "sae": key,
        "prompts": PROMPTS,
        "texts of a feature and rule": len(PROMPTS) * SEEDS,
        "chosen on": list(CHOOSE),
        "reported on": list(CHECK),
        "rows": rows,
    }


def means(rows: Sequence[Mapping[str, Any]], words: Sequence[str], rule: str, name: str) -> dict[Any, float]:
    """One number of a rule for each feature of the words; 0 for a feature that the rule gives no strength."""
    features = {(row["word"], row["feature"]) for row in rows if row["word"] in words}
    known = {(row["word"], row["feature"]): row[name] for row in rows if row["rule"] == rule}
    return {feature: known.get(feature, 0.0) for feature in sorted(features)}


def table(result: Mapping[str, Any]) -> str:
    """The rules, with the shares of texts on either half."""
    rows, halves = result["rows"], (result["chosen on"], result["reported on"])
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    scores = {rule: mean_interval([means(rows, halves[0], rule, "good")], lambda unit: unit[0]).mean for rule in rules}
    best = max(scores, key=lambda rule: scores[rule])
    lines = [
        "| the slider begins at | good, words that choose | good, other words | speak of the word | no repetition |",
        "|---|---|---|---|---|",
    ]
    for rule in rules:
        good, speaks, fluent = (
            mean_interval([means(rows, halves[1], rule, name)], lambda unit: unit[0])
            for name in ("good", "speaks", "fluent")
        )
        shown = f"**{rule}**" if rule == best else rule
        lines.append(
            f"| {shown} | {scores[rule]:.0%} | {good.mean:.0%} [{max(0.0, good.low):.0%}, {min(1.0, good.high):.0%}] "
            f"| {speaks.mean:.0%} | {fluent.mean:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark("play_start", __doc__, PAGE, measure, table)
