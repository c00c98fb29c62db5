"""The steering of a running batch: a table of rows for each layer, and a plan that says which token takes which rows.

Both are tensors that stay at the same address, so one compiled graph, captured or not, steers whatever they hold. The
plan of a token is a tag, const, gain, lo and hi; a row acts on the tokens whose tag is its owner's. Nothing has the tag
0 or −1, so tokens that are not steered keep every bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fgsteer.errors import HookpointError, PairingError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.steering.ranges import max_change

FREE = -1.0
COLUMNS = 5  # of a token's plan: tag, const, gain, lo, hi
Plan = tuple[float, float, float, float, float, float, float]  # these, then the first position and the end


class Table(nn.Module):
    """The table of one block: ``rows`` rows of width d_model, in float32, that act on its output."""

    read: Tensor
    write: Tensor
    bias: Tensor
    threshold: Tensor
    target: Tensor
    lam: Tensor
    lo: Tensor
    hi: Tensor
    owner: Tensor
    tokens: Tensor

    def __init__(self, rows: int, width: int, tokens: Tensor) -> None:
        super().__init__()
        for name in ("read", "write"):
            self.register_buffer(name, tokens.new_zeros(rows, width), persistent=False)
        for name in ("bias", "threshold", "target", "lam", "lo", "hi"):
            self.register_buffer(name, tokens.new_zeros(rows), persistent=False)
        self.register_buffer("owner", tokens.new_full((rows,), FREE), persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Return ``hidden`` (tokens, d_model) plus the change of the stream ``hidden + residual``.

        Tokens that are not steered keep every bit. Whatever the tables hold, no steered entry of the stream grows
        beyond ``ranges.max_change``, or beyond what it was where the model itself goes further: requests share one
        cache, in which nan would spread to others. Loading and admission refuse amounts beyond it, so what is left to
        bound here depends on activations, such as a feature that fires a thousand times as strongly as others. An
        infinite change becomes the bound, which is where a strength that large would end; nan (inf − inf) adds nothing.
        """
        flat = hidden.flatten(0, -2)
        stream = flat.float()
        if residual is not None:
            stream = stream + residual.flatten(0, -2).float()
        tag, const, gain, lo, hi = self.tokens[:, : flat.shape[0], None].unbind()
        read = torch.addmm(self.bias, stream, self.read.T)
        acts = torch.where(read > self.threshold, read, 0.0)
        is_owned = tag == self.owner
        amount = const * self.target + gain * self.lam * acts
        amount = torch.minimum(torch.maximum(amount, torch.maximum(lo, self.lo)), torch.minimum(hi, self.hi))
        amount = torch.where(is_owned, amount, 0.0)
        bound = stream.abs().clamp(min=max_change(hidden.dtype, flat.shape[1]))
        change = (amount @ self.write).nan_to_num(0.0).clamp(-bound - stream, bound - stream)
        largest = torch.finfo(hidden.dtype).max
        steered = (flat + change.to(hidden.dtype)).clamp(-largest, largest)
        return torch.where(is_owned.any(1, keepdim=True), steered, flat).view_as(hidden)

    def fill(self, tag: float, tensors: Mapping[str, Tensor]) -> None:
        """Give free rows to a tag. Raises PairingError for another width, SteeringError where too few rows are free."""
        count, width = tensors["read"].shape
        if width != self.read.shape[1]:
            raise PairingError(
                f"a vector of width {width}",
                f"a vector of width {self.read.shape[1]}, which is the model's d_model",
                "load a vector that was built for the model that is served",
            )
        free = (self.owner == FREE).nonzero().flatten()[:count]
        if len(free) < count:
            raise SteeringError(
                f"The table of this layer has no room for {count} rows: {len(free)} of {len(self.owner)} are free.",
                "",
                "unload something, or start the engine with more rows (rows=, or fgsteer serve --rows)",
            )
        for name, values in tensors.items():
            getattr(self, name)[free] = values.to(self.read)
        self.owner[free] = tag

    def clear(self, tag: float) -> None:
        """Free the rows of a tag."""
        rows = self.owner == tag
        self.owner[rows] = FREE
        self.write[rows] = 0.0


def steer_block(block: nn.Module, _: Any, output: Any) -> Any:
    """A forward hook that steers the stream in a block's output by the block's table.

    vLLM's blocks return the stream, or (hidden, residual), whose sum is the stream; the residual is not changed.
    """
    table: Table = block.steering  # type: ignore[assignment]
    if isinstance(output, Tensor):
        return table(output, None)
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor):
        return table(*output), output[1]
    raise HookpointError(
        f"{a(type(block).__name__)} that returns {a(type(output).__name__)}",
        "a block of vLLM that returns a tensor, or (hidden, residual)",
        "fgsteer does not know this architecture in vLLM: steer it with transformers instead",
    )


def blocks_of(model: nn.Module, count: int) -> nn.ModuleList:
    """The language model's one list of ``count`` blocks, in a model of vLLM. Raises HookpointError."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and not any(other in name for other in ("vision", "visual", "audio", "encoder"))
    }
    if len(lists) != 1:
        raise HookpointError(
            f"{a(type(model).__name__)} with {'the lists ' + ', '.join(lists) if lists else 'none'}",
            f"a model with one list of {count} blocks",
            "fgsteer does not know this architecture in vLLM: steer it with transformers instead",
        )
    return next(iter(lists.values()))


class Batch:
    """The plans of all requests, and the tensor (5, tokens) with tag, const, gain, lo and hi of a batch's tokens."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        # one more than a batch holds: a slice that can be the whole tensor is compiled as if it always were
        self.tokens = torch.zeros(COLUMNS, tokens + 1, device=device)
        self.plans: dict[str, Plan] = {}
        self._is_steered = False

    def write_plan(self, requests: Sequence[str], starts: np.ndarray[Any, Any], positions: Tensor) -> None:
        """Write the plan of a batch in which request r has tokens ``starts[r]`` to ``starts[r + 1]``."""
        plans = [self.plans.get(request) for request in requests]
        if self._is_steered:
            self.tokens.zero_()
        self._is_steered = any(plans)
        if not self._is_steered:
            return
        by_request = np.array([plan or (0.0,) * (COLUMNS + 2) for plan in plans], dtype=np.float32).T
        by_token = np.repeat(by_request, np.diff(starts[: len(plans) + 1]), axis=1)
        tag, *amounts, first, end = torch.from_numpy(by_token).to(self.tokens.device)
        at = positions[: len(tag)]
        in_span = (at >= first) & (at < end)
        self.tokens[:, : len(tag)] = torch.stack([torch.where(in_span, tag, 0.0), *amounts])
