"""Features of an SAE as rows that read and write: of a clamp, and of a gate that reads one.

encoder_rows(sae, [123]) reads feature 123
"""

from __future__ import annotations

import torch
from torch import Tensor

from fgsteer.errors import PairingError
from fgsteer.interventions import ClampFeature
from fgsteer.interventions.files import steering_sae_sha256
from fgsteer.saes.sae import SAE
from fgsteer.serving.rows import TableRows


def rows_of_clamp(clamp: ClampFeature) -> TableRows:
    """The rows of a clamp, one for each term. Raises PairingError where no row can read its features."""
    sae, terms = clamp.sae, clamp.terms()
    if sae.reads is not None:
        raise PairingError(
            f"a feature clamp of a transcoder, which reads at {sae.reads}",
            "a clamp of an SAE that reads where it steers",
            "vLLM computes the inside of a block in fused steps: steer with fgsteer.steer, or serve the features' "
            "directions as a vector (from_features)",
        )
    features = [feature for feature, *_ in terms]
    read, bias, threshold = encoder_rows(sae, features)
    target, lam, lo, hi = (torch.tensor([float(term[n]) for term in terms]) for n in (1, 2, 3, 4))
    rows = (read, sae.W_dec[features].float(), bias, threshold, target, lam, lo, hi)
    if sae.activation == "topk":
        return TableRows(clamp.hookpoint, *rows, features=tuple(features), sae=steering_sae_sha256(sae))
    return TableRows(clamp.hookpoint, *rows)


def encoder_rows(sae: SAE, features: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What reads features, its bias, and the threshold at or below which a feature is 0. Raises PairingError."""
    if sae.input_norm != "none":
        raise PairingError(
            f"features of an SAE with input_norm={sae.input_norm!r}",
            'features of an SAE with input_norm="none"',
            "rows of a table read activations as they are: serve the features' directions as a vector instead "
            "(from_features)",
        )
    read, bias, threshold = sae.W_enc[:, features].T.float(), sae.b_enc[features].float(), torch.zeros(len(features))
    if sae.threshold is not None and sae.activation == "jumprelu":
        threshold = sae.threshold[features].float().clamp(min=0)
    if sae.gate_bias is not None and sae.gate_scale is not None:  # open where pre > −gate_bias; reads pre·scale + b
        scale = sae.gate_scale[features].float()
        if not bool((scale > 0).all()):
            raise PairingError(
                "a gated SAE with a gate_scale of 0 or less",
                "positive gate scales",
                "a threshold cannot express its gate: serve the features' directions as a vector (from_features)",
            )
        read, threshold = read * scale[:, None], (bias - scale * sae.gate_bias[features].float()).clamp(min=0)
    return read, bias, threshold
