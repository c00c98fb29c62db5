"""Measure the share of ordinary tokens on which each feature of an SAE fires, and whether it fires on BOS alone.

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
from fgsteer.saes.density import COUNTS, FeatureDensity
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.shards import Shards

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE


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

    These are steps 2 and 3 of FGAA (arXiv 2501.09929). Memory is O(d_sae) besides one batch.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are counted.
        texts: Texts, or rows with a text in ``field``, as those of the ``datasets`` library.
        field: The field of the text, where rows are given.
        batch_tokens: The tokens in a forward pass; by default as many as suit the device.
        max_tokens: The first tokens of each text that are read.
        prepend_bos: Whether BOS stands before each text; by default as in the texts that the SAE was trained on.
        corpus: What is to be remembered of the corpus: its name and the like.
        work: A folder for shards of the counts, from which a killed run goes on to the same result.
        fresh: Whether to delete the shards in ``work`` and start over.
        progress: As in ``collect``; a function is called with the number of texts done.

    Returns:
        Where each feature fires, and how often.

    Raises:
        DataError: A text has no token, or there is none.
        PairingError: The SAE does not fit the model, or ``work`` holds shards of another run.
    """
    documents = as_documents(texts, field)
    reader = corpus_reader(model, tokenizer, sae, max_tokens, prepend_bos)

    total = {**dict.fromkeys(COUNTS, torch.zeros(sae.d_sae, dtype=torch.float64)), "tokens": torch.tensor(0)}
    with reporting(progress, "measuring density", len(texts) if isinstance(texts, Sized) else None) as report, reader:

        def count(number: int, chunk: Sequence[str]) -> dict[str, Tensor]:
            first = number * TEXTS_PER_CHUNK
            batches = batch_corpus(model, reader, chunk, sae, batch_tokens=batch_tokens, first=first)
            return _count(batches, sae.d_sae, None if work else lambda done: report(first + done))

        shards = None
        chunks = split_into_chunks(documents)
        if work is None:
            counted: Iterable[Mapping[str, Tensor]] = (count(*numbered) for numbered in enumerate(chunks))
        else:
            plan = {**run_fingerprint(model, tokenizer), "sae": sae_identity(sae)}
            options = {"batch_tokens": batch_tokens, "max_tokens": max_tokens, "prepend_bos": reader.prepend_bos}
            shards = Shards(work, "counted texts", {**plan, **options}, fresh=fresh)
            counted = shards.each(chunks, count, text_sha256, lambda shards_done: report(shards_done * TEXTS_PER_CHUNK))
        for number, counts in enumerate(counted):
            shapes = {name: part.shape for name, part in counts.items()}
            if shards is not None and shapes != {name: part.shape for name, part in total.items()}:
                raise shards.damage_error(number, f"it holds {', '.join(counts)}")
            total = {name: so_far + counts[name] for name, so_far in total.items()}
    fired, in_documents, in_first_place = (total[name] for name in COUNTS)
    return FeatureDensity(fired, in_documents, in_first_place, int(total["tokens"]), sae.sha256, corpus=corpus or {})


def _count(
    batches: Iterable[tuple[Batch, Tensor, SAE]], d_sae: int, progress: Callable[[int], None] | None
) -> dict[str, Tensor]:
    """The number of tokens of some texts, and of those on which each feature fires."""
    counts = {name: torch.zeros(d_sae, dtype=torch.float64) for name in COUNTS}
    tokens = done = 0
    for batch, values, sae in batches:
        real = batch.selected.to(values.device)
        text = real & ~batch.starts.to(values.device)
        for rows in row_groups(real, d_sae):
            acts = sae.encode(values[rows]) * real[rows][..., None]
            peak, position = acts.max(1)
            fires = peak > 0
            counts["fired"] += ((acts > 0) & text[rows][..., None]).sum((0, 1)).cpu()
            counts["documents"] += fires.sum(0).cpu()
            counts["first"] += (fires & (position == 0)).sum(0).cpu()
        tokens += int(text.sum())
        done += len(batch.rows)
        if progress is not None:
            progress(done)
    return {**counts, "tokens": torch.tensor(tokens)}
