"""Audit of a checkpoint against a reference: whether a direction was added to it, or taken out of it, and where.

found = audit(model, tokenizer, reference)
print(found, found.vector)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.batches import Batch, batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text, refuse_one_text
from fgsteer.data.shipped import load_neutral
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError, HookpointError, PairingError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import a, count
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint, Site, blocks_of, resolve
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import context_window, d_model
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = 16  # shipped neutral texts that are read by default
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")  # in the order of a pass over a block
EXACT, MOST = 1e-6, 0.1  # of a difference: what a finding may leave unexplained beside rounding, and at most
NOISE, MOST_NOISE = 256, 0.25  # times the dtype's rounding, and at most: what kernels of other kinds may differ by
ENERGY = 0.9  # of the squared difference, that the rank is the number of directions for
Kind = Literal["none", "rounding", "addition", "ablation", "clamp", "other"]


@dataclass(frozen=True, repr=False)
class PlaceDifference(OneLineRepr):
    """How far two models differ at a hookpoint.

    Args:
        hookpoint: The place.
        difference: The largest ``‖h − h_ref‖ / ‖h_ref‖`` of a token; infinite where one of both is not finite.
    """

    hookpoint: Hookpoint
    difference: float

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {"hookpoint": str(self.hookpoint), "difference": self.difference}


@dataclass(frozen=True, eq=False, repr=False)
class Audit(OneLineRepr):
    """What distinguishes a model from its reference.

    Args:
        kind: What the differences d are at the first place that differs: "none"; "addition" of a vector, ``d = v``;
            "ablation" of a direction, ``d = −(r̂·h) r̂``; "clamp" of its projection, ``d = (t − r̂·h) r̂``; "other"; or
            "rounding", where parameters are equal and no difference is larger than those of other kernels.
        hookpoint: The first place in a pass at which activations differ, None for none.
        vector: The vector v, or the direction r̂, whose sign is arbitrary; None for the other kinds.
        target: The projection t of a clamp, else None.
        tokens: The share of tokens that differ there.
        rank: How many directions hold nine tenths of the squared differences there.
        unexplained: The share of the differences, ``‖d − d̂‖ / ‖d‖``, that the best explanation leaves.
        places: How far the models differ at every place.
        added: Parameters that the reference lacks.
        missing: Parameters that the model lacks.
        changed: Parameters of both whose values differ.
        hooked: Modules of the model that run forward hooks, other than those of transformers.
    """

    kind: Kind
    hookpoint: Hookpoint | None
    vector: SteeringVector | None
    target: float | None
    tokens: float
    rank: int
    unexplained: float
    places: Table[PlaceDifference]
    added: tuple[str, ...]
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    hooked: tuple[str, ...]

    def __str__(self) -> str:
        static = ", ".join(
            f"{count(len(names), what)}"
            for names, what in (
                (self.added, "added parameter"),
                (self.missing, "missing parameter"),
                (self.changed, "changed parameter"),
                (self.hooked, "hooked module"),
            )
        )
        if self.kind == "none":
            return f"No difference in activations; {static}."
        what = {
            "addition": f"an addition of norm {self.vector.norm if self.vector else 0:.4g}",
            "ablation": "an ablation",
            "clamp": f"a clamp to {self.target if self.target is not None else 0:.4g}",
            "other": f"a difference of rank {self.rank}",
            "rounding": "no more than rounding, as of other kernels,",
        }[self.kind]
        of = "" if self.tokens == 1 else f", of {self.tokens:.0%} of tokens"
        return f"The first difference is {what} at {self.hookpoint}{of} ({self.unexplained:.2g} unexplained); {static}."


@checked
@torch.no_grad()
def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedModel,
    texts: Sequence[Text] | None = None,
    *,
    batch_tokens: int | None = None,
) -> Audit:
    """Compare a model with the one that it should be, and name a direction that was added to it or taken out of it.

    Both read the same texts. At the first place in a pass where activations differ, ``d = h − h_ref`` is one constant
    vector where something was added (a bias, a folded vector), and ``−(r̂·h_ref) r̂`` where a direction was taken out
    (orthogonalised weights). Later places follow from the first. Both are published ways of hiding a direction in a
    model (arXiv 2311.09433, 2406.11717).

    Args:
        model: The model to audit.
        tokenizer: The tokenizer of both.
        reference: The model that it is said to be, of the same architecture, dtype and kind of device.
        texts: What both read; by default sixteen neutral texts that ship.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The first difference with its vector, and what differs in parameters and hooks.

    Raises:
        PairingError: The models have other shapes or dtypes, or are one object.
        DataError: There is no text.
    """
    _check_pair(model, reference)
    chosen = list(load_neutral()[0])[:TEXTS] if texts is None else texts
    refuse_one_text(chosen)
    if not chosen:
        raise DataError("no texts", "at least one text", "leave texts= out for those that ship")
    pairs: list[tuple[Text, Text, bool]] = [("", text, True) for text in chosen]
    with TokenReader(tokenizer, bos=True, window=context_window(model)) as reader:
        batches = list(batch_texts(model, reader, pairs, batch_tokens=batch_tokens))
    places = _places(model)
    rows = _differences(model, reference, batches, places)
    eps = torch.finfo(next(reference.parameters()).dtype).eps
    first = next((row.hookpoint for row in rows if row.difference > 0), None)
    finding, vector = Finding("none"), None
    if first is not None:
        states = [_states(own, batches, first) for own in (model, reference)]
        finding = _classify(states[0] - states[1], states[1], eps)
        if finding.direction is not None:
            about = {**provenance("audit", {"kind": finding.kind}), "model": model_identity(reference)}
            vector = SteeringVector(finding.direction.float(), first, provenance=about)
    own, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, reference))
    added = tuple(name for name in own if name not in theirs)
    missing = tuple(name for name in theirs if name not in own)
    changed = tuple(n for n in own if n in theirs and not _equal(own[n], theirs[n]))
    hooked = tuple(name or "model" for name, module in model.named_modules() if _is_hooked(module))
    small = max(row.difference for row in rows) <= min(NOISE * eps, MOST_NOISE)
    if finding.kind == "other" and small and not (added or missing or changed or hooked):
        finding = replace(finding, kind="rounding")
    return Audit(
        kind=finding.kind,
        hookpoint=first,
        vector=vector,
        target=finding.target,
        tokens=finding.tokens,
        rank=finding.rank,
        unexplained=finding.unexplained,
        places=rows,
        added=added,
        missing=missing,
        changed=changed,
        hooked=hooked,
    )


@dataclass(frozen=True, eq=False)
class Finding:
    """What differences are at a place, as ``Audit`` has it."""

    kind: Kind
    direction: Tensor | None = None
    target: float | None = None
    tokens: float = 0.0
    rank: int = 0
    unexplained: float = 0.0


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.cpu(), second.cpu())


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module runs forward hooks, other than those by which transformers records outputs."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        function = hook.func if isinstance(hook, functools.partial) else hook
        if not (getattr(function, "__module__", None) or "").startswith("transformers."):
            return True
    return False


def _check_pair(model: nn.Module, reference: nn.Module) -> None:
    """Raises PairingError for models that cannot be compared."""
    if model is reference:
        raise PairingError("one model as its own reference", "two models", "load the reference anew")
    facts = [
        (type(m).__name__, len(blocks_of(m)), d_model(m), str(next(m.parameters()).dtype)) for m in (model, reference)
    ]
    if facts[0] != facts[1]:
        shown = [f"{a(kind)} of {blocks} blocks, width {width}, in {dtype}" for kind, blocks, width, dtype in facts]
        raise PairingError(
            f"{shown[0]}, with {shown[1]} as its reference",
            "two models of one architecture in one dtype",
            "load both with the same class and dtype",
        )


def _places(model: nn.Module) -> list[Hookpoint]:
    """Where models are compared, in the order of a pass; sublayers where the family's outputs are known."""
    places: list[Hookpoint] = []
    for layer in range(len(blocks_of(model))):
        for site in SITES:
            try:
                resolve(model, Hookpoint(layer, site))
            except HookpointError:
                continue
            places.append(Hookpoint(layer, site))
    return places


def _differences(
    model: nn.Module, reference: nn.Module, batches: Sequence[Batch], places: Sequence[Hookpoint]
) -> Table[PlaceDifference]:
    largest = [0.0] * len(places)
    for batch in batches:
        own, theirs = record_batch(model, batch, places), record_batch(reference, batch, places)
        for number, place in enumerate(places):
            h, h_ref = (_real(acts[place], batch) for acts in (own, theirs))
            ratio = (h - h_ref).norm(dim=1) / h_ref.norm(dim=1).clamp(min=1e-300)
            ratio = torch.where(ratio.isfinite(), ratio, math.inf)
            largest[number] = max(largest[number], float(ratio.max()))
    return Table(PlaceDifference(place, ratio) for place, ratio in zip(places, largest, strict=True))


def _states(model: nn.Module, batches: Sequence[Batch], place: Hookpoint) -> Float[Tensor, "tokens d_model"]:
    """The activations of all tokens at a place, in float64 on the CPU."""
    return torch.cat([_real(record_batch(model, batch, [place])[place], batch) for batch in batches])


def _real(acts: Tensor, batch: Batch) -> Float[Tensor, "tokens d_model"]:
    """The activations of a batch's tokens without padding, in float64 on the CPU."""
    return acts[batch.attention.to(acts.device).bool()].double().cpu()


def _classify(d: Float[Tensor, "tokens d_model"], h: Float[Tensor, "tokens d_model"], eps: float) -> Finding:
    """What explains differences d of activations h best, in a dtype of this rounding, if anything does."""
    differs = (d != 0).any(1)
    tokens = float(differs.double().mean())
    if not bool(torch.isfinite(d).all()):
        return Finding("other", tokens=tokens, rank=d.shape[1], unexplained=1.0)
    d, h = d[differs], h[differs]
    size = d.norm()
    _, singular, right = torch.linalg.svd(d, full_matrices=False)
    energy = singular.square().cumsum(0) / singular.square().sum()
    rank = int((energy < ENERGY).sum()) + 1
    rounding = EXACT + 4 * eps * float((h.norm() + size) / size)  # of h and of h + d in their dtype, as a share of d
    found = [
        Finding(kind, direction, target, tokens, rank, float((d - explained).norm() / size))
        for kind, direction, target, explained in _explanations(d, h, right[0])
    ]
    best = min(found, key=lambda one: one.unexplained)
    simplest = next((one for one in found if one.unexplained <= min(rounding, MOST)), None)
    if simplest is None or len(d) < 2:  # one token is explained by anything
        return Finding("other", tokens=tokens, rank=rank, unexplained=best.unexplained)
    return simplest


def _explanations(
    d: Float[Tensor, "tokens d_model"], h: Float[Tensor, "tokens d_model"], axis: Float[Tensor, " d_model"]
) -> Iterator[tuple[Kind, Tensor, float | None, Tensor]]:
    """What may explain differences, simple ones first: kind, direction, target, and the differences that it gives."""
    mean = d.mean(0)
    yield "addition", mean, None, mean.expand_as(d)
    projection = h @ axis
    yield "ablation", axis, None, -projection[:, None] * axis
    target = float((d @ axis + projection).mean())
    yield "clamp", axis, target, (target - projection)[:, None] * axis
