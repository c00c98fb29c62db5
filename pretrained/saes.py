"""The embedded sparse autoencoders: activations, training with sae-lens, quality on held-out text.

Why a store on disk: three layers and several kinds train on the same tokens, and the
language model need run over them only once.

    store_activations(work, Recipe())
    train_sae(work / "sae" / "layer_2", work, Recipe(), layer=2)
    quality(model, tokenizer, sae, texts)["explained_variance"]
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm import load_lm
from recipe import Recipe

import fgsteer as fg

JUMP_THRESHOLD = 0.5  # JumpReLU's first threshold and the width of its straight-through window,
JUMP_BANDWIDTH = 0.5  # for inputs scaled to a mean norm of √d_model
JUMP_L0 = 0.1  # weight of 2/L0* (L0 - L0*)² beside the squared error
KINDS = ("topk", "batchtopk", "jumprelu", "matryoshka")


def store_activations(work: Path, recipe: Recipe) -> None:
    """activations/layer_N.npy, float16 (sae_tokens, d_model): resid_post on random blocks of the training stream.

    Every block starts with the end-of-text token, whose own activation is left out.
    """
    model, _ = load_lm(work)
    tokens = np.load(work / "train.npy", mmap_mode="r")
    width = recipe.context - 1
    order = np.random.default_rng(recipe.seed + 1).permutation(len(tokens) // width)
    blocks = -(-recipe.sae_tokens // width)
    hookpoints = [fg.Hookpoint(layer) for layer in recipe.sae_layers]
    part = work / "activations.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    stores = {
        hookpoint: np.lib.format.open_memmap(
            part / f"layer_{hookpoint.layer}.npy", "w+", np.float16, (recipe.sae_tokens, recipe.d_model)
        )
        for hookpoint in hookpoints
    }
    for start in range(0, blocks, 64):
        picks = order[np.arange(start, min(start + 64, blocks)) % len(order)]
        rows = np.stack([tokens[b * width : (b + 1) * width] for b in picks]).astype(np.int64)
        ids = torch.from_numpy(np.pad(rows, ((0, 0), (1, 0))))
        at = start * width
        for hookpoint, found in fg.record(model, ids, None, hookpoints).items():
            flat = found[:, 1:].reshape(-1, recipe.d_model).half()
            if not bool(flat.isfinite().all()):
                raise SystemExit(f"activations of {hookpoint} do not fit into float16")
            stores[hookpoint][at : at + len(flat)] = flat[: recipe.sae_tokens - at].numpy()
    for store in stores.values():
        store.flush()
    os.replace(part, work / "activations")


def batches(work: Path, recipe: Recipe, layer: int, seed: int, tokens: int) -> Iterator[torch.Tensor]:
    """Endless float32 batches (sae_batch, d_model) of the first ``tokens`` activations, shuffled every time around."""
    store = np.load(work / "activations" / f"layer_{layer}.npy", mmap_mode="r")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(tokens)
        for start in range(0, tokens - recipe.sae_batch + 1, recipe.sae_batch):
            yield torch.from_numpy(store[np.sort(order[start : start + recipe.sae_batch])]).float()


def new_sae(kind: str, layer: int, recipe: Recipe, steps: int) -> Any:
    """An untrained sae-lens SAE of a kind, with ``sae_k`` features active a token (on average, for all but topk)."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    common: dict[str, Any] = {
        "d_in": recipe.d_model,
        "d_sae": recipe.sae_width,
        "normalize_activations": "expected_average_only_in",
        "metadata": SAEMetadata(
            model_name="fgsteer/default",
            hook_name=f"blocks.{layer}.hook_resid_post",
            hf_hook_name=f"model.layers.{layer}",
            context_size=recipe.context,
            prepend_bos=True,
        ),
    }
    if kind == "topk":
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=recipe.sae_k, **common))
    if kind == "jumprelu":
        return sae_lens.JumpReLUTrainingSAE(
            sae_lens.JumpReLUTrainingSAEConfig(
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=recipe.sae_k,
                jumprelu_ste_to_input=True,
                jumprelu_init_threshold=JUMP_THRESHOLD,
                jumprelu_bandwidth=JUMP_BANDWIDTH,
                l0_coefficient=JUMP_L0,
                l0_warm_up_steps=steps // 4,
                pre_act_loss_coefficient=3e-6,
                **common,
            )
        )
    common |= {"k": float(recipe.sae_k), "topk_threshold_lr": 0.1}  # its slow default outlasts runs this short
    if kind == "batchtopk":
        return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**common))
    widths = [recipe.sae_width // part for part in (16, 4, 1)]
    return sae_lens.MatryoshkaBatchTopKTrainingSAE(
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=widths, **common)
    )


def train_sae(
    target: Path, work: Path, recipe: Recipe, layer: int, kind: str = "", seed: int = 0, tokens: int = 0
) -> None:
    """Train one SAE with sae-lens and save it whole, its input scaling folded in, in float16."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind, tokens = kind or recipe.sae_kind, tokens or recipe.sae_tokens
    steps = tokens // recipe.sae_batch
    torch.manual_seed(recipe.seed + seed)
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
    stream = batches(work, recipe, layer, recipe.seed + seed + 2, tokens)
    trained = SAETrainer(cfg=config, sae=new_sae(kind, layer, recipe, steps), data_provider=stream).fit()
    trained.to(dtype=torch.float16)
    part = target.with_name(target.name + ".part")
    trained.save_inference_model(part)
    os.replace(part, target)


@torch.no_grad()
def quality(model: Any, tokenizer: Any, sae: fg.SAE, texts: Sequence[str]) -> dict[str, float]:
    """Explained variance, L0, dead share and CE recovered of an SAE on held-out texts.

    The first position of every text is left out of all of them. CE recovered is
    (zeroed - spliced) / (zeroed - plain), with the block's output zeroed or reconstructed.
    """
    residual = total = active = 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    losses = {"plain": 0.0, "spliced": 0.0, "zeroed": 0.0}
    inputs = [tokenizer(text, return_tensors="pt", truncation=True)["input_ids"] for text in texts]
    rows = [fg.record(model, ids, None, [sae.hookpoint])[sae.hookpoint][0, 1:] for ids in inputs]
    count, mean = sum(map(len, rows)), torch.cat(rows).mean(0)
    block = model.model.layers[sae.hookpoint.layer]
    for ids, h in zip(inputs, rows, strict=True):
        acts = sae.encode(h)
        new = {"plain": h, "spliced": sae.decode(acts), "zeroed": h * 0}
        residual += float((h - new["spliced"]).square().sum())
        total += float((h - mean).square().sum())
        active += float((acts > 0).sum())
        fired |= (acts > 0).any(0)
        for name, replacement in new.items():

            def splice(_: Any, __: Any, out: torch.Tensor, replacement: torch.Tensor = replacement) -> torch.Tensor:
                return torch.cat([out[:, :1], replacement[None]], 1)

            handle = block.register_forward_hook(splice)
            losses[name] += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            handle.remove()
    return {
        "tokens": count,
        "explained_variance": 1 - residual / total,
        "l0": active / count,
        "dead_share": 1 - float(fired.float().mean()),
        "ce_recovered": (losses["zeroed"] - losses["spliced"]) / (losses["zeroed"] - losses["plain"]),
        "ce": losses["plain"] / count,
        "ce_spliced": losses["spliced"] / count,
    }
