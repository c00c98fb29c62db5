"""How large steering may be: a limit for each dtype, which every strength is held against before any pass.

An activation that overflows becomes inf, then nan, and nan in a shared cache spoils other texts than its own.

    check_amount(change_bound(vec.add(8.0).update()), torch.bfloat16, vec.d_model, "an Add")
"""

from __future__ import annotations

import torch
from torch import nn

from fgsteer.errors import SteeringError
from fgsteer.interventions.kernel import Update

WEIGHT_GAIN = 64.0  # left for weights that magnify what they read: its fourth power is 1.7e7


def max_change(dtype: torch.dtype, d_model: int) -> float:
    """The most that steering may add to one entry of an activation (…, d_model) of a dtype.

    Half of what the dtype holds, as the other half is the model's own; and no more than ``(M/d_model)^¼ / 64``, with M
    the largest float32: norms sum up squares in float32, and where a gated MLP stands between a stream and a
    norm (OLMo 2), what is squared is a square already. That is about 7e6 to 3e7, above any activation of a model.
    """
    sums: float = (torch.finfo(torch.float32).max / max(d_model, 1)) ** 0.25 / WEIGHT_GAIN
    return min(torch.finfo(dtype).max / 2, sums)


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's activations: its own, or its first floating-point weight's."""
    own = getattr(model, "dtype", None)
    dtypes = [own, *(p.dtype for p in model.parameters())] if not isinstance(own, torch.dtype) else [own]
    return next((d for d in dtypes if isinstance(d, torch.dtype) and d.is_floating_point), torch.float32)


def change_bound(update: Update) -> float:
    """An upper bound of an update's change of an entry: ``Σⱼ|αⱼ + λⱼμⱼ|·|wⱼ|``, or what it reads of a stream of norm 1.

    It is inf or nan where that overflows.
    """
    amounts = [update.const]
    if update.read is not None:
        amounts.append(update.lam * update.read.norm(dim=-1))
    elif update.sae is not None:
        weights = update.sae.W_enc[:, list(update.features)] if update.features else update.sae.W_enc
        amounts.append(update.lam * weights.float().norm(dim=0))
    write = update.write.detach().abs()
    return float(torch.stack([(each.detach().abs()[..., None] * write).sum(-2).amax() for each in amounts]).amax())


def check_amount(amount: float, dtype: torch.dtype, d_model: int, what: str) -> None:
    """Raises SteeringError for a change beyond ``max_change``, or one that is not a number."""
    most = max_change(dtype, d_model)
    if not amount <= most:
        name = str(dtype).removeprefix("torch.")
        wider = ", or load the model in bfloat16 or float32" if dtype == torch.float16 else ""
        raise SteeringError(
            f"{what} that changes entries by {amount:.3g}",
            f"changes of at most {most:.5g}, so that activations in {name} do not overflow",
            f"use a smaller strength{wider}",
        )
