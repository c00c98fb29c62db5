"""A strength that depends on the token (PSR) against the same vectors added to every token, at one cost.

From the written replies of two shipped contrasts, with an instruction that asks for such replies, vectors are built or
trained for one layer of SmolLM2. All are brought to the strength at which the model's own answers to some
questions have a KL of KL nats a token; other questions are then answered, which the benchmark's embedding judge and
coherence score, and log p(wanted reply) − log p(plain reply) is measured on held-out pairs. Nothing else is chosen.

    python benchmarks/adaptive.py             writes results/smollm2/adaptive.json and adaptive.md
    python benchmarks/adaptive.py --docs      puts the table into docs/guides/train.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from beginnings import like, strength
from grains import margins
from subject import ROOT, over_items, run_benchmark, verdict, with_interval

import fgsteer as fg
from fgsteer.data.shipped import load_chat_prompts
from fgsteer.evaluation.metrics.intervals import paired_differences
from fgsteer.likelihood.passes import TextPasses
from fgsteer.likelihood.scoring import mean_kl_divergences

PAGE = ROOT / "docs" / "guides" / "train.md"
ASKING = {"cheerful": "Reply in a cheerful and enthusiastic way. ", "spanish": "Reply in Spanish. "}
LAYER = 14
KL = 0.25  # nats a token of the model's own answers
TRAINED, PAIRS = 32, 10  # pairs of the contrast that train, and held-out ones
CALIBRATED, REPORTED = 6, 24  # questions of either half
NEW_TOKENS = 24
SETTINGS = {
    "mse": fg.AdaptiveTraining("mse", steps=600, hold_out=True),
    "ll": fg.AdaptiveTraining("ll", steps=30, batch=6, hold_out=True),
}
NAMES = {
    "unsteered": "unsteered",
    "asked": "the instruction, unsteered",
    "caa": "CAA, every token",
    "mse": "S-PSR, mse",
    "mse, constant": "u of mse, every token",
    "ll": "S-PSR, ll",
    "ll, constant": "u of ll, every token",
    "random": "a random vector, every token",
}
COMPARED = (("mse", "mse, constant"), ("ll", "ll, constant"))
Make = Callable[[float], Any]
"""From a strength to an entry of ``steering``."""


def build(model: Any, tokenizer: Any, contrast: fg.ContrastSet) -> tuple[dict[str, Make], dict[str, float]]:
    """What is compared, at strengths near 1, and the share of tokens at which a trained strength is above 0."""
    pairs = contrast.pairs[:TRAINED]
    triples = [(pair.prompt, asked(pair.prompt, ASKING[contrast.name]), pair.positive) for pair in pairs]
    stats = fg.collect(model, tokenizer, pairs, hookpoints=[LAYER], tokens="answer", progress=False)
    caa = fg.caa(stats)
    noise = fg.SteeringVector(like(caa.direction, 0), caa.hookpoint)
    makes: dict[str, Make] = {"caa": every_token(caa), "random": every_token(noise)}
    shares: dict[str, float] = {}
    for name, settings in SETTINGS.items():
        (vector,) = fg.train_adaptive(model, tokenizer, triples, hookpoints=LAYER, objective=settings, progress=False)
        makes[name] = partial(vector.adaptive_add, scope="reply")
        makes[f"{name}, constant"] = every_token(vector.unit() * caa.norm)
        shares[name] = vector.provenance["training"]["active_share"]
        print(name, shares[name], vector.provenance["training"]["held_out_losses"], flush=True)
    return makes, shares


def every_token(vector: fg.SteeringVector) -> Make:
    """A vector that is added to every token of a reply."""
    return partial(vector.add, scope="reply")


def cost_of(passes: TextPasses, make: Make) -> Callable[[float], float]:
    """The KL on texts by strength, in nats a token."""
    return lambda c: mean_kl_divergences(passes, [make(c)])[0]


def asked(prompt: Any, instruction: str) -> list[dict[str, str]]:
    """A question with an instruction before it."""
    (message,) = prompt
    return [{**message, "content": instruction + message["content"]}]


def answer(model: Any, tokenizer: Any, prompts: Sequence[Any], steering: Any = None) -> list[str]:
    """Sampled answers, from one seed."""
    torch.manual_seed(0)
    return fg.generate(
        model, tokenizer, prompts, steering=steering, max_new_tokens=NEW_TOKENS, do_sample=True, top_p=0.9
    )


def measure() -> dict[str, Any]:
    """Every contrast."""
    model, tokenizer = fg.load_model("smollm2", dtype="bfloat16", device="cpu")
    judge = fg.EmbeddingJudge()
    prompts = load_chat_prompts()
    first, prompts = prompts[:CALIBRATED], prompts[CALIBRATED:][:REPORTED]
    passes = TextPasses(model, tokenizer, list(zip(first, answer(model, tokenizer, first), strict=True)), keep=True)
    plain = answer(model, tokenizer, prompts)
    coherence = fg.Coherence.fit(model, tokenizer, plain, prompts=prompts)
    contrasts: dict[str, Any] = {}
    for name, instruction in ASKING.items():
        contrast = fg.load_contrast(name)
        assert contrast.held_out is not None
        makes, shares = build(model, tokenizer, contrast)
        entries: dict[str, Any] = {"unsteered": None}
        found: dict[str, tuple[float, float]] = {}
        for label, make in makes.items():
            found[label] = strength(cost_of(passes, make), 1.0, KL)
            entries[label] = make(found[label][0])
            print(name, label, found[label], flush=True)
        held_out = contrast.held_out.pairs[:PAIRS]
        moved = margins(model, tokenizer, held_out, list(entries.values()))
        texts = {label: answer(model, tokenizer, prompts, entry) for label, entry in entries.items()}
        texts["asked"] = answer(model, tokenizer, [asked(prompt, instruction) for prompt in prompts])
        rows: dict[str, Any] = {}
        for label, own in texts.items():
            number = list(entries).index(label) if label in entries else None
            rows[label] = {
                "behavior": [float(x) for x in judge.score(own, name)],
                "coherence": [float(x) for x in coherence.score(own, prompts)],
                "moved": None if number is None else (moved[number] - moved[0]).tolist(),
                "strength": found[label][0] if label in found else None,
                "kl": found[label][1] if label in found else None,
                "active_share": shares.get(label),
                "texts": own[:3],
            }
            print(name, label, own[0], flush=True)
        contrasts[name] = rows
    return {
        "kl": KL,
        "layer": LAYER,
        "calibrated": CALIBRATED,
        "reported": len(prompts),
        "contrasts": contrasts,
    }


def scores(row: Mapping[str, Any], what: str) -> dict[int, float]:
    """A number for each question: behavior, coherence, or both multiplied (BCS)."""
    if what != "bcs":
        return dict(enumerate(row[what]))
    return {n: b * c for n, (b, c) in enumerate(zip(row["behavior"], row["coherence"], strict=True))}


def table(content: Mapping[str, Any]) -> str:
    """Every way to steer, by what is written and how held-out replies' likelihood moves, in Markdown."""
    lines = []
    for name, rows in content["contrasts"].items():
        lines += [
            f"| {name} | behavior × coherence | behavior | coherence | moved margin | KL | λ > 0 in training replies |",
            "|---|---|---|---|---|---|---|",
        ]
        for label, title in NAMES.items():
            row = rows[label]
            bcs = with_interval(over_items(list(scores(row, "bcs").values())))
            others = [f"{sum(row[what]) / len(row[what]):.2f}" for what in ("behavior", "coherence")]
            steered = row["strength"] is not None
            moved = with_interval(over_items(row["moved"]), "+.2f") if steered else ""
            kl = f"{row['kl']:.2f}" if steered else ""
            share = "" if row["active_share"] is None else f"{row['active_share']:.2f}"
            lines.append(f"| {title} | {bcs} | {' | '.join(others)} | {moved} | {kl} | {share} |")
        lines.append("")
        for one, other in COMPARED:
            gains = paired_differences(scores(rows[one], "bcs"), scores(rows[other], "bcs"))
            mean, low, high = over_items(list(gains.values()))
            said = verdict(mean, low, high)
            kls = [rows[label]["kl"] for label in (one, other)]
            if min(kls) < 0.9 * max(kls):  # a strategy whose strength cannot reach the cost
                said = "but at {:.2f} nats and at {:.2f}, which compares nothing".format(*kls)
            lines.append(f"- {NAMES[one]}, less {NAMES[other]}: {with_interval((mean, low, high), '+.3f')}, {said}.")
        lines.append("")
    lines.append(
        f"At block {content['layer']} of SmolLM2, at {content['kl']:g} nats a token of KL on the model's own answers "
        f"where a strength reaches that, and else at the largest; {content['reported']} other questions, with 95 % "
        "intervals over questions."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_benchmark("adaptive", __doc__, PAGE, measure, table)
