"""Tiny random models of real architectures, and a tokenizer of whole words."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

WORDS = [
    "the",
    "a",
    "bride",
    "groom",
    "wedding",
    "church",
    "ring",
    "wore",
    "took",
    "said",
    "man",
    "woman",
    "house",
    "dog",
    "cat",
    "ran",
    "sat",
    "was",
    "is",
    "and",
    "in",
    "on",
    "to",
    "of",
    "with",
    "happy",
    "sad",
    "old",
    "new",
    "king",
    "queen",
    "sea",
    "ship",
    "war",
    "film",
    "good",
    "bad",
    "I",
    "you",
    "he",
    "she",
    "it",
    "they",
    "think",
    "next",
    "day",
    "A",
    "B",
    "C",
    "(",
    ")",
    ".",
    ",",
    "?",
    "!",
    "user",
    "assistant",
    "yes",
    "no",
    "tea",
    "bread",
]
VOCAB = 80
D_MODEL, LAYERS, HEADS = 32, 3, 4

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**_SHAPE, num_key_value_heads=2),
    "gemma2": lambda: Gemma2Config(
        **_SHAPE, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE, rotary_pct=0.5),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model of a family whose logits are spread enough for greedy decoding to vary."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0 if "embed" in name or "wte" in name else 3.0)
    model.generation_config.eos_token_id = None  # every row runs to its length
    return model.to(dtype).eval()


def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; a beginning-of-text token in front; pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{word: i + 4 for i, word in enumerate(WORDS)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.padding_side = "left"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer
