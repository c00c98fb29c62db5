"""Everything that is measured of one steering: what carries it, what freezing does, how sparse its vector may be.

found = explain(model, tokenizer, vec, 8.0, ["I think that", "The sea"])
print(found.attribution.table()); print(found.sparsity)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fgsteer.data.chat import Text
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_number, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions import Add
from fgsteer.interventions.scopes import Scope
from fgsteer.mechanisms.agreement import Faithful, steering_faithfulness
from fgsteer.mechanisms.attribution import SteeringAttribution, attribute_steering
from fgsteer.mechanisms.circuits import CircuitPoint, circuit_faithfulness
from fgsteer.mechanisms.freezing import freeze_steering
from fgsteer.mechanisms.sparse import Rule, kept_by_ratio, sparsify
from fgsteer.mechanisms.value_vectors import ValueVector, value_vectors
from fgsteer.steering.generation import parse_prompts
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TAUS = (0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5)  # those of the paper
CONTROLS: tuple[Rule, ...] = ("entries", "effects", "random")


@dataclass(frozen=True, eq=False, repr=False)
class SparsePoint(OneLineRepr):
    """How faithful a sparsified vector is, and vectors of as many entries that were chosen otherwise.

    Args:
        tau: The threshold.
        count: How many entries stay.
        sparsity: The share of entries that do not.
        ratio: Its faithfulness.
        entries: That of the largest entries.
        effects: That of the entries of largest effect.
        random: That of random entries.
    """

    tau: float
    count: int
    sparsity: float
    ratio: float
    entries: float
    effects: float
    random: float

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {key: round(value, 4) for key, value in vars(self).items()}


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(OneLineRepr):
    """What carries one steering.

    Args:
        attribution: The effects of heads, MLPs, edges and entries, in every other prompt.
        held_out: Those of heads and MLPs in the other prompts, on which all that follows is measured.
        edges: What circuits of edges keep.
        heads: What circuits of heads keep, with all MLPs.
        freezing: What is left with parts frozen.
        sparsity: How sparse the vector may be.
        values: The steering value vectors.
        settings: What was asked for, as plain JSON.
    """

    attribution: SteeringAttribution
    held_out: SteeringAttribution
    edges: Table[CircuitPoint]
    heads: Table[CircuitPoint]
    freezing: Table[Faithful]
    sparsity: Table[SparsePoint]
    values: Table[ValueVector]
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The explanation as plain JSON, without the vectors themselves."""
        found = self.attribution
        return {
            "settings": self.settings,
            "texts": [len(found.texts), len(self.held_out.texts)],
            "left_out": [found.left_out, self.held_out.left_out],
            "positions": [sum(found.positions), sum(self.held_out.positions)],
            "difference": found.difference,
            "completeness_error": found.error,
            "nodes": [vars(row) for row in found.table()],
            "edges": [vars(point) for point in self.edges],
            "heads": [vars(point) for point in self.heads],
            "freezing": [vars(row) for row in self.freezing],
            "sparsity": [vars(point) for point in self.sparsity],
            "value_vectors": [
                {
                    "layer": row.layer,
                    "head": row.head,
                    "norm": float(row.vector.norm()),
                    "raises": list(row.raises),
                    "lowers": list(row.lowers),
                }
                for row in self.values
            ],
        }


@checked
def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    coefficient: float,
    prompts: Sequence[Text],
    *,
    scope: Scope = "all",
    bos: bool = False,
    steps: int = 10,
    max_new_tokens: int = 16,
    sizes: Mapping[str, Sequence[int]] | None = None,
    controls: int = 2,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> Explanation:
    """What carries a vector's effect: attribution, circuits, freezing, value vectors and sparsity (arXiv 2604.08524).

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vector: The vector, before or after a block.
        coefficient: How many times it is added.
        prompts: Texts or conversations.
        scope: The tokens at which it is added.
        bos: Whether it is added at a start token at position 0 too.
        steps: As in ``attribute_steering``.
        max_new_tokens: As in ``attribute_steering``.
        sizes: The sizes of circuits, {"edges": …, "heads": …}; by default eight of each, up to all.
        controls: How many random circuits of each size are run.
        seed: The seed of everything random.
        progress: A function that is called with the name of each stage as it begins.

    Raises:
        DataError, HookpointError, PairingError, SteeringError: As ``attribute_steering`` does.
    """
    check_number("coefficient", coefficient)
    asked = parse_prompts(prompts)
    if len(asked) < 2:
        raise DataError(f"{len(asked)} prompts", "at least two: one half chooses, the other is measured on")
    tell = progress or (lambda _: None)
    tell("attribution")
    steering = vector.add(coefficient, scope=scope, bos=bos)
    found, held_out = (
        attribute_steering(
            model, tokenizer, asked[half::2], steering, steps=steps, max_new_tokens=max_new_tokens, edges=half == 0
        )
        for half in (0, 1)
    )
    options: dict[str, Any] = {"held_out": held_out, "controls": controls, "seed": seed}
    tell("circuits of edges")
    edges = circuit_faithfulness(model, found, (sizes or {}).get("edges"), **options)
    tell("circuits of heads")
    heads = circuit_faithfulness(model, found, (sizes or {}).get("heads"), kind="heads", **options)
    tell("freezing")
    freezing = freeze_steering(model, held_out)
    tell("sparsity")
    sparsity = sparsity_curve(model, found, vector, steering, held_out=held_out, seed=seed)
    tell("value vectors")
    values = value_vectors(model, tokenizer, vector)
    settings = {
        "vector": str(vector),
        "coefficient": float(coefficient),
        "scope": str(scope),
        "bos": bos,
        "prompts": len(asked),
        "steps": steps,
        "max_new_tokens": max_new_tokens,
        "controls": controls,
        "seed": seed,
        "model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Explanation(found, held_out, edges, heads, freezing, sparsity, values, settings)


def sparsity_curve(
    model: PreTrainedModel,
    attribution: SteeringAttribution,
    vector: SteeringVector,
    steering: Add,
    taus: Sequence[float] = TAUS,
    *,
    held_out: SteeringAttribution | None = None,
    seed: int = 0,
) -> Table[SparsePoint]:
    """The faithfulness of sparsified vectors and of their controls, added as ``steering`` adds the whole vector."""
    steerings: dict[str, Any] = {}
    kept: dict[float, int] = {}
    for tau in taus:
        size = int(kept_by_ratio(vector.direction.double().cpu(), attribution.effects, tau).sum())
        if not size or size in kept.values():
            continue
        kept[tau] = size
        variants = {"ratio": sparsify(vector, attribution, tau=tau)}
        variants |= {by: sparsify(vector, attribution, count=size, by=by, seed=seed) for by in CONTROLS}
        steerings |= {f"{tau} {by}": replace(steering, direction=v.direction) for by, v in variants.items()}
    rows = {row.name: row.faithfulness for row in steering_faithfulness(model, held_out or attribution, steerings)}
    return Table(
        SparsePoint(tau, size, 1 - size / vector.d_model, *(rows[f"{tau} {by}"] for by in ("ratio", *CONTROLS)))
        for tau, size in kept.items()
    )
