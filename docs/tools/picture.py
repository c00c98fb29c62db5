"""The README's picture: the same prompts unsteered and steered, and the features that were chosen.

    python docs/tools/picture.py        writes docs/assets/steering.svg

Prompts are the first three neutral prompts that ship, continued by the likeliest tokens; nothing is picked by hand but
the concept. Words of the concept are marked by the keyword judge, which reads them off sentences that built no vector.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from html import escape
from pathlib import Path

import fgsteer as fg

OUT = Path(__file__).resolve().parents[1] / "assets" / "steering.svg"
MODEL, CONCEPT, PROMPTS, CE_RISE, FEATURES = "smollm2", "wedding", 3, 0.5, 5
WIDTH, COLUMN, GAP, LINE, CHARACTERS = 900, 410, 24, 21, 54
INK, PALE, ACCENT = "#1f2933", "#7b8794", "#00796b"
FONT = "font-family='Helvetica, Arial, sans-serif'"


def outputs() -> tuple[list[str], list[str], list[str], list[tuple[int, float, str]], float, int]:
    """Prompts, continuations unsteered and steered, the strongest features, the coefficient, and how many there are."""
    model, tokenizer = fg.load_model(MODEL)
    sae = fg.load_sae(MODEL)
    stats = fg.collect(model, tokenizer, fg.load_contrast(CONCEPT), sae=sae)
    vec = fg.fgaa(stats, sae)
    neutral, prompts = fg.load_neutral()
    prompts = prompts[:PROMPTS]
    coefficient = fg.calibrate(model, tokenizer, vec.add, neutral[:16], target_ce_rise=CE_RISE)
    texts = []
    for steering in (None, vec.add(coefficient)):
        options = {"max_new_tokens": 32, "do_sample": False}  # as in README's example
        texts.append(fg.generate(model, tokenizer, prompts, steering=steering, **options))
    labels = sae.labels or {}
    features = [(f.id, f.weight, labels.get(f.id) or "no label") for f in vec.top_features(FEATURES)]
    return prompts, *texts, features, coefficient, len(vec.features)


def marked(line: str, keywords: tuple[str, ...]) -> str:
    """A line as SVG text, words of the concept in the accent colour."""
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, keywords))})(?!\w)", re.IGNORECASE)
    return pattern.sub(rf"<tspan fill='{ACCENT}' font-weight='bold'>\1</tspan>", escape(line))


def column(x: int, heading: str, texts: Iterable[tuple[str, str]], keywords: tuple[str, ...]) -> tuple[list[str], int]:
    """A column of prompts (bold) and continuations, and the height that it takes."""
    parts, y = [f"<text x='{x}' y='84' fill='{PALE}' font-size='14'>{escape(heading)}</text>"], 112
    for prompt, text in texts:
        words = " ".join(text.split())
        lines = textwrap.wrap(f"{prompt} {words} …", CHARACTERS)
        for number, line in enumerate(lines):
            begun = f"<tspan font-weight='bold'>{escape(prompt)}</tspan>" if not number else ""
            rest = marked(line.removeprefix(prompt) if not number else line, keywords)
            parts.append(f"<text x='{x}' y='{y}' fill='{INK}' font-size='15'>{begun}{rest}</text>")
            y += LINE
        y += 12
    return parts, y


def draw() -> str:
    """The whole picture."""
    prompts, plain, steered, features, coefficient, chosen = outputs()
    keywords = fg.KeywordJudge().keywords(CONCEPT)
    left, right = 32, 32 + COLUMN + GAP
    unsteered, low = column(left, "unsteered", zip(prompts, plain, strict=True), keywords)
    made, lower = column(right, f"steered: vec.add({coefficient:.0f})", zip(prompts, steered, strict=True), keywords)
    y = max(low, lower) + 14
    bars = [
        f"<line x1='32' y1='{y - 10}' x2='{WIDTH - 32}' y2='{y - 10}' stroke='#d9e2ec'/>",
        f"<text x='32' y='{y + 20}' fill='{PALE}' font-size='14'>the strongest of the {chosen} features that FGAA "
        "chose, their labels, and their weights in the vector</text>",
    ]
    y += 34
    longest = max(abs(weight) for _, weight, _ in features)
    for number, weight, label in features:
        wide = round(300 * abs(weight) / longest)
        colour = PALE if label == "no label" else INK
        bars += [
            f"<text x='32' y='{y + 14}' fill='{INK}' font-size='15'>{number}</text>",
            f"<text x='92' y='{y + 14}' fill='{colour}' font-size='15'>{escape(label)}</text>",
            f"<rect x='{right}' y='{y + 2}' width='{wide}' height='14' rx='3' fill='{ACCENT}'/>",
            f"<text x='{right + wide + 10}' y='{y + 14}' fill='{INK}' font-size='14'>{weight:+.1f}</text>",
        ]
        y += 24
    height = y + 20
    title = f"Steering SmolLM2-135M-Instruct towards “{CONCEPT}”"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' "
            f"role='img' aria-label='{escape(title)}' {FONT}>",
            f"<rect width='{WIDTH}' height='{height}' rx='10' fill='#ffffff' stroke='#d9e2ec'/>",
            f"<text x='32' y='46' fill='{INK}' font-size='20' font-weight='bold'>{escape(title)}</text>",
            *unsteered,
            *made,
            *bars,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(OUT)
