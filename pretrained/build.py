"""Rebuild the embedded default from a folder of corpora, stage by stage.

What: cleans the text, trains the tokenizer, the language model and the sparse
autoencoder, measures them, and writes everything that ships in ``default/``.
Why: every figure quoted about the default must be one command away.

    python pretrained/build.py --corpora DIR --work build/default

Each stage writes its output whole (beside, then renamed) and is skipped when that
output exists; language-model training also checkpoints and resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import features
import numpy as np
import torch
from baselines import Trigram, xz_bits_per_byte
from corpus import SOURCES, split_corpus, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fgsteer as fg
from fgsteer.files import whole, write_json
from fgsteer.rollouts import Sampling

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """Every number that the result depends on."""

    seed: int = 0
    vocab_size: int = 4096
    layers: int = 4
    d_model: int = 256
    d_mlp: int = 704
    context: int = 256  # tokens in a training block
    batch: int = 64  # blocks in an optimizer step
    steps: int = 1500
    warmup: int = 50  # steps
    decay: float = 0.6  # final share of the steps over which the rate falls linearly to 0
    lr_matrix: float = 0.02  # Muon, on the blocks' matrices
    lr_other: float = 3e-3  # AdamW, on embedding and norms
    compile: bool = True
    sae_layer: int = 1  # resid_post
    sae_width: int = 4096
    sae_k: int = 24
    sae_tokens: int = 2_500_000
    sae_batch: int = 4096  # tokens in an optimizer step
    sae_lr: float = 8e-4
    feature_texts: int = 8000  # beginnings of training documents that features are read on
    effects_vectors: int = 4096  # decoder rows measured
    effects_texts: int = 8  # neutral texts that set each row's strength
    effects_ce_rise: float = 0.5  # nats a token that it costs them
    effects_rollouts: int = 2  # of each neutral prompt
    effects_tokens: int = 24
    effects_top_p: float = 1.0


# ---------------------------------------------------------------- tokens and language model


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file whole."""
    with whole(path) as beside, open(beside, "wb") as file:
        np.save(file, array)


def stage_tokens(corpora: Path, work: Path, recipe: Recipe) -> None:
    """Tokenizer, the shuffled training stream, and the held-out documents."""
    train, held = split_corpus(corpora)
    everything = [document for group in train.values() for document in group]
    order = np.random.default_rng(recipe.seed).permutation(len(everything))
    sample = [everything[i] for i in order[: max(1, len(order) // 3)]]
    tokenizer = train_tokenizer(sample, recipe.vocab_size, recipe.context)
    tokenizer.save_pretrained(work / "tokenizer")
    pieces: list[np.ndarray] = []
    for start in range(0, len(order), 4096):
        batch = [everything[i] for i in order[start : start + 4096]]
        pieces.extend(np.asarray(ids, dtype=np.uint16) for ids in tokenizer(batch)["input_ids"])
    write_json(work / "held_out.json", held)
    save_array(work / "train.npy", np.concatenate(pieces))


def rate(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: linear warm-up, flat, linear to zero."""
    left = (recipe.steps - step) / max(1, recipe.decay * recipe.steps)
    return min((step + 1) / recipe.warmup, 1.0, left)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained language model."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.d_model // 64,
        num_key_value_heads=recipe.d_model // 64,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def new_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.lr_matrix, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.lr_other, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def stage_lm(work: Path, recipe: Recipe) -> None:
    """Train the language model in bf16 autocast; resumes from its last checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(recipe).to(device)
    tokens = np.load(work / "train.npy", mmap_mode="r")
    blocks = len(tokens) // recipe.context
    order = np.random.default_rng(recipe.seed).permutation(blocks)
    optimizers = new_optimizers(model, recipe)
    first, checkpoint = 0, work / "lm.checkpoint"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    forward = torch.compile(model) if recipe.compile else model
    began, seen = time.time(), 0
    for step in range(first, recipe.steps):
        picks = [order[i % blocks] for i in range(step * recipe.batch, (step + 1) * recipe.batch)]
        rows = np.stack([tokens[b * recipe.context : (b + 1) * recipe.context] for b in picks])
        ids = torch.from_numpy(rows.astype(np.int64)).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, (recipe.lr_matrix, recipe.lr_other), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        if step % 20 == 0 or step == recipe.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {seen / (time.time() - began):.0f} tokens/s", flush=True)
        if (step + 1) % 100 == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            with whole(checkpoint) as beside:
                torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1}, beside)
    model.to(torch.bfloat16).save_pretrained(work / "lm.part")
    os.replace(work / "lm.part", work / "lm")


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, tokenizer: object, texts: list[str], context: int) -> float:
    """Mean bits per UTF-8 byte of the texts, each scored in blocks of ``context`` tokens."""
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[operator]
        size += len(text.encode())
        for start in range(0, ids.shape[1] - 1, context - 1):
            block = ids[:, start : start + context]
            logits = model(block).logits.float()[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits, block[0, 1:], reduction="sum").item()
    return nats / math.log(2) / max(1, size)


def load_lm(work: Path) -> tuple[torch.nn.Module, object]:
    """The trained model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(work / "lm", dtype=torch.float32).eval()
    model.config._name_or_path = "fgsteer/default"
    return model, AutoTokenizer.from_pretrained(work / "tokenizer")


# ---------------------------------------------------------------- sparse autoencoder


def activation_stream(work: Path, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless shuffled batches (sae_batch, d_model) of activations on the training stream.

    Every block starts with the end-of-text token, whose own activation is left out.
    """
    model, _ = load_lm(work)
    tokens = np.load(work / "train.npy", mmap_mode="r")
    hookpoint = fg.Hookpoint(recipe.sae_layer)
    width, rng = recipe.context - 1, np.random.default_rng(recipe.seed + 1)
    order = rng.permutation(len(tokens) // width)
    pool = torch.empty(0, recipe.d_model)
    at = 0
    while True:
        fresh = [pool]
        while sum(map(len, fresh)) < 16 * recipe.sae_batch:
            picks = [order[(at + i) % len(order)] for i in range(32)]
            at += 32
            rows = np.stack([tokens[b * width : (b + 1) * width] for b in picks]).astype(np.int64)
            ids = torch.from_numpy(np.pad(rows, ((0, 0), (1, 0))))
            fresh.append(fg.record(model, ids, None, [hookpoint])[hookpoint][:, 1:].reshape(-1, recipe.d_model))
        pool = torch.cat(fresh)
        pool = pool[torch.from_numpy(rng.permutation(len(pool)))]
        for _ in range(8):
            yield pool[: recipe.sae_batch]
            pool = pool[recipe.sae_batch :]


def stage_sae(work: Path, recipe: Recipe) -> None:
    """Train a TopK SAE with sae-lens and save it, its input scaling folded in, in float16."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(recipe.seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=recipe.d_model,
            d_sae=recipe.sae_width,
            k=recipe.sae_k,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(
                model_name="fgsteer/default",
                hook_name=f"blocks.{recipe.sae_layer}.hook_resid_post",
                hf_hook_name=f"model.layers.{recipe.sae_layer}",
                context_size=recipe.context,
                prepend_bos=True,
            ),
        )
    )
    steps = recipe.sae_tokens // recipe.sae_batch
    config = SAETrainerConfig(
        total_training_samples=steps * recipe.sae_batch,
        train_batch_size_samples=recipe.sae_batch,
        lr=recipe.sae_lr,
        lr_end=recipe.sae_lr / 10,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 4,
        autocast=True,
        dead_feature_window=max(20, steps // 10),
        n_batches_for_norm_estimate=8,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trained = SAETrainer(cfg=config, sae=sae, data_provider=activation_stream(work, recipe)).fit()
    trained.to(dtype=torch.float16)
    trained.save_inference_model(work / "sae.part")
    os.replace(work / "sae.part", work / "sae")


@torch.no_grad()
def sae_figures(work: Path, texts: list[str]) -> dict[str, float]:
    """Explained variance, L0, dead share and CE recovered of the SAE on held-out texts."""
    model, tokenizer = load_lm(work)
    sae = fg.load_sae(work / "sae")
    residual = total = active = 0.0
    count, fired = 0, torch.zeros(sae.d_sae, dtype=torch.bool)
    losses = {"plain": 0.0, "spliced": 0.0, "zeroed": 0.0}
    mean = torch.zeros(sae.d_model)
    inputs = [tokenizer(text, return_tensors="pt", truncation=True)["input_ids"] for text in texts]  # type: ignore[operator]
    rows = [fg.record(model, ids, None, [sae.hookpoint])[sae.hookpoint][0, 1:] for ids in inputs]
    mean = torch.cat(rows).mean(0)
    module = model.model.layers[sae.hookpoint.layer]  # type: ignore[union-attr]
    for ids, h in zip(inputs, rows, strict=True):
        acts = sae.encode(h)
        residual += float((h - sae.decode(acts)).square().sum())
        total += float((h - mean).square().sum())
        active += float((acts > 0).sum())
        fired |= (acts > 0).any(0)
        count += len(h)
        for name in losses:

            def splice(_: object, __: object, out: torch.Tensor, name: str = name) -> torch.Tensor:
                new = {"plain": out[:, 1:], "spliced": sae.reconstruct(out[:, 1:]), "zeroed": out[:, 1:] * 0}[name]
                return torch.cat([out[:, :1], new], 1)

            handle = module.register_forward_hook(splice)
            losses[name] += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            handle.remove()
    recovered = (losses["zeroed"] - losses["spliced"]) / (losses["zeroed"] - losses["plain"])
    return {
        "tokens": count,
        "explained_variance": 1 - residual / total,
        "l0": active / count,
        "dead_share": 1 - float(fired.float().mean()),
        "ce_recovered": recovered,
        "ce": losses["plain"] / count,
        "ce_spliced": losses["spliced"] / count,
    }


# ---------------------------------------------------------------- density, figures, packing


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Share of (positive, negative) pairs in order; ties count half."""
    above = (positive[:, None] > negative[None]).double() + 0.5 * (positive[:, None] == negative[None]).double()
    return float(above.mean())


def example_features(model: torch.nn.Module, tokenizer: object, sae: fg.SAE, texts: list[str]) -> torch.Tensor:
    """Mean feature activations (texts, d_sae) over each text's tokens besides the first."""
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[operator]
        rows.append(sae.encode(fg.record(model, ids, None, [sae.hookpoint])[sae.hookpoint][0, 1:]).mean(0))
    return torch.stack(rows)


def stage_density(work: Path) -> None:
    """Density on the held-out documents, and the θ of FGAA's filter that ranks held-out sentences best.

    θ is the smallest of the grid whose mean AUC over the shipped concepts (weights chosen on the
    training sentences, scored on the held-out ones) is within 0.005 of the best.
    """
    model, tokenizer = load_lm(work)
    sae = fg.load_sae(work / "sae")
    held = json.loads((work / "held_out.json").read_text())
    texts = [text for group in held.values() for text in group if len(text) > 20]
    density = fg.measure_density(model, tokenizer, texts, sae, corpus={"name": "held-out 1 %", "texts": len(texts)})
    examples = {}
    for name in fg.shipped_contrasts():
        contrast = fg.load_contrast(name)
        assert contrast.held_out is not None
        sides = [
            example_features(model, tokenizer, sae, list(x))
            for c in (contrast, contrast.held_out)
            for x in (c.positives, c.negatives)
        ]
        examples[name] = sides
    table: dict[str, dict[str, float]] = {}
    for theta in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1.0):
        scores = {}
        for name, (up, down, up_held, down_held) in examples.items():
            weights = torch.where(density.density > theta, 0.0, (up.mean(0) - down.mean(0)).double())
            top = weights.topk(16).indices
            chosen = torch.zeros_like(weights).index_put_((top,), weights[top].clamp(min=0)).float()
            scores[name] = auc(up_held @ chosen, down_held @ chosen)
        table[str(theta)] = {"mean": sum(scores.values()) / len(scores), **scores}
    best = max(row["mean"] for row in table.values())
    chosen_theta = min(float(theta) for theta, row in table.items() if row["mean"] >= best - 0.005)
    write_json(work / "density.json", {"max_density": chosen_theta, "auc": table})
    fg.FeatureDensity(**{**vars(density), "max_density": chosen_theta}).save(work / "density.safetensors")


def stage_features(corpora: Path, work: Path, recipe: Recipe) -> None:
    """Excerpts and labels of every feature, from training documents of all sources."""
    model, tokenizer = load_lm(work)
    sae = fg.load_sae(work / "sae")
    pairs = features.sample(split_corpus(corpora)[0], recipe.feature_texts)
    texts, sources = [text for _, text in pairs], [source for source, _ in pairs]
    examples = fg.measure_examples(
        model,
        tokenizer,
        texts,
        sae,
        top=features.TOP,
        window=features.WINDOW,
        corpus={"name": "training documents", "texts": len(texts)},
    )
    labels, figures = features.label(examples, tokenizer)
    allowed = {source.file for source in SOURCES if source.excerpts}
    features.shippable(examples, sources, allowed).save(work / "examples.safetensors")
    write_json(work / "features.json", figures)
    write_json(work / "labels.json", {str(feature): text for feature, text in labels.items()})


def stage_effects(work: Path, recipe: Recipe) -> None:
    """Measure and fit the effect approximator in bfloat16, a part at a time; stored in float16."""
    model, tokenizer = load_lm(work)
    texts, prompts = fg.load_neutral()
    measured = fg.EffectApproximator.measure(
        model.to(torch.bfloat16),  # type: ignore[arg-type]
        tokenizer,  # type: ignore[arg-type]
        fg.load_sae(work / "sae"),
        vectors=recipe.effects_vectors,
        prompts=prompts,
        texts=texts[: recipe.effects_texts],
        rollouts=recipe.effects_rollouts,
        target_ce_rise=recipe.effects_ce_rise,
        sampling=Sampling(max_new_tokens=recipe.effects_tokens, top_p=recipe.effects_top_p, seed=recipe.seed),
        work=work / "effects.parts",
        progress=lambda done: print(f"effects of {done} vectors", flush=True),
    )
    replace(measured, M=measured.M.half(), b=measured.b.half()).save(work / "effects.safetensors")


def single_feature_auc(work: Path) -> dict[str, dict[str, float]]:
    """Per concept, the best single feature (max over tokens, chosen on train) and its held-out AUC."""
    model, tokenizer = load_lm(work)
    sae = fg.load_sae(work / "sae")
    result = {}
    for name in fg.shipped_contrasts():
        contrast = fg.load_contrast(name)
        assert contrast.held_out is not None
        peaks = []
        for part in (contrast, contrast.held_out):
            for texts in (part.positives, part.negatives):
                rows = []
                for text in texts:
                    ids = tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[operator]
                    acts = sae.encode(fg.record(model, ids, None, [sae.hookpoint])[sae.hookpoint][0, 1:])
                    rows.append(acts.amax(0))
                peaks.append(torch.stack(rows))
        train = torch.tensor([auc(peaks[0][:, j], peaks[1][:, j]) for j in range(sae.d_sae)])
        best = int(train.argmax())
        result[name] = {
            "feature": best,
            "train_auc": float(train[best]),
            "held_out_auc": auc(peaks[2][:, best], peaks[3][:, best]),
        }
    return result


def baselines(work: Path, held: dict[str, list[str]], tokenizer: object) -> dict[str, float]:
    """Bits per byte of the held-out texts by a trigram model of the training tokens, and by xz."""
    trigram = Trigram(np.load(work / "train.npy"), len(tokenizer))  # type: ignore[arg-type]
    texts = [text for group in held.values() for text in group]
    bits = sum(trigram.bits(np.asarray(tokenizer(text)["input_ids"])) for text in texts)  # type: ignore[operator]
    return {"trigram": bits / sum(len(t.encode()) for t in texts), "xz": xz_bits_per_byte(texts)}


def stage_figures(work: Path, recipe: Recipe) -> None:
    """Everything that the model card quotes, in one file."""
    model, tokenizer = load_lm(work)
    held = json.loads((work / "held_out.json").read_text())
    per_source = {name: bits_per_byte(model, tokenizer, texts, recipe.context) for name, texts in held.items()}
    sizes = {name: sum(len(t.encode()) for t in texts) for name, texts in held.items()}
    mix = sum(per_source[n] * sizes[n] for n in held) / sum(sizes.values())
    texts = [text for group in held.values() for text in group[:40] if len(text) > 100]
    _, prompts = fg.load_neutral()
    torch.manual_seed(recipe.seed)
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 48}
    samples = fg.generate(model, tokenizer, prompts[:10], **options)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": recipe.steps * recipe.batch * recipe.context,
        "bits_per_byte": {"mix": mix, **per_source},
        "held_out_bytes": sizes,
        "baselines": baselines(work, held, tokenizer),
        "sae": sae_figures(work, texts),
        "concepts": single_feature_auc(work),
        "features": json.loads((work / "features.json").read_text()),
        "effects": fg.EffectApproximator.load(work / "effects.safetensors").about,
        "samples": [[prompt, text] for prompt, text in zip(prompts, samples, strict=False)],
    }
    write_json(work / "figures.json", figures)


def stage_pack(work: Path, recipe: Recipe, target: Path) -> None:
    """Copy what ships into the package's folder, with an index of hashes, sizes and licences."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(work / "lm", part / "model")
    shutil.copytree(work / "tokenizer", part / "model", dirs_exist_ok=True)
    shutil.copytree(work / "sae", part / "sae")
    for name in ("density.safetensors", "examples.safetensors", "labels.json"):
        shutil.copy(work / name, part / "sae" / name)
    for name in ("effects.safetensors", "figures.json", "density.json"):
        shutil.copy(work / name, part / name)
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
        "sources": [asdict(source) for source in SOURCES],
        "licence": "Apache-2.0 (weights)",
        "files": files,
    }
    write_json(part / "index.json", index)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)


def main() -> None:
    """Run the stages in order, skipping those whose output exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the text files")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files")
    parser.add_argument("--target", type=Path, default=HERE / "default", help="folder that ships")
    parser.add_argument("--recipe", type=json.loads, default={}, help='JSON of recipe fields, {"steps": 10}')
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe, work = Recipe(**arguments.recipe), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    stages: list[tuple[Path, Callable[[], None]]] = [
        (work / "train.npy", lambda: stage_tokens(arguments.corpora, work, recipe)),
        (work / "lm", lambda: stage_lm(work, recipe)),
        (work / "sae", lambda: stage_sae(work, recipe)),
        (work / "density.safetensors", lambda: stage_density(work)),
        (work / "labels.json", lambda: stage_features(arguments.corpora, work, recipe)),
        (work / "effects.safetensors", lambda: stage_effects(work, recipe)),
        (work / "figures.json", lambda: stage_figures(work, recipe)),
        (arguments.target / "index.json", lambda: stage_pack(work, recipe, arguments.target)),
    ]
    for output, stage in stages:
        if not output.exists():
            print(f"building {output.name}", flush=True)
            stage()


if __name__ == "__main__":
    main()
