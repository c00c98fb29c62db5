"""Measure on which share of ordinary tokens each feature of an SAE fires, and whether only on BOS.

density = measure_density(model, tokenizer, sae, texts)
density.save("density.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgsteer.activations.batches import Batch, batch_corpus, corpus_reader
from fgsteer.activations.pooling import row_groups
from fgsteer.activations.tokens import TEXTS_PER_CHUNK, split_into_chunks
from fgsteer.data.corpora import as_documents
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors.checks import checked_after
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.shards import Shards

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE

from fgsteer.saes.density import COUNTS, FeatureDensity


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
    progress: Progress = None,
) -> FeatureDensity:
    """Stream a generic corpus through the SAE and count, token by token, where each feature fires.

    Texts are strings, or rows with one in ``field``, as those of the ``datasets`` library.
    They keep their first ``max_tokens`` tokens, and begin as those that the SAE was trained on (``prepend_bos`` as in
    ``collect``). ``progress`` as in ``collect``. Memory is O(d_sae) besides one batch.
    ``work`` and ``fresh`` as in ``collect``. FGAA steps 2 and 3 (arXiv 2501.09929).
    Raises DataError for a text without a token, PairingError for an SAE of another width.
    """
    strings = as_documents(texts, field)
    reader = corpus_reader(model, tokenizer, sae, max_tokens, prepend_bos)

    total = {**dict.fromkeys(COUNTS, torch.zeros(sae.d_sae, dtype=torch.float64)), "tokens": torch.tensor(0)}
    with reporting(progress, "measuring density", len(texts) if isinstance(texts, Sized) else None) as report, reader:

        def count(number: int, window: Sequence[str]) -> dict[str, Tensor]:
            first = number * TEXTS_PER_CHUNK
            read = batch_corpus(model, reader, window, sae, batch_tokens=batch_tokens, first=first)
            return _count(read, sae.d_sae, None if work else lambda done: report(first + done))

        if work is None:
            found: Iterable[Mapping[str, Tensor]] = (
                count(*numbered) for numbered in enumerate(split_into_chunks(strings))
            )
        else:
            plan = {**run_fingerprint(model, tokenizer), "sae": sae_identity(sae)}
            options = {"batch_tokens": batch_tokens, "max_tokens": max_tokens, "prepend_bos": reader.prepend_bos}
            parts = Shards(work, "counted texts", {**plan, **options}, fresh=fresh)
            chunks = split_into_chunks(strings)
            found = parts.each(chunks, count, text_sha256, lambda chunks_done: report(chunks_done * TEXTS_PER_CHUNK))
        for number, counts in enumerate(found):
            if {name: part.shape for name, part in counts.items()} != {name: x.shape for name, x in total.items()}:
                raise parts.damage_error(number, f"it holds {', '.join(counts)}")
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
