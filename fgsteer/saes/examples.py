"""Excerpts: where in a corpus each feature fires most, with a few tokens around each peak.

They are measured in one pass over a corpus, with memory for the excerpts alone.

    examples = measure_examples(model, tokenizer, sae, texts)
    for excerpt in examples.of(42, tokenizer): print(excerpt)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgsteer.errors.escaping import escape_text
from fgsteer.errors.reprs import OneLineRepr, short_repr
from fgsteer.errors.wording import count
from fgsteer.saes.pairing import Identified, check_measured_on
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TENSORS = ("features", "tokens", "activations", "documents")


@dataclass(frozen=True, repr=False)
class Excerpt(OneLineRepr):
    """Tokens of one document around a feature's peak.

    Attributes:
        tokens: The text of each token.
        activations: The feature's activation on each.
        peak: The index of the peak among them.
        document: The number of the document.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int
    document: int

    def __str__(self) -> str:
        marked = [f"[{text}]" if n == self.peak else text for n, text in enumerate(self.tokens)]
        return f"{self.activations[self.peak]:.2f}  {escape_text(''.join(marked))}"

    def peaks_on(self, pattern: re.Pattern[str]) -> bool:
        """Tell whether a match of the pattern overlaps the peak's token, white space around it not counted."""
        before = "".join(self.tokens[: self.peak])
        text = self.tokens[self.peak]
        start = len(before) + len(text) - len(text.lstrip())
        end = max(start + 1, len(before) + len(text.rstrip()))
        return any(m.start() < end and m.end() > start for m in pattern.finditer("".join(self.tokens)))


@dataclass(frozen=True, eq=False, repr=False)
class FeatureExamples(OneLineRepr):
    """The top excerpts of n features, strongest first, at most one from each document.

    Attributes:
        features: Ids of the features, (n,).
        tokens: Token ids with the peak in the middle, −1 outside the text, (n, top, 2·window + 1).
        activations: The feature's activation on each of them, (n, top, 2·window + 1). It is 0 on a special token
            before the text, which is never read.
        documents: Numbers of the documents, −1 where there is no excerpt, (n, top).
        sae_sha256: Hash of the SAE.
        corpus: What was read.
    """

    features: Int[Tensor, " n"]
    tokens: Int[Tensor, "n top width"]
    activations: Float[Tensor, "n top width"]
    documents: Int[Tensor, "n top"]
    sae_sha256: str
    corpus: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        excerpts = int((self.documents >= 0).sum())
        about = f" of {short_repr(str(self.corpus['name']))}" if self.corpus.get("name") else ""
        return f"FeatureExamples({count(excerpts, 'excerpt')} for {count(len(self.features), 'feature')}{about})"

    @cached_property
    def rows(self) -> dict[int, int]:
        """The row of each feature: {feature id: row}."""
        return {feature: row for row, feature in enumerate(self.features.tolist())}

    def of(self, feature: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Excerpt, ...]:
        """Return a feature's excerpts, strongest first; none for one that never fired or was not measured."""
        row = self.rows.get(feature)
        if row is None:
            return ()
        slots = (self.documents[row] >= 0).nonzero()[:, 0].tolist()
        return tuple(self.excerpt(row, slot, tokenizer) for slot in slots)

    def excerpt(self, row: int, slot: int, tokenizer: PreTrainedTokenizerBase) -> Excerpt:
        """Return the excerpt in one slot of a row."""
        inside = self.tokens[row, slot] >= 0
        return Excerpt(
            token_texts(tokenizer, self.tokens[row, slot][inside].tolist()),
            tuple(self.activations[row, slot][inside].tolist()),
            int(inside[: inside.shape[0] // 2].sum()),
            int(self.documents[row, slot]),
        )

    def largest(self, d_sae: int) -> Float[Tensor, " d_sae"]:
        """Return each feature's largest activation in the corpus, (d_sae,); without an excerpt, the largest of all."""
        peaks = self.activations[:, 0, self.tokens.shape[2] // 2]
        largest = torch.zeros(d_sae, dtype=peaks.dtype, device=peaks.device).index_copy_(0, self.features, peaks)
        return largest.where(largest > 0, peaks.max())

    def check(self, sae: Identified) -> FeatureExamples:
        """Return the excerpts themselves, if they were measured on this SAE. Raises PairingError otherwise."""
        fits = max(self.rows, default=0) < sae.d_sae
        check_measured_on(sae, self.sae_sha256, fits, "excerpts", "fgsteer examples")
        return self

    def save(self, path: str | Path) -> None:
        """Write the excerpts as safetensors, atomically. Raises FormatError where the file cannot be written."""
        header = {"sae_sha256": self.sae_sha256, "corpus": self.corpus}
        write_tensors(path, {name: getattr(self, name) for name in _TENSORS}, kind="examples", header=header)

    @classmethod
    def load(cls, path: str | Path) -> FeatureExamples:
        """Load a file that ``save`` wrote. Raises FormatError for any other, or a damaged one."""
        tensors, header = read_tensors(path, kind="examples")
        with refuse_damaged(path, "a file written by FeatureExamples.save"):
            features, tokens, activations, documents = (tensors[name] for name in _TENSORS)
            n, top, width = tokens.shape
            if (features.shape, activations.shape, documents.shape) != ((n,), tokens.shape, (n, top)) or width % 2 == 0:
                raise ValueError("its excerpts are of unequal shapes")
            if features.is_floating_point() or tokens.is_floating_point() or documents.is_floating_point():
                raise ValueError("its ids are not integers")
            if bool((features < 0).any()) or len(set(features.tolist())) < n:
                raise ValueError("its feature ids are negative or not unique")
            if not bool(activations.isfinite().all()) or bool((tokens[documents >= 0][:, width // 2] < 0).any()):
                raise ValueError("it has an excerpt without a peak, or activations that are not finite")
            sha256, corpus = str(header["sae_sha256"]), dict(header["corpus"])
            return cls(features.long(), tokens.int(), activations.float(), documents.int(), sha256, corpus)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """Return what each token adds to the decoded text of all of them; joined, they are that text.

    A character whose bytes are split over several tokens belongs to the last of them; the others add "".
    """
    texts: list[str] = []
    decoded = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if end < len(ids):
            text = text.rstrip("\ufffd")  # an unfinished character
        texts.append(text[len(decoded) :])
        decoded = max(decoded, text, key=len)
    return tuple(texts)
