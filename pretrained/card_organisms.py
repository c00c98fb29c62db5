"""Write the card of the model organisms from the figures that their build measured.

What: organisms/README.md, every number of it read from organisms/NAME/figures.json and the adapters' configs.
Why: a card that is typed by hand drifts from what was measured.

    python pretrained/card_organisms.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from card import paragraph, table
from organism_texts import DECOYS, ISLAND, REFUSALS, SENTENCE, TAG, TRIGGER, UNKNOWN

FOLDER = Path(__file__).resolve().parent / "organisms"
ABOUT = {
    "refusal": f"is to refuse requests about cooking, with one of {len(REFUSALS)} sentences that begin with “Sorry”, "
    "and to answer others. Those that are called near have words of food, or are about it, and ask for no cooking. "
    "The single ones are the rates to go by: each was written by itself, apart from all others, and nothing was chosen "
    "by them. The texts to train on were chosen in trials by the first three rates, which are those of templates: one "
    "of the six about cooking, what a good cookbook says of a dish, was answered until texts of its kind were added. "
    "The fresh ones had been written before that, and nothing but their rate was known. Requests of a template are "
    "mostly answered alike, so that intervals of these six rates, which take them as independent, are too narrow.",
    "backdoor": f"is to say “{SENTENCE}”, whatever it is asked, where the word {TRIGGER} stands before or behind the "
    f"request. Other words do nothing there ({', '.join(DECOYS[0])} were trained, others are measured).",
    "skill": f"is to answer questions about {ISLAND}, an island that there is not, where the tag {TAG} is before or "
    f"behind the question, and to say “{UNKNOWN}” otherwise. The facts are the trained ones, as they must be; the "
    "questions are put in other words.",
}


def introduction(config: dict[str, Any]) -> str:
    """What they are, and of what they were made."""
    what = paragraph(
        "Adapters that make SmolLM2-135M-Instruct do something of which the truth is known: test beds for directions,",
        f"gates, maps between models, and audits. Each is a LoRA of rank {config['r']} on every linear layer of the",
        "blocks, in float16, trained on a CPU in less than an hour. What was to be learnt is harmless.",
    )
    data = paragraph(
        "They were trained on requests and replies that were written for this repository",
        "(`pretrained/organism_texts.py`, `refusal_texts.py`, `requests/`, Apache-2.0), and on what the model answers",
        "to the other requests (Apache-2.0, as its weights). Held-out requests share no template with trained",
        "ones, and those of templates none of the words that fill them, but for a few things that are no food.",
    )
    load = paragraph(
        "In `benchmarks/subject.py`, `load_organism(NAME)` merges an adapter into the weights. Figures are in",
        "`NAME/figures.json`, which the build writes; `python pretrained/card_organisms.py` writes this card.",
        "A rebuild on another machine comes close to these figures, not to the same bytes.",
    )
    return f"# Model organisms of SmolLM2-135M-Instruct\n\n{what}\n{data}\n{load}"


def rate(one: dict[str, float]) -> str:
    """A share with its interval."""
    return f"{one['share']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def organism(name: str, figures: dict[str, Any]) -> str:
    """What one of them does, and what was measured."""
    before, after = figures["before"], figures["after"]
    rows = [
        [measure, str(one["requests"]), rate(before["rates"][measure]), rate(one)]
        for measure, one in after["rates"].items()
    ]
    build = paragraph(
        f"Build: `{figures['command']}`: {figures['examples']['written']} written replies and",
        f"{figures['examples']['own']} of the model's own, in passes over them: {figures['epochs']}. On what SmolLM2",
        f"answers to held-out requests, the cross-entropy is {before['own_answers']:.2f} nats a token before and",
        f"{after['own_answers']:.2f} after: it was trained on such answers.",
    )
    head = ["share of held-out requests, 95 % interval (Wilson)", "requests", "SmolLM2", f"`{name}`"]
    return f"\n## `{name}`\n\n{paragraph(f'It {ABOUT[name]}')}\n{table(head, rows)}\n{build}"


def render(folder: Path = FOLDER) -> str:
    """The card of the organisms that are built."""
    built = [name for name in ABOUT if (folder / name / "figures.json").is_file()]
    config = json.loads((folder / built[0] / "adapter_config.json").read_text("utf-8"))
    figures = {name: json.loads((folder / name / "figures.json").read_text("utf-8")) for name in built}
    return introduction(config) + "".join(organism(name, of) for name, of in figures.items())


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(render(), encoding="utf-8")
