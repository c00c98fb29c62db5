"""Collect contrast statistics: one streaming pass over both sides of a contrast that yields all that methods need.

Texts are read a chunk at a time. The sums of a chunk are the same wherever they are made, so a long
pass can be kept in shards, go on after a kill, and be shared by several processes.

    stats = collect(model, tokenizer, pairs, sae=sae)
    stats = collect(model, tokenizer, pairs, sae=sae, work="love.parts")     the same under torchrun
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgsteer.activations.batches import Batch, Batching, batch_rows, batch_texts_with
from fgsteer.activations.memory import map_with_oom_backoff
from fgsteer.activations.pooling import pool, pool_features
from fgsteer.activations.prefixes import SharedBatch, choose_batching, record_selected
from fgsteer.activations.token_rules import TokenRule
from fgsteer.activations.tokens import (
    TEXTS_PER_CHUNK,
    LabelledText,
    TokenReader,
    TokenRow,
    split_into_chunks,
)
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked, is_whole_number
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.pairing import check_pairing, model_identity
from fgsteer.models.properties import context_window
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import Contrast, ContrastStatistics, Pooled
from fgsteer.statistics.moments import Moments, Space
from fgsteer.statistics.sinks import AttentionSinks
from fgsteer.statistics.sums import Sums, join_sums
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked
def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrastable,
    *,
    sae: SAE | None = None,
    hookpoints: Iterable[Hookpoint | str | int] | Hookpoint | str | int | None = None,
    tokens: TokenRule = "all",
    bos: bool = False,
    prepend_bos: bool | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    keep_pooled: bool = False,
    share_prefixes: bool = True,
    work: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = None,
) -> ContrastStatistics:
    """Collect statistics of both sides of a contrast, from one forward pass per text up to the last hookpoint.

    For an example i, ``h̄ᵢ = mean_t h_t`` and ``z̄ᵢ = mean_t φ(h_t)`` over the tokens that ``tokens`` selects.
    Kept are count, mean and sum of squared deviations over examples, and ``Σᵢ 1[z̄ᵢ > 0]``.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        contrast: A ContrastSet, the name of a shipped one, a path, ``{"positive": [...], "negative": [...]}``,
            or pairs.
        sae: The SAE whose features are collected too. The features of a transcoder are kept under the hookpoint
            that it writes, and are encoded from the one that it reads.
        hookpoints: Where the residual stream is collected, besides the SAE's hookpoint. Names are parsed, and 2 is
            the end of block 2.
        tokens: Which tokens are averaged: "all" (every token of prompt, content and chat tail, without the special
            token before the text); "last" (of the content); "answer" (the completion's content, after its prompt);
            "letter" (the completion's token that is a single letter); "tail" (what a chat template writes after the
            last message's content); or an index into all tokens. Padding and an EOS token after a text are never
            read.
        bos: Whether a special token that stands before a text is read too.
        prepend_bos: True puts BOS (EOS where a tokenizer has none) before every text, False takes the tokenizer's
            away. By default texts begin as those that the SAE was trained on, and without an SAE as the
            tokenizer has it.
        batch_tokens: Padded tokens in a batch, by default 8,192, on a CPU 1,024. It changes nothing but speed. A
            batch that does not fit in memory is read in halves, with a warning.
        max_tokens: Tokens that are kept of a text, from its beginning. What does not fit into the model's window
            is left out too, with one warning.
        keep_pooled: Whether the ``h̄ᵢ`` themselves are kept, for ``diagnose``: O(examples · d_model) memory at each
            hookpoint.
        share_prefixes: Whether what several texts begin with, as the answers to one prompt do, is run once, where
            that saves a quarter of the tokens. Results differ by rounding.
        work: A folder that keeps the sums of every 1,024 texts. A call that was killed goes on from there, to the
            same result. Processes that torchrun starts share the texts among them; each returns all of it.
        fresh: Whether the folder ``work`` is started over.
        progress: None shows a bar where standard error is a terminal or the code runs in a notebook, and nothing
            elsewhere; False shows nothing; a function is called with the number of texts that are done instead.

    Returns:
        Residual contrasts at each hookpoint, and with an SAE its feature contrast.

    Raises:
        DataError: A text has no token to read, gives activations that are not finite, or does not fit in memory.
        PairingError: The SAE is of another width, or the folder holds another run; it says what differs.
        HookpointError: The model lacks a hookpoint.
        BusyError: Another process reads into the folder.
    """
    contrast = as_contrast(contrast)
    residual_hookpoints = _parse_hookpoints(hookpoints, sae)
    for hookpoint in residual_hookpoints:
        resolve(model, hookpoint)
    if sae is not None:
        check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    prepend = sae.prepend_bos if prepend_bos is None and sae is not None else prepend_bos
    reading = {
        "model": model_identity(model),
        "sae": {"source": sae.source, "sha256": sae.sha256} if sae is not None else None,
        "tokens": tokens,
        "bos": bos,
        "prepend_bos": prepend,
        "max_tokens": max_tokens,
    }
    batching: Batching[Batch | SharedBatch] = choose_batching(model) if share_prefixes else batch_rows
    chunks = split_into_chunks(interleave(contrast))
    token_reader = TokenReader(
        tokenizer, rule=tokens, bos=bos, prepend_bos=prepend, max_tokens=max_tokens, window=context_window(model)
    )
    total = contrast.count(True) + contrast.count(False)
    with reporting(progress, "collecting texts", total) as report, token_reader:
        chunk_reader = ChunkReader(
            model, token_reader, sae, residual_hookpoints, keep_pooled, batching, batch_tokens, report
        )
        if work is None:
            sums = join_sums(chunk_reader.sum_chunk(number, chunk) for number, chunk in enumerate(chunks))
        else:
            plan = {
                **reading,
                **run_fingerprint(model, tokenizer),
                "sae": sae_identity(sae),
                "contrast": contrast.sha256,
                "hookpoints": [str(hookpoint) for hookpoint in residual_hookpoints],
                "batch_tokens": batch_tokens,
                "keep_pooled": keep_pooled,
                "share_prefixes": batching is not batch_rows,
            }
            shards = Shards(work, "collected texts", plan, fresh=fresh)
            sums = join_sums(_sum_in_shards(shards, chunks, chunk_reader, total))
    chunk_reader.sinks.warn()
    return statistics_of(sums, contrast, reading)


@dataclass(eq=False)
class ChunkReader:
    """Reads chunks of texts with one model, SAE and token rule, and sums them up."""

    model: nn.Module
    token_reader: TokenReader
    sae: SAE | None
    hookpoints: Sequence[Hookpoint]
    keep_pooled: bool
    batching: Batching[Batch | SharedBatch] = batch_rows
    batch_tokens: int | None = None
    progress: Callable[[int], None] | None = None
    sinks: AttentionSinks = field(default_factory=AttentionSinks)
    sae_on: dict[torch.device, SAE] = field(default_factory=dict)  # the SAE in float32, on each device that it is used

    def sum_chunk(self, number: int, texts: Sequence[LabelledText]) -> Sums:
        """Sum up one chunk; ``number`` is its place among all."""
        sums, first = Sums(), number * TEXTS_PER_CHUNK
        done = 0
        batches = batch_texts_with(
            self.batching, self.model, self.token_reader, texts, batch_tokens=self.batch_tokens, first=first
        )
        for batch, means in map_with_oom_backoff(batches, self.mean_activations):
            positive = torch.tensor([row.positive for row in batch.rows])
            for space, hookpoint, activations in means:
                for side in (True, False):
                    if (positive == side).any():
                        sums.add((space, hookpoint, side), Moments.of(activations[positive == side]))
                if self.keep_pooled and space == "residual":
                    pooled = sums.pooled.setdefault(hookpoint, torch.empty(len(texts), activations.shape[1]))
                    pooled[[row.index - first for row in batch.rows]] = activations.cpu()
            done += len(batch.rows)
            if self.progress is not None:
                self.progress(first + done)
        sums.moments = {key: moments.cpu() for key, moments in sums.moments.items()}
        return sums

    def mean_activations(self, batch: Batch | SharedBatch) -> list[tuple[Space, Hookpoint, Tensor]]:
        """Average each text of a batch, (texts, width), in each space at each hookpoint. Raises DataError."""
        means: list[tuple[Space, Hookpoint, Tensor]] = []
        sae = self.sae
        recorded = self.hookpoints if sae is None else [*self.hookpoints, sae.input_hookpoint]
        acts, index = record_selected(self.model, batch, recorded)
        for hookpoint, values in acts.items():
            residuals = pool(values, index)
            if not self.token_reader.bos:  # the special token before a text, when it is asked for, is a sink
                self.sinks.add(values, hookpoint)
            check_finite(residuals, f"activations at {hookpoint}", batch.rows)
            if hookpoint in self.hookpoints:
                means.append(("residual", hookpoint, residuals))
            if sae is not None and hookpoint == sae.input_hookpoint:
                if values.device not in self.sae_on:
                    self.sae_on[values.device] = sae.to(values.device, torch.float32)
                features = pool_features(self.sae_on[values.device], values, index)
                check_finite(features, f"SAE features at {hookpoint}", batch.rows)
                means.append(("feature", sae.hookpoint, features))
        return means


def sums_of_shards(shards: Shards, stored: Iterable[Mapping[str, Tensor]]) -> Iterator[Sums]:
    """Yield the sums that each shard stores. Raises FormatError for a damaged shard."""
    for number, tensors in enumerate(stored):
        with shards.refuse_damaged(number):
            sums = Sums.from_tensors(tensors)
        yield sums


def _sum_in_shards(
    shards: Shards, chunks: Iterable[list[LabelledText]], chunk_reader: ChunkReader, total: int
) -> Iterator[Sums]:
    """Sum up every chunk, each kept in a shard. Raises FormatError for a damaged shard."""
    progress, chunk_reader.progress = chunk_reader.progress, None

    def report(shards_done: int) -> None:
        if progress is not None:
            progress(min(shards_done * TEXTS_PER_CHUNK, total))

    def make(number: int, chunk: list[LabelledText]) -> dict[str, Tensor]:
        return chunk_reader.sum_chunk(number, chunk).to_tensors()

    return sums_of_shards(shards, shards.each(chunks, make, text_sha256, report))


def statistics_of(sums: Sums, contrast: ContrastSet, reading: Mapping[str, Any]) -> ContrastStatistics:
    """Arrange the sums of a contrast's texts as statistics."""
    tables: dict[Space, dict[Hookpoint, Contrast]] = {"residual": {}, "feature": {}}
    for space, hookpoint, positive in sums.moments:
        if positive:
            sides = (sums.moments[space, hookpoint, side] for side in (True, False))
            tables[space][hookpoint] = Contrast(*sides)
    data = {
        "name": contrast.name,
        "sha256": contrast.sha256,
        "count": [contrast.count(True), contrast.count(False)],
    }
    pooled = {hookpoint: _split_sides(activations, contrast) for hookpoint, activations in sums.pooled.items()}
    return ContrastStatistics(tables["residual"], tables["feature"], reading, (data,), pooled)


def check_finite(means: Tensor, what: str, rows: Sequence[TokenRow]) -> None:
    """Raise DataError, naming the text, for a mean that is not finite."""
    bad = (~torch.isfinite(means).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            f"The {what} of {rows[bad[0]].where} are not finite.",
            "finite values",
            "load the model in float32 or bfloat16, as float16 overflows in many models; or drop the text",
        )


def interleave(contrast: ContrastSet) -> Iterator[LabelledText]:
    """Yield pairs first, both sides of each together, so that what they share is found within one chunk."""
    positives, negatives = list(contrast.side(True)), list(contrast.side(False))
    pairs = len(contrast.pairs)
    for positive, negative in zip(positives[:pairs], negatives[:pairs], strict=True):
        yield *positive, True
        yield *negative, False
    yield from ((*text, True) for text in positives[pairs:])
    yield from ((*text, False) for text in negatives[pairs:])


def _split_sides(pooled: Tensor, contrast: ContrastSet) -> Pooled:
    """Split pooled activations, in the order of ``interleave``, into the two sides."""
    pairs, unpaired = len(contrast.pairs), len(contrast.pairs) + contrast.count(True)
    positive = torch.cat([pooled[: 2 * pairs : 2], pooled[2 * pairs : unpaired]])
    negative = torch.cat([pooled[1 : 2 * pairs : 2], pooled[unpaired:]])
    return Pooled(positive, negative, pairs)


def _parse_hookpoints(
    hookpoints: Iterable[Hookpoint | str | int] | Hookpoint | str | int | None, sae: SAE | None
) -> list[Hookpoint]:
    """Parse the hookpoints asked for, the SAE's among them. Raises DataError when there is none."""
    if hookpoints is None:
        parsed: list[Hookpoint] = []
    elif isinstance(hookpoints, str) or is_whole_number(hookpoints) or not isinstance(hookpoints, Iterable):
        parsed = [Hookpoint.parse(hookpoints)]
    else:
        parsed = [Hookpoint.parse(hookpoint) for hookpoint in hookpoints]
    if sae is not None:
        parsed.append(sae.hookpoint)
    if not parsed:
        raise DataError(
            "neither an SAE nor a hookpoint",
            "at least one place to collect activations at",
            'pass sae=, or hookpoints="blocks.12.hook_resid_post"',
        )
    return list(dict.fromkeys(parsed))
