"""The steering of a running batch: tables of rows by layer, and a plan of which token takes which.

Both are tensors that stay where they are, so the same compiled graph, captured or not,
steers whatever they hold. A token's plan is a tag, const and gain; a row acts on the tokens
that bear its owner's tag. Nothing bears tag 0 or −1, so unsteered tokens keep what they are.
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
Plan = tuple[float, float, float, float, float]  # tag, const, gain, first position, end


class Table(nn.Module):
    """``rows`` rows at the output of one block, of width d_model, in float32."""

    read: Tensor
    write: Tensor
    bias: Tensor
    threshold: Tensor
    target: Tensor
    owner: Tensor
    tokens: Tensor

    def __init__(self, rows: int, width: int, tokens: Tensor) -> None:
        super().__init__()
        for name in ("read", "write"):
            self.register_buffer(name, tokens.new_zeros(rows, width), persistent=False)
        for name in ("bias", "threshold", "target"):
            self.register_buffer(name, tokens.new_zeros(rows), persistent=False)
        self.register_buffer("owner", tokens.new_full((rows,), FREE), persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """``hidden`` (tokens, d_model) plus the change of the stream ``hidden + residual``.

        Unsteered tokens stay bit for bit. Whatever the tables hold, no steered entry of the stream grows beyond
        ``ranges.max_change``, or beyond what it was where the model itself goes there: requests share one cache, in
        which nan spreads to others. Loading and admission refuse amounts beyond it, so this meets what
        activations alone decide, such as a feature that fires thousandfold. inf becomes the bound, where a
        strength that large would end; nan (inf − inf) adds nothing.
        """
        flat = hidden.flatten(0, -2)
        stream = flat.float()
        if residual is not None:
            stream = stream + residual.flatten(0, -2).float()
        tag, const, gain = self.tokens[:, : flat.shape[0], None].unbind()
        read = torch.addmm(self.bias, stream, self.read.T)
        acts = torch.where(read > self.threshold, read, 0.0)
        mine = tag == self.owner
        amount = torch.where(mine, const * self.target + gain * acts, 0.0)
        bound = stream.abs().clamp(min=max_change(hidden.dtype, flat.shape[1]))
        change = (amount @ self.write).nan_to_num(0.0).clamp(-bound - stream, bound - stream)
        most = torch.finfo(hidden.dtype).max
        steered = (flat + change.to(hidden.dtype)).clamp(-most, most)
        return torch.where(mine.any(1, keepdim=True), steered, flat).view_as(hidden)

    def fill(self, tag: float, tensors: Mapping[str, Tensor]) -> None:
        """Give free rows to ``tag``. Raises PairingError for another width, SteeringError where none are left."""
        count, width = tensors["read"].shape
        if width != self.read.shape[1]:
            raise PairingError(f"a vector of d_model {width}", f"{self.read.shape[1]}, the model's")
        free = (self.owner == FREE).nonzero().flatten()[:count]
        if len(free) < count:
            raise SteeringError(
                f"{count} rows, with {len(free)} of {len(self.owner)} free",
                "room in the layer's table",
                "unload something, or start with more rows",
            )
        for name, values in tensors.items():
            getattr(self, name)[free] = values.to(self.read)
        self.owner[free] = tag

    def clear(self, tag: float) -> None:
        """Free the rows of ``tag``."""
        rows = self.owner == tag
        self.owner[rows] = FREE
        self.write[rows] = 0.0


def steer_block(block: nn.Module, _: Any, output: Any) -> Any:
    """Forward hook: a block's output with its stream steered by the block's table.

    vLLM's blocks return the stream, or (hidden, residual) whose sum it is; the residual is left alone.
    """
    table: Table = block.steering  # type: ignore[assignment]
    if isinstance(output, Tensor):
        return table(output, None)
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor):
        return table(*output), output[1]
    raise HookpointError(
        f"{a(type(block).__name__)} that returns other than a stream", "(hidden, residual), or a tensor"
    )


def blocks_of(model: nn.Module, count: int) -> nn.ModuleList:
    """The language model's one list of ``count`` blocks, in a model of vLLM. Raises HookpointError."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and not any(other in name for other in ("vision", "visual", "audio", "encoder"))
    }
    if len(found) != 1:
        raise HookpointError(
            f"{a(type(model).__name__)} with {', '.join(found) or 'no list'} of {count} blocks",
            "one such list",
        )
    return next(iter(found.values()))


class Batch:
    """The plans of live requests, and the tensor (3, tokens) that says what each token of a batch takes."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        # one more than a batch holds: a slice that may be the whole is compiled as if it always were
        self.tokens = torch.zeros(3, tokens + 1, device=device)
        self.plans: dict[str, Plan] = {}
        self._any = False

    def place(self, requests: Sequence[str], starts: np.ndarray[Any, Any], positions: Tensor) -> None:
        """Write the plan of a batch: request r holds tokens ``starts[r]`` to ``starts[r + 1]``, at ``positions``."""
        plans = [self.plans.get(request) for request in requests]
        if self._any:
            self.tokens.zero_()
        self._any = any(plans)
        if not self._any:
            return
        by_request = np.array([plan or (0.0,) * 5 for plan in plans], dtype=np.float32).T
        by_token = np.repeat(by_request, np.diff(starts[: len(plans) + 1]), axis=1)
        tag, const, gain, first, end = torch.from_numpy(by_token).to(self.tokens.device)
        here = positions[: len(tag)]
        inside = (here >= first) & (here < end)
        self.tokens[:, : len(tag)] = torch.stack([torch.where(inside, tag, 0.0), const, gain])
