"""Which tokens a forward pass holds: prompt or generated, real or padding, position 0.

Outside ``generate`` the prompt is what was fed to an empty cache. Inside, it is what
``generate`` was given, so passes without a cache, chunked prefill and several
candidate tokens at once are placed right. Once a prompt has been read, nothing is
computed and nothing waits for the device: every token is a generated one.

    place = Place("generated", bos=False)
    Positions([place]).begin(input_ids, past_key_values, attention_mask)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


class Positions:
    """Tells each place which tokens of the running pass it holds; a batch is a multiple of ``rows``."""

    def __init__(self, places: Sequence[Place], rows: int = 1) -> None:
        self.places, self.rows = places, rows
        self.generating = False
        self.read = False  # whether the running generate's prompt is in its cache
        self.prompt_mask: Tensor | None = None  # (rows, prompt tokens), 1 where real: generate's
        self.prompt_length: int | None = None
        self.batch = self.start = self.length = 0
        self.mask: Tensor | None = None  # (batch, tokens so far) of this pass

    def generate(self, prompt_length: int, prompt_mask: Tensor | None) -> None:
        """Begin a call of ``generate`` on a prompt."""
        self.generating, self.read = True, False
        self.prompt_length, self.prompt_mask = prompt_length, prompt_mask

    def finish(self) -> None:
        """End a call of ``generate``."""
        self.generating = False
        self.prompt_length = self.prompt_mask = None

    def begin(self, tokens: Tensor, past: Any, attention_mask: Any) -> None:
        """Note a forward pass of ``tokens`` (batch, tokens, …) after those that the cache ``past`` holds."""
        self.batch, self.length = tokens.shape[:2]
        start = 0 if past is None else past.get_seq_length()
        if isinstance(start, Tensor):  # a static cache's: to look at it waits for the device, and breaks a graph
            if self.generating and self.read:
                self._hold_generated()
                return
            start = int(start)
        self.start = start
        if self.generating:
            assert self.prompt_length is not None
            self.read = start + self.length >= self.prompt_length
        else:
            self.mask = _plain_mask(attention_mask, start + self.length)
            if start == 0:
                self.prompt_length = self.length
            elif self.prompt_length is None or self.prompt_length > start:
                self.prompt_length = start  # the prompt was read before steering began
        if start >= max(1, self.prompt_length) and (self.generating or self.mask is None):
            self._hold_generated()
            return
        if self.generating:  # beams and several sequences of a prompt share its mask
            given = self.prompt_mask
            self.mask = None if given is None else given.repeat_interleave(max(1, self.batch // len(given)), 0)
        for place in self.places:
            where = self._where(place, tokens.device)
            place.hold(where is None, where, self.rows)

    def _hold_generated(self) -> None:
        """All tokens of the pass are generated ones."""
        for place in self.places:
            place.hold(place.scope == "prompt")

    def _where(self, place: Place, device: torch.device) -> Tensor | None:
        """Mask (batch, length) of the tokens in a scope, None where there is none."""
        prompt_length = self.prompt_length or 0
        if place.scope == "prompt" and self.start >= max(1, prompt_length):
            return None
        at = torch.arange(self.start, self.start + self.length, device=device)[None]
        real, first, last = self._landmarks(at, prompt_length)
        where = real & ((at >= first) if place.bos else (at > first))
        if place.scope == "prompt":
            where &= at < prompt_length
        elif place.scope == "generated":
            where &= at >= prompt_length
        elif place.scope == "last_prompt_on":
            where &= at >= last
        return where.expand(self.batch, -1)

    def _landmarks(self, at: Tensor, prompt_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(which places are real, first real place, last real prompt place), by row."""
        if self.mask is None:
            one = torch.ones_like(at)
            return one.bool(), one * 0, one * (prompt_length - 1)
        mask = self.mask.to(at.device).bool()
        width = mask.shape[1]
        real = mask[:, at[0].clamp(max=width - 1)] | (at >= width)
        count = torch.arange(width, device=at.device)
        first = torch.where(mask, count, width).amin(1, keepdim=True)
        prompt = mask & (count < prompt_length)
        last = torch.where(prompt, count, -1).amax(1, keepdim=True)
        return real, first, last


def _plain_mask(mask: Any, total: int) -> Tensor | None:
    """A (batch, total) mask of real tokens from any attention mask that a model accepts."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:  # a key is real when some query of this pass may see it
        seen = mask if mask.dtype == torch.bool else mask >= 0
        mask = seen.flatten(1, 2).any(1)
    if mask.shape[1] < total:  # covers the new tokens only
        mask = torch.cat([mask.new_ones(mask.shape[0], total - mask.shape[1]), mask], 1)
    plain: Tensor = mask[:, :total]
    return plain
