"""The tokens of a scope in a pass, and the landmarks by which they are found.

mask = ScopeMask("generated", bos=False)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fgsteer.interventions.scopes import Scope


@dataclass(eq=False)
class ScopeMask:
    """The tokens of a scope in the running pass, and the rows in which any of them was met.

    Args:
        scope: The scope of some interventions.
        bos: Whether a start token at position 0 belongs to it.
        empty: Whether the running pass holds no token of the scope.
        mask: The tokens of the scope in the running pass, (batch, tokens); None for every token.
        rows_met: The rows in which a pass so far held a token of the scope, (rows,); True for all of them.
        rows_short: The rows in which a prompt so far lacked a position of the scope, (rows,); False for none.
    """

    scope: Scope
    bos: bool
    empty: bool = True
    mask: Tensor | None = None
    rows_met: Tensor | bool = False
    rows_short: Tensor | bool = False

    def begin_pass(self, empty: bool, mask: Tensor | None = None, rows: int = 1) -> None:
        """Note what the pass that begins holds: no token of the scope, those of a mask, or every one."""
        self.empty, self.mask = empty, mask
        if empty:
            return
        if mask is None or torch.compiler.is_compiling():  # a compiled graph leaves no tensor behind
            self.rows_met = True
        elif self.rows_met is not True:
            self.rows_met = mask.reshape(rows, -1).any(1) | self.rows_met

    def note_short(self, short: Tensor, rows: int) -> None:
        """Note which prompts of a batch (batch,) are shorter than the scope counts."""
        if not torch.compiler.is_compiling():
            self.rows_short = short.reshape(rows, -1).any(1) | self.rows_short


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Masks over the columns of one pass, each (batch or 1, tokens).

    Args:
        prompt: Whether the column stands before the first completion token.
        real: Whether it is neither padding nor a virtual token.
        first: Whether it is position 0 of a sequence.
        reply: Whether it is the last real token of the prompt, or comes after that.
        before: How many tokens of its prompt stand before the column.
        after: How many tokens of its prompt stand after it.
        packed: Whether a row may hold several sequences.
    """

    prompt: Tensor
    real: Tensor
    first: Tensor
    reply: Tensor
    before: Tensor
    after: Tensor
    packed: bool = False
