"""Feature density: on which share of ordinary tokens a feature fires, and whether only on BOS.

Streamed once per SAE over a generic corpus, token by token, and kept with the SAE.

    density = measure_density(model, tokenizer, sae, texts)
    density.save("density.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.activations import Batch, corpus_batches, corpus_reader
from fgsteer.brief import Brief
from fgsteer.checks import checked_after
from fgsteer.corpora import as_documents
from fgsteer.errors import FormatError, PairingError
from fgsteer.files import read_tensors, text_sha256, write_tensors
from fgsteer.identities import made_of, sae_identity
from fgsteer.parts import Parts
from fgsteer.pooling import row_groups
from fgsteer.tokens import WINDOW, windows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fgsteer.sae import SAE


COUNTS = ("fired", "documents", "first")


@dataclass(frozen=True, eq=False, repr=False)
class FeatureDensity(Brief):
    """Token-level firing counts of every feature over a corpus; two of them add up.

    ``fired (d_sae,)``: tokens besides the special one before a text on which the feature is > 0, of ``tokens``.
    ``documents (d_sae,)``: documents in which it fires at all, position 0 included;
    ``first (d_sae,)``: those in which its largest activation is at position 0.
    ``max_density``: the θ of FGAA's filter recommended for this SAE, where one was tuned.
    """

    fired: Float[Tensor, " d_sae"]
    documents: Float[Tensor, " d_sae"]
    first: Float[Tensor, " d_sae"]
    tokens: int
    sae_sha256: str
    max_density: float | None = None
    corpus: dict[str, Any] = field(default_factory=dict)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens (the special one before a text aside) on which each feature fires, (d_sae,)."""
        return self.fired / max(1, self.tokens)

    def bos_features(self, share: float = 0.99) -> Bool[Tensor, " d_sae"]:
        """Mask (d_sae,) of features that peak on position 0 in at least this share of their documents.

        FGAA step 3 (arXiv 2501.09929).
        """
        return (self.documents > 0) & (self.first >= share * self.documents)

    def check(self, sae: SAE) -> FeatureDensity:
        """Itself, when measured on this SAE. Raises PairingError."""
        if self.sae_sha256 != sae.sha256 or len(self.fired) != sae.d_sae:
            raise PairingError(
                f"density measured on SAE {self.sae_sha256[:12]}",
                f"one of this SAE {sae.sha256[:12]} ({sae.source})",
                "measure it again with fgsteer density",
            )
        return self

    def __add__(self, other: FeatureDensity) -> FeatureDensity:
        if self.sae_sha256 != other.sae_sha256:
            raise PairingError("densities of two SAEs", "of one SAE")
        return FeatureDensity(
            self.fired + other.fired,
            self.documents + other.documents,
            self.first + other.first,
            self.tokens + other.tokens,
            self.sae_sha256,
            self.max_density if self.max_density == other.max_density else None,
            {"parts": [self.corpus, other.corpus]},
        )

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole."""
        header = {
            "tokens": self.tokens,
            "sae_sha256": self.sae_sha256,
            "max_density": self.max_density,
            "corpus": self.corpus,
        }
        tensors = {name: getattr(self, name) for name in COUNTS}
        write_tensors(path, tensors, kind="density", header=header)

    @classmethod
    def load(cls, path: str | Path) -> FeatureDensity:
        """Read a file that ``save`` wrote. Raises FormatError."""
        tensors, header = read_tensors(path, kind="density")
        try:
            if len({tuple(tensors[name].shape) for name in COUNTS}) != 1:
                raise ValueError("counts of unequal widths")
            if tensors["fired"].ndim != 1 or not 0 <= int(header["tokens"]) < 2**53:
                raise ValueError(f"counts of {header['tokens']} tokens, of shape {tuple(tensors['fired'].shape)}")
            return cls(
                tensors["fired"].double(),
                tensors["documents"].double(),
                tensors["first"].double(),
                tokens=int(header["tokens"]),
                sae_sha256=str(header["sae_sha256"]),
                max_density=None if header["max_density"] is None else float(header["max_density"]),
                corpus=dict(header["corpus"]),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise FormatError(f"{path} is damaged: {error}", "a file written by FeatureDensity.save") from error


@checked_after(("model", "tokenizer", "texts", "sae"))
@torch.no_grad()
def measure_density(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    texts: Iterable[object],
    *,
    field: str = "text",
    batch_tokens: int | None = None,
    max_tokens: int = 256,
    prepend_bos: bool | None = None,
    corpus: dict[str, Any] | None = None,
    work: str | Path | None = None,
    fresh: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FeatureDensity:
    """Stream a generic corpus through the SAE and count, token by token, where each feature fires.

    Texts are strings, or rows with one in ``field``, as those of the ``datasets`` library.
    They keep their first ``max_tokens`` tokens, and begin as those that the SAE was trained on (``prepend_bos`` as in
    ``collect``). ``progress`` is called with the number of texts done. Memory is O(d_sae) besides one batch.
    ``work`` and ``fresh`` as in ``collect``. FGAA steps 2 and 3 (arXiv 2501.09929).
    Raises DataError for a text without a token, PairingError for an SAE of another width.
    """
    strings = as_documents(texts, field)
    reader = corpus_reader(model, tokenizer, sae, max_tokens, prepend_bos)

    def count(number: int, window: Sequence[str]) -> dict[str, Tensor]:
        first = number * WINDOW
        read = corpus_batches(model, reader, window, sae, batch_tokens=batch_tokens, first=first)
        return _count(read, sae.d_sae, None if progress is None or work else lambda done: progress(first + done))

    if work is None:
        found: Iterable[Mapping[str, Tensor]] = (count(*numbered) for numbered in enumerate(windows(strings)))
    else:
        plan = {**made_of(model, tokenizer), "sae": sae_identity(sae)}
        options = {"batch_tokens": batch_tokens, "max_tokens": max_tokens, "prepend_bos": reader.prepend_bos}
        parts = Parts(work, "counted texts", {**plan, **options}, fresh=fresh)
        told = None if progress is None else lambda parts_done: progress(parts_done * WINDOW)
        found = parts.each(windows(strings), count, text_sha256, told)
    total = {**dict.fromkeys(COUNTS, torch.zeros(sae.d_sae, dtype=torch.float64)), "tokens": torch.tensor(0)}
    with reader:
        for number, counts in enumerate(found):
            if {name: part.shape for name, part in counts.items()} != {name: x.shape for name, x in total.items()}:
                raise parts.damaged(number, f"it holds {', '.join(counts)}")
            total = {name: so_far + counts[name] for name, so_far in total.items()}
    fired, documents, first = (total[name] for name in COUNTS)
    return FeatureDensity(fired, documents, first, int(total["tokens"]), sae.sha256, corpus=corpus or {})


def _count(
    batches: Iterable[tuple[Batch, Tensor, SAE]], d_sae: int, progress: Callable[[int], None] | None
) -> dict[str, Tensor]:
    """Tokens, and where each feature fires, of a window of texts."""
    counts = {name: torch.zeros(d_sae, dtype=torch.float64) for name in COUNTS}
    tokens = done = 0
    for batch, values, sae in batches:
        real = batch.selected.to(values.device)
        text = real & ~batch.starts.to(values.device)
        for rows in row_groups(real, d_sae):
            acts = sae.encode(values[rows]) * real[rows][..., None]
            peak, place = acts.max(1)
            fires = peak > 0
            counts["fired"] += ((acts > 0) & text[rows][..., None]).sum((0, 1)).cpu()
            counts["documents"] += fires.sum(0).cpu()
            counts["first"] += (fires & (place == 0)).sum(0).cpu()
        tokens += int(text.sum())
        done += len(batch.rows)
        if progress is not None:
            progress(done)
    return {**counts, "tokens": torch.tensor(tokens)}
