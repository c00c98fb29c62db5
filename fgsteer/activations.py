"""Reading activations: texts to token rows, and one truncated forward pass per batch.

``record`` runs a model only as far as the last hookpoint asked for; no later block
and no head is computed. ``token_rows`` decides which tokens of a text are read.

    acts = record(model, ids, mask, [Hookpoint(6)])[Hookpoint(6)]      (batch, tokens, d_model)
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.chat import apply_template
from fgsteer.checks import checked
from fgsteer.data import Text
from fgsteer.errors import DataError, HookpointError
from fgsteer.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.models import check_pairing, input_device, warn_of_dropout

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

    from fgsteer.sae import SAE

TokenRule = Literal["all", "last", "answer", "letter"] | int
T = TypeVar("T")
# padded tokens in a batch by default; on a CPU few enough for its caches: 1.3 to 1.6 times as fast
BATCH_TOKENS, CPU_BATCH_TOKENS = 8192, 1024
WINDOW = 1024  # texts tokenised and sorted by length together: bounds memory, not results


@dataclass(frozen=True)
class TokenRow:
    """One text as token ids, with the indices that are read.

    ``index`` is its place in the input, ``where`` how messages name it.
    """

    ids: Sequence[int]
    selected: Sequence[int]
    index: int
    positive: bool = True
    where: str = ""


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

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.attention.to(device), self.selected.to(device), self.rows)

    def part(self, rows: slice) -> Batch:
        """Some of its rows, padded to the longest of them."""
        width = max(len(row.ids) for row in self.rows[rows])
        ids, attention, selected = (t[rows, :width] for t in (self.ids, self.attention, self.selected))
        return Batch(ids, attention, selected, self.rows[rows])


class _Reached(Exception):  # noqa: N818
    """Every hookpoint asked for has been read: the forward pass may stop."""


def primary(output: Any) -> Tensor:
    """The hidden states of a module output: a tensor, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def by_token(hidden: Tensor, batch: int, length: int) -> Float[Tensor, "batch tokens width"]:
    """Hidden states as (batch, tokens, width), also of modules that flatten batch and tokens (OPT's fc2).

    Raises HookpointError when there is not one vector a token.
    """
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
    ``attention`` then covers too, and leaves its own in it. Raises HookpointError for one that the
    model lacks, DataError for none; warns FgsteerWarning of a model in train mode with dropout.
    """
    warn_of_dropout(model)
    wanted = list(dict.fromkeys(hookpoints))
    if not wanted:
        raise DataError("no hookpoint", "at least one")
    found: dict[Hookpoint, Tensor] = {}
    mine = threading.get_ident()

    def keep(hookpoint: Hookpoint, value: Tensor) -> None:
        if threading.get_ident() != mine:  # another thread's pass, which goes on as it is
            return
        found[hookpoint] = by_token(value, *ids.shape)
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
            decoder_of(model)(input_ids=ids, attention_mask=attention, **_continuing(model, ids, attention, cache))
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


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, joint: str | None = None
) -> tuple[str, int, bool]:
    """(text, where the completion starts in it, whether special tokens are still to be added).

    Strings are joined by the ``joint``, by default a space unless one of them brings white space; chat
    messages go through the tokenizer's template. Raises DataError when the template cannot place them.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        if not prompt:
            joint = ""
        elif joint is None:
            joint = "" if prompt[-1:].isspace() or completion[:1].isspace() else " "
        return prompt + joint + completion, len(prompt) + len(joint), True
    before: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt)
    if isinstance(completion, str):
        head = apply_template(tokenizer, before, add_generation_prompt=True)
        return head + completion, len(head), False
    messages = list(completion)
    text = apply_template(tokenizer, before + messages)
    if not before:
        return text, 0, False
    opens = messages[0]["role"] == "assistant"
    head = apply_template(tokenizer, before, add_generation_prompt=opens)
    if not text.startswith(head):
        raise DataError("a chat template that rewrites earlier turns", "one under which the prompt is a prefix")
    return text, len(head), False


def _answer_start(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], offsets: Any, text: str, start: int, special: bool
) -> int:
    """Index of the first token of the completion (0 without a prompt)."""
    if start == 0:
        return 0
    if offsets is not None:
        inside = [i for i, (a, b) in enumerate(offsets) if b > start]
        return inside[0] if inside else len(ids)
    return len(tokenizer(text[:start].rstrip(), add_special_tokens=special)["input_ids"])


def _letter_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answer: int, where: str) -> int:
    """Index of the one completion token that is the completion's letter. Raises DataError."""
    pieces = [tokenizer.decode([i]) for i in ids[answer:]]
    found = [n for n, piece in enumerate(pieces) if len(piece.strip()) == 1 and piece.strip().isalpha()]
    if len(found) != 1:
        raise DataError(
            f"{where} ends in tokens {pieces}",
            "exactly one token that is a single letter",
            'use tokens="answer" or rows whose letter is a token of its own',
        )
    return answer + found[0]


def select_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answer: int, rule: TokenRule, bos: bool, where: str
) -> list[int]:
    """Indices of the tokens that a rule reads, maybe none; position 0 only with ``bos``. Raises DataError."""
    first = 0 if bos else 1
    last = len(ids) - 1
    if rule == "all":
        chosen = list(range(first, len(ids)))
    elif rule == "answer":
        chosen = list(range(max(first, answer), len(ids)))
    elif rule == "last":
        chosen = [last] if last >= first else []
    elif rule == "letter":
        chosen = [_letter_token(tokenizer, ids, answer, where)]
    elif isinstance(rule, int) and not isinstance(rule, bool):
        place = rule if rule >= 0 else len(ids) + rule
        if place == 0 and not bos:
            raise DataError(
                f"tokens={rule} is position 0 of {where}", "a later token", "pass bos=True to read position 0"
            )
        chosen = [place] if first <= place <= last else []
    else:
        raise DataError(f"tokens={rule!r}", "all, last, answer, letter or a token index")
    return chosen if chosen and chosen[0] >= first else []


def windows(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of WINDOW items, the last of what is left."""
    rest = iter(items)
    while window := list(islice(rest, WINDOW)):
        yield window


def token_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[tuple[Text, Text, bool]],
    *,
    rule: TokenRule = "all",
    bos: bool = False,
    max_tokens: int | None = None,
    joint: str | None = None,
    skip_empty: bool = False,
    first: int = 0,
) -> Iterator[list[TokenRow]]:
    """Windows of rows sorted by length, from (prompt, completion, positive) triples joined as by ``render``.

    They are numbered from ``first``. Texts longer than ``max_tokens`` keep their first tokens; one
    without a token to read is left out with ``skip_empty``. Raises DataError naming the text.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    for window in windows(enumerate(texts, first)):
        rendered = [(i, positive, *render(tokenizer, p, c, joint)) for i, (p, c, positive) in window]
        rows = []
        for special in (True, False):
            group = [r for r in rendered if r[4] == special]
            if not group:
                continue
            texts_of = [r[2] for r in group]
            # not verbose: no warning of a text longer than the model's context, which max_tokens cuts
            encoded = tokenizer(texts_of, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
            for n, (index, positive, text, start, _) in enumerate(group):
                offsets = encoded["offset_mapping"][n] if fast else None
                ids = list(encoded["input_ids"][n])
                where = f"text {index} ({'positive' if positive else 'negative'}) {text!r:.60}"
                answer = _answer_start(tokenizer, ids, offsets, text, start, special)
                ids = ids[:max_tokens]
                selected = select_tokens(tokenizer, ids, answer, rule, bos, where)
                if selected:
                    rows.append(TokenRow(ids, selected, index, positive, where))
                elif not skip_empty:
                    raise DataError(
                        f"{where} has {len(ids)} token(s) and none to read under tokens={rule!r}",
                        "at least one token besides position 0",
                        "drop the text, choose another rule, or pass bos=True",
                    )
        rows.sort(key=lambda row: (len(row.ids), row.index))
        yield rows


def usual_batch_tokens(device: torch.device) -> int:
    """Padded tokens in a batch where nothing is said of it."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right"
) -> tuple[Int[Tensor, "rows longest"], Int[Tensor, "rows longest"]]:
    """(ids, attention mask) of rows filled up to the longest."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad_id, side)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    place = torch.arange(ids.shape[1])
    return ids, (place < lengths if side == "right" else place >= ids.shape[1] - lengths).long()


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
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[Text, Text, bool]], **options: Any
) -> Iterator[Batch]:
    """Batches of (prompt, completion, positive) triples on the model's input device; see ``token_rows``.

    ``batch_tokens`` None takes what suits the device. ``arrange`` makes batches of a window's rows: ``batches``
    by default, or ``prefixes.shared_batches``.
    """
    batch_tokens, arrange = options.pop("batch_tokens"), options.pop("arrange", batches)
    pad_id = tokenizer.pad_token_id
    pad_id = pad_id if isinstance(pad_id, int) else 0
    device = input_device(model)
    batch_tokens = batch_tokens or usual_batch_tokens(device)
    for rows in token_rows(tokenizer, texts, **options):
        yield from arrange(rows, batch_tokens=batch_tokens, pad_id=pad_id, device=device)


def corpus_batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    sae: SAE,
    *,
    batch_tokens: int | None,
    max_tokens: int,
    first: int = 0,
) -> Iterator[tuple[Batch, Float[Tensor, "batch tokens d_model"], SAE]]:
    """Batches of plain texts, position 0 included, with what the SAE reads there and the SAE beside it, in float32.

    Raises PairingError for an SAE of another width.
    """
    at, local = sae.input_hookpoint, sae
    check_pairing(model, at, sae.d_model, sae.model_name, "SAE")
    triples = (("", text, True) for text in texts)
    for batch in text_batches(
        model, tokenizer, triples, rule="all", bos=True, batch_tokens=batch_tokens, max_tokens=max_tokens, first=first
    ):
        values = record(model, batch.ids, batch.attention, [at])[at]
        if local.W_enc.device != values.device or local.W_enc.dtype != torch.float32:
            local = sae.to(values.device, torch.float32)
        yield batch, values, local
