"""Rebuild the embedded default from a folder of corpora, stage by stage.

What: cleans the text, trains the tokenizer, the language model and the sparse
autoencoders, measures them, and writes everything that ships in ``default/``.
Why: every figure quoted about the default must be one command away.

    python pretrained/build.py --corpora DIR --work build/default

Each stage writes its output whole (beside, then renamed) and is skipped when that
output exists; language-model training and the measuring of effects also resume within.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import features
import numpy as np
import samples
import torch
from baselines import Trigram, xz_bits_per_byte
from concepts import KNOWN, best_single_features, contrast_activations
from corpus import SOURCES, split_corpus
from lm import bits_per_byte, load_lm, train_lm, train_tokens
from recipe import Recipe
from stages import (
    Stage,
    build,
    pack,
    quality,
    read_features,
    train,
    write_density,
    write_effects,
    write_features,
)

import fgsteer as fg
from fgsteer.storage.json_files import write_json
from fgsteer.training.settings import KINDS

HERE = Path(__file__).resolve().parent
QUALITY_TEXTS = 40  # held-out documents of each source that an SAE's quality is measured on


def held_out(work: Path) -> dict[str, list[str]]:
    """Held-out documents by source."""
    found: dict[str, list[str]] = json.loads((work / "held_out.json").read_text(encoding="utf-8"))
    return found


def quality_texts(work: Path) -> list[str]:
    """The held-out documents that an SAE's quality is measured on."""
    return [text for group in held_out(work).values() for text in group[:QUALITY_TEXTS] if len(text) > 100]


# ---------------------------------------------------------------- what each SAE gets


def stage_density(work: Path, recipe: Recipe, folder: Path) -> None:
    """Density on the held-out documents, with the θ of FGAA's filter; quality; and what the concepts look like."""
    texts = [text for group in held_out(work).values() for text in group if len(text) > 20]
    write_density(*load_lm(work), folder, texts, quality_texts(work), recipe.context)


def stage_activations(corpora: Path, work: Path, recipe: Recipe) -> None:
    """Activations at every layer that gets an SAE, of training documents in random order."""
    documents = [document for group in split_corpus(corpora)[0].values() for document in group]
    random.Random(recipe.seed + 1).shuffle(documents)
    fg.store_activations(
        *load_lm(work),
        documents,
        [fg.Hookpoint(layer) for layer in recipe.sae_layers],
        work / "activations",
        tokens=recipe.sae_tokens,
        context=recipe.context,
    )


def train_sae(
    target: Path, work: Path, recipe: Recipe, layer: int, kind: str = "", seed: int = 0, tokens: int = 0
) -> None:
    """Train the SAE of a layer, by default of the recipe's kind on all tokens."""
    settings = fg.SAETraining(
        kind=kind or recipe.sae_kind,  # type: ignore[arg-type]
        d_sae=recipe.sae_width,
        k=recipe.sae_k,
        tokens=tokens or recipe.sae_tokens,
        batch=recipe.sae_batch,
        lr=recipe.sae_lr,
        warm_up=0.05,
        decay=0.25,
        dead_window=0.1,
        seed=recipe.seed + seed,
        dtype="float16",
        autocast=recipe.sae_autocast,
    )
    metadata = {
        "model_name": "fgsteer/default",
        "hf_hook_name": f"model.layers.{layer}",
        "context_size": recipe.context,
        "prepend_bos": True,
    }
    train(work / "activations", target, layer, settings, metadata)


def stage_feature_texts(corpora: Path, work: Path, recipe: Recipe) -> None:
    """The (source, text) pairs that features are read on."""
    write_json(work / "feature_texts.json", features.sample(split_corpus(corpora)[0], recipe.feature_texts))


def feature_texts(work: Path) -> list[tuple[str, str]]:
    """(source, text) pairs in random order."""
    return [tuple(pair) for pair in json.loads((work / "feature_texts.json").read_text(encoding="utf-8"))]


def stage_features(work: Path, folder: Path) -> None:
    """Excerpts and labels of every feature, from training documents of all sources."""
    write_features(*load_lm(work), folder, feature_texts(work), {source.file for source in SOURCES if source.excerpts})


def stage_effects(work: Path, recipe: Recipe, folder: Path) -> None:
    """The effect approximator, measured in bfloat16."""
    model, tokenizer = load_lm(work)
    write_effects(model.to(torch.bfloat16), tokenizer, folder, work / f"effects.parts.{folder.name}", recipe)


# ---------------------------------------------------------------- comparison of kinds, figures, packing


def stage_compare(work: Path, recipe: Recipe) -> None:
    """Every kind of SAE with every seed at the middle layer: quality, concepts, share of features about one thing."""
    model, tokenizer = load_lm(work)
    texts = quality_texts(work)
    pairs = feature_texts(work)[: recipe.compare_texts]
    rows = []
    for kind in KINDS:
        for seed in range(recipe.compare_seeds):
            folder = work / "compare" / f"{kind}-{seed}"
            folder.parent.mkdir(exist_ok=True)
            if not folder.exists():
                train_sae(folder, work, recipe, recipe.middle, kind, seed, recipe.compare_tokens)
            if not (folder / "row.json").exists():
                sae = fg.load_sae(folder)
                found = [
                    c["held_out_auc"]
                    for c in best_single_features(contrast_activations(model, tokenizer, sae)).values()
                ]
                row = {
                    "kind": kind,
                    "seed": seed,
                    **quality(model, tokenizer, sae, texts, recipe.context),
                    "concepts": sum(found) / len(found),
                    "concepts_known": sum(value >= KNOWN for value in found),
                    **read_features(model, tokenizer, sae, pairs)[2],
                }
                write_json(folder / "row.json", row)
                print(row, flush=True)
            rows.append(json.loads((folder / "row.json").read_text(encoding="utf-8")))
    write_json(work / "comparison.json", {"layer": recipe.middle, "tokens": recipe.compare_tokens, "rows": rows})


def baselines(work: Path, held: dict[str, list[str]], tokenizer: Any) -> dict[str, float]:
    """Bits per byte of the held-out texts by a trigram model of the training tokens, and by xz."""
    trigram = Trigram(np.load(work / "train.npy"), len(tokenizer))
    texts = [text for group in held.values() for text in group]
    bits = sum(trigram.bits(np.asarray(tokenizer(text)["input_ids"])) for text in texts)
    return {"trigram": bits / sum(len(t.encode()) for t in texts), "xz": xz_bits_per_byte(texts)}


def stage_scale(work: Path, recipe: Recipe) -> None:
    """Bits per byte of the language model on every source, and what simpler models need."""
    model, tokenizer = load_lm(work)
    held = held_out(work)
    sizes = {name: sum(len(t.encode()) for t in texts) for name, texts in held.items()}
    found = {name: bits_per_byte(model, tokenizer, texts, recipe.context) for name, texts in held.items()}
    found["mix"] = sum(found[name] * sizes[name] for name in held) / sum(sizes.values())
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": recipe.steps * recipe.batch * recipe.context,
        "epochs": recipe.steps * recipe.batch / (len(np.load(work / "train.npy", mmap_mode="r")) // recipe.context),
        "bits_per_byte": found,
        "held_out_bytes": sizes,
        "baselines": baselines(work, held, tokenizer),
        "samples": samples.unsteered(model, tokenizer, recipe.seed),
    }
    write_json(work / "lm.json", figures)


def stage_figures(work: Path, recipe: Recipe) -> None:
    """Everything that the model card quotes, in one file."""
    model, tokenizer = load_lm(work)
    folder = sae_folder(work, recipe.middle)
    effects = fg.EffectApproximator.load(folder / "effects.safetensors")

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    saes = {}
    for layer in recipe.sae_layers:
        at = sae_folder(work, layer)
        saes[at.name] = {**read(at / "figures.json"), "features": read(at / "features.json")}
    write_json(
        work / "figures.json",
        {
            **read(work / "lm.json"),
            "saes": saes,
            "comparison": read(work / "comparison.json"),
            "effects": {
                at.name: fg.EffectApproximator.load(at / "effects.safetensors").about
                for at in (sae_folder(work, layer) for layer in recipe.effects_layers)
            },
            "steered": samples.steered(model, tokenizer, fg.load_sae(folder), effects, recipe.seed),
        },
    )


def stage_pack(work: Path, recipe: Recipe, target: Path) -> None:
    """Copy what ships into the package's folder, with an index of hashes, sizes and licences."""
    index = {
        "command": "python pretrained/build.py --corpora DIR --work build/default",
        "recipe": asdict(recipe),
        "sae": sae_folder(work, recipe.middle).name,
        "sources": [asdict(source) for source in SOURCES],
        "licence": "Apache-2.0 (weights)",
    }
    folders = {"model": work / "lm", "model/": work / "tokenizer"}
    folders |= {f"sae/{folder.name}": folder for folder in (sae_folder(work, layer) for layer in recipe.sae_layers)}
    pack(target, folders, index, work / "figures.json")


def stages(corpora: Path, work: Path, recipe: Recipe, target: Path) -> Iterator[Stage]:
    """(output, what makes it), in order; a stage is skipped when its output exists."""
    yield work / "train.npy", lambda: train_tokens(corpora, work, recipe)
    yield work / "lm", lambda: train_lm(work, recipe)
    yield work / "feature_texts.json", lambda: stage_feature_texts(corpora, work, recipe)
    yield work / "activations" / "index.json", lambda: stage_activations(corpora, work, recipe)
    yield work / "comparison.json", lambda: stage_compare(work, recipe)
    for layer in sorted(recipe.sae_layers, key=lambda layer: layer != recipe.middle):  # the default one first
        yield from sae_stages(work, recipe, layer)
    yield work / "lm.json", lambda: stage_scale(work, recipe)
    yield work / "figures.json", lambda: stage_figures(work, recipe)
    yield target / "index.json", lambda: stage_pack(work, recipe, target)


def sae_folder(work: Path, layer: int) -> Path:
    """Where the SAE of a layer, and what was measured of it, are kept."""
    return work / "sae" / f"layer_{layer}"


def sae_stages(work: Path, recipe: Recipe, layer: int) -> Iterator[Stage]:
    """The stages of one SAE."""
    folder = sae_folder(work, layer)
    yield folder, lambda: train_sae(folder, work, recipe, layer)
    yield folder / "density.safetensors", lambda: stage_density(work, recipe, folder)
    yield folder / "labels.json", lambda: stage_features(work, folder)
    if layer in recipe.effects_layers:
        yield folder / "effects.safetensors", lambda: stage_effects(work, recipe, folder)


if __name__ == "__main__":
    build(stages, Recipe, HERE / "default", __doc__)
