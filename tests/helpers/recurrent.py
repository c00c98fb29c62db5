"""Tiny random models whose blocks keep a state: state-space and recurrent ones, and hybrids with attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, D_MODEL, LAYERS = 80, 32, 3
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_STATE = {"state_size": 4, "conv_kernel": 3}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": "auto",
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": _STATE,
    "mamba2": {**_STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": _STATE,
    "rwkv": {"attention_hidden_size": D_MODEL, "context_length": 64},
    "recurrent_gemma": {
        "lru_width": D_MODEL,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 4},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "zamba2": {**_MAMBA2, "n_mamba_heads": 8, "mamba_headdim": 8, "layers_block_type": ["mamba", "hybrid", "mamba"]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "mamba_d_head": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "granitemoehybrid": {
        **_MAMBA2,
        **_EXPERTS,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 16,
    },
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "olmo_hybrid": _DELTA,
    "minimax": {**_EXPERTS, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 8},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_dt_rank": 4,
        "mamba_d_state": 4,
    },
    "xlstm": {"hidden_size": 64, "num_heads": 2, "chunk_size": 8, "qk_dim_factor": 1.0},
}


@functools.cache
def recurrent_model(family: str) -> Any:
    """A random model of a family in float32, whose generated tokens vary."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SHAPE | CONFIGS[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # every row runs to its length
    return model.eval()
