"""Write the model card from the figures that the build measured.

What: README.md beside this script, every number of it read from default/figures.json.
Why: a card that is typed by hand drifts from what was measured.

    python pretrained/card.py
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CARD = HERE / "README.md"
BLIND = HERE / "blind_look.json"
ENOUGH = 0.8  # held-out AUC at which one feature is said to carry a concept
HISTORY = (  # what a rebuild does otherwise than was done
    "The training that made these weights was cut short on the way: from step 900 to 1,200 the learning rate fell as "
    "for 1,800 steps, not as for 1,600, so a rebuild comes close to these figures, not to the same bytes."
)
KINDS = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "Matryoshka", "jumprelu": "JumpReLU"}
QUALITY = ("explained variance", "L0", "dead features", "CE, plain → spliced (nats)", "CE recovered")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def paragraph(*sentences: str) -> str:
    """Text wrapped to the width of a card."""
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False) + "\n"


def introduction(figures: dict[str, Any], index: dict[str, Any]) -> str:
    """What it is and how to rebuild it."""
    recipe = index["recipe"]
    layers = ", ".join(name.removeprefix("layer_") for name in figures["saes"])
    what = paragraph(
        f"A Llama-architecture language model with {figures['parameters'] / 1e6:.2f} M parameters",
        f"({recipe['layers']} layers, d_model {recipe['d_model']}, {recipe['d_model'] // 64} heads of 64,",
        f"vocabulary {recipe['vocab_size']:,}, context {recipe['context']}, tied embeddings, bfloat16);",
        f"{KINDS[recipe['sae_kind']]} sparse autoencoders on the residual stream after blocks {layers}",
        f"({recipe['sae_width']:,} features, {recipe['sae_k']} active, float16, trained with sae-lens on",
        f"{recipe['sae_tokens'] / 1e6:.1f} M tokens), with densities, labels and excerpts; and the effect",
        f'approximators of {" and ".join(f"`{name}`" for name in figures["effects"])}. `load_sae("default")` gives',
        f'`{index["sae"]}`, `load_sae("default", "layer_N")` the others.',
        f"{sum(entry['bytes'] for entry in index['files'].values()) / 1e6:.1f} MB in all. It exists so that everything",
        "in this package can be tried, tested and compared anywhere, in minutes, without a download.",
    )
    rebuild = paragraph(
        f"Rebuild: `{index['command']}`. Every figure below is in `default/figures.json`, which that command writes;",
        "`python pretrained/card.py` writes this card from it (and from `blind_look.json`, what a reader answered).",
        HISTORY,
    )
    return f"""# The embedded default

{what}
{rebuild}"""


def data(figures: dict[str, Any], sources: list[dict[str, Any]]) -> str:
    """Sources, licences, held-out bits per byte."""
    bits = figures["bits_per_byte"]
    rows = [[s["title"], s["licence"], f"{s['keep']:g}", f"{bits[s['file']]:.3f}"] for s in sources]
    rows.append(["the mix, by held-out bytes", "", "", f"{bits['mix']:.3f}"])
    scale = figures["baselines"]
    how = paragraph(
        "Documents (books in pieces of about 4,000 characters) are split by a hash of their text; one in a hundred is",
        f"held out. {figures['training_tokens'] / 1e6:.1f} M tokens were seen, {figures['epochs']:.2f} of one pass",
        "over the mix; copies says how often a document is in that mix.",
    )
    return f"""
## Data and licences

{how}
{table(["source", "licence", "copies", "held-out bits per byte"], rows)}
For scale, over the same texts: an interpolated trigram model of the training tokens needs
{scale["trigram"]:.3f} bits per byte, xz {scale["xz"]:.3f}.

The film reviews are for research use and contain adult language; only weights are shipped.
"""


def shipped_saes(saes: dict[str, dict[str, Any]]) -> str:
    """A table of the quality of the SAEs that ship."""
    rows = [
        [name, *quality_cells(sae["quality"]), f"{sae['features']['about_one_thing']:.0%}"]
        for name, sae in saes.items()
    ]
    return table(["SAE", *QUALITY, "about one thing"], rows)


def density_thresholds(saes: dict[str, dict[str, Any]]) -> str:
    """A table of FGAA's threshold by what it makes of the concepts."""
    thetas = next(iter(saes.values()))["density_auc"]
    rows = [
        [name, *(f"{entry['mean']:.3f}" for entry in sae["density_auc"].values()), f"{sae['max_density']:g}"]
        for name, sae in saes.items()
    ]
    return table(["θ", *thetas, "stored"], rows)


def quality_cells(q: dict[str, Any]) -> list[str]:
    """Cells of the columns in QUALITY."""
    return [
        f"{q['explained_variance']:.3f}",
        f"{q['l0']:.1f}",
        f"{q['dead_share']:.1%}",
        f"{q['ce']:.3f} → {q['ce_spliced']:.3f}",
        f"{q['ce_recovered']:.3f}",
    ]


def autoencoders(figures: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Quality of the SAEs, their density thresholds, and how kinds compare."""
    saes, compared = figures["saes"], figures["comparison"]
    tokens = next(iter(saes.values()))["quality"]["tokens"]
    kinds = [
        [
            f"{KINDS[row['kind']]}, {row['seed']}",
            *quality_cells(row),
            f"{row['about_one_thing']:.0%}",
            f"{row['concepts']:.3f}",
            str(row["concepts_known"]),
        ]
        for row in compared["rows"]
    ]
    how = paragraph(
        f"Every kind that was tried, with two seeds, at layer {compared['layer']} on {compared['tokens'] / 1e6:.1f} M",
        f"tokens, features read on {recipe['compare_texts']:,} documents. The last two columns are of the check below:",
        "the mean held-out AUC of the best single features, and how many concepts reach",
        f"{ENOUGH}. TopK ships: its L0 is exact, and it was the quickest to train. JumpReLU did not come down",
        "to its L0 in so short a run. It has Gemma Scope 2's quadratic penalty around the same L0; Matryoshka is",
        "BatchTopK with nested widths of a sixteenth, a quarter and all.",
    )
    return f"""
## The sparse autoencoders, on {tokens:,} held-out tokens

{shipped_saes(saes)}
Dead means never active on those tokens; CE recovered is against a zeroed block output. About one
thing: one word, or one token, is the peak in at least half of a feature's twenty strongest documents,
as a share of the features that fire in ten.

{how}
{table(["kind, seed", *QUALITY, "about one thing", "concepts", f"≥ {ENOUGH}"], kinds)}
`density.safetensors` holds token-level density and position-0 counts over the held-out documents.
FGAA's threshold θ by mean AUC of 16-feature scores on the held-out sentences of the shipped
concepts (which are therefore tuning data for θ); stored is the smallest within 0.005 of the best:

{density_thresholds(saes)}"""


def features(figures: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Excerpts and labels."""
    rows = [
        [name, f"{sae['features']['live']:,}", f"{sae['features']['labelled']:,}"]
        for name, sae in figures["saes"].items()
    ]
    text = paragraph(
        f"Features were read on the beginnings of {recipe['feature_texts']:,} training documents, equally",
        "many of each source; those that fire in at least ten are counted live. `labels.json` labels them by the words",
        "that their twenty strongest documents peak on (a piece of a word between hyphens).",
        "`examples.safetensors` holds up to four excerpts a feature, of sources whose licence allows it: the film",
        "reviews and TinyStories are left out. Labels are counted, not judged: no one has read them all.",
    )
    return f"""
## What the features fire on

{text}
{table(["SAE", "live features", "labelled"], rows)}
`fgsteer features --search wedding` finds features by label, excerpts and the tokens that they raise.
"""


def effects(name: str, found: dict[str, Any], recipe: dict[str, Any], title: str, how_run: str) -> str:
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
        f"`sae/{name}/effects.safetensors` (d_model {recipe['d_model']} → {recipe['sae_width']:,} features, float16):",
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
## {title}

{how}`fgsteer effects -o FILE {how_run} {options}`.

{table(head, rows)}
The columns of M have a mean cosine of {found["cosine_to_decoder"]:.2f} to their features' decoder rows. The
prompts are those of the measurement: R² for other prompts is not known.
"""


def concepts(saes: dict[str, dict[str, Any]]) -> str:
    """The concept check."""
    rows, good, elsewhere, missing = [], [], [], []
    for concept in next(iter(saes.values()))["concepts"]:
        cells = {name: sae["concepts"][concept] for name, sae in saes.items()}
        best = max(cells, key=lambda name: cells[name]["train_auc"])
        held = cells[best]["held_out_auc"]
        rows.append(
            [
                concept,
                *(f"{c['feature']}: {c['train_auc']:.2f} / {c['held_out_auc']:.2f}" for c in cells.values()),
                f"{held:.2f} ({best})",
            ]
        )
        best_anywhere = max(c["held_out_auc"] for c in cells.values())
        (good if held >= ENOUGH else elsewhere if best_anywhere >= ENOUGH else missing).append(concept)
    verdict = paragraph(
        f"{len(good)} of {len(rows)} reach {ENOUGH} ({', '.join(good)}).",
        f"Only another SAE's best training feature does for: {', '.join(elsewhere) or 'none'}.",
        f"No SAE here has a single clean feature for: {', '.join(missing) or 'none'}; read what is steered",
        "towards these with that in mind.",
    )
    return f"""
## Does it know the concepts?

The best single feature per concept and SAE (largest activation in a sentence; chosen on 40 + 40
training sentences, scored on 20 + 20 held-out ones): feature, training AUC / held-out AUC. The last
column is the held-out AUC of the SAE that is best in training.

{table(["concept", *saes, "held out"], rows)}
{verdict}"""


def lines(found: list[list[str]]) -> str:
    """A list of [prompt, continuation]."""
    return "".join(f"- **{prompt}** {' '.join(text.split())}\n" for prompt, text in found)


def texts_sha256(figures: dict[str, Any]) -> str:
    """A hash of all samples that the card shows."""
    shown = [figures["samples"], figures["steered"]["concepts"]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def blind_look(figures: dict[str, Any]) -> str:
    """What a reader saw in the samples; nothing when these are not the samples that were read."""
    told = json.loads(BLIND.read_text("utf-8"))
    if told["texts_sha256"] != texts_sha256(figures):
        return ""
    rows = []
    for name, row in told["rows"].items():
        others = ", ".join(f"{count} {other}" for other, count in row["answers"].items() if other != name)
        rows.append([name, f"{row['answers'].get(name, 0)} of {row['texts']}", others, str(row["fluent"])])
    how = paragraph(
        f"{told['reader']} The texts of both sections were read in random order; the answer is the one concept that a",
        "text plainly shows, or none; fluent counts those that read mostly as English sentences.",
    )
    return f"""
## A blind look

{how}
{table(["steered towards", "named", "taken for", "fluent"], rows)}"""


def written(figures: dict[str, Any], index: dict[str, Any]) -> str:
    """Samples, steered and not, and what not to expect."""
    how = figures["steered"]
    told = paragraph(
        f"FGAA through the effect approximator of `{index['sae']}` (μ = {how['mu']}, bias weight",
        f"{how['bias_weight']}), at the coefficient that costs {how['texts']} neutral texts {how['ce_rise']} nats a",
        "token; prompts, seed and temperature as above, unselected.",
    )
    parts = [
        f"""
## Samples

Temperature 0.8, the first ten neutral prompts, seed {index["recipe"]["seed"]}, unselected:

{lines(figures["samples"])}
## Steered

{told}"""
    ]
    for concept, entry in how["concepts"].items():
        parts.append(f"\n### {concept}, coefficient {entry['coefficient']:.1f}\n\n{lines(entry['samples'])}")
    parts.append(blind_look(figures))
    parts.append(
        """
## What it can't do

It keeps a sentence together, not a story; it states no facts; it has no instruction following.
Steering it shifts vocabulary and topic, often at a visible cost to fluency. Do not draw conclusions
about larger models from it.
"""
    )
    return "".join(parts)


def render(folder: Path = HERE / "default") -> str:
    """The card of a built default."""
    figures, index = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("figures", "index")
    )
    recipe = index["recipe"]
    approximators = (
        effects(name, found, recipe, f"The effects at {name}", f"--sae-id {name} --dtype bfloat16")
        for name, found in figures["effects"].items()
    )
    return (
        introduction(figures, index)
        + data(figures, index["sources"])
        + autoencoders(figures, recipe)
        + features(figures, recipe)
        + "".join(approximators)
        + concepts(figures["saes"])
        + written(figures, index)
    )


if __name__ == "__main__":
    CARD.write_text(render(), encoding="utf-8")
