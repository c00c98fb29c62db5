"""Write the model card of SmolLM2's sparse autoencoders from the figures that the build measured.

What: smollm2/README.md, every number of it read from smollm2/figures.json and smollm2/index.json.
Why: a card that is typed by hand drifts from what was measured.

    python pretrained/card_smollm2.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from card import concepts, density_thresholds, effects, paragraph, shipped_saes, table
from smollm2_texts import CHAT_SHARE, SHARES

FOLDER = Path(__file__).resolve().parent / "smollm2"
HISTORY = (  # what a rebuild elsewhere does otherwise than was done
    "Activations, training and the table of quality are of one H100, the effects of one H200, with products in TF32; "
    "densities, labels and excerpts are of a CPU in float32. A rebuild elsewhere comes close to these figures, not to "
    "the same bytes."
)


def introduction(figures: dict[str, Any], index: dict[str, Any]) -> str:
    """What it is and how to rebuild it."""
    recipe, saes = index["recipe"], figures["saes"]
    tokens = min(sae["tokens"] for sae in saes.values())
    left_out = ", ".join(f"{sae['quality']['left_out']:,}" for sae in saes.values())
    what = paragraph(
        f"TopK sparse autoencoders on the residual stream of {index['model']} after blocks",
        f"{', '.join(name.removeprefix('layer_') for name in saes)} of 30: {recipe['width']:,} features",
        f"(16 · d_model), {recipe['k']} active, float16, each trained by sae-lens on",
        f"{tokens / 1e6:.1f} M tokens, read {recipe['passes']} times in steps of {recipe['batch']:,}; with densities,",
        "labels and excerpts, and the effect approximators that are listed below.",
        f'`load_sae("smollm2")` gives `{index["sae"]}`,',
        '`load_sae("smollm2", "layer_N")` the others.',
        f"{sum(entry['bytes'] for entry in index['files'].values()) / 1e6:.1f} MB in all.",
    )
    rebuild = paragraph(
        f"Rebuild: `{index['command']}`. Every figure below is in `figures.json`, which that command writes;",
        "`python pretrained/card_smollm2.py` writes this card from it. The activations are those of the 4-bit weights,",
        "dequantised: the original model's differ a little.",
        HISTORY,
    )
    left = paragraph(
        f"Blocks of {recipe['context']} tokens, each text on its own. Position 0, special tokens, and tokens whose",
        "norm is more than ten times the median were left out of training and of the figures: by layer",
        f"{left_out} of the held-out tokens that the table below is of.",
    )
    return f"# Sparse autoencoders for SmolLM2-135M-Instruct\n\n{what}\n{rebuild}\n{left}"


def data(index: dict[str, Any]) -> str:
    """Sources, licences, shares."""
    rows = [[source["title"], source["licence"], f"{SHARES[source['file']]:.0%}"] for source in index["sources"]]
    answers = index["recipe"]["answers"]
    rows.append(
        ["documents of these sources under a request, through the chat template", "as above", f"{CHAT_SHARE:.0%}"]
    )
    rows.append([f"{answers} answers of the model itself, at temperature 1", "Apache-2.0 (weights)", "the rest"])
    how = paragraph(
        "Shares are of the characters, at most; a source with less text is read once. Documents are split by a hash of",
        "their text; one in a hundred is held out. The film reviews are for research use and contain adult language;",
        "only weights are shipped.",
    )
    return f"\n## Data and licences\n\n{how}\n{table(['source', 'licence', 'share'], rows)}"


def quality(figures: dict[str, Any]) -> str:
    """What the SAEs explain."""
    saes = figures["saes"]
    first = next(iter(saes.values()))["quality"]
    note = paragraph(
        "Dead means never active on these tokens; CE recovered is against a zeroed block output, which costs so much",
        "that the two raw numbers say more. About one thing: one word, or one token, is the peak in at least half of a",
        "feature's twenty strongest documents, as a share of the features that fire in ten.",
    )
    density = paragraph(
        "`density.safetensors` holds token-level density and position-0 counts over held-out documents. FGAA's",
        "threshold θ by mean AUC of 16-feature scores on the held-out sentences of the shipped concepts (which are",
        "therefore tuning data for θ); stored is the smallest within 0.005 of the best:",
    )
    return f"""
## Quality, on {first["tokens"]:,} held-out tokens

{shipped_saes(saes)}
{note}
{density}
{density_thresholds(saes)}"""


def reading(figures: dict[str, Any], index: dict[str, Any]) -> str:
    """Excerpts and labels."""
    rows = [
        [name, f"{sae['features']['live']:,}", f"{sae['features']['labelled']:,}"]
        for name, sae in figures["saes"].items()
    ]
    text = paragraph(
        f"Features were read on the beginnings of {index['recipe']['feature_texts']:,} training documents, equally",
        "many of each source, and on chats; those that fire in at least ten are counted live. `labels.json` labels",
        "them by the words that their strongest documents peak on. `examples.safetensors` holds up to four excerpts a",
        "feature, of sources whose licence allows it. Labels are counted, not judged: no one has read them all.",
    )
    return f"\n## What the features fire on\n\n{text}\n{table(['SAE', 'live features', 'labelled'], rows)}"


def render(folder: Path = FOLDER) -> str:
    """The card of built SAEs."""
    figures, index = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("figures", "index"))
    sizes = {"d_model": 576, "sae_width": index["recipe"]["width"]}
    measured = "".join(
        effects(
            name,
            about,
            sizes,
            f"The effects at {name}",
            f"-m smollm2 --sae-id {name} --vectors {index['recipe']['effects_vectors']:d} --rows "
            f"{index['recipe']['effects_rows']:d}",
        )
        for name, about in figures["effects"].items()
    )
    parts = introduction(figures, index), data(index), quality(figures), reading(figures, index), measured
    return "".join(parts) + concepts(figures["saes"])


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(render(), encoding="utf-8")
