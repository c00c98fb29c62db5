"""Small SAEs in the layouts that people keep: sae-lens, sparsify, and the releases of the registry on a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fgsteer.saes.registry import RegistryRow, registry
from tests.reference import sparse as reference

D, K = 8, 12
META = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.0.0"}


def state_of(architecture, seed=0, width=D, features=K):
    """Random weights of an architecture, as sae-lens names them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g) * 0.7

    state = {"W_enc": normal(width, features), "W_dec": normal(features, width), "b_dec": normal(width)}
    if architecture == "gated":
        state |= {name: normal(features) for name in ("b_gate", "r_mag", "b_mag")}
    else:
        state["b_enc"] = normal(features)
    if "jumprelu" in architecture:
        state["threshold"] = normal(features).abs()
    if "skip" in architecture:
        state["W_skip"] = normal(width, width)
    return state


def config_of(architecture, options):
    """A cfg.json of sae-lens 6."""
    transcoder = "transcoder" in architecture
    base = {
        "dtype": "float32",
        "architecture": architecture,
        "d_in": D,
        "d_sae": K,
        "apply_b_dec_to_input": not transcoder,
    }
    if transcoder:
        base["d_out"] = D
    return {**base, **options, "metadata": {**META, **options.get("metadata", {})}}


def folder_of(path, config, state, weights="sae_weights.safetensors"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / weights)
    return path


def inputs(width=D, rows=6):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def naive(x, state, **options):
    """The loop's encoding of rows x with weights that nothing was folded into."""
    arrays = {name: tensor.double().numpy() for name, tensor in state.items()}
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    return np.array(
        [
            reference.encode(row, *(arrays.get(n) for n in names), threshold=arrays.get("threshold"), **options)
            for row in x.double().numpy()
        ]
    )


def sparsify_files(path, *, seed=0, **options):
    """A folder as sparsify writes it, and its weights under sae-lens's names."""
    state = state_of("skip" if options.get("skip_connection") else "standard", seed)
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": K, "k": 4,
              "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D, **options}  # fmt: skip
    stored = {"encoder.weight": state["W_enc"].T, "encoder.bias": state["b_enc"]}
    stored |= {name: state[name] for name in ("W_dec", "b_dec", "W_skip") if name in state}
    folder_of(path, config, stored, "sae.safetensors")
    return state


class Releases:
    """Writes releases into the repositories of a hub's root; ``cases`` is what each must load as."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cases: dict[str, dict[str, Any]] = {}

    def row(self, release: str, layer: int, words: str = "") -> RegistryRow:
        """The first row of a release at a layer with these words."""
        return next(row for row in registry(layer=layer, search=words) if row.release == release)

    def file(self, row: RegistryRow, path: str) -> Path:
        file = self.root / row.repo_id / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def expect(self, row, state, hookpoint, x=None, **options):
        """Note the loop's encoding of ``x`` (else of ``inputs()``) by unfolded weights."""
        self.cases[f"{row.release}|{row.sae_id}"] = {
            "acts": naive(inputs() if x is None else x, state, **options).tolist(),
            "direction": state["W_dec"][3].tolist(),
            "hookpoint": hookpoint,
            "model": row.model,
        }

    def gemma_scope(self, site, hook, seed):
        row, state = self.row(f"gemma-scope-2b-pt-{site}-canonical", 12, "16k"), state_of("jumprelu", seed)
        np.savez(self.file(row, f"{row.path}/params.npz"), **{name: tensor.numpy() for name, tensor in state.items()})
        self.expect(row, state, f"blocks.12.{hook}", **JUMPRELU)

    def gemma_scope_2(self, site, hook, seed):
        row = self.row(f"gemma-scope-2-1b-pt-{site}", 13, "affine" if "transcoder" in site else "16k")
        state = state_of("jumprelu_skip" if "transcoder" in site else "jumprelu", seed)
        stored = {name.replace("W", "w"): tensor for name, tensor in state.items()}
        if "w_skip" in stored:
            stored["affine_skip_connection"] = stored.pop("w_skip").T.contiguous()
        save_file(stored, self.file(row, f"{row.path}/params.safetensors"))
        self.expect(row, state, f"blocks.13.{hook}", **JUMPRELU)

    def llama_scope(self):
        row, state, average = self.row("llama_scope_lxr_8x", 3), state_of("standard", 20), 2.5
        save_file(linear(state), self.file(row, f"{row.path}/checkpoints/final.safetensors"))
        config = {"d_model": D, "d_sae": K, "jump_relu_threshold": 0.2, "hook_point_in": "blocks.3.hook_resid_post"}
        config["dataset_average_activation_norm"] = {"in": average}
        self.file(row, f"{row.path}/hyperparams.json").write_text(json.dumps(config))
        f = row.norm_scaling_factor
        state |= {"W_enc": state["W_enc"] * f, "W_dec": state["W_dec"] / f, "b_dec": state["b_dec"] / f}
        state["threshold"] = torch.full((K,), 0.2 * D**0.5 / average)
        self.expect(row, state, "blocks.3.hook_resid_post", **JUMPRELU)

    def sae_bench(self, words, dict_class, activation, seed):
        release = f"sae_bench_{words}"
        row = self.row(release, 12) if "2b" in words else self.row(release, 3)
        state = state_of(activation, seed)
        stored = linear(state) if activation != "gated" else {
            "encoder.weight": state["W_enc"].T, "decoder.weight": state["W_dec"].T, "decoder_bias": state["b_dec"],
            "r_mag": state["r_mag"], "gate_bias": state["b_gate"], "mag_bias": state["b_mag"],
        }  # fmt: skip
        if activation != "gated":
            stored["b_dec"] = stored.pop("decoder.bias")
        torch.save(stored, self.file(row, f"{row.path}/ae.pt"))
        trainer = {"layer": row.layer, "dict_class": dict_class, "k": 4, "activation_dim": D, "dict_size": K}
        config = {"trainer": {**trainer, "lm_name": f"x/{row.model}"}, "buffer": {"ctx_len": 128}}
        self.file(row, f"{row.path}/config.json").write_text(json.dumps(config))
        gate = {"gate": [state[n].numpy() for n in ("b_gate", "r_mag", "b_mag")]} if activation == "gated" else {"k": 4}
        self.expect(row, state, f"blocks.{row.layer}.hook_resid_post", activation=activation, **gate)

    def qwen_scope(self):
        row, state = self.row("qwen-scope-3-1.7b-base-w32k-l50", 7), state_of("standard", 40, features=64)
        stored = {**state, "W_enc": state["W_enc"].T, "W_dec": state["W_dec"].T}
        torch.save(stored, self.file(row, row.path))
        self.expect(row, state, "blocks.7.hook_resid_post", activation="topk", k=50, apply_b_dec_to_input=False)

    def gpt2_res_jb(self):
        row, state = self.row("gpt2-small-res-jb", 5), state_of("standard", 50)
        old = {"d_in": D, "d_sae": K, "dtype": "torch.float32", "hook_point": "blocks.5.hook_resid_pre"}
        folder_of(self.root / row.repo_id / row.path, {**old, "model_name": "gpt2-small"}, state)
        centred = inputs() - inputs().mean(-1, keepdim=True)
        self.expect(row, state, "blocks.5.hook_resid_pre", centred, activation="relu")

    def matryoshka(self):
        row, state = self.row("gemma-2-2b-res-matryoshka-dc", 12), state_of("jumprelu", 55)
        config = config_of("jumprelu", {"metadata": {"model_name": "gemma-2-2b"}})
        folder_of(self.root / row.repo_id / row.path, config, state)
        self.expect(row, state, "blocks.1.hook_resid_post", activation="jumprelu")

    def mwhanna(self):
        row, state = self.row("mwhanna-qwen3-4b-transcoders", 9), state_of("transcoder", 60)
        save_file({**state, "W_enc": state["W_enc"].T.contiguous()}, self.file(row, row.path))
        sizes = f"d_model: {{value: {D}}}\nd_feature: {{value: {K}}}\nbatch_size: {{value: 1}}\n"
        self.file(row, "wandb-config.yaml").write_text(sizes)
        self.expect(row, state, "blocks.9.hook_mlp_out", activation="relu", apply_b_dec_to_input=False)

    def sparsify(self):
        row = RegistryRow("EleutherAI/sae-tiny", "layers.2", model="", repo_id="EleutherAI/sae-tiny")
        state = sparsify_files(self.root / row.repo_id / "layers.2", seed=70)
        self.expect(row, state, "blocks.2.hook_resid_post", activation="topk", k=4)


JUMPRELU = {"activation": "jumprelu", "apply_b_dec_to_input": False}


def linear(state):
    """The weights as two nn.Linear layers keep them."""
    names = {"encoder.weight": state["W_enc"].T, "decoder.weight": state["W_dec"].T}
    names |= {"encoder.bias": state["b_enc"], "decoder.bias": state["b_dec"]}
    return {name: tensor.contiguous() for name, tensor in names.items()}


def write_releases(root: Path) -> dict[str, dict[str, Any]]:
    """One release of every layout that the registry has; per "release|id" what it must load as."""
    releases = Releases(root)
    for seed, (site, hook) in enumerate((("res", "hook_resid_post"), ("mlp", "hook_mlp_out"), ("att", "attn.hook_z"))):
        releases.gemma_scope(site, hook, seed)
        releases.gemma_scope_2(f"{site}-all", hook, seed + 10)
    releases.gemma_scope_2("transcoders-all", "hook_mlp_out", 13)
    releases.llama_scope()
    releases.sae_bench("gemma-2-2b_topk_width-2pow12_date-1109", "AutoEncoderTopK", "topk", 30)
    releases.sae_bench("pythia70m_sweep_gated_ctx128_0730", "GatedAutoEncoder", "gated", 31)
    releases.qwen_scope()
    releases.gpt2_res_jb()
    releases.matryoshka()
    releases.mwhanna()
    releases.sparsify()
    return releases.cases
