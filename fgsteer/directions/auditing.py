"""Audit of a checkpoint against a reference: whether a direction was added to it, or taken out of it, and where.

found = audit(model, reference, tokenizer)
print(found, found.vector)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from fgsteer.errors.wording import a, count
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint, Site, blocks_of, resolve
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import context_window, d_model
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = 16  # shipped neutral texts that are read by default
SITES: tuple[Site, ...] = ("attn_out", "mlp_out", "resid_post")  # in the order of a pass over a block
EXACT = 1e-6  # of what a finding explains, left for rounding beside that of the dtype
ENERGY = 0.9  # of the squared difference, that the rank is the number of directions for
Kind = Literal["none", "addition", "ablation", "clamp", "other"]


@dataclass(frozen=True)
class PlaceDifference:
    """How far two models differ at a hookpoint.

    Args:
        hookpoint: The place.
        difference: ``‖h − h_ref‖ / ‖h_ref‖`` over all tokens.
    """

    hookpoint: Hookpoint
    difference: float

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {"hookpoint": str(self.hookpoint), "difference": self.difference}


@dataclass(frozen=True, eq=False)
class Audit:
    """What distinguishes a model from its reference.

    Args:
        kind: "none"; "addition" of a vector, ``d = v``; "ablation" of a direction, ``d = −(r̂·h) r̂``; "clamp" of its
            projection, ``d = (t − r̂·h) r̂``; or "other", of the differences d at the first place that differs.
        hookpoint: The first place in a pass at which activations differ, None for none.
        vector: The vector v, or the direction r̂, whose sign is arbitrary; None for "none" and "other".
        target: The projection t of a clamp, else None.
        rank: How many directions hold nine tenths of the squared differences there.
        unexplained: The share of the differences, ``‖d − d̂‖ / ‖d‖``, that the finding does not explain.
        places: How far the models differ at every place.
        added: Parameters that the reference lacks.
        changed: Parameters of both whose values differ.
        hooked: Modules of the model that run forward hooks.
    """

    kind: Kind
    hookpoint: Hookpoint | None
    vector: SteeringVector | None
    target: float | None
    rank: int
    unexplained: float
    places: Table[PlaceDifference]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    hooked: tuple[str, ...]

    def __str__(self) -> str:
        static = ", ".join(
            f"{count(len(names), what)}"
            for names, what in (
                (self.added, "added parameter"),
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
        }[self.kind]
        return f"The first difference is {what} at {self.hookpoint} ({self.unexplained:.2g} unexplained); {static}."


@checked
@torch.no_grad()
def audit(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
        reference: The model that it is said to be, of the same architecture, dtype and kind of device.
        tokenizer: The tokenizer of both.
        texts: What both read; by default sixteen neutral texts that ship.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The first difference with its vector, and what differs in parameters and hooks.

    Raises:
        PairingError: The models have other shapes or dtypes.
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
    first = next((row.hookpoint for row in rows if row.difference > eps), None)
    kind, vector, target, rank, unexplained = _nothing()
    if first is not None:
        states = [_states(own, batches, first) for own in (model, reference)]
        kind, direction, target, rank, unexplained = _classify(states[0] - states[1], states[1], eps)
        if direction is not None:
            about = {**provenance("audit", {"kind": kind}), "model": model_identity(reference)}
            vector = SteeringVector(direction.float(), first, provenance=about)
    own, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, reference))
    changed = tuple(n for n in own if n in theirs and not torch.equal(own[n].cpu(), theirs[n].cpu()))
    hooked = tuple(n or "model" for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks)
    added = tuple(name for name in own if name not in theirs)
    return Audit(kind, first, vector, target, rank, unexplained, rows, added, changed, hooked)


def _nothing() -> tuple[Kind, SteeringVector | None, float | None, int, float]:
    return "none", None, None, 0, 0.0


def _check_pair(model: nn.Module, reference: nn.Module) -> None:
    """Raises PairingError for models that cannot be compared."""
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
    places = [Hookpoint(0, "resid_pre")]
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
    squares = torch.zeros(len(places), 2, dtype=torch.float64)
    for batch in batches:
        own, theirs = record_batch(model, batch, places), record_batch(reference, batch, places)
        for number, place in enumerate(places):
            h, h_ref = (_real(acts[place], batch) for acts in (own, theirs))
            squares[number] += torch.stack([(h - h_ref).square().sum(), h_ref.square().sum()])
    shares = (squares[:, 0] / squares[:, 1].clamp(min=1e-300)).sqrt().tolist()
    return Table(PlaceDifference(place, share) for place, share in zip(places, shares, strict=True))


def _states(model: nn.Module, batches: Sequence[Batch], place: Hookpoint) -> Float[Tensor, "tokens d_model"]:
    """The activations of all tokens at a place, in float64 on the CPU."""
    return torch.cat([_real(record_batch(model, batch, [place])[place], batch) for batch in batches])


def _real(acts: Tensor, batch: Batch) -> Float[Tensor, "tokens d_model"]:
    """The activations of a batch's tokens without padding, in float64 on the CPU."""
    return acts[batch.attention.to(acts.device).bool()].double().cpu()


def _classify(
    d: Float[Tensor, "tokens d_model"], h: Float[Tensor, "tokens d_model"], eps: float
) -> tuple[Kind, Tensor | None, float | None, int, float]:
    """(kind, direction, target, rank, unexplained share) of differences d of activations h, of a dtype's rounding."""
    size = d.norm()
    rounding = EXACT + 4 * eps * float((h.norm() + size) / size)  # of h and of h + d in their dtype, as a share of d
    _, singular, right = torch.linalg.svd(d, full_matrices=False)
    energy = singular.square().cumsum(0) / singular.square().sum()
    rank = int((energy < ENERGY).sum()) + 1
    for kind, direction, target, explained in _explanations(d, h, right[0]):
        unexplained = float((d - explained).norm() / size)
        if unexplained <= rounding:
            return kind, direction, target, rank, unexplained
    return "other", None, None, rank, float((1 - energy[0]).clamp(min=0).sqrt())


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
