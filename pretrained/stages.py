"""What every shipped SAE gets beside its weights: density, figures, excerpts, labels, effects; and the packing.

Why a module of its own: the embedded default and SmolLM2 are built from the same stages.

    write_density(model, tokenizer, folder, held_out, quality_texts)
    write_features(model, tokenizer, folder, pairs, allowed)
    write_effects(model, tokenizer, folder, parts, ...)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import features
import torch
from concepts import best_single_features, choose_density, contrast_activations

import fgsteer as fg
from fgsteer.effects.rollouts import Sampling
from fgsteer.storage.json_files import write_json

Stage = tuple[Path, Callable[[], None]]


def quality(model: Any, tokenizer: Any, sae: fg.SAE, texts: Sequence[Any], context: int) -> dict[str, float]:
    """Figures of an SAE on held-out texts, under the names that figures.json has."""
    measured = fg.measure_sae(model, tokenizer, sae, texts, context=context).as_dict()
    names = {"dead": "dead_share", "ce_score": "ce_recovered"}
    return {names.get(name, name): value for name, value in measured.items()}


def write_density(
    model: Any, tokenizer: Any, folder: Path, texts: Sequence[str], quality_texts: Sequence[Any], context: int
) -> None:
    """Density on held-out documents, with the θ of FGAA's filter; quality; and what the concepts look like."""
    sae = fg.load_sae(folder)
    density = fg.measure_density(model, tokenizer, sae, texts, corpus={"name": "held-out 1 %", "texts": len(texts)})
    activations = contrast_activations(model, tokenizer, sae)
    theta, table = choose_density(activations, density.density)
    write_json(
        folder / "figures.json",
        {
            "quality": quality(model, tokenizer, sae, quality_texts, context),
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


def write_features(
    model: Any, tokenizer: Any, folder: Path, pairs: Sequence[tuple[str, str]], allowed: set[str]
) -> None:
    """Excerpts and labels of every feature, from training documents of all sources; excerpts of the allowed ship."""
    examples, labels, figures = read_features(model, tokenizer, fg.load_sae(folder), pairs)
    features.shippable(examples, [source for source, _ in pairs], allowed).save(folder / "examples.safetensors")
    write_json(folder / "features.json", figures)
    write_json(folder / "labels.json", {str(feature): text for feature, text in labels.items()})


def write_effects(model: Any, tokenizer: Any, folder: Path, parts: Path, recipe: Any) -> None:
    """Measure and fit the effect approximator, a part at a time; stored in float16."""
    texts, prompts = fg.load_neutral()
    measured = fg.EffectApproximator.measure(
        model,
        tokenizer,
        fg.load_sae(folder),
        vectors=recipe.effects_vectors,
        prompts=prompts,
        texts=texts[: recipe.effects_texts],
        rollouts=recipe.effects_rollouts,
        target_ce_rise=recipe.effects_ce_rise,
        sampling=Sampling(max_new_tokens=recipe.effects_tokens, top_p=recipe.effects_top_p, seed=recipe.seed),
        rows=recipe.effects_rows,
        work=parts,
        progress=lambda done: print(f"effects of {done} vectors", flush=True),
    )
    replace(measured, M=measured.M.half(), b=measured.b.half()).save(folder / "effects.safetensors")


def pack(target: Path, folders: Mapping[str, Path], index: Mapping[str, Any], figures: Path) -> None:
    """Copy what ships, with an index of hashes and sizes that is written last; other files of the folder stay.

    Args:
        target: The folder that ships.
        folders: What is copied, by its place there; files that only the build needs are left out.
        index: What index.json holds besides the files.
        figures: The file of figures.
    """
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    own = shutil.ignore_patterns("figures.json", "features.json", "row.json")
    for place, folder in folders.items():
        shutil.copytree(folder, part / place, dirs_exist_ok=True, ignore=own)
    shutil.copy(figures, part / "figures.json")
    files = {
        str(path.relative_to(part)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }
    write_json(part / "index.json", {**index, "files": files})
    target.mkdir(exist_ok=True)
    (target / "index.json").unlink(missing_ok=True)
    for path in sorted(
        part.iterdir(), key=lambda path: path.name == "index.json"
    ):  # last, as it says that all is there
        if (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)
    part.rmdir()


def build(stages: Callable[..., Iterable[Stage]], recipe: type[Any], target: Path, about: str | None) -> None:
    """Run the stages of a recipe in order, as the command line says, skipping those whose output exists."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the text files")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--target", type=Path, default=target, help="folder that ships")
    parser.add_argument("--recipe", type=json.loads, default={}, help='JSON of recipe fields, {"seed": 1}')
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--until", default="", help="name of the last output to make")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # ten bits of mantissa are as many as the weights ship with
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.recipe.items()}
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for output, stage in stages(arguments.corpora, work, recipe(**given), arguments.target):
        name = "/".join(output.parts[len(work.parts) :]) if output.is_relative_to(work) else output.name
        if not output.exists():
            print(f"building {name}", flush=True)
            began = time.monotonic()
            output.parent.mkdir(parents=True, exist_ok=True)
            stage()
            print(f"built {name} in {time.monotonic() - began:.0f} s", flush=True)
        if name == arguments.until:
            break


def train(store: Path, out: Path, layer: int, settings: fg.SAETraining, metadata: dict[str, Any]) -> None:
    """Train the SAE of a layer on stored activations."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out.parent.mkdir(parents=True, exist_ok=True)
    fg.fit_sae(
        fg.ActivationStore(store),
        fg.Hookpoint(layer),
        out,
        settings=settings,
        metadata=metadata,
        device=device,
        progress=_report,
    )


def _report(done: int, total: int) -> None:
    """Say now and then how far training is."""
    if done % max(1, total // 50) == 0:
        print(f"step {done} of {total}", flush=True)
