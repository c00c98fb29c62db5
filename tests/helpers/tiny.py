"""Tiny random models of real architectures, and a tokenizer of whole words."""

from __future__ import annotations

import functools

import torch
from transformers import (
    AutoConfig,
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


_GQA = {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_GEMMA3 = {
    **_GQA,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_OLD = {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}


def _config(model_type, **extra):
    """A config of the tiny shape; an extra of None takes an entry of the shape away."""
    settings = {key: value for key, value in {**_SHAPE, **extra}.items() if value is not None}
    return AutoConfig.for_model(model_type, **settings)


def _falcon(**extra):
    return _config("falcon", intermediate_size=None, ffn_hidden_size=48, **extra)


def _gemma3_wrapper():
    return AutoConfig.for_model(
        "gemma3",
        text_config={**_SHAPE, **_GEMMA3},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
        pad_token_id=1,
        bos_token_id=0,
    )


# families that run a smaller matrix of the steering tests than FAMILIES
MORE_FAMILIES = {
    "mistral": lambda: _config("mistral", **_GQA),
    "qwen3": lambda: _config("qwen3", **_GQA),
    "gemma3": lambda: _config("gemma3_text", **_GEMMA3),
    "gemma3 with vision": _gemma3_wrapper,
    "phi": lambda: _config("phi"),
    "phi3": lambda: _config("phi3", num_key_value_heads=2),
    "mixtral": lambda: _config("mixtral", **_GQA, **_EXPERTS),
    "falcon": _falcon,
    "falcon, new decoder": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon, alibi": lambda: _falcon(parallel_attn=False, alibi=True, multi_query=False),
    "opt": lambda: _config("opt", ffn_dim=48, word_embed_proj_dim=D_MODEL),
    "opt, post-norm": lambda: _config("opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "olmo2": lambda: _config("olmo2", num_key_value_heads=2),
    "cohere": lambda: _config("cohere", num_key_value_heads=2, logit_scale=1.0),
    "qwen3_moe": lambda: _config("qwen3_moe", **_GQA, **_EXPERTS),
    "gpt_oss": lambda: _config("gpt_oss", **_GQA, **_EXPERTS, sliding_window=8),
    "granite": lambda: _config("granite", num_key_value_heads=2, residual_multiplier=0.5),
    "bloom": lambda: _config("bloom"),
    "gemma4": lambda: _config(
        "gemma4_text",
        **_GEMMA3 | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        global_head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
    ),
}
# families with state-space, convolution or other recurrent blocks, alone or among attention
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRIDS = {
    "mamba": lambda: _config("mamba", intermediate_size=None, state_size=8, time_step_rank=4),
    "mamba2": lambda: _config("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "qwen3_5": lambda: _config("qwen3_5_text", **_GQA, **_DELTA),
    "qwen3_next": lambda: _config(
        "qwen3_next", **_GQA, **_DELTA, **_EXPERTS, shared_expert_intermediate_size=16, mlp_only_layers=[]
    ),
    "lfm2": lambda: _config("lfm2", num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
    "falcon_h1": lambda: _config("falcon_h1", num_key_value_heads=2, mamba_d_ssm=64, **_MAMBA2),
    "nemotron_h": lambda: _config(
        "nemotron_h",
        **_GQA,
        num_hidden_layers=None,
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "granitemoehybrid": lambda: _config(
        "granitemoehybrid",
        num_key_value_heads=2,
        layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        **_MAMBA2,
    ),
    "jamba": lambda: _config(
        "jamba",
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: _config("bamba", num_key_value_heads=2, attn_layer_indices=[1], **_MAMBA2),
    "zamba2": lambda: _config(
        "zamba2",
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        n_mamba_heads=4,
        chunk_size=8,
        use_mamba_kernels=False,
    ),
    "recurrent_gemma": lambda: _config(
        "recurrent_gemma",
        num_key_value_heads=1,
        lru_width=D_MODEL,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        logits_soft_cap=1e6,  # so far off that logits are linear in the head's input, as the logit lens is
    ),
}
# families whose decoder or blocks come in another form: a wrapper with the head, the head itself, lists as outputs
ODD_FAMILIES = {
    "llama4": lambda: _config(
        "llama4_text",
        **_GQA,
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=8,
        interleave_moe_layer_step=2,
        layer_types=["chunked_attention", "chunked_attention", "full_attention"],
    ),
    "mllama": lambda: AutoConfig.for_model(
        "mllama", text_config={**_SHAPE, "num_key_value_heads": 2, "cross_attention_layers": []}
    ),
    "modernbert-decoder": lambda: _config("modernbert-decoder", local_attention=8, cls_token_id=0, sep_token_id=2),
    "openai-gpt": lambda: _config("openai-gpt", **_OLD),
}
# families whose blocks are checked to add up, no more
OTHER_FAMILIES = {
    "codegen": lambda: _config("codegen", **_OLD, rotary_dim=8),
    "cohere2": lambda: _config("cohere2", num_key_value_heads=2),
    "deepseek_v2": lambda: _config("deepseek_v2", **_LATENT),
    "deepseek_v3": lambda: _config("deepseek_v3", **_LATENT),
    "exaone4": lambda: _config("exaone4", num_key_value_heads=2),
    "gemma": lambda: _config("gemma", **_GQA),
    "glm": lambda: _config("glm", **_GQA),
    "glm4": lambda: _config("glm4", **_GQA),
    "gpt_bigcode": lambda: _config("gpt_bigcode"),
    "gpt_neo": lambda: _config(
        "gpt_neo",
        num_hidden_layers=None,
        num_attention_heads=None,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1], [["global"], 1]],
    ),
    "gptj": lambda: _config("gptj", **_OLD, rotary_dim=8),
    "nemotron": lambda: _config("nemotron", num_key_value_heads=2),
    "olmo": lambda: _config("olmo", num_key_value_heads=2),
    "olmo3": lambda: _config("olmo3", num_key_value_heads=2),
    "olmoe": lambda: _config("olmoe", num_key_value_heads=2, **_EXPERTS),
    "phimoe": lambda: _config("phimoe", num_key_value_heads=2, **_EXPERTS),
    "qwen2_moe": lambda: _config("qwen2_moe", num_key_value_heads=2, shared_expert_intermediate_size=16, **_EXPERTS),
    "smollm3": lambda: _config("smollm3", num_key_value_heads=2),
    "stablelm": lambda: _config("stablelm", num_key_value_heads=2),
    "starcoder2": lambda: _config("starcoder2", num_key_value_heads=2),
}
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
# families that have no attn_out and mlp_out, and a word of the reason that is given
NO_SUBLAYERS = {
    "opt, post-norm": "norm follows",
    "granite": "residual_multiplier",
    "bloom": "residual added",
    "gemma4": "layer_scalar",
    **dict.fromkeys([*HYBRIDS, *ODD_FAMILIES], "not known"),
}
ALL_FAMILIES = {**FAMILIES, **MORE_FAMILIES, **HYBRIDS, **ODD_FAMILIES, **OTHER_FAMILIES}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random model of a family whose logits are spread enough for greedy decoding to vary."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ALL_FAMILIES[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0 if "embed" in name or "wte" in name else 3.0)
            else:  # no gain is one and no bias zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.generation_config.eos_token_id = None  # every row runs to its length
    return model.to(dtype).eval()


# the same model for every test that leaves it as it is
model_of = functools.cache(tiny_model)


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
