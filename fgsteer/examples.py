"""Excerpts: where in a corpus each feature fires most, a few tokens around each peak.

Streamed once over a corpus with memory for the excerpts kept, never for the corpus.

    examples = measure_examples(model, tokenizer, sae, texts)
    for excerpt in examples.of(42, tokenizer): print(excerpt)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgsteer.brief import Brief
from fgsteer.checks import checked_after, is_whole, shown
from fgsteer.corpora import as_documents
from fgsteer.errors import DataError, FormatError, PairingError, SelectionError
from fgsteer.escaping import escaped
from fgsteer.files import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fgsteer.sae import SAE

MOST_KEPT = 1 << 16  # excerpts of a feature, tokens on a side of a peak
CONTEXT = 12  # tokens before a peak that tell excerpts apart
_TENSORS = ("features", "tokens", "activations", "documents")


@dataclass(frozen=True, repr=False)
class Excerpt(Brief):
    """Tokens of one document around a feature's peak: their texts, the activation on each, the peak's index."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    document: int

    def __str__(self) -> str:
        marked = [f"[{text}]" if n == self.peak else text for n, text in enumerate(self.tokens)]
        return f"{self.activations[self.peak]:.2f}  {escaped(''.join(marked))}"

    def peaks_on(self, pattern: re.Pattern[str]) -> bool:
        """Whether a match of the pattern overlaps the peak's token, white space aside."""
        before = "".join(self.tokens[: self.peak])
        text = self.tokens[self.peak]
        start = len(before) + len(text) - len(text.lstrip())
        end = max(start + 1, len(before) + len(text.rstrip()))
        return any(m.start() < end and m.end() > start for m in pattern.finditer("".join(self.tokens)))


@dataclass(frozen=True, eq=False, repr=False)
class FeatureExamples(Brief):
    """The top excerpts of n features, strongest first, at most one a document.

    ``features (n,)``: their ids. ``tokens (n, top, 2·window + 1)``: token ids with the peak in the
    middle, −1 outside the text. ``activations``: the feature's on each of them, 0 on a special token before
    the text, which is never read. ``documents (n, top)``: numbers of the texts, −1 where no excerpt is.
    """

    features: Int[Tensor, " n"]
    tokens: Int[Tensor, "n top width"]
    activations: Float[Tensor, "n top width"]
    documents: Int[Tensor, "n top"]
    sae_sha256: str
    corpus: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> dict[int, int]:
        """Where each feature stands: {feature id: row}."""
        return {feature: row for row, feature in enumerate(self.features.tolist())}

    def of(self, feature: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Excerpt, ...]:
        """A feature's excerpts, strongest first; none for one that never fired or was not measured."""
        row = self.rows.get(feature)
        if row is None:
            return ()
        found = (self.documents[row] >= 0).nonzero()[:, 0].tolist()
        return tuple(self.excerpt(row, slot, tokenizer) for slot in found)

    def excerpt(self, row: int, slot: int, tokenizer: PreTrainedTokenizerBase) -> Excerpt:
        """The excerpt in one slot of a row."""
        inside = self.tokens[row, slot] >= 0
        return Excerpt(
            token_texts(tokenizer, self.tokens[row, slot][inside].tolist()),
            tuple(self.activations[row, slot][inside].tolist()),
            int(inside[: inside.shape[0] // 2].sum()),
            int(self.documents[row, slot]),
        )

    def largest(self, d_sae: int) -> Float[Tensor, " d_sae"]:
        """Each feature's largest activation in the corpus; for those without an excerpt, the largest of all."""
        peaks = self.activations[:, 0, self.tokens.shape[2] // 2]
        found = torch.zeros(d_sae).index_copy_(0, self.features, peaks)
        return found.where(found > 0, peaks.max())

    def check(self, sae: SAE) -> FeatureExamples:
        """Itself, when measured on this SAE. Raises PairingError."""
        if self.sae_sha256 != sae.sha256 or max(self.rows, default=0) >= sae.d_sae:
            raise PairingError(
                f"excerpts measured on SAE {self.sae_sha256[:12]}",
                f"ones of this SAE {sae.sha256[:12]} ({sae.source})",
                "measure them again with fgsteer examples",
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole."""
        header = {"sae_sha256": self.sae_sha256, "corpus": self.corpus}
        write_tensors(path, {name: getattr(self, name) for name in _TENSORS}, kind="examples", header=header)

    @classmethod
    def load(cls, path: str | Path) -> FeatureExamples:
        """Read a file that ``save`` wrote. Raises FormatError."""
        tensors, header = read_tensors(path, kind="examples")
        try:
            features, tokens, activations, documents = (tensors[name] for name in _TENSORS)
            n, top, width = tokens.shape
            if (features.shape, activations.shape, documents.shape) != ((n,), tokens.shape, (n, top)) or width % 2 == 0:
                raise ValueError("excerpts of unequal shapes")
            if features.is_floating_point() or tokens.is_floating_point() or documents.is_floating_point():
                raise ValueError("ids that are not integers")
            if bool((features < 0).any()) or len(set(features.tolist())) < n:
                raise ValueError("feature ids that are negative or given twice")
            if not bool(activations.isfinite().all()) or bool((tokens[documents >= 0][:, width // 2] < 0).any()):
                raise ValueError("excerpts without a peak")
            sha256, corpus = str(header["sae_sha256"]), dict(header["corpus"])
            return cls(features.long(), tokens.int(), activations.float(), documents.int(), sha256, corpus)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(f"{path} is damaged: {error}", "a file written by FeatureExamples.save") from error


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the decoded text of them all; together they are that text.

    A character whose bytes are split over tokens stands with the last of them, "" with the others.
    """
    texts: list[str] = []
    shown = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if end < len(ids):
            text = text.rstrip("\ufffd")  # an unfinished character
        texts.append(text[len(shown) :])
        shown = max(shown, text, key=len)
    return tuple(texts)


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
    progress: Callable[[int], None] | None = None,
) -> FeatureExamples:
    """Stream a corpus through the SAE and keep the ``top`` documents in which each feature peaks highest.

    Of peaks with the same token and the same twelve before it (copies, common openings) the highest is kept.
    An excerpt is the peak with ``window`` tokens on either side. ``features`` are all by default;
    texts (strings, or rows with one in ``field``, as those of the ``datasets`` library)
    keep their first ``max_tokens`` tokens and begin as those that the SAE was trained on (``prepend_bos`` as in
    ``collect``); a special token before them is not read. ``progress`` is
    called with the number of texts done. Memory is O(features · top · window) besides one batch.
    Raises DataError for a text without a token or activations that are not finite, PairingError for
    an SAE of another width, SelectionError for unknown features, or sizes below 1 (window: 0).
    """
    from fgsteer.activations import corpus_batches, corpus_reader
    from fgsteer.pooling import row_groups

    if not 1 <= top <= MOST_KEPT or not 0 <= window <= MOST_KEPT:
        raise SelectionError(f"top = {top}, window = {window}", f"1 and 0 to {MOST_KEPT}")
    chosen = list(range(sae.d_sae)) if features is None else _ids(features, sae)
    strings = as_documents(texts, field)
    every = len(chosen) == sae.d_sae
    width = sae.d_sae if every or sae.activation == "topk" else len(chosen)
    done = 0
    best: _Best | None = None
    with corpus_reader(model, tokenizer, sae, max_tokens, prepend_bos) as reader:
        for batch, values, local in corpus_batches(model, reader, strings, sae, batch_tokens=batch_tokens):
            best = best or _Best(len(chosen), top, window, values.device)
            text = (batch.selected & ~batch.starts).to(values.device)
            ids = batch.ids.to(values.device)
            numbers = torch.tensor([row.index for row in batch.rows], device=values.device)
            for rows in row_groups(text, width):
                acts = local.encode(values[rows]) if every else local.encode_selected(values[rows], chosen)
                acts = acts.masked_fill(~text[rows][..., None], 0.0)
                best.merge(acts, ids[rows], text[rows], numbers[rows])
            done += len(batch.rows)
            if progress is not None:
                progress(done)
    best = best or _Best(len(chosen), top, window, torch.device("cpu"))
    tokens, activations, documents = (kept.cpu() for kept in (best.tokens, best.activations, best.documents))
    return FeatureExamples(torch.tensor(chosen), tokens, activations, documents, sae.sha256, corpus or {})


def _ids(features: Sequence[int], sae: SAE) -> list[int]:
    """The feature ids, rising. Raises SelectionError for none, and for what is no id of the SAE's."""
    if not features or any(not is_whole(j) or not 0 <= j < sae.d_sae for j in features):
        listed = ", ".join(shown(j) for j in [*features][:5])
        raise SelectionError(f"features {listed or 'none'}", f"ids 0 to {sae.d_sae - 1}")
    return sorted({int(j) for j in features})


class _Best:
    """The strongest excerpts so far, on the device: peaks (n, top) sorted, and what stands around them."""

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
        shown: Bool[Tensor, "batch tokens"],
        numbers: Int[Tensor, " batch"],
    ) -> None:
        """Let a few documents compete for the slots; only features that gain an excerpt are touched."""
        peak, place = acts.max(1)
        bad = (~peak.isfinite()).any(1).nonzero()[:, 0]
        if len(bad):
            raise DataError(f"activations of text {int(numbers[bad[0]])} are not finite", "finite values")
        gains = ((peak > self.peaks[:, -1]) & (peak > 0)).any(0).nonzero()[:, 0]
        top = self.peaks.shape[1]
        context = torch.cat([self.contexts[gains], _contexts(ids).gather(1, place)[:, gains].T], 1)
        offered = _highest_of_each(torch.cat([self.peaks[gains], peak[:, gains].T], 1), context)
        self.peaks[gains], order = offered.topk(top, dim=1)
        self.contexts[gains] = context.gather(1, order)
        old = order.clamp(max=top - 1)
        for kept in (self.documents, self.tokens, self.activations):
            index = old.view(*old.shape, *[1] * (kept.ndim - 2)).expand(-1, -1, *kept.shape[2:])
            kept[gains] = kept[gains].gather(1, index)
        self.documents[self.peaks == 0] = -1  # a slot whose excerpt gave way to a higher one of the same context
        n, slot = ((order >= top) & (self.peaks[gains] > 0)).nonzero(as_tuple=True)
        row, feature = (order[n, slot] - top)[:, None], gains[n][:, None]
        at = place[row, feature] + self.offsets
        inside = (at >= 0) & (at < ids.shape[1])
        at = at.clamp(0, ids.shape[1] - 1)
        inside &= shown[row, at]
        self.documents[gains[n], slot] = numbers[row[:, 0]].int()
        self.tokens[gains[n], slot] = torch.where(inside, ids[row, at], -1).int()
        self.activations[gains[n], slot] = torch.where(inside, acts[row, at, feature], 0.0)


def _contexts(ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """A hash of each token and the ``CONTEXT`` before it."""
    keys = torch.zeros_like(ids, dtype=torch.int64)
    for back in range(CONTEXT + 1):
        keys = keys * 1_000_003 + torch.nn.functional.pad(ids + 1, (back, 0))[:, : ids.shape[1]]
    return keys


def _highest_of_each(peaks: Float[Tensor, "n m"], keys: Int[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Peaks, with 0 for all but the highest of those that share a key."""
    order = peaks.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, keys.gather(1, order).argsort(dim=1, stable=True))
    along = keys.gather(1, order)
    again = torch.zeros_like(along, dtype=torch.bool)
    again[:, 1:] = along[:, 1:] == along[:, :-1]
    return peaks.masked_fill(torch.zeros_like(again).scatter(1, order, again), 0.0)
