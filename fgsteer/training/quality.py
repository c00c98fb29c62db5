"""How well a sparse autoencoder stands for the activations that it was trained on, on texts that it has not seen.

quality = measure_sae(model, tokenizer, sae, held_out)
quality.explained_variance, quality.l0, quality.dead, quality.ce, quality.ce_spliced
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgsteer.activations.batches import Batch, batch_rows, tokens_in_batch
from fgsteer.data.chat import Text
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.likelihood.scoring import next_token_loss
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import input_device
from fgsteer.statistics.sinks import MASSIVE
from fgsteer.steering.splicing import splice
from fgsteer.training.activation_store import block_length, split_into_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE


@dataclass(frozen=True)
class SAEQuality:
    """What was measured of an SAE on held-out text.

    Attributes:
        tokens: Tokens that it was measured on: none at position 0, special, or of a massive norm.
        left_out: Tokens of a massive norm.
        explained_variance: ``1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²``.
        l0: Active features a token.
        dead: The share of features that are active on none of the tokens.
        ce: Cross-entropy of the model as it is, in nats a token.
        ce_spliced: The same with reconstructions in the place of these tokens' activations.
        ce_zeroed: The same with zeros in their place.
    """

    tokens: int
    left_out: int
    explained_variance: float
    l0: float
    dead: float
    ce: float
    ce_spliced: float
    ce_zeroed: float

    @property
    def ce_score(self) -> float:
        """``(ce_zeroed − ce_spliced) / (ce_zeroed − ce)``; zeros cost so much that this hides what splicing costs."""
        return (self.ce_zeroed - self.ce_spliced) / (self.ce_zeroed - self.ce)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as plain JSON."""
        return {**asdict(self), "ce_score": self.ce_score}


@checked
@torch.no_grad()
def measure_sae(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    texts: Iterable[Text],
    *,
    context: int | None = None,
    prepend_bos: bool | None = None,
    max_norm_ratio: float | None = MASSIVE,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> SAEQuality:
    """Measure how well an SAE reconstructs, and what its reconstruction costs the model.

    Position 0, special tokens and massive activations keep the model's own activations throughout.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE, which reads and writes at the same hookpoint.
        texts: Held-out strings, or conversations.
        context: Tokens of a block, as in training; by default 128, or the model's window where that is less.
        prepend_bos: Whether BOS stands before each block; by default as the SAE notes, or else as the tokenizer does.
        max_norm_ratio: Tokens whose norm is more than this many times the median are left out; None leaves none out.
        batch_tokens: Tokens of a forward pass; by default what suits the device.
        progress: As in ``collect``; a function is called with the number of blocks done.

    Returns:
        The figures.

    Raises:
        DataError: There is no token to measure on, or the SAE is a transcoder.
        PairingError: The SAE does not fit the model.
    """
    if sae.reads is not None:
        raise DataError(f"a transcoder, which reads {sae.reads}", "an SAE, whose reconstruction can be put back")
    check_pairing(model, sae.hookpoint, sae.d_model, sae.model_name, "SAE")
    device = input_device(model)
    prepend = sae.prepend_bos if prepend_bos is None else prepend_bos
    rows = sorted(
        split_into_blocks(tokenizer, texts, context=block_length(model, context), prepend_bos=prepend),
        key=lambda row: len(row.ids),
    )
    if not rows:
        raise DataError("no text with a token to measure on", "texts of at least two tokens")
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    measured = _Measured(model, sae, max_norm_ratio)
    with reporting(progress, "measuring the SAE", len(rows)) as report:
        done = 0
        size = tokens_in_batch(batch_tokens, device)
        for batch in batch_rows(rows, batch_tokens=size, pad_id=pad_id, device=device):
            measured.add(batch)
            done += len(batch.rows)
            report(done)
    return measured.result()


class _Measured:
    """Sums over batches."""

    def __init__(self, model: PreTrainedModel, sae: SAE, max_norm_ratio: float | None) -> None:
        self.model, self.sae, self.ratio = model, sae, max_norm_ratio
        self.median: float | None = None  # of the first batch
        self.fired = torch.zeros(sae.d_sae, dtype=torch.bool)
        self.sum_x = torch.zeros(sae.d_model, dtype=torch.float64)
        self.squares = self.residual = self.active = 0.0
        self.tokens = self.left_out = self.scored = 0
        self.losses = dict.fromkeys(("ce", "ce_spliced", "ce_zeroed"), 0.0)

    def add(self, batch: Batch) -> None:
        """Measure a batch: a plain pass, one with reconstructions, one with zeros."""
        recorded: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            recorded.append(hidden)
            return hidden

        with splice(self.model, self.sae.hookpoint, keep):
            loss, scored = next_token_loss(self.model, batch)
        self.losses["ce"] += loss
        self.scored += scored
        h = recorded[0]
        norms = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32)
        selected = batch.selected.to(h.device)
        if self.median is None:
            self.median = float(norms[selected].median())
        kept = selected & (norms <= (torch.inf if self.ratio is None else self.ratio * self.median))
        if self.sae.W_enc.device != h.device or self.sae.W_enc.dtype != torch.float32:
            self.sae = self.sae.to(h.device, torch.float32)
        sae = self.sae
        x = h[kept].float()
        acts = sae.encode(x)
        decoded = sae.decode(acts)
        self.residual += float((x - decoded).double().square().sum())
        self.squares += float(x.double().square().sum())
        self.sum_x += x.double().sum(0).cpu()
        self.active += float((acts > 0).sum())
        self.fired |= (acts > 0).any(0).cpu()
        self.tokens += len(x)
        self.left_out += int(selected.sum()) - len(x)
        for name, new in (("ce_spliced", decoded), ("ce_zeroed", torch.zeros_like(decoded))):

            def put(hidden: Tensor, new: Tensor = new) -> Tensor:
                return hidden.index_put((kept,), new.to(hidden.dtype))

            with splice(self.model, sae.hookpoint, put):
                self.losses[name] += next_token_loss(self.model, batch)[0]

    def result(self) -> SAEQuality:
        """The figures of all batches."""
        total = self.squares - float(self.sum_x.square().sum()) / self.tokens
        losses = {name: loss / self.scored for name, loss in self.losses.items()}
        return SAEQuality(
            tokens=self.tokens,
            left_out=self.left_out,
            explained_variance=1 - self.residual / total,
            l0=self.active / self.tokens,
            dead=1 - float(self.fired.float().mean()),
            **losses,
        )
