"""Requests to Neuronpedia's steering API: the features of a vector, each with its strength.

    write(vec, "love.json", sae, coefficient=8.0, prompt="The next day")
    curl -X POST https://www.neuronpedia.org/api/steer -H "Content-Type: application/json" -d @love.json

Neuronpedia adds decoder rows of an SAE that it hosts, at every token, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fgsteer.errors import PairingError, SelectionError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.saes.sae import SAE
from fgsteer.steering.ranges import check_amount
from fgsteer.storage.json_files import write_json
from fgsteer.vector import SteeringVector

TOLERANCE = 1e-4  # of the direction's norm: float32 sums of a few hundred rows stay below


def write(
    vector: SteeringVector,
    path: str | Path,
    sae: SAE,
    *,
    coefficient: float = 1.0,
    prompt: str = "I think",
    n_tokens: int = 48,
    temperature: float = 0.5,
    seed: int = 16,
) -> None:
    """Write the request whose strengths sⱼ make ``Σⱼ sⱼ W_dec[j]/‖W_dec[j]‖`` the coefficient times the vector.

    Neuronpedia scales decoder rows to norm 1, except those of TopK SAEs. Written after its source, not run
    against it. Raises SelectionError for a vector without features, SteeringError for one that is not a sum
    of its features' decoder rows, PairingError for another SAE's, a transcoder's, or an SAE without
    ``neuronpedia`` ("gemma-2-2b/12-gemmascope-res-16k").
    """
    model_id, separator, source = sae.neuronpedia.partition("/")
    if not separator or "/" in source:
        raise PairingError(
            f"an SAE whose Neuronpedia id is {sae.neuronpedia!r}",
            "one that Neuronpedia hosts, such as 'gemma-2-2b/12-gemmascope-res-16k'",
            "dataclasses.replace(sae, neuronpedia=…), or export to GGUF",
        )
    features = [
        {"modelId": model_id, "layer": source, "index": feature, "strength": strength}
        for feature, strength in _strengths(vector, sae, coefficient).items()
    ]
    request = {
        "modelId": model_id,
        "prompt": prompt,
        "features": features,
        "steer_method": "SIMPLE_ADDITIVE",
        "strength_multiplier": 1,
        "n_tokens": n_tokens,
        "temperature": temperature,
        "freq_penalty": 0,
        "seed": seed,
    }
    write_json(path, request)


def _strengths(vector: SteeringVector, sae: SAE, coefficient: float) -> dict[int, float]:
    """{feature: strength}, by absolute strength. Raises as ``write``."""
    method = vector.provenance.get("method", "bare")
    if not vector.features:
        raise SelectionError(
            f"{a(method)} vector, which has no features",
            "one built from features: Neuronpedia adds nothing else",
            "build it with from_features, sta or fgaa, or export to GGUF",
        )
    if sae.reads is not None:
        raise PairingError(
            f"a transcoder, read at {sae.reads}", "an SAE: Neuronpedia steers where it reads", "export to GGUF"
        )
    if (vector.hookpoint, vector.d_model) != (sae.hookpoint, sae.d_model):
        raise PairingError(f"a vector at {vector.hookpoint}", f"one at {sae.hookpoint}, where this SAE is")
    rows = torch.stack([sae.direction(j) for j in vector.features]).double().cpu()
    weights = torch.tensor(list(vector.features.values()), dtype=torch.float64)
    decoded, direction = weights @ rows, vector.direction.detach().double().cpu()
    scale = float(direction @ decoded / (decoded @ decoded).clamp(min=torch.finfo(torch.float64).tiny))
    if not bool((direction - scale * decoded).norm() <= TOLERANCE * direction.norm()):
        raise SteeringError(
            f"{a(method)} vector that is not the sum of its features' decoder rows",
            "one that is: Neuronpedia adds nothing else",
            "from_features(sae, vector.features) is its nearest, or export to GGUF",
        )
    norms = torch.ones(len(rows)) if sae.activation == "topk" else rows.norm(dim=1)
    strengths = coefficient * scale * weights * norms
    check_amount(float(strengths.abs().amax()), torch.float32, vector.d_model, "a request")
    found = strengths.tolist()
    pairs = sorted(zip(vector.features, found, strict=True), key=lambda pair: (-abs(pair[1]), pair[0]))
    return dict(pairs)
