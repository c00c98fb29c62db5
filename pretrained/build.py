"""Rebuild the embedded default from a folder of corpora, stage by stage.

What: cleans the text, trains the tokenizer, the language model and the sparse
autoencoders, measures them, and writes everything that ships in ``default/``.
Why: every figure quoted about the default must be one command away.

    python pretrained/build.py --corpora DIR --work build/default

Each stage writes its output whole (beside, then renamed) and is skipped when that
output exists; language-model training and the measuring of effects also resume within.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import features
import numpy as np
import samples
import torch
from baselines import Trigram, xz_bits_per_byte
from concepts import KNOWN, best_single_features, choose_density, contrast_activations
from corpus import SOURCES, split_corpus
from lm import bits_per_byte, load_lm, train_lm, train_tokens
from recipe import Recipe
from saes import KINDS, quality, store_activations, train_sae

import fgsteer as fg
from fgsteer.effects.rollouts import Sampling
from fgsteer.storage.json_files import write_json

HERE = Path(__file__).resolve().parent
QUALITY_TEXTS = 40  # held-out documents of each source that an SAE's quality is measured on

Stage = tuple[Path, Callable[[], None]]


def held_out(work: Path) -> dict[str, list[str]]:
    """Held-out documents by source."""
    found: dict[str, list[str]] = json.loads((work / "held_out.json").read_text(encoding="utf-8"))
    return found


def quality_texts(work: Path) -> list[str]:
    """The held-out documents that an SAE's quality is measured on."""
    return [text for group in held_out(work).values() for text in group[:QUALITY_TEXTS] if len(text) > 100]


# ---------------------------------------------------------------- what each SAE gets


def stage_density(work: Path, folder: Path) -> None:
    """Density on the held-out documents, with the θ of FGAA's filter; and what the concepts look like."""
    model, tokenizer = load_lm(work)
    sae = fg.load_sae(folder)
    texts = [text for group in held_out(work).values() for text in group if len(text) > 20]
    density = fg.measure_density(model, tokenizer, sae, texts, corpus={"name": "held-out 1 %", "texts": len(texts)})
    activations = contrast_activations(model, tokenizer, sae)
    theta, table = choose_density(activations, density.density)
    write_json(
        folder / "figures.json",
        {
            "quality": quality(model, tokenizer, sae, quality_texts(work)),
            "concepts": best_single_features(activations),
            "max_density": theta,
            "density_auc": table,
        },
    )
    replace(density, max_density=theta).save(folder / "density.safetensors")


def read_features(
    model: Any, tokenizer: Any, sae: fg.SAE, pairs: Sequence[tuple[str, str]]
) -> tuple[fg.FeatureExamples, dict[int, str], dict[str, float]]:
    """(excerpts, labels, figures) of every feature on (source, text) pairs."""
    texts = [text for _, text in pairs]
    corpus = {"name": "training documents", "texts": len(texts)}
    options: dict[str, Any] = {"top": features.TOP, "window": features.WINDOW, "corpus": corpus}
    examples = fg.measure_examples(model, tokenizer, sae, texts, **options)
    return (examples, *features.label(examples, tokenizer))


def stage_feature_texts(corpora: Path, work: Path, recipe: Recipe) -> None:
    """The (source, text) pairs that features are read on."""
    write_json(work / "feature_texts.json", features.sample(split_corpus(corpora)[0], recipe.feature_texts))


def feature_texts(work: Path) -> list[tuple[str, str]]:
    """(source, text) pairs in random order."""
    return [tuple(pair) for pair in json.loads((work / "feature_texts.json").read_text(encoding="utf-8"))]


def stage_features(work: Path, folder: Path) -> None:
    """Excerpts and labels of every feature, from training documents of all sources."""
    model, tokenizer = load_lm(work)
    pairs = feature_texts(work)
    examples, labels, figures = read_features(model, tokenizer, fg.load_sae(folder), pairs)
    allowed = {source.file for source in SOURCES if source.excerpts}
    features.shippable(examples, [source for source, _ in pairs], allowed).save(folder / "examples.safetensors")
    write_json(folder / "features.json", figures)
    write_json(folder / "labels.json", {str(feature): text for feature, text in labels.items()})


def stage_effects(work: Path, recipe: Recipe, folder: Path) -> None:
    """Measure and fit the effect approximator in bfloat16, a part at a time; stored in float16."""
    model, tokenizer = load_lm(work)
    texts, prompts = fg.load_neutral()
    measured = fg.EffectApproximator.measure(
        model.to(torch.bfloat16),
        tokenizer,
        fg.load_sae(folder),
        vectors=recipe.effects_vectors,
        prompts=prompts,
        texts=texts[: recipe.effects_texts],
        rollouts=recipe.effects_rollouts,
        target_ce_rise=recipe.effects_ce_rise,
        sampling=Sampling(max_new_tokens=recipe.effects_tokens, top_p=recipe.effects_top_p, seed=recipe.seed),
        work=work / "effects.parts",
        progress=lambda done: print(f"effects of {done} vectors", flush=True),
    )
    replace(measured, M=measured.M.half(), b=measured.b.half()).save(folder / "effects.safetensors")


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
                    **quality(model, tokenizer, sae, texts),
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
            "effects": {folder.name: effects.about},
            "steered": samples.steered(model, tokenizer, fg.load_sae(folder), effects, recipe.seed),
        },
    )


def stage_pack(work: Path, recipe: Recipe, target: Path) -> None:
    """Copy what ships into the package's folder, with an index of hashes, sizes and licences."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(work / "lm", part / "model")
    shutil.copytree(work / "tokenizer", part / "model", dirs_exist_ok=True)
    for layer in recipe.sae_layers:
        folder = sae_folder(work, layer)
        own = shutil.ignore_patterns("figures.json", "features.json")
        shutil.copytree(folder, part / "sae" / folder.name, ignore=own)
    shutil.copy(work / "figures.json", part / "figures.json")
    files = {
        str(path.relative_to(part)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }
    index = {
        "command": "python pretrained/build.py --corpora DIR --work build/default",
        "recipe": asdict(recipe),
        "sae": sae_folder(work, recipe.middle).name,
        "sources": [asdict(source) for source in SOURCES],
        "licence": "Apache-2.0 (weights)",
        "files": files,
    }
    write_json(part / "index.json", index)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)


def stages(corpora: Path, work: Path, recipe: Recipe, target: Path) -> Iterator[Stage]:
    """(output, what makes it), in order; a stage is skipped when its output exists."""
    yield work / "train.npy", lambda: train_tokens(corpora, work, recipe)
    yield work / "lm", lambda: train_lm(work, recipe)
    yield work / "feature_texts.json", lambda: stage_feature_texts(corpora, work, recipe)
    yield work / "activations", lambda: store_activations(work, recipe)
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
    yield folder / "density.safetensors", lambda: stage_density(work, folder)
    yield folder / "labels.json", lambda: stage_features(work, folder)
    if layer == recipe.middle:
        yield folder / "effects.safetensors", lambda: stage_effects(work, recipe, folder)


def main() -> None:
    """Run the stages in order, skipping those whose output exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the text files")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--target", type=Path, default=HERE / "default", help="folder that ships")
    parser.add_argument("--recipe", type=json.loads, default={}, help='JSON of recipe fields, {"steps": 10}')
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--until", default="", help="name of the last output to make")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.recipe.items()}
    recipe, work = Recipe(**given), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for output, stage in stages(arguments.corpora, work, recipe, arguments.target):
        name = "/".join(output.parts[len(work.parts) :]) if output.is_relative_to(work) else output.name
        if not output.exists():
            print(f"building {name}", flush=True)
            began = time.monotonic()
            output.parent.mkdir(parents=True, exist_ok=True)
            stage()
            print(f"built {name} in {time.monotonic() - began:.0f} s", flush=True)
        if name == arguments.until:
            break


if __name__ == "__main__":
    main()
