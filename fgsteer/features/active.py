"""The features of an SAE that fire most on the tokens of one text.

for feature in seen_features(model, tokenizer, sae, "the ship went down", prompt="The next day,"): print(feature)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text
from fgsteer.display.tables import Cell, Table
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.methods.selection import PAPER_MAX_DENSITY
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import context_window
from fgsteer.saes.examples import token_texts
from fgsteer.saes.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class SeenFeature(OneLineRepr):
    """A feature that fires on a text.

    Args:
        id: The feature's number in its SAE.
        label: What it is said to mean, "" where no label is known.
        activation: Its largest activation on the text.
        token: The token on which it has that activation.
    """

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
    prompt: Text = "",
    top: int = 5,
) -> Table[SeenFeature]:
    """The features of largest activation on a text's tokens, read by the unsteered model.

    The activation is ``max_t f_j(h_t)`` over the text's tokens t, without those of the prompt and a special one before
    them. Features that fire on more than 1 % of tokens are left out, where the SAE has densities.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are read.
        text: The text.
        prompt: What stands before the text, or the conversation that it answers.
        top: The number of features; fewer are returned where fewer fire.

    Returns:
        The features, largest activation first.

    Raises:
        HookpointError: The model does not have the SAE's hookpoint.
        PairingError: The SAE does not fit the model.
    """
    hookpoint = sae.input_hookpoint
    check_range("top", top, 1, MAX_COUNT, whole=True)
    check_pairing(model, hookpoint, sae.d_model, sae.model_name, "SAE")
    features: Table[SeenFeature] = Table()
    with TokenReader(
        tokenizer, rule="answer", prepend_bos=sae.prepend_bos, window=context_window(model), joint="", skip_empty=True
    ) as reader:
        batches = list(batch_texts(model, reader, [(prompt, text, True)], batch_tokens=1))
    for batch in batches:
        values = record_batch(model, batch, [hookpoint])[hookpoint][batch.selected]
        activations = sae.to(values.device, torch.float32).encode(values.float())
        if sae.density is not None:
            activations = activations * (sae.density.density <= PAPER_MAX_DENSITY).to(activations.device)
        peaks, positions = activations.max(0)
        tokens = token_texts(tokenizer, batch.ids[batch.selected].tolist())
        best = peaks.topk(min(top, int((peaks > 0).sum()))).indices.tolist()
        features = Table(
            SeenFeature(j, sae.labels.get(j, ""), float(peaks[j]), tokens[int(positions[j])].strip()) for j in best
        )
    return features
