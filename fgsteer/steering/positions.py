"""Which tokens a forward pass holds: prompt or generated, real or padding, position 0.

Under ``generate`` the prompt is what ``generate`` was given, so passes without a cache, chunked
prefill and several candidate tokens at once are placed right. Elsewhere it is what was fed to an
empty cache, or the leading columns that the caller names. Once a prompt has been read, nothing is
computed and nothing waits for the device: every token is a generated one.

    place = Place("generated", bos=False)
    Positions([place], starts).begin(input_ids, cache, attention_mask)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from fgsteer.activations.prompt_ends import noted_prompt_ends
from fgsteer.errors import SteeringError
from fgsteer.interventions import Scope


@dataclass(eq=False)
class Place:
    """The tokens of a scope: which of the running pass they are, and of which rows any was met."""

    scope: Scope
    bos: bool
    empty: bool = True  # whether the running pass holds none of them
    mask: Tensor | None = None  # (batch, tokens) of the running pass; None for every token
    met: Tensor | bool = False  # (rows,), or of all of them

    def hold(self, empty: bool, mask: Tensor | None = None, rows: int = 1) -> None:
        """Note what the pass that begins holds: no token of the scope, those of a mask, or every one."""
        self.empty, self.mask = empty, mask
        if empty:
            return
        if mask is None or torch.compiler.is_compiling():  # a graph leaves no tensor behind
            self.met = True
        elif self.met is not True:
            self.met = mask.reshape(rows, -1).any(1) | self.met


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Masks over the columns of one pass, each (batch or 1, tokens)."""

    prompt: Tensor  # the column stands before the first completion token
    real: Tensor  # it is neither padding nor a virtual token
    first: Tensor  # it is position 0 of a sequence
    tail: Tensor  # it is the last real token of the prompt, or comes after that
    packed: bool = False  # whether a row may hold several sequences


class Positions:
    """Tells each place which tokens of the running pass it holds; a batch is a multiple of ``rows``.

    ``starts`` tells which of ids (batch, tokens), or of embeddings (batch, tokens, width), are start
    tokens. ``named (batch,)`` are the columns before each row's first completion token in plain
    passes, where the caller of ``steer`` names them; else those of ``prompt_ends`` under ``key`` hold.
    """

    def __init__(
        self,
        places: Sequence[Place],
        starts: Callable[[Tensor], Tensor],
        rows: int = 1,
        named: Tensor | None = None,
        key: tuple[int, int] = (0, 0),
    ) -> None:
        self.places, self.starts, self.rows, self.named, self.key = places, starts, rows, named, key
        self.around = noted_prompt_ends(key)  # those in which the block was opened
        self.lengths: Tensor | None = None  # those of the running pass
        self.generating = False
        self.read = False  # whether the running generate's prompt is in its cache
        self.prompt_mask: Tensor | None = None  # (rows, prompt columns), 1 where real: generate's
        self.prompt_length: int | None = None  # columns of the prompt
        self.batch = self.start = self.length = 0
        self.virtual = 0  # leading columns that no text stands in
        self.mask: Tensor | None = None  # (batch, columns so far) of this pass, 1 where real

    def generate(self, prompt_length: int, prompt_mask: Tensor | None, virtual: int = 0) -> None:
        """Begin a call of ``generate`` on a prompt of so many columns, after ``virtual`` ones that hold no text.

        Raises SteeringError where the caller named prompt lengths.
        """
        if self.named is not None:
            raise SteeringError(
                "generate in a block of steer(…, prompt_lengths=…)",
                "forward passes over prompt and completion",
                "leave prompt_lengths out: generate knows where its prompts end",
            )
        self.generating, self.read = True, False
        self.start = self.length = 0
        self.virtual, self.prompt_length = virtual, virtual + prompt_length
        self.prompt_mask = prompt_mask if prompt_mask is None else _after_virtual(prompt_mask, virtual)

    def finish(self) -> None:
        """End a call of ``generate``."""
        self.generating = False
        self.prompt_length = self.prompt_mask = None

    def begin(
        self, tokens: Tensor, cache: Any, attention_mask: Any, position_ids: Any = None, virtual: int = 0
    ) -> None:
        """Note a forward pass of ``tokens`` (batch, tokens, …) after those that ``cache`` holds.

        ``virtual`` columns of a plain pass or its cache come before all text. Raises SteeringError
        where named prompt lengths do not fit the pass.
        """
        self.lengths = None if self.generating else noted_prompt_ends(self.key) if self.named is None else self.named
        self._check_batch()
        start = columns_in(cache)
        if isinstance(start, Tensor):  # a static cache's: to look at it waits for the device, and breaks a graph
            if self.generating and self.read:
                self.batch, self.length = tokens.shape[:2]
                self._hold_generated()
                return
            start = int(start)
        if start is None:
            start = self._uncounted(tokens, attention_mask)
        self.start, self.batch, self.length = start, *tokens.shape[:2]
        if not self.generating:
            # a pass over ids from the start is not one of a model that puts virtual tokens in front
            self.virtual = virtual if start or tokens.is_floating_point() else 0
            self._plain(attention_mask)
        assert self.prompt_length is not None
        self.read = start + self.length >= self.prompt_length
        if start >= max(1, self.prompt_length) and (self.generating or self.mask is None):
            self._hold_generated()
            return
        if self.generating:  # beams and several sequences of a prompt share its mask
            given = self.prompt_mask
            self.mask = None if given is None else given.repeat_interleave(max(1, self.batch // len(given)), 0)
        marks = self._landmarks(tokens.device)
        if not self.generating and start <= self.virtual and (positions := _by_row(position_ids, tokens)) is not None:
            marks = self._unpack(marks, positions)
        self._hold(tokens, marks)

    def _check_batch(self) -> None:
        """Raises SteeringError for entries or lengths by row around a function that puts texts into rows itself."""
        ends = noted_prompt_ends(self.key)
        if ends is not None and ends is not self.around and (self.rows > 1 or self.named is not None):
            what = "one entry a row" if self.rows > 1 else "prompt_lengths"
            raise SteeringError(
                f"a steer block with {what} around a function that makes batches of texts, in an order of its own",
                "one intervention, or a composition, for all rows",
                "pass the entries to the function where it takes steering=, or call it once for each",
            )

    def _uncounted(self, tokens: Tensor, attention_mask: Any) -> int:
        """Columns before a pass that goes on from a state which does not count them."""
        length, before = tokens.shape[1], self.start + self.length
        if self.lengths is not None:
            raise SteeringError(
                "prompt_lengths with a pass that goes on from a state",
                "one pass over prompt and completion",
                "feed both at once",
            )
        if not self.generating:  # all of them are generated tokens, wherever they stand
            mask = _plain_mask(attention_mask)
            return max(1, before if mask is None else mask.shape[1] - length)
        if not before:  # the state came with the call, and its tokens are of the prompt
            return max(0, (self.prompt_length or 0) - length)
        return 0 if length > before else before  # all of it again, or what comes next

    def _plain(self, attention_mask: Any) -> None:
        """Note mask and prompt of a pass outside ``generate``. Raises SteeringError."""
        total = self.start + self.length
        self.mask = _plain_mask(attention_mask, total)
        if self.mask is not None and self.virtual:
            self.mask = _after_virtual(self.mask[:, self.virtual :], self.virtual)
        if self.lengths is not None:
            self._check_lengths(total - self.virtual)
            self.prompt_length = total  # at most
        elif self.start <= self.virtual:
            self.prompt_length = total
        elif self.prompt_length is None or self.prompt_length > self.start:
            self.prompt_length = self.start  # the prompt was read before steering began

    def _check_lengths(self, columns: int) -> None:
        """Raises SteeringError where the lengths that the caller named are not those of this pass."""
        assert self.lengths is not None
        if len(self.lengths) != self.batch:
            raise SteeringError(
                f"{len(self.lengths)} prompt_lengths for a batch of {self.batch} rows", "one a row of the forward pass"
            )
        if torch.compiler.is_compiling():  # a graph cannot look
            return
        if (longest := int(self.lengths.max())) > columns:
            raise SteeringError(
                f"a prompt length of {longest} in a pass of {columns} columns",
                "the columns, padding included, before the row's first completion token",
            )

    def _hold_generated(self) -> None:
        """All tokens of the pass are generated ones."""
        for place in self.places:
            place.hold(place.scope == "prompt")

    def _hold(self, tokens: Tensor, marks: Landmarks) -> None:
        """Tell each place which of ``tokens`` it holds."""
        beyond = self.start >= max(1, self.prompt_length or 0)
        spared = None
        for place in self.places:
            if place.scope == "prompt" and beyond:
                place.hold(True)
                continue
            where = marks.real
            if not place.bos:
                spared = self._start_tokens(tokens, marks) if spared is None else spared
                where = where & ~spared
            if place.scope == "last_prompt_on":
                where = where & marks.tail
            elif place.scope != "all":
                where = where & (marks.prompt if place.scope == "prompt" else ~marks.prompt)
            place.hold(False, where.expand(self.batch, -1), self.rows)

    def _start_tokens(self, tokens: Tensor, marks: Landmarks) -> Tensor:
        """Which tokens are a start token at position 0 of a sequence."""
        if marks.packed:
            return marks.first & self.starts(tokens)
        first = marks.first.expand(self.batch, -1)
        row = torch.arange(self.batch, device=tokens.device)
        return first & self.starts(tokens[row, first.int().argmax(1)][:, None])

    def _landmarks(self, device: torch.device) -> Landmarks:
        """Where the rows and their prompts begin and end."""
        at = torch.arange(self.start, self.start + self.length, device=device)[None]
        end: Any = self.prompt_length
        if self.lengths is not None:
            end = self.lengths.to(device)[:, None] + self.virtual
        first: Tensor | int = self.virtual
        if self.mask is None:
            real, last = at >= self.virtual, end - 1
        else:
            mask = self.mask.to(device).bool()
            width = mask.shape[1]
            real = mask[:, at[0].clamp(max=width - 1)] | (at >= width)
            column = torch.arange(width, device=device)
            first = torch.where(mask, column, width).amin(1, keepdim=True)
            last = torch.where(mask & (column < end), column, -1).amax(1, keepdim=True)
        return Landmarks(at < end, real, at == first, at >= last)

    def _unpack(self, marks: Landmarks, positions: Tensor) -> Landmarks:
        """Landmarks of rows that may hold several sequences: each begins where ``positions`` are 0."""
        real = marks.real.expand_as(positions)
        first = real & (marks.first | (positions == 0))
        if self.lengths is not None:
            if not torch.compiler.is_compiling() and bool((first.sum(1) > 1).any()):
                raise SteeringError(
                    "prompt_lengths with several sequences packed in a row (position_ids that begin again at 0)",
                    "one sequence a row",
                )
            return marks
        # the last token of a sequence is the one before the next one's first
        column = torch.arange(self.length, device=real.device).expand_as(positions)
        ahead = torch.where(real, column, self.length).flip(1).cummin(1).values.flip(1)  # the next real one, or itself
        ahead = torch.nn.functional.pad(ahead[:, 1:], (0, 1), value=self.length)
        begins = torch.nn.functional.pad(first, (0, 1), value=True)
        return Landmarks(marks.prompt, real, first, real & begins.gather(1, ahead), packed=True)


def column_counts(lengths: Sequence[int] | Tensor | None) -> Tensor | None:
    """Prompt lengths (rows,) as a caller gave them, each a count of columns. Raises SteeringError."""
    if lengths is None:
        return None
    expected = "integers ≥ 0, one a row: the columns before the row's first completion token"
    if isinstance(lengths, Tensor):
        if lengths.ndim != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise SteeringError(f"prompt_lengths of shape {tuple(lengths.shape)} and {lengths.dtype}", expected)
        lengths = lengths.tolist()
    if not isinstance(lengths, Sequence) or not lengths:
        raise SteeringError(f"prompt_lengths {lengths!r:.40}", expected)
    for number in lengths:
        if isinstance(number, bool) or not isinstance(number, SupportsIndex) or operator.index(number) < 0:
            raise SteeringError(f"{number!r:.40} among prompt_lengths", expected)
    return torch.tensor([operator.index(number) for number in lengths])


def columns_in(cache: Any) -> int | Tensor | None:
    """Columns that a pass goes on from: 0 without any, None where a state holds some and does not count them."""
    if cache is None:
        return 0
    layers = getattr(cache, "layers", None)
    if layers is None:
        count = getattr(cache, "get_seq_length", None)
        return count() if callable(count) else getattr(cache, "seqlen_offset", None)  # xLSTM's
    for layer in layers:  # those of blocks without attention count nothing, or stay at 0
        if hasattr(layer, "get_seq_length"):
            held: int | Tensor = layer.get_seq_length()
            if isinstance(held, Tensor) or held:
                return held
    states = [getattr(layer, "has_previous_state", False) for layer in layers]
    return None if any(any(s.values()) if isinstance(s, dict) else s for s in states) else 0


def _by_row(position_ids: Any, tokens: Tensor) -> Tensor | None:
    """Positions (batch, tokens) of the tokens, where a pass was given them in this form."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != tokens.shape[1]:
        return None
    return position_ids.to(tokens.device).expand(tokens.shape[0], -1)


def _after_virtual(mask: Tensor, virtual: int) -> Tensor:
    """A mask of real tokens behind so many columns that are none."""
    return torch.nn.functional.pad(mask, (virtual, 0), value=0)


def _plain_mask(mask: Any, total: int | None = None) -> Tensor | None:
    """A (batch, total) mask of real tokens from any attention mask that a model accepts; without a total, as wide."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:  # a key is real when some query of this pass may see it
        seen = mask if mask.dtype == torch.bool else mask >= 0
        mask = seen.flatten(1, 2).any(1)
    total = mask.shape[1] if total is None else total
    if mask.shape[1] < total:  # covers the new tokens only
        mask = torch.cat([mask.new_ones(mask.shape[0], total - mask.shape[1]), mask], 1)
    plain: Tensor = mask[:, :total]
    return plain
