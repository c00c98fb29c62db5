"""The embedded language model: its training stream, its training, its bits per byte.

train_tokens(corpora, work, Recipe())
train_lm(work, Recipe())
model, tokenizer = load_lm(work)
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import split_corpus, train_tokenizer
from recipe import Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.json_files import write_json


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file whole."""
    with atomic_write(path) as beside, open(beside, "wb") as file:
        np.save(file, array)


def train_tokens(corpora: Path, work: Path, recipe: Recipe) -> None:
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


def train_lm(work: Path, recipe: Recipe) -> None:
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
            with atomic_write(checkpoint) as beside:
                torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1}, beside)
    model.to(torch.bfloat16).save_pretrained(work / "lm.part")
    os.replace(work / "lm.part", work / "lm")


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, texts: list[str], context: int) -> float:
    """Mean bits per UTF-8 byte of the texts, each scored in blocks of ``context`` tokens."""
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        size += len(text.encode())
        for start in range(0, ids.shape[1] - 1, context - 1):
            block = ids[:, start : start + context]
            logits = model(block).logits.float()[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits, block[0, 1:], reduction="sum").item()
    return nats / math.log(2) / max(1, size)


def load_lm(work: Path) -> tuple[Any, Any]:
    """The trained model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(work / "lm", dtype=torch.float32).eval()
    model.config._name_or_path = "fgsteer/default"
    return model, AutoTokenizer.from_pretrained(work / "tokenizer")
