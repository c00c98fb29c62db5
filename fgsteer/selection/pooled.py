"""The largest activation of every feature in every text, and which texts choose features and which report on them.

max_activations(model, tokenizer, sae, "sea").values               (texts, d_sae)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.pooling import ENCODE_ELEMENTS
from fgsteer.activations.token_rules import TokenRule
from fgsteer.activations.tokens import LabelledText, TokenReader
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import context_window
from fgsteer.saes.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST = 4  # texts of a side, so that either half has two


@dataclass(frozen=True, eq=False, repr=False)
class FeatureActivations(OneLineRepr):
    """The largest activation of every feature in every text of a contrast set.

    Attributes:
        values: (texts, d_sae), float32, on the CPU.
        positive: Which texts are positive.
        chooses: Which texts features are chosen on; the others report.
        sae: The SAE.
        about: What was read, as plain JSON.
    """

    values: Float[Tensor, "texts d_sae"]
    positive: Bool[Tensor, " texts"]
    chooses: Bool[Tensor, " texts"]
    sae: SAE
    about: dict[str, Any]

    def half(self, chooses: bool) -> tuple[Float[Tensor, "half d_sae"], Bool[Tensor, " half"]]:
        """The activations and labels of the texts that choose, or of those that report."""
        rows = self.chooses == chooses
        return self.values[rows], self.positive[rows]

    @property
    def reports(self) -> bool:
        """Whether there are texts of both sides that do not choose."""
        labels = self.positive[~self.chooses]
        return bool(labels.any()) and not bool(labels.all())


@checked
@torch.no_grad()
def max_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    contrast: Contrastable,
    *,
    tokens: TokenRule = "all",
    halves: bool = True,
    prepend_bos: bool | None = None,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> FeatureActivations:
    """Read every text of a contrast set, and keep the largest activation of each feature over its tokens.

    Where the set has a held-out part, its texts report and all others choose. Elsewhere every second text of a side
    reports, so that pairs stay together.

    Args:
        model: A Hugging Face causal language model, unsteered.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are read.
        contrast: A contrast set, a shipped name, a path, or what ``collect`` takes.
        tokens: Which tokens are read, as in ``collect``.
        halves: Whether texts report; without, all of them choose.
        prepend_bos: As in ``collect``.
        batch_tokens: As in ``collect``.
        progress: As in ``collect``.

    Returns:
        The activations, (texts, d_sae), and the texts' sides and halves. This takes 4 bytes for each text and feature.

    Raises:
        DataError: A side has fewer than four texts to be halved, or a text has no token to read.
        PairingError: The SAE does not fit the model.
        HookpointError: The model lacks the SAE's hookpoint.
    """
    check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    given = as_contrast(contrast)
    texts, chooses = _labelled(given, halves)
    prepend = sae.prepend_bos if prepend_bos is None else prepend_bos
    values = torch.zeros(len(texts), sae.d_sae)
    local: dict[torch.device, SAE] = {}
    with (
        reporting(progress, "reading texts", len(texts)) as report,
        TokenReader(tokenizer, rule=tokens, prepend_bos=prepend, window=context_window(model)) as reader,
    ):
        done = 0
        for batch in batch_texts(model, reader, texts, batch_tokens=batch_tokens):
            h = record_batch(model, batch, [sae.input_hookpoint])[sae.input_hookpoint]
            if h.device not in local:
                local[h.device] = sae.to(h.device, torch.float32)
            values[[row.index for row in batch.rows]] = pool_maxima(local[h.device], h, batch.selected).cpu()
            done += len(batch.rows)
            report(done)
    if not bool(values.isfinite().all()):
        raise DataError(
            "feature activations that are not finite", "finite ones", "load the model in float32 or bfloat16"
        )
    about = {"contrast": given.name, "sha256": given.sha256, "tokens": tokens, "texts": len(texts)}
    return FeatureActivations(values, torch.tensor([text[2] for text in texts]), torch.tensor(chooses), sae, about)


def pool_maxima(
    sae: SAE, h: Float[Tensor, "batch tokens d_model"], selected: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch d_sae"]:
    """The largest activation of each feature over the selected tokens of each row, at least 0."""
    owner = selected.nonzero()[:, 0].to(h.device)
    rows = h[selected.to(h.device)]
    maxima = torch.zeros(len(selected), sae.d_sae, device=h.device)
    step = max(1, ENCODE_ELEMENTS // sae.d_sae)
    for start in range(0, len(rows), step):
        acts = sae.encode(rows[start : start + step].float())
        maxima.scatter_reduce_(0, owner[start : start + step, None].expand_as(acts), acts, "amax")
    return maxima


def halves_of(contrast: ContrastSet) -> tuple[ContrastSet, ContrastSet]:
    """The part of a set that chooses and the part that reports.

    The latter is the held-out part, or else every second pair and text of a side. Raises DataError for too few.
    """
    if contrast.held_out is not None:
        return replace(contrast, held_out=None), contrast.held_out
    fewest = min(contrast.count(True), contrast.count(False))
    if fewest < LEAST:
        raise DataError(
            f"{fewest} texts on a side of {contrast.name!r}",
            f"at least {LEAST}, of which every second reports",
            "add texts",
        )
    first, second = (
        ContrastSet(contrast.name, contrast.pairs[n::2], contrast.positives[n::2], contrast.negatives[n::2])
        for n in (0, 1)
    )
    return first, second


def _labelled(contrast: ContrastSet, halves: bool) -> tuple[list[LabelledText], list[bool]]:
    """(prompt, completion, positive) of every text, and whether it chooses."""
    parts = halves_of(contrast) if halves else (contrast,)
    texts = [[(*text, side) for side in (True, False) for text in part.side(side)] for part in parts]
    return [text for part in texts for text in part], [n == 0 for n, part in enumerate(texts) for _ in part]
