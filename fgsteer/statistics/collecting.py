"""One streaming pass over a contrast that yields all that every method needs: ``collect``.

Texts are read a window at a time. A window's sums are the same wherever they are made, so a
long reading can be kept in parts, go on after a kill, and be shared by several processes.

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

from fgsteer.activations.batches import Batch, batch_rows, batch_texts
from fgsteer.activations.memory import map_with_oom_backoff
from fgsteer.activations.pooling import pool, pool_features
from fgsteer.activations.prefixes import SharedBatch, choose_batching, read
from fgsteer.activations.tokens import (
    TEXTS_PER_CHUNK,
    TokenReader,
    TokenRow,
    TokenRule,
    Triple,
    split_into_chunks,
)
from fgsteer.data.contrasts import Contrastable, ContrastSet, as_contrast
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, FgsteerError
from fgsteer.errors.checks import checked, is_whole_number
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.pairing import check_pairing, model_identity
from fgsteer.models.properties import context_window
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.statistics.contrast import Contrast, ContrastStatistics, Pooled, Space
from fgsteer.statistics.moments import Moments
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[Space, Hookpoint, bool]  # a space, a hookpoint, and whether positive
MOMENTS = ("mean", "m2", "fired")


@dataclass
class _Sums:
    """Moments of both sides in every space, and the examples that were kept, in the order of the texts."""

    moments: dict[Key, Moments] = field(default_factory=dict)
    kept: dict[Hookpoint, Tensor] = field(default_factory=dict)

    def add(self, key: Key, moments: Moments) -> None:
        """Merge moments into those of their key."""
        self.moments[key] = self.moments[key] + moments if key in self.moments else moments

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be written."""
        found = {f"kept/{at}": rows for at, rows in self.kept.items()}
        for (space, at, side), moments in self.moments.items():
            name = f"{space}/{at}/{'positive' if side else 'negative'}"
            found[f"{name}/count"] = torch.tensor(moments.count)
            found |= {f"{name}/{part}": getattr(moments, part) for part in MOMENTS}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> _Sums:
        """What ``tensors`` gave. Raises KeyError and ValueError for anything else."""
        sums = cls()
        for name, tensor in tensors.items():
            head, _, rest = name.partition("/")
            if head == "kept":
                sums.kept[Hookpoint.parse(rest)] = tensor
            elif name.endswith("/count"):
                space, at, side = name.removesuffix("/count").split("/")
                parts = [tensors[f"{space}/{at}/{side}/{part}"] for part in MOMENTS]
                key: Key = ("feature" if space == "feature" else "residual", Hookpoint.parse(at), side == "positive")
                if tensor.numel() != 1 or len({part.shape for part in parts}) != 1:
                    raise ValueError(f"{name} beside shapes {[tuple(part.shape) for part in parts]}")
                sums.moments[key] = Moments(int(tensor), *parts)
        return sums


@dataclass(eq=False)
class _Reader:
    """Reads windows of texts with one model, SAE and token rule."""

    model: nn.Module
    rows: TokenReader
    sae: SAE | None
    wanted: Sequence[Hookpoint]
    keep: bool
    batching: Mapping[str, Any]
    progress: Callable[[int], None] | None = None
    placed: dict[torch.device, SAE] = field(default_factory=dict)

    def window(self, number: int, texts: Sequence[Triple]) -> _Sums:
        """Sums of one window; ``number`` is its place among all."""
        sums, first = _Sums(), number * TEXTS_PER_CHUNK
        done = 0
        arranged = batch_texts(self.model, self.rows, texts, first=first, **self.batching)
        for batch, found in map_with_oom_backoff(arranged, self.read):
            positive = torch.tensor([row.positive for row in batch.rows])
            for space, at, rows in found:
                for side in (True, False):
                    if (positive == side).any():
                        sums.add((space, at, side), Moments.of(rows[positive == side]))
                if self.keep and space == "residual":
                    examples = sums.kept.setdefault(at, torch.empty(len(texts), rows.shape[1]))
                    examples[[row.index - first for row in batch.rows]] = rows.cpu()
            done += len(batch.rows)
            if self.progress is not None:
                self.progress(first + done)
        sums.moments = {key: moments.cpu() for key, moments in sums.moments.items()}
        return sums

    def read(self, batch: Batch | SharedBatch) -> list[tuple[Space, Hookpoint, Tensor]]:
        """Means of a batch's texts (texts, width) in each space at each hookpoint. Raises DataError."""
        found: list[tuple[Space, Hookpoint, Tensor]] = []
        sae = self.sae
        acts, reads = read(self.model, batch, self.wanted if sae is None else [*self.wanted, sae.input_hookpoint])
        for at, values in acts.items():
            rows = pool(values, reads)
            _check_finite(rows, f"activations at {at}", batch.rows)
            if at in self.wanted:
                found.append(("residual", at, rows))
            if sae is not None and at == sae.input_hookpoint:
                if values.device not in self.placed:
                    self.placed[values.device] = sae.to(values.device, torch.float32)
                features = pool_features(self.placed[values.device], values, reads)
                _check_finite(features, f"SAE features at {at}", batch.rows)
                found.append(("feature", sae.hookpoint, features))
        return found


def _check_finite(pooled: Tensor, what: str, rows: Sequence[TokenRow]) -> None:
    bad = (~torch.isfinite(pooled).all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            f"{what} of {rows[bad[0]].where} are not finite",
            "finite values",
            "load the model in float32 or bfloat16, or drop the text",
        )


def _texts(contrast: ContrastSet) -> Iterator[Triple]:
    """Pairs first, both sides of each together, so that what they share is found in one window."""
    positives, negatives = list(contrast.side(True)), list(contrast.side(False))
    pairs = len(contrast.pairs)
    for positive, negative in zip(positives[:pairs], negatives[:pairs], strict=True):
        yield *positive, True
        yield *negative, False
    yield from ((*text, True) for text in positives[pairs:])
    yield from ((*text, False) for text in negatives[pairs:])


def _pooled(examples: Tensor, contrast: ContrastSet) -> Pooled:
    """Examples in the order of ``_texts`` as those of either side."""
    pairs, unpaired = len(contrast.pairs), len(contrast.pairs) + contrast.count(True)
    positive = torch.cat([examples[: 2 * pairs : 2], examples[2 * pairs : unpaired]])
    negative = torch.cat([examples[1 : 2 * pairs : 2], examples[unpaired:]])
    return Pooled(positive, negative, pairs)


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
    """Statistics of both sides of a contrast, from one forward pass per text up to the last hookpoint.

    Per example i: ``h̄ᵢ = mean_t h_t`` and ``z̄ᵢ = mean_t φ(h_t)`` over the tokens that the
    rule selects; kept are count, mean, M2 over examples and ``Σᵢ 1[z̄ᵢ > 0]``.

    ``contrast``: a ContrastSet, the name of a shipped one, a path, ``{"positive": [...], "negative": [...]}`` or
    pairs. ``hookpoints`` default to the SAE's; strings are parsed, and 2 is the end of block 2. A transcoder's
    features are kept under the hookpoint that it writes, read from the one that it reads. ``tokens``: all, last
    (of the content), answer (the completion's content, after its prompt), letter (the single-letter answer token),
    tail (what a chat template writes after the last message's content), or an index into all tokens. Padding is
    never read, a special token that stands before a text only with ``bos=True``, EOS behind a text never.
    ``prepend_bos`` puts BOS (EOS where a tokenizer has none) before every text (True) or takes the tokenizer's away
    (False); by default texts begin as those that the SAE was trained on, and without an SAE as the tokenizer has it.
    Texts keep their first ``max_tokens`` tokens, and, with one warning, what fits into the model's window.
    ``batch_tokens`` bounds a batch and changes nothing but speed: by default 8,192, on a CPU 1,024. A batch that
    does not fit in memory is read in halves, with a warning. ``keep_pooled`` keeps the ``h̄ᵢ`` themselves,
    O(examples · d_model) memory at each hookpoint, for ``diagnose``.
    ``share_prefixes`` runs once what several texts begin with, as the answers to one prompt do, where that
    saves a quarter of the tokens; results differ by rounding. ``progress`` shows how far it is: by default a bar where
    standard error is a terminal or the code runs in a notebook, and nothing elsewhere; False shows nothing, and a
    function is called with the number of texts done instead.

    ``work`` names a folder that keeps the sums of every 1,024 texts: a killed call goes on from there, to the
    same result, and processes that torchrun starts share the texts among them; each returns all of it. A folder
    of another model, tokenizer, SAE, contrast or setting is refused, saying what differs; ``fresh`` starts it over.

    Raises DataError for a text without a token to read, with non-finite activations or too long for memory,
    PairingError for an SAE of another width or a folder of another reading, HookpointError for a missing hookpoint,
    BusyError while another process reads into the folder.
    """
    contrast = as_contrast(contrast)
    wanted = _hookpoints(hookpoints, sae)
    for at in wanted:
        resolve(model, at)
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
    arrange = choose_batching(model) if share_prefixes else batch_rows
    counts = [contrast.count(side) for side in (True, False)]
    texts = split_into_chunks(_texts(contrast))
    rows = TokenReader(
        tokenizer, rule=tokens, bos=bos, prepend_bos=prepend, max_tokens=max_tokens, window=context_window(model)
    )
    with reporting(progress, "collecting texts", sum(counts)) as report, rows:
        batching = {"batch_tokens": batch_tokens, "arrange": arrange}
        reader = _Reader(model, rows, sae, wanted, keep_pooled, batching, report)
        if work is None:
            sums = _join(reader.window(number, window) for number, window in enumerate(texts))
        else:
            plan = {
                **reading,
                **run_fingerprint(model, tokenizer),
                "sae": sae_identity(sae),
                "contrast": contrast.sha256,
                "hookpoints": [str(at) for at in wanted],
                "batch_tokens": batch_tokens,
                "keep_pooled": keep_pooled,
                "share_prefixes": arrange is not batch_rows,
            }
            parts = Shards(work, "collected texts", plan, fresh=fresh)
            sums = _join(_in_parts_of(parts, texts, reader, sum(counts)))
    tables: dict[Space, dict[Hookpoint, Contrast]] = {"residual": {}, "feature": {}}
    for space, at, side in sums.moments:
        if side:
            tables[space][at] = Contrast(sums.moments[space, at, True], sums.moments[space, at, False])
    data = {"name": contrast.name, "sha256": contrast.sha256, "count": counts}
    pooled = {at: _pooled(examples, contrast) for at, examples in sums.kept.items()}
    return ContrastStatistics(tables["residual"], tables["feature"], reading, (data,), pooled)


def _join(found: Iterable[_Sums]) -> _Sums:
    """Sums of all windows, in their order."""
    total = _Sums()
    kept: dict[Hookpoint, list[Tensor]] = {}
    for sums in found:
        for key, moments in sums.moments.items():
            total.add(key, moments)
        for at, rows in sums.kept.items():
            kept.setdefault(at, []).append(rows)
    total.kept = {at: torch.cat(rows) for at, rows in kept.items()}
    return total


def _in_parts_of(parts: Shards, texts: Iterable[list[Triple]], reader: _Reader, total: int) -> Iterator[_Sums]:
    """Sums of every window, kept in a folder. Raises FormatError for a damaged part."""
    report, reader.progress = reader.progress, None

    def told(count: int) -> None:
        if report is not None:
            report(min(count * TEXTS_PER_CHUNK, total))

    def make(number: int, window: list[Triple]) -> dict[str, Tensor]:
        return reader.window(number, window).tensors()

    return _sums_of(parts, parts.each(texts, make, text_sha256, told))


def _sums_of(parts: Shards, found: Iterable[Mapping[str, Tensor]]) -> Iterator[_Sums]:
    """Sums that were written. Raises FormatError for a damaged part."""
    for number, tensors in enumerate(found):
        try:
            yield _Sums.of(tensors)
        except (KeyError, ValueError, FgsteerError) as error:
            raise parts.damaged(number, error) from error


def _hookpoints(
    hookpoints: Iterable[Hookpoint | str | int] | Hookpoint | str | int | None, sae: SAE | None
) -> list[Hookpoint]:
    """Hookpoints asked for, the SAE's among them. Raises DataError when there is none."""
    if hookpoints is None:
        given: list[Hookpoint] = []
    elif isinstance(hookpoints, str) or is_whole_number(hookpoints) or not isinstance(hookpoints, Iterable):
        given = [Hookpoint.parse(hookpoints)]
    else:
        given = [Hookpoint.parse(h) for h in hookpoints]
    if sae is not None:
        given.append(sae.hookpoint)
    if not given:
        raise DataError(
            "neither sae nor hookpoints", "at least one", 'pass sae=, or hookpoints="blocks.12.hook_resid_post"'
        )
    return list(dict.fromkeys(given))
