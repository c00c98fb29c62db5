"""What is timed: models, SAEs and texts, all of them deterministic and offline.

subject = load("llama-100m", torch.device("cpu"), torch.float32)
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import fgsteer as fg

SHIPPED = ("default", "smollm2")
MODELS = ("default", "llama", "gpt2", "llama-100m", "smollm2")
SHAPES = {"llama": (8, 256, 704), "gpt2": (8, 256, 1024), "llama-100m": (12, 768, 2048)}  # layers, d_model, d_mlp
SMALL = (3, 64, 128)
HEAD, CONTEXT, EXPANSION = 64, 512, 16


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its tokenizer, and an SAE after its middle block."""

    name: str
    model: Any
    tokenizer: Any
    sae: fg.SAE

    @property
    def layer(self) -> int:
        """The block whose output is read and steered."""
        return self.sae.hookpoint.layer

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return int(self.model.config.num_hidden_layers)

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return int(self.model.config.max_position_embeddings)


def load(name: str, device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Subject:
    """A shipped model, or one of random weights under the default's tokenizer; ``quick`` makes those tiny."""
    disable_progress_bar()
    model, tokenizer = fg.load_model(name if name in SHIPPED else "default")
    if name in SHIPPED:
        sae = fg.load_sae(name)
    else:
        layers, width, mlp = SMALL if quick else SHAPES[name]
        model = random_model(name, layers, width, mlp, model.config.vocab_size)
        sae = random_sae(width, layers // 2)
    return Subject(name, model.to(device, dtype).eval(), tokenizer, sae.to(device))


def random_model(name: str, layers: int, width: int, mlp: int, vocabulary: int) -> Any:
    """A GPT-2, or else a Llama, of random weights."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    kind = GPT2Config if name == "gpt2" else LlamaConfig
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": CONTEXT,
        "n_inner" if name == "gpt2" else "intermediate_size": mlp,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        kind(**shape, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=1), dtype=torch.float32
    )


def random_sae(width: int, layer: int) -> fg.SAE:
    """A JumpReLU SAE of random unit directions."""
    rows = torch.randn(EXPANSION * width, width, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    return fg.SAE(
        W_enc=rows.T.contiguous(),
        W_dec=rows,
        b_enc=torch.zeros(len(rows)),
        b_dec=torch.zeros(width),
        hookpoint=fg.Hookpoint(layer),
        activation="jumprelu",
        threshold=torch.full((len(rows),), 0.1),
    )


def texts(count: int, sentences: int = 3, seed: int = 0) -> list[str]:
    """Texts of one to ``sentences`` sentences from the shipped contrast sets."""
    sets = [fg.load_contrast(name) for name in fg.shipped_contrasts()]
    pool = [str(text) for one in sets for side in (True, False) for _, text in one.side(side)]
    rng = random.Random(seed)
    return [" ".join(rng.choices(pool, k=rng.randint(1, sentences))) for _ in range(count)]


def text_pairs(count: int) -> list[fg.ContrastPair]:
    """Pairs without a prompt: different texts of different lengths."""
    both = texts(2 * count)
    return [fg.ContrastPair(p, n) for p, n in zip(both[::2], both[1::2], strict=True)]


def answer_pairs(count: int) -> list[fg.ContrastPair]:
    """Pairs in the manner of CAA: one long question, the answers A and B."""
    parts = texts(3 * count, seed=1)
    asked = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return [fg.ContrastPair("A", "B", f"{q}\nChoices:\nA) {a}\nB) {b}\nAnswer:") for q, a, b in asked]


def prompt_ids(subject: Subject, batch: int, length: int) -> Tensor:
    """(batch, length) token ids of running text, without padding, so that everyone steers the same tokens."""
    text = " ".join(texts(batch * length // 10 + 10))
    ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: batch * length], device=subject.model.device).view(batch, length)


def directions(subject: Subject, count: int, seed: int = 0) -> Tensor:
    """(count, d_model) random directions, a third as long as the middle activations."""
    ids = prompt_ids(subject, 1, 64)
    h = fg.record(subject.model, ids, None, [subject.sae.hookpoint])[subject.sae.hookpoint]
    rows = torch.randn(count, h.shape[-1], generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True) * float(h.float().norm(dim=-1).median()) / 3
