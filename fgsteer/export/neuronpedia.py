"""Requests to Neuronpedia's steering API: the features of a vector, each with its strength.

    write(vec, "love.json", sae, coefficient=8.0, prompt="The next day")
    curl -X POST https://www.neuronpedia.org/api/steer -H "Content-Type: application/json" -d @love.json

Neuronpedia adds decoder rows of an SAE that it hosts, at every token, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fgsteer.errors import PairingError, SelectionError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.export.requirements import every_token, kind_of
from fgsteer.export.table import ExportInputs
from fgsteer.interventions import Add, Intervention
from fgsteer.saes.sae import SAE
from fgsteer.steering.ranges import check_amount
from fgsteer.storage.json_files import write_json
from fgsteer.vector import SteeringVector

TOLERANCE = 1e-4  # as a share of the direction's norm: float32 sums of a few hundred rows stay below it


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

    Neuronpedia scales decoder rows to norm 1, except those of TopK SAEs. Written after its source, not run against it.

    Args:
        vector: A vector that is a sum of decoder rows of the SAE, as ``from_features``, ``sta`` and ``fgaa`` make.
        path: The file to write.
        sae: The SAE, whose field ``neuronpedia`` says where it is hosted ("gemma-2-2b/12-gemmascope-res-16k").
        coefficient: What the vector is multiplied by.
        prompt: The text to continue.
        n_tokens: Tokens to generate.
        temperature: The temperature of sampling.
        seed: The seed of sampling.

    Raises:
        SelectionError: The vector has no features.
        SteeringError: The vector is not a sum of its features' decoder rows.
        PairingError: The vector is of another SAE, the SAE is not hosted, or it is a transcoder.
    """
    model_id, separator, source = sae.neuronpedia.partition("/")
    if not separator or "/" in source:
        raise PairingError(
            f"an SAE whose field neuronpedia is {sae.neuronpedia!r}",
            "an SAE that Neuronpedia hosts, such as 'gemma-2-2b/12-gemmascope-res-16k'",
            "if Neuronpedia hosts this one, name it with dataclasses.replace(sae, neuronpedia=…); else export to GGUF",
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


def export(interventions: Sequence[Intervention], path: Path, inputs: ExportInputs) -> list[Path]:
    """The exporter of the table of exports: one Add, of a vector whose features are known."""
    adds = [item for item in interventions if isinstance(item, Add)]
    if len(interventions) != 1 or len(adds) != 1 or len(inputs.vectors) != 1:
        kinds = ", ".join(map(kind_of, interventions)) or "nothing"
        raise SteeringError(kinds, "one Add of one vector", "Neuronpedia does nothing else: export to another engine")
    every_token(adds[0], "Neuronpedia")
    coefficient = float(adds[0].coefficient)
    write(inputs.vectors[0], path, inputs.load_sae(), coefficient=coefficient, **inputs.options)
    return [path]


def _strengths(vector: SteeringVector, sae: SAE, coefficient: float) -> dict[int, float]:
    """{feature: strength}, ordered by absolute strength. Raises as ``write``."""
    method = vector.provenance.get("method", "bare")
    if not vector.features:
        raise SelectionError(
            f"{a(method)} vector, which has no features",
            "a vector that was built from features, which is all that Neuronpedia adds",
            "build it with from_features, sta or fgaa, or export to GGUF",
        )
    if sae.reads is not None:
        raise PairingError(
            f"a transcoder, which reads at {sae.reads} and writes at {sae.hookpoint}",
            "an SAE, because Neuronpedia steers where it reads",
            "export to GGUF",
        )
    if (vector.hookpoint, vector.d_model) != (sae.hookpoint, sae.d_model):
        raise PairingError(
            f"a vector of width {vector.d_model} at {vector.hookpoint}",
            f"a vector of width {sae.d_model} at {sae.hookpoint}, where this SAE is",
            "pass the SAE that the vector was built with",
        )
    rows = torch.stack([sae.direction(j) for j in vector.features]).double().cpu()
    weights = torch.tensor(list(vector.features.values()), dtype=torch.float64)
    decoded, direction = weights @ rows, vector.direction.detach().double().cpu()
    scale = float(direction @ decoded / (decoded @ decoded).clamp(min=torch.finfo(torch.float64).tiny))
    if not bool((direction - scale * decoded).norm() <= TOLERANCE * direction.norm()):
        raise SteeringError(
            f"{a(method)} vector that is not the sum of its features' decoder rows",
            "a vector that is such a sum, which is all that Neuronpedia adds",
            "use the nearest such vector, from_features(sae, vector.features), or export to GGUF",
        )
    norms = torch.ones(len(rows)) if sae.activation == "topk" else rows.norm(dim=1)
    strengths = coefficient * scale * weights * norms
    check_amount(float(strengths.abs().amax()), torch.float32, vector.d_model, "a request")
    pairs = zip(vector.features, strengths.tolist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: (-abs(pair[1]), pair[0])))
