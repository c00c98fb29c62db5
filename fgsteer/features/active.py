"""What a text shows in an SAE's terms: the features that fire most on its tokens.

for feature in seen_features(model, tokenizer, sae, "the ship went down", prompt="The next day,"): print(feature)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader
from fgsteer.display.tables import Cell, Table
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import context_window
from fgsteer.saes.examples import token_texts
from fgsteer.saes.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_DENSITY = 0.01  # features that fire on more tokens say little of one text (FGAA's filter, arXiv 2501.09929)


@dataclass(frozen=True, repr=False)
class SeenFeature(OneLineRepr):
    """A feature, its label ("" where none is known), its largest activation on a text, and the token of it."""

    id: int
    label: str
    activation: float
    token: str

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {"feature": self.id, "label": self.label, "activation": float(self.activation), "on": self.token}

    def __str__(self) -> str:
        label = f" {self.label}" if self.label else ""
        return escape_text(f"{self.id}{label}, {self.activation:.3g} on “{self.token}”")


@checked
@torch.no_grad()
def seen_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    text: str,
    *,
    prompt: str = "",
    top: int = 5,
) -> Table[SeenFeature]:
    """The ``top`` features of largest activation on a text's tokens, read by the unsteered model after ``prompt``.

    ``max_t f_j(h_t)`` over the text's tokens t, without the prompt's and a special one before them, for features
    that fire on at most 1 % of tokens (all, where the SAE has no density). Fewer where fewer fire. Raises
    HookpointError and PairingError as ``collect`` does.
    """
    at = sae.input_hookpoint
    check_range("top", top, 1, MAX_COUNT, whole=True)
    check_pairing(model, at, sae.d_model, sae.model_name, "SAE")
    found: Table[SeenFeature] = Table()
    with TokenReader(
        tokenizer, rule="answer", prepend_bos=sae.prepend_bos, window=context_window(model), joint="", skip_empty=True
    ) as reader:
        read = list(batch_texts(model, reader, [(prompt, text, True)], batch_tokens=1))
    for batch in read:
        values = record_batch(model, batch, [at])[at][batch.selected]
        fired = sae.to(values.device, torch.float32).encode(values.float())
        if sae.density is not None:
            fired = fired * (sae.density.density <= MAX_DENSITY).to(fired.device)
        peaks, where = fired.max(0)
        tokens = token_texts(tokenizer, batch.ids[batch.selected].tolist())
        best = peaks.topk(min(top, int((peaks > 0).sum()))).indices.tolist()
        found = Table(
            SeenFeature(j, sae.labels.get(j, ""), float(peaks[j]), tokens[int(where[j])].strip()) for j in best
        )
    return found
