"""Write the model card from the figures that the build measured.

What: README.md beside this script, every number of it read from default/*.json.
Why: a card that is typed by hand drifts from what was measured.

    python pretrained/card.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CARD = HERE / "README.md"
ENOUGH = 0.8  # held-out AUC at which one feature is said to carry a concept


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def paragraph(*sentences: str) -> str:
    """Text wrapped to the width of a card."""
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False) + "\n"


def introduction(figures: dict[str, Any], recipe: dict[str, Any]) -> str:
    """What it is and how to rebuild it."""
    what = paragraph(
        f"A Llama-architecture language model with {figures['parameters'] / 1e6:.2f} M parameters",
        f"({recipe['layers']} layers, d_model {recipe['d_model']}, {recipe['d_model'] // 64} heads of 64,",
        f"vocabulary {recipe['vocab_size']:,}, context {recipe['context']}, tied embeddings, bfloat16),",
        f"one TopK sparse autoencoder ({recipe['sae_width']:,} features, k = {recipe['sae_k']},",
        f"`blocks.{recipe['sae_layer']}.hook_resid_post`, float16, trained with sae-lens on",
        f"{recipe['sae_tokens'] / 1e6:.1f} M tokens), and its effect approximator. First version: it exists so",
        "that the pipeline can be tried and tested anywhere.",
    )
    return f"""# The embedded default

{what}
Rebuild: `python pretrained/build.py --corpora DIR --work build/default`. Every figure below is in
`default/figures.json` or `default/density.json`, which that command writes;
`python pretrained/card.py` writes this card from them.
"""


def data(figures: dict[str, Any], sources: list[dict[str, Any]]) -> str:
    """Sources, licences, held-out bits per byte."""
    bits = figures["bits_per_byte"]
    rows = [[s["title"], s["licence"], f"{bits[s['file']]:.3f}"] for s in sources]
    rows.append(["the mix, by held-out bytes", "", f"{bits['mix']:.3f}"])
    scale = figures["baselines"]
    return f"""
## Data and licences

Documents (books in pieces of about 4,000 characters) are split by a hash of their text; one in a
hundred is held out. {figures["training_tokens"] / 1e6:.1f} M tokens were seen, each once or nearly so.

{table(["source", "licence", "held-out bits per byte"], rows)}
For scale, over the same texts: an interpolated trigram model of the training tokens needs
{scale["trigram"]:.3f} bits per byte, xz {scale["xz"]:.3f}.

The film reviews are for research use and contain adult language; only weights are shipped.
"""


def autoencoder(sae: dict[str, Any], density: dict[str, Any]) -> str:
    """Quality of the SAE, and its density threshold."""
    head = ["explained variance", "L0", "dead features", "CE, plain → spliced (nats)", "CE recovered against zeroing"]
    row = [
        f"{sae['explained_variance']:.3f}",
        f"{sae['l0']:.1f}",
        f"{sae['dead_share']:.1%}",
        f"{sae['ce']:.3f} → {sae['ce_spliced']:.3f}",
        f"{sae['ce_recovered']:.3f}",
    ]
    auc = density["auc"]
    return f"""
## The sparse autoencoder, on {sae["tokens"]:,} held-out tokens

{table(head, [row])}
Dead means never active on those tokens. `sae/density.safetensors` holds token-level density and
position-0 counts over the held-out documents. FGAA's threshold θ, by mean AUC of 16-feature scores on
the held-out sentences of the shipped concepts (which are therefore tuning data for θ):

{table(["θ", *auc], [["mean AUC", *(f"{entry['mean']:.3f}" for entry in auc.values())]])}
Stored: θ = {density["max_density"]}, the smallest within 0.005 of the best.
"""


def features(found: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Excerpts and labels."""
    text = paragraph(
        f"Features were read on the beginnings of {recipe['feature_texts']:,} training documents, equally",
        f"many of each source. {found['live']:,} of {recipe['sae_width']:,} fired in at least ten of them; of these",
        f"{found['about_one_thing']:.0%} are about one thing by this rule: one word, or one token, is the peak in at",
        f"least half of the feature's twenty strongest documents. `sae/labels.json` labels {found['labelled']:,} by",
        "the words that these peak on (a piece of a word between hyphens). `sae/examples.safetensors` holds up to four",
        "excerpts a feature, of sources whose licence allows it: the film reviews and TinyStories are left out.",
        "Labels are counted, not judged: no one has read them all.",
    )
    return f"""
## What the features fire on

{text}"""


def effects(found: dict[str, Any], recipe: dict[str, Any]) -> str:
    """How well effects on features are predicted."""
    plan, sampling = found["plan"], found["plan"]["sampling"]
    share = f"λ = {found['ridge_in_mean_eigenvalues']:.2g} mean eigenvalues, by validation"
    rows = [
        [f"fit ({share})", f"{found['r2']:.3f}", f"{found['explained']:.3f}"],
        ["bias only", "0", f"{found['explained_by_bias']:.3f}"],
        ["fit to effects dealt to the wrong vectors", f"{found['shuffled']:.3f}", ""],
        ["ceiling set by sampling noise, from two halves of the rollouts", f"{found['ceiling']:.3f}", ""],
    ]
    how = paragraph(
        f"`effects.safetensors` (d_model {recipe['d_model']} → {recipe['sae_width']:,} features, float16):",
        f"{plan['vectors'][0]:,} unit decoder rows, each at the strength that costs {plan['texts'][0]} neutral",
        f"texts {plan['target_ce_rise']} nats a token; {plan['prompts'][0]} prompts × {plan['rollouts']} rollouts",
        f"× {sampling['max_new_tokens']} tokens a vector, temperature {sampling['temperature']:g}, top_k",
        f"{sampling['top_k']}, top_p {sampling['top_p']:g}, model in {plan['model']['dtype'].split('.')[1]}.",
        "The same numbers come from",
    )
    options = (
        f"--rollouts {plan['rollouts']} --max-new-tokens {sampling['max_new_tokens']} --top-p {sampling['top_p']:g}"
    )
    head = [f"on {found['held_out_vectors']} vectors held out", "R² about the mean effect", "share of squared effect"]
    return f"""
## The effect approximator

{how}`fgsteer effects -o FILE --dtype bfloat16 {options}`.

{table(head, rows)}
The columns of M have a mean cosine of {found["cosine_to_decoder"]:.2f} to their features' decoder rows. The
prompts are those of the measurement: R² for other prompts is not known.
"""


def concepts(found: dict[str, dict[str, Any]]) -> str:
    """The concept check."""
    rows = [[n, str(c["feature"]), f"{c['train_auc']:.2f}", f"{c['held_out_auc']:.2f}"] for n, c in found.items()]
    good = [name for name, c in found.items() if c["held_out_auc"] >= ENOUGH]
    return f"""
## Does it know the concepts?

The best single feature per concept (largest activation in a sentence; chosen on 40 + 40 training
sentences, scored on 20 + 20 held-out ones):

{table(["concept", "feature", "train AUC", "held-out AUC"], rows)}
{len(good)} of {len(found)} reach {ENOUGH} ({", ".join(good)}): the others have no single clean feature in this SAE.
"""


def samples(found: list[list[str]]) -> str:
    """Unselected samples, and what not to expect."""
    lines = "".join(f"- **{prompt}** {' '.join(text.split())}\n" for prompt, text in found)
    return f"""
## Samples

Temperature 0.8, the first ten neutral prompts, seed 0, unselected:

{lines}
## What it can't do

It keeps a sentence together, not a story; it states no facts; it has no instruction following.
Steering it shifts vocabulary and topic, often at a visible cost to fluency. Do not draw conclusions
about larger models from it.
"""


def render(folder: Path = HERE / "default") -> str:
    """The card of a built default."""
    figures, density, index = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("figures", "density", "index")
    )
    recipe = index["recipe"]
    return (
        introduction(figures, recipe)
        + data(figures, index["sources"])
        + autoencoder(figures["sae"], density)
        + features(figures["features"], recipe)
        + effects(figures["effects"], recipe)
        + concepts(figures["concepts"])
        + samples(figures["samples"])
    )


if __name__ == "__main__":
    CARD.write_text(render(), encoding="utf-8")
