"""Reading a vector: its features with density and the tokens that each of them promotes.

for row in describe_features(vec, model, tokenizer, sae): print(row)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fgsteer.errors import PairingError
from fgsteer.models import logit_lens, residual_direction
from fgsteer.sae import SAE
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FeatureRow:
    """One feature of a vector: id, weight, density, top logit-lens tokens of its direction, label ("" if unknown)."""

    id: int
    weight: float
    density: float | None
    tokens: tuple[str, ...]
    label: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def top_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directions: torch.Tensor, n: int = 6
) -> list[tuple[str, ...]]:
    """The n tokens that each direction (rows, d_model) raises most, read through final norm and head.

    Raises DataError for a wrong width.
    """
    ids = logit_lens(model, directions).topk(n, dim=-1).indices
    return [tuple(tokenizer.decode([int(i)]).strip() for i in row) for row in ids]


def describe_features(
    vector: SteeringVector,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    *,
    top: int = 20,
    tokens: int = 6,
) -> list[FeatureRow]:
    """The vector's features of largest absolute weight, with what is known of each.

    A feature's tokens are those that its decoder row raises most, or lowers most when its
    weight is negative; on z, what it adds through the output projection. Raises PairingError
    for an SAE that the vector was not made with, HookpointError where its directions do not
    act linearly on the residual stream.
    """
    made = (vector.provenance.get("sae") or {}).get("sha256")
    if made and made != sae.sha256:
        raise PairingError(f"a vector made with SAE {made[:12]}", f"this SAE {sae.sha256[:12]} ({sae.source})")
    rows = vector.top_features(top)
    if not rows:
        return []
    signs = torch.tensor([1.0 if row.weight >= 0 else -1.0 for row in rows])
    directions = torch.stack([sae.direction(row.id).cpu() for row in rows]) * signs[:, None]
    promoted = top_tokens(model, tokenizer, residual_direction(model, sae.hookpoint, directions), tokens)
    density = None if sae.density is None else sae.density.density
    return [
        FeatureRow(
            row.id,
            row.weight,
            row.density if density is None else float(density[row.id]),
            words,
            sae.labels.get(row.id, ""),
        )
        for row, words in zip(rows, promoted, strict=True)
    ]
