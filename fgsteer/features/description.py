"""Descriptions: what is known of each feature of a vector, or of some ids.

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
from fgsteer.models.unembedding import residual_direction, top_tokens
from fgsteer.saes.examples import Excerpt, FeatureExamples
from fgsteer.saes.sae import SAE
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class FeatureRow(OneLineRepr):
    """What is known of one feature; empty where nothing is.

    Args:
        id: The feature's number in its SAE.
        weight: Its weight in a vector, None outside a vector.
        density: The share of tokens on which it fires.
        tokens: The tokens that it raises most: the logit lens of its decoder row times the weight's sign.
        label: What it is said to mean.
        lowered: The tokens that it lowers most.
        link: Its page at Neuronpedia.
        excerpts: Excerpts of a corpus in which it fires most.
        why: The reasons for which a search found it.
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
        """The row as plain JSON."""
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


def feature_link(sae: SAE, feature: int) -> str:
    """The address of the feature's page at Neuronpedia, "" for an SAE that has no id there."""
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
    """Describe features of a vector, or of ids: density, label, the tokens that each raises and lowers, excerpts.

    Directions on z are read through the output projection.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are meant.
        features: A vector, or feature ids.
        top: The number of a vector's features, by absolute weight.
        tokens: The number of tokens raised and lowered.
        examples: Excerpts, which ``load_examples`` or ``measure_examples`` gives.
        why: {feature id: reasons}, what a search found each id for.

    Returns:
        One row for each feature, in the order of weight, or of the ids.

    Raises:
        PairingError: The vector or the examples were made with another SAE.
        SelectionError: An id is unknown.
        HookpointError: Directions at this hookpoint do not act linearly on the residual stream.
    """
    check_range("tokens", tokens, 1, len(model.get_output_embeddings().weight), whole=True)  # type: ignore[operator]
    if examples is not None:
        examples.check(sae)
    entries: list[tuple[int, float | None, float | None]]
    if isinstance(features, SteeringVector):
        made = (features.provenance.get("sae") or {}).get("sha256")
        if made and made != sae.sha256:
            raise PairingError(
                f"a vector made with another SAE, {made[:12]}",
                f"a vector made with this SAE, {sae.sha256[:12]}{f' ({sae.source})' if sae.source else ''}",
                "load the SAE that the vector was made with",
            )
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
