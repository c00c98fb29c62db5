"""SAEs and transcoders of Gemma Scope 2: params.safetensors in a folder that names the site and the layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fgsteer.errors import FormatError
from fgsteer.models.hookpoints import Hookpoint, Site
from fgsteer.saes.formats.base import LoadOptions, Source, State, load_state
from fgsteer.saes.formats.sae_lens import parse_sae_lens, refuse_architecture
from fgsteer.saes.registry import RegistryRow
from fgsteer.saes.sae import SAE

WEIGHTS_FILE = "params.safetensors"
_SITES: dict[str, Site] = {
    "resid_post": "resid_post",
    "attn_out": "z",
    "mlp_out": "mlp_out",
    "transcoder": "mlp_in",
}


def is_gemma_scope_2(source: Source) -> bool:
    """Tell whether an entry of sae-lens's registry is of Gemma Scope 2."""
    return source.row is not None and source.row.conversion == "gemma_3"


def load_gemma_scope_2(source: Source, options: LoadOptions) -> SAE:
    """Load an entry of a release; the reader of sae-lens would ask the hub for shapes, cached or not."""
    from huggingface_hub import hf_hub_download

    row = source.row
    assert row is not None
    path = hf_hub_download(row.repo_id, f"{row.path}/{WEIGHTS_FILE}")
    config, state = parse_gemma_scope_2(row, load_state(Path(path)))
    return parse_sae_lens(config, state, {}, source="", options=options)


def parse_gemma_scope_2(row: RegistryRow, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, state) as sae-lens has them, of the params.safetensors of a Gemma Scope 2 release.

    Raises PairingError for cross-layer transcoders, FormatError for an unknown layout.
    """
    match = re.match(r"(resid_post|attn_out|mlp_out|transcoder|clt)\w*/layer_(\d+)", row.path)
    if match is None:
        raise FormatError(f"{row.repo_id}/{row.path}", "a path such as resid_post/layer_12_width_16k_l0_small")
    kind, layer = match[1], int(match[2])
    refuse_architecture(kind, f"{row.release}/{row.sae_id}")
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    tensors = {names.get(name, name): tensor for name, tensor in state.items()}
    is_transcoder, has_skip = kind == "transcoder", "W_skip" in tensors
    architecture = "jumprelu"
    if is_transcoder:
        architecture = "jumprelu_skip_transcoder" if has_skip else "jumprelu_transcoder"
    config = {
        "architecture": architecture,
        "apply_b_dec_to_input": False,
        "prepend_bos": True,
        "model_name": row.model,
        "neuronpedia_id": row.neuronpedia,
        "hook_name": str(Hookpoint(layer, _SITES[kind])),
        "hook_name_out": str(Hookpoint(layer, "mlp_out")) if is_transcoder else None,
    }
    if has_skip:  # stored as (d_in, d_out), kept by sae-lens as (d_out, d_in)
        tensors["W_skip"] = tensors["W_skip"].T
    return config, tensors
