"""What directions do further on: through attention's output projection, the final norm and the unembedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fgsteer.errors import DataError, HookpointError
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.models.properties import d_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """Compute what directions at a hookpoint add to the residual stream.

    That is ``v W_O`` at z, and v itself at resid_pre, resid_post, attn_out and mlp_out.

    Args:
        model: A Hugging Face causal language model.
        hookpoint: Where the directions are.
        directions: Directions (..., width).

    Returns:
        What they add, (..., d_model).

    Raises:
        HookpointError: The effect is not linear: at mlp_in, and at z before a post-norm.
    """
    module, _ = resolve(model, hookpoint)
    if hookpoint.site not in ("z", "mlp_in"):
        return directions
    sublayer, _ = resolve(model, Hookpoint(hookpoint.layer, "attn_out"))
    if hookpoint.site == "mlp_in" or all(part is not module for part in sublayer.modules()):
        raise HookpointError(
            f"a direction at {hookpoint} of {a(type(model).__name__)}",
            "a direction whose effect on the residual stream is linear",
            "steer with it at its own hookpoint, or read an SAE on resid_post, attn_out or mlp_out",
        )
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    rows = directions.to(next(module.parameters()).device, embedding.dtype)
    return module(rows) - module(torch.zeros_like(rows))  # type: ignore[no-any-return]


@checked
@torch.no_grad()
def logit_lens(model: nn.Module, directions: torch.Tensor) -> torch.Tensor:
    """Compute the logits that directions add, read through the final norm and the head.

    That is ``U(norm(v) − norm(0))``: the norm's gain acts, its bias does not (the logit lens, nostalgebraist 2020).

    Args:
        model: A Hugging Face causal language model.
        directions: Directions (n, d_model) in the residual stream.

    Returns:
        Logits (n, vocabulary), float32.

    Raises:
        DataError: The directions are of another width.
        HookpointError: The final norm of the decoder is not known.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if directions.ndim != 2 or directions.shape[1] != d_model(model):
        raise DataError(f"directions of shape {tuple(directions.shape)}", f"directions of shape (n, {d_model(model)})")
    decoder = decoder_of(model)
    names = [name for name in FINAL_NORMS if hasattr(decoder, name)]
    if not names:
        raise HookpointError(
            f"a decoder {type(decoder).__name__} without one",
            f"a decoder with a final norm named {' or '.join(FINAL_NORMS)}",
            "this architecture is not supported yet",
        )
    norm = getattr(decoder, names[0])  # None in OPT-350m
    weight: torch.Tensor = head.weight
    rows: torch.Tensor = directions.to(weight.device, weight.dtype)
    if norm is not None:
        rows = norm(rows) - norm(torch.zeros_like(rows))
    if isinstance(narrow := getattr(decoder, "project_out", None), nn.Module):  # OPT-350m
        rows = narrow(rows)
    return (rows @ weight.T).float()


def top_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directions: torch.Tensor, n: int = 6
) -> list[tuple[str, ...]]:
    """The n tokens that each direction (rows, d_model) raises most, read through the model's final norm and head.

    Raises DataError for directions of another width.
    """
    ids = logit_lens(model, directions).topk(n, dim=-1).indices
    return [tuple(tokenizer.decode([int(i)]).strip() for i in row) for row in ids]
