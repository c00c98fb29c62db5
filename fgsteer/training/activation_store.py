"""The activations that a sparse autoencoder is trained on: stored on disk once, or made again as they are needed.

Left out are position 0 of every block, special tokens, and massive activations: tokens whose norm is many times the
median, of which a few would decide what is learned.

    store = store_activations(model, tokenizer, texts, [Hookpoint(9), Hookpoint(12)], "activations", tokens=3_000_000)
    for acts in store.shards(Hookpoint(12)): ...                                               (tokens, d_model)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.batches import batch_rows, tokens_in_batch
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import TokenReader, TokenRow, special_starts
from fgsteer.data.chat import Text
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, FormatError, HookpointError
from fgsteer.errors.checks import check_range, checked
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import width_at
from fgsteer.models.properties import context_window, input_device
from fgsteer.statistics.sinks import MASSIVE
from fgsteer.storage.files import read_tensors, refuse_damaged
from fgsteer.storage.json_files import read_json, text_sha256, write_json
from fgsteer.storage.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 1 << 15  # tokens of a shard, of which the median norm is taken
KIND = "activations"
INDEX = "index.json"  # written when the store is finished
MAX_CONTEXT = 128  # tokens of a block by default, or the model's window
MOST_CONTEXT = 1 << 20


class ActivationSource(Protocol):
    """Where training takes activations from: a store on disk, or passes of the model as they are needed."""

    plan: dict[str, Any]
    repeats: bool

    def width(self, hookpoint: Hookpoint) -> int:
        """Return the width of the activations. Raises HookpointError for a hookpoint that they lack."""

    def shards(self, hookpoint: Hookpoint, first: int = 0) -> Iterator[Float[Tensor, "tokens d_model"]]:
        """Yield the activations of each shard, from number ``first`` on."""


def block_length(model: nn.Module, context: int | None) -> int:
    """Return the tokens of a block: as asked for, or the default. Raises DataError for more than the model's window."""
    window = context_window(model) or MOST_CONTEXT
    if context is None:
        return min(MAX_CONTEXT, window)
    check_range("context", context, 2, window, whole=True)
    return context


def split_into_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Text], *, context: int, prepend_bos: bool | None
) -> Iterator[TokenRow]:
    """Yield blocks of at most ``context`` tokens: each text on its own, in pieces that begin as the text does.

    A row's ``selected`` are the tokens that are trained on: not those at position 0, and no special ones.
    """
    reader = TokenReader(tokenizer, prepend_bos=prepend_bos, skip_empty=True)
    specials = special_starts(tokenizer)
    for chunk in reader.rows(("", text, True) for text in texts):
        for row in sorted(chunk, key=lambda row: row.index):
            head = list(row.ids[: row.start])
            size = context - len(head)
            for begin in range(row.start, len(row.ids), size):
                ids = head + list(row.ids[begin : begin + size])
                selected = [place for place, token in enumerate(ids) if place and token not in specials]
                if selected:
                    yield replace(row, ids=ids, selected=selected)


def split_into_shards(blocks: Iterable[TokenRow], tokens: int | None) -> Iterator[list[TokenRow]]:
    """Yield lists of blocks with SHARD_TOKENS selected tokens each, until there are ``tokens`` in all."""
    shard: list[TokenRow] = []
    total = held = 0
    for block in blocks:
        shard.append(block)
        held += len(block.selected)
        total += len(block.selected)
        is_last = tokens is not None and total >= tokens
        if held >= SHARD_TOKENS or is_last:
            yield shard
            shard, held = [], 0
        if is_last:
            return
    if shard:
        yield shard


@dataclass(frozen=True)
class ActivationReader:
    """Passes of a model over texts, which record what is trained on.

    Attributes:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: Strings, or conversations as lists of messages, in the order in which they are read.
        tokens: How many tokens are read, or None for all.
        context: Tokens of a block; by default 128, or the model's window where that is less.
        prepend_bos: As for ``TokenReader``.
        batch_tokens: Tokens of a forward pass; by default what suits the device.
        max_norm_ratio: Tokens of a larger norm than this many medians are left out; None leaves none out.
        dtype: The dtype in which activations are kept.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    texts: Iterable[Text]
    tokens: int | None = None
    context: int | None = None
    prepend_bos: bool | None = None
    batch_tokens: int | None = None
    max_norm_ratio: float | None = MASSIVE
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", block_length(self.model, self.context))
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise DataError(f"max_norm_ratio = {self.max_norm_ratio}", "more than 1, or None to leave nothing out")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which activations are read, besides the model, the tokenizer and the texts."""
        return {
            "tokens": self.tokens,
            "context": self.context,
            "prepend_bos": self.prepend_bos,
            "max_norm_ratio": self.max_norm_ratio,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def pieces(self) -> Iterator[list[TokenRow]]:
        """Yield the blocks of each shard."""
        assert self.context is not None  # it was filled in
        blocks = split_into_blocks(self.tokenizer, self.texts, context=self.context, prepend_bos=self.prepend_bos)
        return split_into_shards(blocks, self.tokens)

    @torch.no_grad()
    def read(self, blocks: Sequence[TokenRow], hookpoints: Sequence[Hookpoint]) -> dict[str, Tensor]:
        """Record a shard: activations (tokens, d_model) by hookpoint, and how many massive ones were left out.

        Raises DataError for activations that the dtype cannot hold.
        """
        device = input_device(self.model)
        pad_id = self.tokenizer.pad_token_id
        recorded: dict[Hookpoint, list[Tensor]] = {hookpoint: [] for hookpoint in hookpoints}
        rows = sorted(blocks, key=lambda row: len(row.ids))
        size = tokens_in_batch(self.batch_tokens, device)
        for batch in batch_rows(
            rows, batch_tokens=size, pad_id=pad_id if isinstance(pad_id, int) else 0, device=device
        ):
            for hookpoint, values in record(self.model, batch.ids, batch.attention, hookpoints).items():
                recorded[hookpoint].append(values[batch.selected.to(values.device)].cpu())
        tensors: dict[str, Tensor] = {}
        for hookpoint, parts in recorded.items():
            acts = torch.cat(parts)
            norms = torch.linalg.vector_norm(acts, dim=1, dtype=torch.float32)
            limit = torch.inf if self.max_norm_ratio is None else self.max_norm_ratio * float(norms.median())
            kept = acts[norms <= limit].to(self.dtype)
            if not bool(kept.isfinite().all()):
                raise DataError(
                    f"Activations at {hookpoint} have values that are nan, or too large for {self.dtype}.",
                    "finite values",
                    "pass dtype=torch.float32 to keep them in, or look for what is wrong with the model",
                )
            tensors |= {str(hookpoint): kept, f"{hookpoint} left out": torch.tensor(len(acts) - len(kept))}
        return tensors


class ActivationStream:
    """Activations that are recorded as they are needed, and kept nowhere.

    Args:
        reader: What records them.
    """

    repeats = False

    def __init__(self, reader: ActivationReader) -> None:
        self.reader = reader
        self.plan = {**run_fingerprint(reader.model, reader.tokenizer), **reader.settings}

    def width(self, hookpoint: Hookpoint) -> int:
        """Return the width of the activations. Raises HookpointError for a hookpoint that the model lacks."""
        return width_at(self.reader.model, hookpoint)

    def shards(self, hookpoint: Hookpoint, first: int = 0) -> Iterator[Float[Tensor, "tokens d_model"]]:
        """Yield the activations of each shard, from number ``first`` on."""
        for number, blocks in enumerate(self.reader.pieces()):
            if number >= first:
                yield self.reader.read(blocks, [hookpoint])[str(hookpoint)]


class ActivationStore:
    """Activations in a folder, as ``store_activations`` leaves them.

    Args:
        folder: The folder.

    Raises:
        FormatError: It holds no finished store.
    """

    repeats = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).exists():
            raise FormatError(
                f"{folder}, which holds no finished store of activations",
                "a folder that store_activations has filled",
                "call store_activations again with the same arguments: it goes on where it was interrupted",
            )
        self.plan: dict[str, Any] = read_json(self.folder / "plan.json")
        index = read_json(self.folder / INDEX)
        with refuse_damaged(self.folder / INDEX, "the index of a store of activations"):
            self.counts: dict[Hookpoint, list[int]] = {
                Hookpoint.parse(name): list(counts) for name, counts in index["tokens"].items()
            }
            self.left_out: dict[Hookpoint, int] = {
                Hookpoint.parse(name): int(count) for name, count in index["left_out"].items()
            }

    def width(self, hookpoint: Hookpoint) -> int:
        """Return the width of the activations. Raises HookpointError for a hookpoint that was not recorded."""
        return next(self.shards(hookpoint)).shape[1]

    def shards(self, hookpoint: Hookpoint, first: int = 0) -> Iterator[Float[Tensor, "tokens d_model"]]:
        """Yield the activations of each shard, from number ``first`` on.

        Raises HookpointError for a hookpoint that was not recorded, FormatError for a damaged shard.
        """
        if hookpoint not in self.counts:
            recorded = ", ".join(map(str, self.counts))
            raise HookpointError(f"activations at {hookpoint}", f"those of {self.folder}, at {recorded}")
        for number in range(first, len(self.counts[hookpoint])):
            path = self.folder / f"part-{number:06d}.safetensors"
            tensors, header = read_tensors(path, kind=KIND)
            with refuse_damaged(path, "a shard of this store"):
                if header["plan"] != text_sha256(self.plan):
                    raise ValueError("it belongs to another store")
                yield tensors[str(hookpoint)]


@checked
def store_activations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    hookpoints: Iterable[Hookpoint | str],
    folder: str | Path,
    *,
    tokens: int | None = None,
    context: int | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int | None = None,
    max_norm_ratio: float | None = MASSIVE,
    dtype: torch.dtype = torch.float16,
    fresh: bool = False,
    progress: Progress = None,
) -> ActivationStore:
    """Record activations at several hookpoints in one pass over texts, and keep them in a folder.

    Position 0 of every block, special tokens, and massive activations are left out. A killed run goes on where it
    was, and several processes (torchrun) share the work.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: Strings, or conversations as lists of messages, which go through the chat template. They are read in
            their order, so shuffle them.
        hookpoints: Where to record.
        folder: Where shards of activations are kept: a token takes 2 · d_model bytes at each hookpoint.
        tokens: How many tokens to record, or None for all of the texts.
        context: Tokens of a block, with the special token before it; longer texts are cut into several. By default
            128, or the model's window where that is less.
        prepend_bos: Whether BOS stands before each block; by default as the tokenizer does.
        batch_tokens: Tokens of a forward pass, with padding; by default what suits the device.
        max_norm_ratio: Tokens whose norm is more than this many times the median are left out; None leaves none out.
        dtype: The dtype in which they are kept.
        fresh: Whether to delete what is in the folder and start over.
        progress: As in ``collect``; a function is called with the number of shards done.

    Returns:
        The store, as ``ActivationStore(folder)`` opens it later.

    Raises:
        DataError: There is no text, or activations do not fit into the dtype.
        PairingError: The folder holds activations of something else.
    """
    wanted = [Hookpoint.parse(hookpoint) for hookpoint in hookpoints]
    reader = ActivationReader(
        model, tokenizer, texts, tokens, context, prepend_bos, batch_tokens, max_norm_ratio, dtype
    )
    plan = {**run_fingerprint(model, tokenizer), **reader.settings, "hookpoints": [str(h) for h in wanted]}
    shards = Shards(folder, KIND, plan, fresh=fresh)
    counts: dict[str, list[int]] = {str(hookpoint): [] for hookpoint in wanted}
    left_out = dict.fromkeys(counts, 0)
    total = None if tokens is None else -(-tokens // SHARD_TOKENS)
    with reporting(progress, "recording activations", total) as report:
        pieces = (tuple(blocks) for blocks in reader.pieces())
        for tensors in shards.each(pieces, lambda _, blocks: reader.read(blocks, wanted), _name, report):
            for name, kept in counts.items():
                kept.append(len(tensors[name]))
                left_out[name] += int(tensors[f"{name} left out"])
    if not any(map(sum, counts.values())):
        raise DataError("no text with a token to train on", "texts of at least two tokens")
    write_json(Path(folder) / INDEX, {"tokens": counts, "left_out": left_out})
    return ActivationStore(folder)


def _name(blocks: Sequence[TokenRow]) -> str:
    """Name the blocks of a shard by their tokens."""
    return text_sha256([list(block.ids) for block in blocks])
