"""Find the excerpts of a corpus in which each feature of an SAE fires most: a few tokens around each peak.

The corpus is streamed once; memory holds the excerpts that are kept, and never the corpus.

    examples = measure_examples(model, tokenizer, sae, texts)
    for excerpt in examples.of(42, tokenizer): print(excerpt)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgsteer.activations.batches import batch_corpus, corpus_reader
from fgsteer.activations.pooling import row_groups
from fgsteer.data.corpora import as_documents
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import checked_after, describe_value, is_whole_number
from fgsteer.saes.examples import FeatureExamples

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE

MAX_KEPT = 1 << 16  # excerpts of a feature, and tokens on each side of a peak
CONTEXT_TOKENS = 12  # the tokens before a peak that tell excerpts apart


@checked_after(("model", "tokenizer", "texts", "sae"))
@torch.no_grad()
def measure_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    texts: Iterable[object],
    *,
    field: str = "text",
    features: Sequence[int] | None = None,
    top: int = 8,
    window: int = 12,
    batch_tokens: int | None = None,
    max_tokens: int = 256,
    prepend_bos: bool | None = None,
    corpus: dict[str, Any] | None = None,
    progress: Progress = None,
) -> FeatureExamples:
    """Stream a corpus through the SAE and keep the documents in which each feature peaks highest.

    Of peaks with the same token and the same twelve tokens before it (copies, common openings) the highest is kept.
    Memory is O(features · top · window) besides one batch.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are looked for.
        texts: Texts, or rows with a text in ``field``, as those of the ``datasets`` library.
        field: The field of the text, where rows are given.
        features: The ids of some features; by default all of them.
        top: The excerpts that are kept of each feature, one from a document.
        window: The tokens on each side of a peak that belong to its excerpt.
        batch_tokens: The tokens in a forward pass; by default as many as suit the device.
        max_tokens: The first tokens of each text that are read.
        prepend_bos: Whether BOS stands before each text; by default as in the texts that the SAE was trained on. It is
            not read itself.
        corpus: What is to be remembered of the corpus: its name and the like.
        progress: As in ``collect``; a function is called with the number of texts done.

    Returns:
        The excerpts of each feature.

    Raises:
        DataError: A text has no token, or activations are not finite.
        PairingError: The SAE does not fit the model.
        SelectionError: A feature is unknown, ``top`` is below 1, or ``window`` below 0.
    """
    if not 1 <= top <= MAX_KEPT or not 0 <= window <= MAX_KEPT:
        raise SelectionError(
            f"top = {top} and window = {window}",
            f"top from 1 to {MAX_KEPT} and window from 0 to {MAX_KEPT}",
            "8 excerpts of 12 tokens on each side are usual",
        )
    chosen = list(range(sae.d_sae)) if features is None else _feature_ids(features, sae)
    documents = as_documents(texts, field)
    every = len(chosen) == sae.d_sae
    width = sae.d_sae if every or sae.activation == "topk" else len(chosen)
    done = 0
    best: _TopExcerpts | None = None
    reader = corpus_reader(model, tokenizer, sae, max_tokens, prepend_bos)
    with reporting(progress, "measuring excerpts", len(texts) if isinstance(texts, Sized) else None) as report, reader:
        for batch, values, local in batch_corpus(model, reader, documents, sae, batch_tokens=batch_tokens):
            best = best or _TopExcerpts(len(chosen), top, window, values.device)
            text = (batch.selected & ~batch.starts).to(values.device)
            ids = batch.ids.to(values.device)
            numbers = torch.tensor([row.index for row in batch.rows], device=values.device)
            for rows in row_groups(text, width):
                acts = local.encode(values[rows]) if every else local.encode_selected(values[rows], chosen)
                acts = acts.masked_fill(~text[rows][..., None], 0.0)
                best.merge(acts, ids[rows], text[rows], numbers[rows])
            done += len(batch.rows)
            report(done)
    best = best or _TopExcerpts(len(chosen), top, window, torch.device("cpu"))
    tokens, activations, numbers = (kept.cpu() for kept in (best.tokens, best.activations, best.documents))
    return FeatureExamples(torch.tensor(chosen), tokens, activations, numbers, sae.sha256, corpus or {})


def _feature_ids(features: Sequence[int], sae: SAE) -> list[int]:
    """The feature ids in order. Raises SelectionError for none, and for one that the SAE does not have."""
    if not features or any(not is_whole_number(j) or not 0 <= j < sae.d_sae for j in features):
        listed = ", ".join(describe_value(j) for j in [*features][:5])
        raise SelectionError(
            f"{listed or 'none'}", f"feature ids from 0 to {sae.d_sae - 1}", "leave features out to read all of them"
        )
    return sorted({int(j) for j in features})


class _TopExcerpts:
    """The strongest excerpts so far, on the device: peaks (n, top) in order, and the tokens around them."""

    def __init__(self, n: int, top: int, window: int, device: torch.device) -> None:
        self.offsets = torch.arange(-window, window + 1, device=device)
        self.peaks = torch.zeros(n, top, device=device)
        self.contexts = torch.zeros(n, top, dtype=torch.int64, device=device)
        self.documents = torch.full((n, top), -1, dtype=torch.int32, device=device)
        self.tokens = torch.full((n, top, len(self.offsets)), -1, dtype=torch.int32, device=device)
        self.activations = torch.zeros(n, top, len(self.offsets), device=device)

    def merge(
        self,
        acts: Float[Tensor, "batch tokens n"],
        ids: Int[Tensor, "batch tokens"],
        readable: Bool[Tensor, "batch tokens"],
        numbers: Int[Tensor, " batch"],
    ) -> None:
        """Let a batch of documents compete for the slots; only features that gain an excerpt are changed."""
        peak, position = acts.max(1)
        bad = (~peak.isfinite()).any(1).nonzero()[:, 0]
        if len(bad):
            raise DataError(
                f"nan or inf in the activations of text {int(numbers[bad[0]])}",
                "finite activations",
                "load the model in bfloat16 or float32, or leave the text out",
            )
        gains = ((peak > self.peaks[:, -1]) & (peak > 0)).any(0).nonzero()[:, 0]
        top = self.peaks.shape[1]
        context = torch.cat([self.contexts[gains], _contexts(ids).gather(1, position)[:, gains].T], 1)
        candidates = _highest_of_each(torch.cat([self.peaks[gains], peak[:, gains].T], 1), context)
        self.peaks[gains], order = candidates.topk(top, dim=1)
        self.contexts[gains] = context.gather(1, order)
        old = order.clamp(max=top - 1)
        for kept in (self.documents, self.tokens, self.activations):
            index = old.view(*old.shape, *[1] * (kept.ndim - 2)).expand(-1, -1, *kept.shape[2:])
            kept[gains] = kept[gains].gather(1, index)
        self.documents[self.peaks == 0] = -1  # a slot whose excerpt gave way to a higher one of the same context
        n, slot = ((order >= top) & (self.peaks[gains] > 0)).nonzero(as_tuple=True)
        row, feature = (order[n, slot] - top)[:, None], gains[n][:, None]
        at = position[row, feature] + self.offsets
        inside = (at >= 0) & (at < ids.shape[1])
        at = at.clamp(0, ids.shape[1] - 1)
        inside &= readable[row, at]
        self.documents[gains[n], slot] = numbers[row[:, 0]].int()
        self.tokens[gains[n], slot] = torch.where(inside, ids[row, at], -1).int()
        self.activations[gains[n], slot] = torch.where(inside, acts[row, at, feature], 0.0)


def _contexts(ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """A hash of each token and the ``CONTEXT_TOKENS`` tokens before it."""
    keys = torch.zeros_like(ids, dtype=torch.int64)
    for back in range(CONTEXT_TOKENS + 1):
        keys = keys * 1_000_003 + torch.nn.functional.pad(ids + 1, (back, 0))[:, : ids.shape[1]]
    return keys


def _highest_of_each(peaks: Float[Tensor, "n m"], keys: Int[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The peaks, with 0 in place of all but the highest of those that share a key."""
    order = peaks.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, keys.gather(1, order).argsort(dim=1, stable=True))
    ordered_keys = keys.gather(1, order)
    repeated = torch.zeros_like(ordered_keys, dtype=torch.bool)
    repeated[:, 1:] = ordered_keys[:, 1:] == ordered_keys[:, :-1]
    return peaks.masked_fill(torch.zeros_like(repeated).scatter(1, order, repeated), 0.0)
