"""The steering of a running batch: a table of rows for each layer, and a plan that says which token takes which rows.

Both are tensors that stay at the same address, so one compiled graph, captured or not, steers whatever they hold. The
plan of a token has a slot for each steering that a request may have; a slot is a tag, const, gain, lo, hi and a mode,
and a row acts on the tokens whose tag is its owner's. Slots act one after the other, as interventions that compose do.
Nothing has the tag 0 or −1, so tokens that are not steered keep every bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fgsteer.errors import HookpointError, PairingError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.serving.rows import CLAUSES, KEEP_NORM, RELATIVE
from fgsteer.serving.sources import MAX_RUNS
from fgsteer.steering.ranges import max_change

FREE = -1.0
COLUMNS = 6  # of a slot of a token's plan: tag, const, gain, lo, hi, mode
Slot = Sequence[float]  # these, then the first position and the end of each of MAX_RUNS runs
Plan = Sequence[Slot]


class TopK(nn.Module):
    """The encoder of a TopK SAE, (d_model, d_sae), which tells the features that fire: the k largest of all."""

    weight: Tensor
    bias: Tensor

    def __init__(self, d_sae: int, k: int, like: Tensor, width: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("weight", like.new_zeros(width, d_sae), persistent=False)
        self.register_buffer("bias", like.new_zeros(d_sae), persistent=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Return the ids of the k largest pre-activations, (tokens, k), ties decided as ``SAE.encode`` does."""
        return torch.addmm(self.bias, stream, self.weight).topk(self.k, dim=-1, sorted=False).indices

    def fill(self, start: int, weight: Tensor, bias: Tensor) -> None:
        """Write some columns, from ``start`` on. Raises PairingError for another width."""
        if weight.shape[0] != self.weight.shape[0]:
            raise PairingError(
                f"an SAE of width {weight.shape[0]}",
                f"one of width {self.weight.shape[0]}, which is the model's d_model",
                "pass an SAE that was trained on the model that is served",
            )
        self.weight[:, start : start + len(bias)] = weight.to(self.weight)
        self.bias[start : start + len(bias)] = bias.to(self.bias)


class Table(nn.Module):
    """The table of one block: ``rows`` rows of width d_model, in float32, that act on its output.

    ``encoders`` has (d_sae, k) of each TopK SAE whose features rows may read.
    """

    read: Tensor
    write: Tensor
    bias: Tensor
    threshold: Tensor
    target: Tensor
    lam: Tensor
    lo: Tensor
    hi: Tensor
    limit: Tensor
    test: Tensor
    cosine: Tensor
    clause: Tensor
    feature: Tensor
    group: Tensor
    owner: Tensor
    tokens: Tensor

    def __init__(self, rows: int, width: int, tokens: Tensor, encoders: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        for name in ("read", "write"):
            self.register_buffer(name, tokens.new_zeros(rows, width), persistent=False)
        for name in ("bias", "threshold", "target", "lam", "lo", "hi", "limit", "test", "cosine"):
            self.register_buffer(name, tokens.new_zeros(rows), persistent=False)
        for name in ("clause", "feature", "group", "owner"):
            self.register_buffer(name, tokens.new_full((rows,), FREE), persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.encoders = nn.ModuleList(TopK(d_sae, k, tokens, width) for d_sae, k in encoders)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Return ``hidden`` (tokens, d_model) plus the change of the stream ``hidden + residual``.

        Tokens that are not steered keep every bit. Whatever the tables hold, no steered entry of the stream grows
        beyond ``ranges.max_change``, or beyond what it was where the model itself goes further: requests share one
        cache, in which nan would spread to others. Loading and admission refuse amounts beyond it, so what is left to
        bound here depends on activations, such as a feature that fires a thousand times as strongly as others. An
        infinite change becomes the bound, which is where a strength that large would end; nan (inf − inf) adds nothing.
        """
        flat, holds = hidden.flatten(0, -2), None
        rest = None if residual is None else residual.flatten(0, -2).float()
        for slot in self.tokens[:, :, : flat.shape[0], None].unbind():
            stream = flat.float() if rest is None else flat.float() + rest
            read = torch.addmm(self.bias, stream, self.read.T)
            acts = torch.where(self._fires(stream, read), read, 0.0)
            if holds is None:  # gates read before anything here acts; nan meets no condition, negated or not
                holds = self._holds(stream, acts) & ~read.isnan()
            flat = self._steer(flat, stream, acts, holds, slot)
        return flat.view_as(hidden)

    def _steer(self, flat: Tensor, stream: Tensor, acts: Tensor, holds: Tensor, slot: Tensor) -> Tensor:
        """Apply one slot of the plan, (COLUMNS, tokens, 1)."""
        tag, const, gain, lo, hi, mode = slot.unbind()
        is_owned = tag == self.owner
        amount = const * self.target + gain * self.lam * acts
        amount = torch.minimum(torch.maximum(amount, torch.maximum(lo, self.lo)), torch.minimum(hi, self.hi))
        amount = torch.where(is_owned & (self.clause == FREE), amount, 0.0)
        change = _in_mode(mode, stream, amount @ self.write)
        bound = stream.abs().clamp(min=max_change(flat.dtype, flat.shape[1]))
        change = change.nan_to_num(0.0).clamp(-bound - stream, bound - stream)
        largest = torch.finfo(flat.dtype).max
        steered = (flat + change.to(flat.dtype)).clamp(-largest, largest)
        return torch.where(self._is_open(is_owned, holds), steered, flat)

    def _holds(self, stream: Tensor, acts: Tensor) -> Tensor:
        """Which rows' comparisons hold, (tokens, rows)."""
        norm = stream.norm(dim=1, keepdim=True)
        values = torch.where(self.cosine > 0, acts / torch.where(norm > 0, norm, 1.0), acts)
        beyond = torch.where(self.test % 2 == 0, values > self.limit, values < self.limit)
        return beyond ^ (self.test >= 2)

    def _is_open(self, is_owned: Tensor, holds: Tensor) -> Tensor:
        """Which tokens are steered, (tokens, 1): they own rows, and in each clause of these a condition holds."""
        is_open = is_owned.any(1, keepdim=True)
        for clause in range(CLAUSES):
            own = is_owned & (self.clause == clause)
            is_open = is_open & ((own & holds).any(1, keepdim=True) | ~own.any(1, keepdim=True))
        return is_open

    def _fires(self, stream: Tensor, read: Tensor) -> Tensor:
        """Which rows' readings count, (tokens, rows): above the threshold and, of a TopK SAE, among the k largest."""
        fires = read > self.threshold
        for number, encoder in enumerate(self.encoders):
            is_largest = (encoder(stream)[:, :, None] == self.feature).any(1)
            fires = fires & (is_largest | (self.group != number))
        return fires

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

    def fill_encoder(self, number: int, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Write columns of an encoder, from ``start`` on. Raises PairingError for another width."""
        encoder = self.encoders[number]
        assert isinstance(encoder, TopK)
        encoder.fill(start, tensors["weight"], tensors["bias"])

    def clear(self, tag: float) -> None:
        """Free the rows of a tag."""
        rows = self.owner == tag
        for column in (self.owner, self.clause, self.feature, self.group):
            column[rows] = FREE
        self.write[rows] = 0.0


def _in_mode(mode: Tensor, stream: Tensor, change: Tensor) -> Tensor:
    """The change in units of each token's norm, or with the norm restored, where a token's mode says so."""
    norm = stream.norm(dim=1, keepdim=True)
    change = change * torch.where(mode == RELATIVE, norm, 1.0)
    moved = stream + change
    moved_norm = moved.norm(dim=1, keepdim=True)
    restored = moved * (norm / torch.where(moved_norm > 0, moved_norm, 1.0)) - stream
    return torch.where(mode == KEEP_NORM, restored, change)


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
    """The plans of all requests, and the tensor (slots, COLUMNS, tokens) of what they say of a batch's tokens."""

    def __init__(self, tokens: int, device: torch.device, slots: int = 1) -> None:
        # one more than a batch holds: a slice that can be the whole tensor is compiled as if it always were
        self.tokens = torch.zeros(slots, COLUMNS, tokens + 1, device=device)
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
        by_request = np.zeros((len(self.tokens), COLUMNS + 2 * MAX_RUNS, len(plans)), dtype=np.float32)
        for number, plan in enumerate(plans):
            if plan:
                by_request[: len(plan), :, number] = plan
        by_token = np.repeat(by_request, np.diff(starts[: len(plans) + 1]), axis=2)
        columns = torch.from_numpy(by_token).to(self.tokens.device)
        count = columns.shape[2]
        at, first, end = positions[:count], columns[:, COLUMNS::2], columns[:, COLUMNS + 1 :: 2]
        columns[:, 0] *= ((at >= first) & (at < end)).any(1)
        self.tokens[:, :, :count] = columns[:, :COLUMNS]
