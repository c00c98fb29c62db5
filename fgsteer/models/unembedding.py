"""Directions read through what follows them: the output projection of attention, the final norm and the unembedding."""

from __future__ import annotations

import torch
from torch import nn

from fgsteer.errors import (
    DataError,
    HookpointError,
)
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.models.properties import d_model

FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "final_norm",
    "norm_f",
    "embedding_norm",  # LFM 2
    "layer_norm",
)


@checked
@torch.no_grad()
def residual_direction(model: nn.Module, hookpoint: Hookpoint, directions: torch.Tensor) -> torch.Tensor:
    """What directions (..., width) at a hookpoint add to the residual stream, (..., d_model).

    ``v W_O`` at z, v itself at resid_pre, resid_post, attn_out and mlp_out. Raises
    HookpointError where that is not linear: at mlp_in, and at z before a post-norm.
    """
    module, _ = resolve(model, hookpoint)
    if hookpoint.site not in ("z", "mlp_in"):
        return directions
    sublayer, _ = resolve(model, Hookpoint(hookpoint.layer, "attn_out"))
    if hookpoint.site == "mlp_in" or all(part is not module for part in sublayer.modules()):
        raise HookpointError(
            f"a direction at {hookpoint} of {a(type(model).__name__)}",
            "one whose effect on the residual stream is linear",
            "steer with it at its own hookpoint, or read an SAE on resid_post, attn_out or mlp_out",
        )
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    rows = directions.to(next(module.parameters()).device, embedding.dtype)
    return module(rows) - module(torch.zeros_like(rows))  # type: ignore[no-any-return]


@checked
@torch.no_grad()
def logit_lens(model: nn.Module, directions: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary) that directions (n, d_model) add, read through final norm and head.

    ``U(norm(v) − norm(0))``: the norm's gain acts, its bias does not. Raises DataError
    for a wrong width, HookpointError for a decoder whose final norm is not known.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if directions.ndim != 2 or directions.shape[1] != d_model(model):
        raise DataError(f"directions of shape {tuple(directions.shape)}", f"(n, {d_model(model)})")
    decoder = decoder_of(model)
    named = [name for name in FINAL_NORMS if hasattr(decoder, name)]
    if not named:
        raise HookpointError(f"decoder {type(decoder).__name__}", f"a final norm named {', '.join(FINAL_NORMS)}")
    norm = getattr(decoder, named[0])  # None in OPT-350m
    weight: torch.Tensor = head.weight
    rows: torch.Tensor = directions.to(weight.device, weight.dtype)
    if norm is not None:
        rows = norm(rows) - norm(torch.zeros_like(rows))
    if isinstance(narrow := getattr(decoder, "project_out", None), nn.Module):  # OPT-350m
        rows = narrow(rows)
    return (rows @ weight.T).float()
