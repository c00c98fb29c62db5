"""Sparsified vectors: only the entries of a steering vector that carry more of its effect than of its norm.

sparse = sparsify(vec, found, tau=1.0); print(kept_entries(sparse).sum())
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import DataError, PairingError, SelectionError
from fgsteer.errors.checks import check_flags, check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.mechanisms.attribution import SteeringAttribution
from fgsteer.vector import SteeringVector

Rule = Literal["ratio", "entries", "effects", "random"]
RULES = ("ratio", "entries", "effects", "random")
MAX_TAU = 1e6


@checked
def sparsify(
    vector: SteeringVector,
    effects: SteeringAttribution | Tensor,
    *,
    tau: float | None = None,
    count: int | None = None,
    by: Rule = "ratio",
    rescale: bool = True,
    seed: int = 0,
) -> SteeringVector:
    """A vector with those entries alone whose share of its effect is τ times that of its norm (arXiv 2604.08524).

    Entry i stays if ``|e_i|/‖e‖ ≥ τ·|v_i|/‖v‖``. As ``e = v ⊙ ḡ``, that is ``|ḡ_i| ≥ τ·‖e‖/‖v‖``: the size of an
    entry does not count, its gradient alone. The rest is 0, and the result has the norm of v.

    Args:
        vector: The vector v.
        effects: The attribution of steering with it, or the effect e of each entry, (d_model,).
        tau: The threshold τ; 1 where neither it nor ``count`` is given.
        count: How many entries stay, instead of a threshold.
        by: Which stay: "ratio", those of largest ``|e_i/v_i|``; or, as controls of equal ``count``, those of largest
            |v_i| ("entries"), of largest |e_i| ("effects"), or any ("random").
        rescale: Whether the result is scaled to the norm of v.
        seed: The seed of random entries.

    Returns:
        The sparse vector, whose provenance says what was kept.

    Raises:
        DataError: A rule, a threshold or a count is out of range, or a control has no count.
        PairingError: The effects are of another width.
        SelectionError: No entry is left.
    """
    check_flags(rescale=rescale)
    check_range("seed", seed, -MAX_COUNT, MAX_COUNT, whole=True)
    e = effects.effects if isinstance(effects, SteeringAttribution) else effects
    if e.shape != vector.direction.shape:
        raise PairingError(f"effects of shape {tuple(e.shape)}", f"one for each of {vector.d_model} entries")
    if by not in RULES:
        raise DataError(f"by = {by!r:.40}", f"one of {', '.join(RULES)}")
    if (tau is not None and count is not None) or (by != "ratio" and count is None):
        raise DataError(
            f"tau = {tau}, count = {count} and by = {by!r}", "a threshold or a count; a count alone for controls"
        )
    v, e = vector.direction.detach().double().cpu(), e.detach().double().cpu()
    if count is None:
        tau = 1.0 if tau is None else tau
        check_range("tau", tau, 0, MAX_TAU)
        kept = kept_by_ratio(v, e, float(tau))
    else:
        check_range("count", count, 1, int((v != 0).sum()), whole=True)
        kept = _largest(_scores(v, e, by, seed), v != 0, int(count))
    direction = torch.where(kept, v, 0.0)
    if not float(direction.norm()) > 0:
        raise SelectionError(f"no entry with tau = {tau}", "at least one entry that stays", "lower tau")
    if rescale:
        direction = direction * (v.norm() / direction.norm())
    about = {"by": by, "tau": tau, "count": int(kept.sum()), "rescale": bool(rescale)}
    return replace(
        vector,
        direction=direction.to(vector.direction),
        features={},
        provenance={**vector.provenance, "sparsified": about},
    )


def kept_by_ratio(v: Float[Tensor, " d_model"], e: Float[Tensor, " d_model"], tau: float) -> Bool[Tensor, " d_model"]:
    """The entries with ``|e_i|/‖e‖ ≥ τ·|v_i|/‖v‖``, of those that are not 0."""
    kept: Tensor = (e.abs() * v.norm() >= tau * v.abs() * e.norm()) & (v != 0)
    return kept


def kept_entries(vector: SteeringVector) -> Bool[Tensor, " d_model"]:
    """The entries of a vector that are not 0."""
    return vector.direction.detach().cpu() != 0


def _scores(v: Tensor, e: Tensor, by: str, seed: int) -> Float[Tensor, " d_model"]:
    """What entries are ranked by."""
    if by == "ratio":
        return e.abs() / v.abs().clamp_min(torch.finfo(v.dtype).tiny)
    if by == "random":
        return torch.rand(len(v), generator=torch.Generator().manual_seed(int(seed)), dtype=v.dtype)
    return (v if by == "entries" else e).abs()


def _largest(scores: Tensor, pool: Bool[Tensor, " d_model"], count: int) -> Bool[Tensor, " d_model"]:
    """The ``count`` entries of a pool with the largest scores."""
    chosen = torch.where(pool, scores, -1.0).topk(count).indices
    kept = torch.zeros_like(pool)
    kept[chosen] = True
    return kept
