"""Small random SAEs."""

from __future__ import annotations

import torch

from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE


def make_sae(activation="relu", d_model=32, d_sae=24, layer=1, seed=0, **extra) -> SAE:
    """A random SAE whose features fire on about half of random inputs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    fields = {}
    if activation == "jumprelu":
        fields["threshold"] = normal(d_sae).abs() * 0.3
    if activation == "topk":
        fields["k"] = 5
    if activation == "gated":
        fields.update(gate_bias=normal(d_sae) * 0.2, gate_scale=normal(d_sae).exp())
    return SAE(
        W_enc=normal(d_model, d_sae) * 0.5,
        W_dec=normal(d_sae, d_model),
        b_enc=normal(d_sae) * 0.1,
        b_dec=normal(d_model) * 0.1,
        hookpoint=Hookpoint(layer),
        activation=activation,
        **fields,
        **extra,
    )
