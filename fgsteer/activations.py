"""Reading activations: batches of token rows, and one truncated forward pass per batch.

``record`` runs a model only as far as the last hookpoint asked for; no later block
and no head is computed.

    acts = record(model, ids, mask, [Hookpoint(6)])[Hookpoint(6)]      (batch, tokens, d_model)
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.checks import checked
from fgsteer.errors import DataError, HookpointError
from fgsteer.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.models import check_pairing, check_window, context_window, input_device, virtual_tokens, warn_of_dropout
from fgsteer.tokens import TokenReader, TokenRow, Triple, pad

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

    from fgsteer.sae import SAE

_ends: dict[tuple[int, int], Tensor] = {}  # by decoder and thread: where prompts end in the passes that run now
# padded tokens in a batch by default; on a CPU few enough for its caches: 1.3 to 1.6 times as fast
BATCH_TOKENS, CPU_BATCH_TOKENS = 8192, 1024


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids, attention mask and read mask, each (batch, tokens)."""

    ids: Int[Tensor, "batch tokens"]
    attention: Int[Tensor, "batch tokens"]
    selected: Bool[Tensor, "batch tokens"]
    rows: Sequence[TokenRow]

    @property
    def tokens(self) -> int:
        """Tokens with their padding, which ``batch_tokens`` bounds."""
        return self.ids.numel()

    @property
    def starts(self) -> Bool[Tensor, "batch tokens"]:
        """The special tokens that stand before the texts, of which ``bos`` decides."""
        return mark([range(row.start) for row in self.rows], self.ids.shape[1]).to(self.ids.device)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.attention.to(device), self.selected.to(device), self.rows)

    def part(self, rows: slice) -> Batch:
        """Some of its rows, padded to the longest of them."""
        width = max(len(row.ids) for row in self.rows[rows])
        ids, attention, selected = (t[rows, :width] for t in (self.ids, self.attention, self.selected))
        return Batch(ids, attention, selected, self.rows[rows])


def ends_key(model: nn.Module) -> tuple[int, int]:
    """What tells passes of this model in this thread from all others."""
    return id(decoder_of(model)), threading.get_ident()


@contextmanager
def prompt_ends(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Forward passes over prompts and completions at once, for every ``steer`` block on the model around or inside.

    ``lengths``, one a row of the batch: the columns, padding included, before its first completion token.
    """
    key = ends_key(model)
    before, _ends[key] = _ends.get(key), torch.tensor(lengths, device=input_device(model))
    try:
        yield
    finally:
        if before is None:
            del _ends[key]
        else:
            _ends[key] = before


def record_batch(
    model: nn.Module, batch: Batch, hookpoints: Iterable[Hookpoint]
) -> dict[Hookpoint, Float[Tensor, "batch tokens d_model"]]:
    """``record`` of a batch of texts, for ``steer`` blocks around it too: its prompts end where they do."""
    with prompt_ends(model, [row.prompt_length for row in batch.rows]):
        return record(model, batch.ids, batch.attention, hookpoints)


def running_ends(key: tuple[int, int]) -> Int[Tensor, " batch"] | None:
    """What ``prompt_ends`` says of the pass that runs now, None outside of it."""
    return _ends.get(key)


class _Reached(Exception):  # noqa: N818
    """Every hookpoint asked for has been read: the forward pass may stop."""


def primary(output: Any) -> Tensor:
    """The hidden states of a module output: a tensor, or the first entry of a tuple or list. Raises HookpointError."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise HookpointError(f"a module output of type {type(output).__name__}", "a tensor, or one first in a tuple")
    return hidden


def with_primary(output: Any, hidden: Tensor) -> Any:
    """The same module output with other hidden states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def by_token(hidden: Tensor, batch: int, length: int) -> Float[Tensor, "batch tokens width"]:
    """Hidden states as (batch, tokens, width), also of modules that flatten batch and tokens (OPT's fc2).

    Raises HookpointError when there is not one vector a token, or tokens come before rows.
    """
    if hidden.shape[:2] == (length, batch) and hidden.ndim == 3 and min(batch, length) > 1 and batch != length:
        raise HookpointError(
            f"hidden states of shape {tuple(hidden.shape)}, tokens before rows",
            f"({batch}, {length}, width)",
            "models whose blocks keep the sequence first are not supported",
        )
    if hidden.numel() != batch * length * hidden.shape[-1]:
        raise HookpointError(
            f"hidden states of shape {tuple(hidden.shape)}",
            f"one vector for each of {batch} x {length} tokens",
            "models with several residual streams are not supported",
        )
    return hidden.reshape(batch, length, -1)


@checked
@torch.no_grad()
def record(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    attention: Int[Tensor, "batch seen"] | None,
    hookpoints: Iterable[Hookpoint],
    cache: Cache | None = None,
) -> dict[Hookpoint, Float[Tensor, "batch tokens d_model"]]:
    """Activations (batch, tokens, d_model) at each hookpoint, in the model's dtype.

    The forward pass stops at the last of them. With a ``cache`` it goes on from the tokens in there, which
    ``attention`` then covers too, and leaves its own in it. Virtual tokens of prompt and prefix tuning (PEFT) come
    before the ids and are not among what is returned. Raises HookpointError for one that the
    model lacks, DataError for none; warns FgsteerWarning of a model in train mode with dropout.
    """
    warn_of_dropout(model)
    check_window(model, ids.shape[1], "a row")
    wanted = list(dict.fromkeys(map(Hookpoint.parse, hookpoints)))
    if not wanted:
        raise DataError("no hookpoint", "at least one")
    found: dict[Hookpoint, Tensor] = {}
    mine = threading.get_ident()
    virtual = virtual_tokens(model)
    run = model if virtual else decoder_of(model)  # PEFT puts virtual tokens in front where the whole model is called

    def keep(hookpoint: Hookpoint, value: Tensor) -> None:
        if threading.get_ident() != mine:  # another thread's pass, which goes on as it is
            return
        batch, length = ids.shape
        if value.numel() == batch * (virtual + length) * value.shape[-1]:  # not those of a prefix, which are in a cache
            length += virtual
        found[hookpoint] = by_token(value, batch, length)[:, -ids.shape[1] :]
        if len(found) == len(wanted):
            raise _Reached
        found[hookpoint] = found[hookpoint].clone()  # the pass goes on, and Falcon adds to its MLP's output in place

    with ExitStack() as stack:
        for hookpoint in wanted:
            module, is_input = resolve(model, hookpoint)
            if is_input:

                def before(
                    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: Hookpoint = hookpoint
                ) -> None:
                    keep(at, args[0] if args else kwargs["hidden_states"])

                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            else:

                def after(_: nn.Module, __: tuple[Any, ...], output: Any, at: Hookpoint = hookpoint) -> None:
                    keep(at, primary(output))

                handle = module.register_forward_hook(after)
            stack.callback(handle.remove)
        with suppress(_Reached):
            run(input_ids=ids, attention_mask=attention, **_continuing(model, ids, attention, cache))
    return found


def _continuing(model: nn.Module, ids: Tensor, attention: Tensor | None, cache: Cache | None) -> dict[str, Any]:
    """Arguments of a forward pass that goes on from a cache: the positions of its tokens, padding not counted."""
    if cache is None:
        return {"use_cache": False}
    assert attention is not None
    given: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if "position_ids" in inspect.signature(decoder_of(model).forward).parameters:  # BLOOM counts its mask
        given["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return given


def usual_batch_tokens(device: torch.device) -> int:
    """Padded tokens in a batch where nothing is said of it."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


def mark(places: Sequence[Sequence[int]], width: int) -> Bool[Tensor, "rows width"]:
    """A mask that is true at the given places of each row."""
    mask = torch.zeros(len(places), width, dtype=torch.bool)
    owner = torch.tensor([number for number, row in enumerate(places) for _ in row], dtype=torch.long)
    mask[owner, torch.tensor([place for row in places for place in row], dtype=torch.long)] = True
    return mask


def batches(rows: Sequence[TokenRow], *, batch_tokens: int, pad_id: int, device: torch.device | str) -> Iterator[Batch]:
    """Right-padded batches of at most ``batch_tokens`` padded tokens (one row at least), longest first."""
    start = len(rows)
    while start:
        longest = len(rows[start - 1].ids)
        size = max(1, batch_tokens // max(1, longest))
        chosen = rows[max(0, start - size) : start]
        start -= len(chosen)
        selected = mark([row.selected for row in chosen], longest)
        yield Batch(*pad([row.ids for row in chosen], pad_id), selected, chosen).to(device)


def text_batches(
    model: nn.Module,
    reader: TokenReader,
    texts: Iterable[Triple],
    *,
    batch_tokens: int | None = None,
    first: int = 0,
    arrange: Callable[..., Iterator[Any]] = batches,
) -> Iterator[Any]:
    """Batches of (prompt, completion, positive), numbered from ``first``, on the model's input device.

    ``batch_tokens`` None takes what suits the device. ``arrange`` makes batches of a window's rows: ``batches``
    by default, or ``prefixes.shared_batches``.
    """
    pad_id = reader.tokenizer.pad_token_id
    pad_id = pad_id if isinstance(pad_id, int) else 0
    device = input_device(model)
    if batch_tokens is not None and batch_tokens < 1:
        raise DataError(f"batch_tokens = {batch_tokens}", "at least 1, or None for what suits the device")
    batch_tokens = batch_tokens or usual_batch_tokens(device)
    for rows in reader.rows(texts, first):
        yield from arrange(rows, batch_tokens=batch_tokens, pad_id=pad_id, device=device)


def corpus_batches(
    model: nn.Module,
    reader: TokenReader,
    texts: Iterable[str],
    sae: SAE,
    *,
    batch_tokens: int | None,
    first: int = 0,
) -> Iterator[tuple[Batch, Float[Tensor, "batch tokens d_model"], SAE]]:
    """Batches of plain texts with what the SAE reads there and the SAE beside it, in float32."""
    at, local = sae.input_hookpoint, sae
    triples = (("", text, True) for text in texts)
    for batch in text_batches(model, reader, triples, batch_tokens=batch_tokens, first=first):
        values = record_batch(model, batch, [at])[at]
        if local.W_enc.device != values.device or local.W_enc.dtype != torch.float32:
            local = sae.to(values.device, torch.float32)
        yield batch, values, local


def corpus_reader(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sae: SAE, max_tokens: int, prepend_bos: bool | None
) -> TokenReader:
    """Reads plain texts whole, as the SAE was trained unless ``prepend_bos`` says otherwise.

    Raises PairingError for an SAE of another width.
    """
    check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    prepend = sae.prepend_bos if prepend_bos is None else prepend_bos
    return TokenReader(tokenizer, bos=True, prepend_bos=prepend, max_tokens=max_tokens, window=context_window(model))
