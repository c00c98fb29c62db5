"""The perplexity of plain text by the strength of a vector, of both signs.

print(perplexity_curve(model, tokenizer, vec, [0.1, 0.2], relative=True))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fgsteer.data.shipped import load_neutral
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_number, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.likelihood.scoring import cross_entropies
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class PerplexityPoint(OneLineRepr):
    """What one strength of a vector makes of plain text.

    Args:
        strength: The coefficient, or the share of the activations' norm; 0 for the unsteered model.
        cross_entropy: Nats a token.
        perplexity: Its exponential.
    """

    strength: float
    cross_entropy: float
    perplexity: float

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {"strength": self.strength, "cross-entropy": self.cross_entropy, "perplexity": self.perplexity}


@checked
def perplexity_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    strengths: Sequence[float],
    *,
    texts: Sequence[str] | None = None,
    relative: bool = False,
    batch_tokens: int | None = None,
) -> Table[PerplexityPoint]:
    """The perplexity of plain text at 0 and at both signs of some strengths, which should be least at 0.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vector: The vector.
        strengths: Strengths above 0, each tried with both signs.
        texts: Plain texts; by default the shipped neutral ones.
        relative: Whether strengths are shares of the activations' norm (``vec.add_relative``), in which models of
            different sizes are compared, rather than coefficients (``vec.add``).
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        A row for each strength, from the most negative to the most positive.

    Raises:
        DataError: A strength is not a number above 0, or there is no text.
    """
    for strength in strengths:
        check_number("a strength", strength)
    sizes = sorted({float(strength) for strength in strengths})
    if not sizes or not sizes[0] > 0 or not math.isfinite(sizes[-1]):
        raise DataError(f"strengths {list(strengths)!r:.60}", "numbers above 0", "each is tried with both signs")
    signed = [-size for size in reversed(sizes)] + [0.0] + sizes
    plain = list(load_neutral()[0] if texts is None else texts)
    make = vector.add_relative if relative else vector.add
    losses = cross_entropies(
        model, tokenizer, plain, [make(c) if c else None for c in signed], batch_tokens=batch_tokens
    )
    return Table(PerplexityPoint(c, loss, math.exp(loss)) for c, loss in zip(signed, losses, strict=True))
