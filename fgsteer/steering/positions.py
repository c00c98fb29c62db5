"""Which tokens a forward pass holds: of the prompt or generated, real or padding, at position 0.

Under ``generate`` the prompt is what ``generate`` was given, so that passes without a cache, chunked prefill and
several candidate tokens at once are told apart rightly. In other passes it is what was fed to an empty cache, or the
leading columns that the caller names. Once a prompt has been read, nothing is computed and nothing waits for the
device: every token is a generated one.

    mask = ScopeMask("generated", bos=False)
    Positions([mask], is_start_token).begin_pass(input_ids, cache, attention_mask)
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from fgsteer.activations.prompt_ends import noted_prompt_ends
from fgsteer.errors import SteeringError
from fgsteer.errors.wording import count
from fgsteer.interventions.scopes import counted, is_of_prompt
from fgsteer.steering.masks import Landmarks, ScopeMask


@dataclass(frozen=True, eq=False)
class Decoded:
    """A pass over one generated token of each row.

    Args:
        cache: A weak reference to the cache that it went on from.
        layer: The layer of the cache that counts its columns.
        shape: The shape of its tokens.
    """

    cache: weakref.ref[Any]
    layer: int
    shape: torch.Size

    def columns(self, cache: Any) -> int:
        """The columns that the cache holds now."""
        count: int = cache.layers[self.layer].get_seq_length()
        return count


class Positions:
    """Tells each scope's mask which tokens of the running pass it holds.

    Args:
        masks: The masks to tell.
        is_start_token: A function that says which of ids (batch, tokens), or of embeddings (batch, tokens, width), are
            start tokens.
        rows: The number of steered rows; a batch is a multiple of it.
        prompt_lengths: The columns before each row's first completion token in plain passes, (batch,), where the
            caller of ``steer`` names them; else those that ``note_prompt_ends`` notes under ``key``.
        key: What tells the passes of this model in this thread from all others.
    """

    def __init__(
        self,
        masks: Sequence[ScopeMask],
        is_start_token: Callable[[Tensor], Tensor],
        rows: int = 1,
        prompt_lengths: Tensor | None = None,
        key: tuple[int, int] = (0, 0),
    ) -> None:
        self.masks, self.is_start_token, self.rows = masks, is_start_token, rows
        self.given_prompt_lengths, self.key = prompt_lengths, key
        self.outer_ends = noted_prompt_ends(key)  # those in which the block was opened
        self.pass_prompt_lengths: Tensor | None = None  # the prompt lengths of the running pass
        self.generating = False
        self.prompt_is_cached = False  # of the running call of generate
        self.prompt_mask: Tensor | None = None  # (rows, prompt columns), 1 where real: that of generate
        self.prompt_columns: int | None = None  # of the prompt at most, with virtual ones
        self.batch = self.columns_before = self.pass_columns = 0
        self.starts: Tensor | None = None  # rows whose first token was met and is a start token, (batch, 1)
        self.virtual = 0  # leading columns that hold no text
        self.mask: Tensor | None = None  # (batch, columns so far) of this pass, 1 where real
        self.decoded: Decoded | None = None  # the last pass, where the next may go on from it
        self.goes_on = False  # whether the running pass does so

    def begin_generate(self, prompt_columns: int, prompt_mask: Tensor | None, virtual: int = 0) -> None:
        """Note that a call of ``generate`` begins, on a prompt of so many columns after ``virtual`` ones without text.

        Raises SteeringError where the caller named prompt lengths.
        """
        if self.given_prompt_lengths is not None:
            raise SteeringError(
                "a call of generate in a block of steer(…, prompt_lengths=…)",
                "only forward passes over prompt and completion in such a block",
                "leave prompt_lengths out: generate knows where its prompts end",
            )
        self.generating, self.prompt_is_cached, self.decoded = True, False, None
        self.columns_before = self.pass_columns = 0
        self.virtual, self.prompt_columns = virtual, virtual + prompt_columns
        self.prompt_mask = prompt_mask if prompt_mask is None else _after_virtual(prompt_mask, virtual)

    def end_generate(self) -> None:
        """Note that a call of ``generate`` ends."""
        self.generating = False
        self.prompt_columns = self.prompt_mask = self.decoded = None

    def go_on(self, tokens: Tensor, cache: Any, attention_mask: Any) -> bool:
        """Tell whether a pass that begins is over one more generated token of the rows of the last pass.

        Then all holds that was found out of the last one, and nothing needs to be told to the masks.
        """
        self.goes_on, last = False, self.decoded
        if last is None or cache is None or last.shape != tokens.shape or last.cache() is not cache:
            return False
        before: int = last.columns(cache)
        plain = not self.generating and (attention_mask is not None or noted_prompt_ends(self.key) is not None)
        if plain or before < (self.prompt_columns or 0):
            return False
        self.goes_on, self.columns_before = True, before
        return True

    def begin_pass(
        self, tokens: Tensor, cache: Any, attention_mask: Any, position_ids: Any = None, virtual: int = 0
    ) -> None:
        """Note that a forward pass of ``tokens`` (batch, tokens, …) begins, after those that ``cache`` holds.

        ``virtual`` columns of a plain pass or its cache come before all text. Raises SteeringError where the prompt
        lengths that the caller named do not fit the pass.
        """
        self.decoded, self.goes_on = None, False
        self.pass_prompt_lengths = None if self.generating else self._plain_prompt_lengths()
        self._check_batch()
        start = cached_columns(cache)
        if isinstance(start, Tensor):  # a static cache's: to look at it waits for the device, and breaks a graph
            if self.generating and self.prompt_is_cached:
                self.batch, self.pass_columns = tokens.shape[:2]
                self._mask_generated()
                return
            start = int(start)
        if start is None:
            start = self._uncounted_columns(tokens, attention_mask)
        self.columns_before, self.batch, self.pass_columns = start, *tokens.shape[:2]
        if not self.generating:
            # a pass over ids from the start is not one of a model that puts virtual tokens in front
            self.virtual = virtual if start or tokens.is_floating_point() else 0
            self._note_plain_pass(attention_mask)
        assert self.prompt_columns is not None
        self.prompt_is_cached = start + self.pass_columns >= self.prompt_columns
        if start >= max(1, self.prompt_columns) and (self.generating or self.mask is None):
            self._mask_generated()
            if self.pass_columns == 1 and self.pass_prompt_lengths is None and not torch.compiler.is_compiling():
                self.decoded = _decoded(tokens, cache)
            return
        if self.generating:  # beams and several sequences of a prompt share its mask
            mask = self.prompt_mask
            self.mask = None if mask is None else mask.repeat_interleave(max(1, self.batch // len(mask)), 0)
        landmarks = self._landmarks(tokens.device)
        if not self.generating and start <= self.virtual:
            landmarks = self._unpack(landmarks, _positions_by_row(position_ids, tokens))
        self._mask_tokens(tokens, landmarks)

    def _plain_prompt_lengths(self) -> Tensor | None:
        """The prompt lengths of a pass outside ``generate``, where they are known."""
        return noted_prompt_ends(self.key) if self.given_prompt_lengths is None else self.given_prompt_lengths

    def _check_batch(self) -> None:
        """Raises SteeringError for entries or lengths by row around a function that puts texts into rows itself."""
        ends = noted_prompt_ends(self.key)
        by_row = self.rows > 1 or self.given_prompt_lengths is not None
        if ends is not None and ends is not self.outer_ends and by_row:
            what = "entries" if self.rows > 1 else "prompt_lengths"
            raise SteeringError(
                "Inside this steer block a function batches and reorders its texts, so that "
                f"{what} cannot be matched to rows.",
                "one intervention, or a composition, for all rows",
                "pass the entries to the function where it takes steering=, or call it once for each",
            )

    def _uncounted_columns(self, tokens: Tensor, attention_mask: Any) -> int:
        """The number of columns before a pass that goes on from a state which does not count them."""
        length, before = tokens.shape[1], self.columns_before + self.pass_columns
        if self.pass_prompt_lengths is not None:
            raise SteeringError(
                "prompt_lengths for a pass that goes on from a recurrent state",
                "one pass over prompt and completion",
                "feed both at once, without a state",
            )
        if not self.generating:  # all of them are generated tokens, wherever they stand
            mask = _plain_mask(attention_mask)
            return max(1, before if mask is None else mask.shape[1] - length)
        if not before:  # the state came with the call, and its tokens are of the prompt
            return max(0, (self.prompt_columns or 0) - length)
        return 0 if length > before else before  # all of it again, or what comes next

    def _note_plain_pass(self, attention_mask: Any) -> None:
        """Note the mask and the prompt of a pass outside ``generate``. Raises SteeringError."""
        total = self.columns_before + self.pass_columns
        self.mask = _plain_mask(attention_mask, total)
        if self.mask is not None and self.virtual:
            self.mask = _after_virtual(self.mask[:, self.virtual :], self.virtual)
        if self.pass_prompt_lengths is not None:
            self._check_lengths(total - self.virtual)
            self.prompt_columns = total  # at most
        elif self.columns_before <= self.virtual:
            self.prompt_columns = total
        elif self.prompt_columns is None or self.prompt_columns > self.columns_before:
            self.prompt_columns = self.columns_before  # the prompt was read before steering began

    def _check_lengths(self, columns: int) -> None:
        """Raises SteeringError where the lengths that the caller named are not those of this pass."""
        assert self.pass_prompt_lengths is not None
        if len(self.pass_prompt_lengths) != self.batch:
            raise SteeringError(
                f"{len(self.pass_prompt_lengths)} prompt_lengths for a batch of {count(self.batch, 'row')}",
                "one prompt length for each row of the forward pass",
                "count the rows after padding and batching",
            )
        if torch.compiler.is_compiling():  # a compiled graph cannot look at values
            return
        if (longest := int(self.pass_prompt_lengths.max())) > columns:
            raise SteeringError(
                f"{longest} in a pass of {count(columns, 'column')}",
                f"prompt lengths of at most {columns}",
                "a prompt length counts the columns, padding included, before the row's first completion token",
            )

    def _mask_generated(self) -> None:
        """Tell each mask that all tokens of the pass are generated ones."""
        for mask in self.masks:
            mask.begin_pass(empty=is_of_prompt(mask.scope))

    def _mask_tokens(self, tokens: Tensor, landmarks: Landmarks) -> None:
        """Tell each mask which of ``tokens`` it holds."""
        after_prompt = self.columns_before >= max(1, self.prompt_columns or 0)
        start_tokens = None
        for mask in self.masks:
            if is_of_prompt(mask.scope) and after_prompt:
                mask.begin_pass(empty=True)
                continue
            where = landmarks.real
            if not mask.bos:
                start_tokens = self._start_tokens(tokens, landmarks) if start_tokens is None else start_tokens
                where = where & ~start_tokens
            if mask.scope in ("reply", "last_prompt"):
                where = where & landmarks.reply
            if mask.scope == "generated":
                where = where & ~landmarks.prompt
            if is_of_prompt(mask.scope):
                where = where & landmarks.prompt
            if (counts := counted(mask.scope)) is not None:
                where = where & self._counted(tokens, landmarks, mask, *counts)
            mask.begin_pass(empty=False, mask=where.expand(self.batch, -1), rows=self.rows)

    def _counted(
        self, tokens: Tensor, landmarks: Landmarks, mask: ScopeMask, kind: str, numbers: tuple[int, ...]
    ) -> Tensor:
        """The first tokens of each prompt, the last, or those at positions. Raises SteeringError for packed rows."""
        if landmarks.packed:
            raise SteeringError(
                f"the scope {mask.scope} in rows that hold several sequences",
                "one sequence in each row, where tokens of prompts are counted",
                'unpack the sequences, or steer with another scope, such as "reply"',
            )
        if kind == "last":
            return landmarks.after < numbers[0]
        if kind == "at":
            lengths = (landmarks.before + landmarks.real.long() + landmarks.after).amax(1)
            mask.note_short((lengths <= max(numbers)).expand(self.batch), self.rows)
            return torch.isin(landmarks.before, torch.tensor(numbers, device=tokens.device))
        starts = self._start_tokens(tokens, landmarks).any(1, keepdim=True)
        if (
            self.starts is not None and self.columns_before > self.virtual
        ):  # those of rows that began in an earlier pass
            starts = starts | self.starts
        self.starts = starts
        skipped = 0 if mask.bos else starts.long()
        first = landmarks.before - skipped < numbers[0]
        return first if kind == "first" else first | (landmarks.after < numbers[1])

    def _start_tokens(self, tokens: Tensor, landmarks: Landmarks) -> Tensor:
        """A mask of the tokens that are a start token at position 0 of a sequence."""
        if landmarks.packed:
            return landmarks.first & self.is_start_token(tokens)
        first = landmarks.first.expand(self.batch, -1)
        row = torch.arange(self.batch, device=tokens.device)
        return first & self.is_start_token(tokens[row, first.int().argmax(1)][:, None])

    def _landmarks(self, device: torch.device) -> Landmarks:
        """Where the rows and their prompts begin and end."""
        at = torch.arange(self.columns_before, self.columns_before + self.pass_columns, device=device)[None]
        end: Any = self.prompt_columns
        if self.pass_prompt_lengths is not None:
            end = self.pass_prompt_lengths.to(device)[:, None] + self.virtual
        first: Tensor | int = self.virtual
        if self.mask is None:
            real, last = at >= self.virtual, end - 1
            before, after = at - self.virtual, end - 1 - at
        else:
            mask = self.mask.to(device).bool()
            width = mask.shape[1]
            real = mask[:, at[0].clamp(max=width - 1)] | (at >= width)
            column = torch.arange(width, device=device)
            first = torch.where(mask, column, width).amin(1, keepdim=True)
            of_prompt = mask & (column < end)
            last = torch.where(of_prompt, column, -1).amax(1, keepdim=True)
            upto = of_prompt.long().cumsum(1)
            before, after = upto - of_prompt.long(), upto[:, -1:] - upto
            before, after = (counts[:, at[0].clamp(max=width - 1)] for counts in (before, after))
        return Landmarks(at < end, real, at == first, at >= last, before, after)

    def _unpack(self, landmarks: Landmarks, positions: Tensor | None) -> Landmarks:
        """Landmarks of rows that may hold several sequences: each begins where ``positions`` are 0."""
        if positions is None:
            return landmarks
        real = landmarks.real.expand_as(positions)
        first = real & (landmarks.first | (positions == 0))
        if self.pass_prompt_lengths is not None:
            if not torch.compiler.is_compiling() and bool((first.sum(1) > 1).any()):
                raise SteeringError(
                    "several sequences packed in a row (position_ids that begin again at 0)",
                    "one sequence in each row, where prompt_lengths are given",
                    "unpack the sequences, or leave prompt_lengths out",
                )
            return landmarks
        # the last token of a sequence is the one before the next one's first
        column = torch.arange(self.pass_columns, device=real.device).expand_as(positions)
        # that next one: of each column the first real one from it on
        ahead = torch.where(real, column, self.pass_columns).flip(1).cummin(1).values.flip(1)
        ahead = torch.nn.functional.pad(ahead[:, 1:], (0, 1), value=self.pass_columns)
        begins = torch.nn.functional.pad(first, (0, 1), value=True)
        reply = real & begins.gather(1, ahead)
        return replace(landmarks, real=real, first=first, reply=reply, packed=True)


def parse_prompt_lengths(lengths: Sequence[int] | Tensor | None) -> Tensor | None:
    """A caller's prompt lengths as a tensor (rows,) of counts of columns. Raises SteeringError."""
    if lengths is None:
        return None
    expected = "integers ≥ 0, one for each row: the columns before its first completion token"
    if isinstance(lengths, Tensor):
        if lengths.ndim != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise SteeringError(f"prompt_lengths of shape {tuple(lengths.shape)} and {lengths.dtype}", expected)
        lengths = lengths.tolist()
    if not isinstance(lengths, Sequence) or not lengths:
        raise SteeringError(f"prompt_lengths={lengths!r:.40}", expected)
    for number in lengths:
        if isinstance(number, bool) or not isinstance(number, SupportsIndex) or operator.index(number) < 0:
            raise SteeringError(f"{number!r:.40} among prompt_lengths", expected)
    return torch.tensor([operator.index(number) for number in lengths], device="cpu")


def cached_columns(cache: Any) -> int | Tensor | None:
    """The columns that a cache holds: 0 without any, None where a state holds some and does not count them."""
    if cache is None:
        return 0
    layers = getattr(cache, "layers", None)
    if layers is None:
        count = getattr(cache, "get_seq_length", None)
        return count() if callable(count) else getattr(cache, "seqlen_offset", None)  # xLSTM's
    for layer in layers:  # those of blocks without attention count nothing, or stay at 0
        if hasattr(layer, "get_seq_length"):
            columns: int | Tensor = layer.get_seq_length()
            if isinstance(columns, Tensor) or columns:
                return columns
    states = [getattr(layer, "has_previous_state", False) for layer in layers]
    return None if any(any(s.values()) if isinstance(s, dict) else s for s in states) else 0


def _decoded(tokens: Tensor, cache: Any) -> Decoded | None:
    """The pass over tokens after those of a cache, where a layer of it counts them."""
    for number, layer in enumerate(getattr(cache, "layers", None) or ()):
        if hasattr(layer, "get_seq_length") and layer.get_seq_length():
            return Decoded(weakref.ref(cache), number, tokens.shape)
    return None


def _positions_by_row(position_ids: Any, tokens: Tensor) -> Tensor | None:
    """The positions (batch, tokens) of the tokens, where a pass was given them in this form."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != tokens.shape[1]:
        return None
    return position_ids.to(tokens.device).expand(tokens.shape[0], -1)


def _after_virtual(mask: Tensor, virtual: int) -> Tensor:
    """A mask of real tokens behind so many columns that are none."""
    return torch.nn.functional.pad(mask, (virtual, 0), value=0)


def _plain_mask(mask: Any, total: int | None = None) -> Tensor | None:
    """A mask (batch, total) of real tokens from any attention mask that a model accepts; by default as wide as that."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:  # a key is real when some query of this pass may see it
        visible = mask if mask.dtype == torch.bool else mask >= 0
        mask = visible.flatten(1, 2).any(1)
    total = mask.shape[1] if total is None else total
    if mask.shape[1] < total:  # covers the new tokens only
        mask = torch.cat([mask.new_ones(mask.shape[0], total - mask.shape[1]), mask], 1)
    plain: Tensor = mask[:, :total]
    return plain
