"""Reading features: what is known of each, from a vector or by id.

for row in describe_features(model, tokenizer, sae, vec): print(row)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import nn

from fgsteer.display.tables import Cell, Share, Table
from fgsteer.errors import PairingError
from fgsteer.errors.checks import check_range, checked_after
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.methods.selection import feature_id
from fgsteer.models.unembedding import logit_lens, residual_direction
from fgsteer.saes.examples import Excerpt, FeatureExamples
from fgsteer.saes.sae import SAE
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class FeatureRow(OneLineRepr):
    """One feature: id, weight (None outside a vector), density, the tokens it pushes towards and away from.

    Tokens are the logit lens of its decoder row times the weight's sign. ``label``, ``link`` (its
    page at Neuronpedia), ``excerpts`` and ``why`` (it was found) are empty where nothing is known.
    """

    id: int
    weight: float | None
    density: float | None
    tokens: tuple[str, ...]
    label: str = ""
    lowered: tuple[str, ...] = ()
    link: str = ""
    excerpts: tuple[Excerpt, ...] = ()
    why: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {
            "feature": self.id,
            "label": self.label,
            "weight": None if self.weight is None else float(self.weight),
            "fires on": None if self.density is None else Share(self.density),
            "raises": " ".join(self.tokens),
            "lowers": " ".join(self.lowered),
            "found because": "; ".join(self.why),
        }


def top_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directions: torch.Tensor, n: int = 6
) -> list[tuple[str, ...]]:
    """The n tokens that each direction (rows, d_model) raises most, read through final norm and head.

    Raises DataError for a wrong width.
    """
    ids = logit_lens(model, directions).topk(n, dim=-1).indices
    return [tuple(tokenizer.decode([int(i)]).strip() for i in row) for row in ids]


def feature_link(sae: SAE, feature: int) -> str:
    """The feature's page at Neuronpedia, "" for an SAE without ``neuronpedia`` ("gemma-2-2b/12-gemmascope-res-16k")."""
    return f"https://www.neuronpedia.org/{quote(sae.neuronpedia)}/{feature}" if sae.neuronpedia else ""


@checked_after(("features", "model", "tokenizer", "sae"))
def describe_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    features: SteeringVector | Sequence[int],
    *,
    top: int = 20,
    tokens: int = 6,
    examples: FeatureExamples | None = None,
    why: Mapping[int, tuple[str, ...]] | None = None,
) -> Table[FeatureRow]:
    """What is known of a vector's ``top`` features of largest absolute weight, or of the ids given.

    The list shows as a table.

    ``examples`` brings excerpts, ``why`` what a search found each id for. Directions on z are
    read through the output projection. Raises PairingError for an SAE that the vector or the
    examples were not made with, SelectionError for an unknown id, HookpointError where
    directions do not act linearly on the residual stream.
    """
    check_range("tokens", tokens, 1, len(model.get_output_embeddings().weight), whole=True)  # type: ignore[operator]
    if examples is not None:
        examples.check(sae)
    entries: list[tuple[int, float | None, float | None]]
    if isinstance(features, SteeringVector):
        made = (features.provenance.get("sae") or {}).get("sha256")
        if made and made != sae.sha256:
            raise PairingError(f"a vector made with SAE {made[:12]}", f"this SAE {sae.sha256[:12]} ({sae.source})")
        entries = [(row.id, row.weight, row.density) for row in features.top_features(top)]
    else:
        entries = [(feature_id(feature, sae), None, None) for feature in features]
    if not entries:
        return Table()
    signs = torch.tensor([-1.0 if (weight or 0) < 0 else 1.0 for _, weight, _ in entries])
    rows = torch.stack([sae.direction(feature).cpu() for feature, _, _ in entries]) * signs[:, None]
    directions = residual_direction(model, sae.hookpoint, rows)
    raised, lowered = (top_tokens(model, tokenizer, sign * directions, tokens) for sign in (1.0, -1.0))
    density = None if sae.density is None else sae.density.density
    return Table(
        FeatureRow(
            feature,
            weight,
            known if density is None else float(density[feature]),
            raised[n],
            sae.labels.get(feature, ""),
            lowered[n],
            feature_link(sae, feature),
            () if examples is None else examples.of(feature, tokenizer),
            (why or {}).get(feature, ()),
        )
        for n, (feature, weight, known) in enumerate(entries)
    )
