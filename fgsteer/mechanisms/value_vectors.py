"""Steering value vectors: what each head writes to the stream where it attends to steered tokens.

for row in value_vectors(model, tokenizer, vec): print(row.name, row.raises)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.display.tables import Cell, Table
from fgsteer.errors import HookpointError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.mechanisms.parts import BlockParts, block_parts, norm_gain, norm_linear, project
from fgsteer.mechanisms.texts import first_block
from fgsteer.models.unembedding import top_tokens
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class ValueVector(OneLineRepr):
    """What one head of a layer, or all of them, make of a steering vector.

    Args:
        layer: The block.
        head: The head; None for the sum over heads.
        vector: The steering value vector s, (d_model,).
        raises: The tokens that s raises most, read through the final norm and the unembedding.
        lowers: Those that −s raises most.
    """

    layer: int
    head: int | None
    vector: Float[Tensor, " d_model"]
    raises: tuple[str, ...]
    lowers: tuple[str, ...]

    @property
    def name(self) -> str:
        """L, the layer, and the head."""
        return f"L{self.layer}" if self.head is None else f"L{self.layer}.H{self.head}"

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        norm = float(self.vector.norm())
        return {"heads": self.name, "norm": norm, "raises": " ".join(self.raises), "lowers": " ".join(self.lowers)}


@checked
@torch.no_grad()
def value_vectors(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, vector: SteeringVector, *, tokens: int = 10
) -> Table[ValueVector]:
    """The steering value vectors ``s[ℓ,h] = W_O^h W_V^h (γ_ℓ ⊙ v)`` and their sums over heads (arXiv 2604.08524).

    γ is the gain of the norm before attention, 1 + γ where a family stores it so; where the norm subtracts the mean, so
    does this. What the norm divides by is left out, and so is every bias. A norm after attention multiplies s by its
    gain.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vector: The vector v, before or after a block.
        tokens: How many tokens each is read as.

    Returns:
        A row for each head, and one for the sum, of every block that reads the vector; blocks in order, the sum first.

    Raises:
        HookpointError: The vector is elsewhere, or the model's attention is of an unknown form.
        PairingError: The vector has another width than the model.
    """
    check_range("tokens", tokens, 1, len(model.get_output_embeddings().weight), whole=True)  # type: ignore[operator]
    vector.check(model)
    if vector.hookpoint.site not in ("resid_pre", "resid_post"):
        raise HookpointError(f"a vector at {vector.hookpoint}", "a vector at resid_pre or resid_post")
    rows = []
    for part in block_parts(model, first_block(vector.hookpoint)):
        heads = head_vectors(part, vector.direction)
        numbers: list[int | None] = [None, *range(part.heads)]
        vectors = torch.cat([heads.sum(0, keepdim=True), heads])
        lens = [top_tokens(model, tokenizer, sign * vectors, tokens) for sign in (1.0, -1.0)]
        rows += [ValueVector(part.layer, *row) for row in zip(numbers, vectors.float().cpu(), *lens, strict=True)]
    return Table(rows)


def head_vectors(part: BlockParts, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "heads d_model"]:
    """The value vectors of a block's heads."""
    weight = part.output.weight
    assert isinstance(weight, Tensor)
    assert part.attention_port is not None
    read = norm_linear(part.attention_port.norm, direction.detach().to(weight.device, weight.dtype))
    zero = torch.zeros_like(read)
    values = torch.stack([project(reader, read) - project(reader, zero) for reader in part.readers["v"]])
    z = values.repeat_interleave(part.group, 0).flatten()
    written = part.projected(z)
    return written if part.post_norm is None else written * norm_gain(part.post_norm, len(read)).to(written)
