"""Circuits: the edges or nodes that carry a steering, and how much of its effect they keep when all others are cut.

curve = circuit_faithfulness(model, found, [10, 30, 100, 300]); print(curve)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked, is_whole_number
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.mechanisms.agreement import Agreement, plain_logits
from fgsteer.mechanisms.attribution import SteeringAttribution
from fgsteer.mechanisms.graph import SteeringGraph
from fgsteer.mechanisms.parts import KINDS, BlockParts, Reader, block_parts, project
from fgsteer.mechanisms.texts import SteeredText, first_block, from_block, logits_of, text_device
from fgsteer.models.hookpoints import blocks_of, uncompiled
from fgsteer.steering.splicing import Change, splice_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["edges", "nodes", "heads"]
KINDS_OF_CIRCUIT = ("edges", "nodes", "heads")
ROWS_AT_ONCE = 8  # circuits that share a pass


@dataclass(frozen=True, eq=False, repr=False)
class CircuitPoint(OneLineRepr):
    """What is left of steering in a circuit.

    Args:
        kind: What was kept: "edges", "nodes", or "heads", beside all MLPs.
        size: How many.
        share: Of how many, as a share.
        on_paths: The edges that lie on a path from the steering to the logits; the others do nothing.
        faithfulness: ``1 − KL(steered‖circuit) / KL(steered‖unsteered)``.
        low: The lower end of its 95 % interval, by a bootstrap over texts.
        high: The upper end.
        token_match: The share of tokens changed by steering that the circuit changes in the same way.
        random: The same faithfulness of random circuits of this size, their mean; None without such.
    """

    kind: str
    size: int
    share: float
    on_paths: int
    faithfulness: float
    low: float
    high: float
    token_match: float
    random: float | None

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {
            self.kind: self.size,
            "share": round(self.share, 4),
            "edges on paths": self.on_paths,
            "faithfulness": round(self.faithfulness, 4),
            "from": round(self.low, 4),
            "to": round(self.high, 4),
            "same tokens": round(self.token_match, 4),
            "random": None if self.random is None else round(self.random, 4),
        }


def circuit_order(attribution: SteeringAttribution, kind: Kind) -> list[int]:
    """Numbers of edges (node · readers + reader), of nodes or of heads, the largest |effect| first.

    Raises DataError for edges of an attribution without them, or another kind.
    """
    if kind not in KINDS_OF_CIRCUIT:
        raise DataError(f"kind = {kind!r:.40}", f"one of {', '.join(KINDS_OF_CIRCUIT)}")
    graph = attribution.graph
    if kind == "edges":
        effects = edge_effects_of(attribution).abs().flatten()
        pool = graph.edges.flatten().nonzero()[:, 0]
    else:
        effects = attribution.node_effects.abs()
        kinds = ("head",) if kind == "heads" else ("head", "MLP")
        pool = torch.tensor([n for k in kinds for n in graph.node_numbers(k)], dtype=torch.long)
    return [int(n) for n in pool[effects[pool].argsort(descending=True, stable=True)]]


def edge_effects_of(attribution: SteeringAttribution) -> Float[Tensor, "nodes readers"]:
    """The effects of edges. Raises DataError where they were not asked for."""
    if attribution.edge_effects is None:
        raise DataError("an attribution without edges", "one with edges=True")
    return attribution.edge_effects


def kept_edges(graph: SteeringGraph, kind: Kind, chosen: Sequence[int]) -> Bool[Tensor, "nodes readers"]:
    """The edges of a circuit: those chosen, or all out of the steering and of the chosen nodes (and of all MLPs)."""
    kept = torch.zeros_like(graph.edges)
    if kind == "edges":
        kept.view(-1)[list(chosen)] = True
        return kept
    nodes = [0, *chosen, *(graph.node_numbers("MLP") if kind == "heads" else [])]
    kept[nodes] = graph.edges[nodes]
    return kept


@checked
def iou(first: object, second: object) -> float:
    """The agreement of two sets, ``|A ∩ B| / |A ∪ B|``: of the kept parts of two circuits, or two vectors' entries.

    Args:
        first: A set, or a mask as a tensor of bool.
        second: Another one of the same kind.

    Returns:
        1 for equal sets, also for two empty ones, 0 for sets that share nothing.

    Raises:
        DataError: They are of other kinds.
    """
    sides = [
        frozenset(side.flatten().nonzero()[:, 0].tolist())
        if isinstance(side, Tensor) and side.dtype == torch.bool
        else frozenset(side)
        if isinstance(side, set | frozenset | list | tuple)
        else None
        for side in (first, second)
    ]
    if sides[0] is None or sides[1] is None:
        raise DataError(f"a {type(first).__name__} and a {type(second).__name__}", "two sets, or two masks of bool")
    union = sides[0] | sides[1]
    return len(sides[0] & sides[1]) / len(union) if union else 1.0


@checked
@torch.no_grad()
def circuit_faithfulness(
    model: PreTrainedModel,
    attribution: SteeringAttribution,
    sizes: Sequence[int] | None = None,
    *,
    kind: Kind = "edges",
    held_out: SteeringAttribution | None = None,
    controls: int = 2,
    seed: int = 0,
) -> Table[CircuitPoint]:
    """How much of steering's effect is left when only its strongest edges, nodes or heads carry it (arXiv 2604.08524).

    Every reader gets the stream of the unsteered run, and what its kept edges bring: ``x_base + Σ_kept (u − u_base)``,
    where u is what a node writes in the circuit. All edges give the steered run, none the unsteered one. A circuit of
    heads keeps all MLPs; of nodes it keeps all edges out of them.

    Args:
        model: The model that was attributed.
        attribution: The attribution, which holds effects, steering and texts.
        sizes: How many edges, nodes or heads are kept, largest |effect| first; by default eight sizes up to all.
        kind: What is counted.
        held_out: An attribution of the same steering, of other prompts, on whose texts circuits are run; by default
            they are run on those that they were chosen on, which flatters them.
        controls: How many random circuits of each size are run beside.
        seed: The seed of their draw.

    Returns:
        A row for each size.

    Raises:
        DataError: A size is out of range, or edges were not attributed.
        HookpointError: The model's queries, keys and values are of an unknown form.
    """
    check_range("controls", controls, 0, MAX_COUNT, whole=True)
    order = circuit_order(attribution, kind)
    parts = block_parts(model, first_block(attribution.hookpoint))
    graph = SteeringGraph.of(parts)
    if kind == "edges" and edge_effects_of(attribution).shape != graph.edges.shape:
        raise DataError("an attribution of another model", "the model that was attributed")
    chosen = _parse_sizes(sizes, len(order))
    draws = torch.Generator().manual_seed(int(seed))
    masks, names = [], []
    for size in chosen:
        picks = [order[:size]] + [
            [order[int(n)] for n in torch.randperm(len(order), generator=draws)[:size]] for _ in range(controls)
        ]
        masks += [kept_edges(graph, kind, pick) for pick in picks]
        names += [(size, number) for number in range(len(picks))]
    agreements = [Agreement() for _ in masks]
    for text in (held_out or attribution).texts:
        engine = CircuitEngine(model, parts, graph, text)
        steered = plain_logits(model, text, first_block(attribution.hookpoint), attribution.steering)
        for start in range(0, len(masks), ROWS_AT_ONCE):
            rows = engine.logits(torch.stack(masks[start : start + ROWS_AT_ONCE]))
            for logits, agreement in zip(rows, agreements[start:], strict=False):
                agreement.add(engine.base_logits, steered, logits)
    by_name = dict(zip(names, agreements, strict=True))
    points = []
    for size in chosen:
        own, others = by_name[size, 0], [by_name[size, n + 1].faithfulness for n in range(controls)]
        on_paths = int(graph.on_paths(masks[names.index((size, 0))]).sum())
        random = sum(others) / len(others) if others else None
        share = size / len(order) if order else 1.0
        faithful = (own.faithfulness, *own.interval, own.token_match)
        points.append(CircuitPoint(kind, size, share, on_paths, *faithful, random))
    return Table(points)


def _parse_sizes(sizes: Sequence[int] | None, total: int) -> list[int]:
    """Sizes of circuits. Raises DataError for one below 0 or beyond all."""
    if sizes is None:
        return sorted({max(1, round(total ** (n / 8))) for n in range(1, 9)}) if total else [0]
    if not all(is_whole_number(size) and 0 <= size <= total for size in sizes) or not sizes:
        raise DataError(f"sizes {list(sizes)!r:.60}", f"whole numbers from 0 to {total}, as many as there are")
    return [int(size) for size in sizes]


class CircuitEngine:
    """Runs circuits on one text: each reader gets what its kept edges bring, and otherwise the unsteered stream.

    Args:
        model: A Hugging Face causal language model.
        parts: The blocks that read what is steered.
        graph: Their graph.
        text: The text.
    """

    def __init__(
        self, model: PreTrainedModel, parts: Sequence[BlockParts], graph: SteeringGraph, text: SteeredText
    ) -> None:
        self.model, self.parts, self.graph, self.text = model, parts, graph, text
        self.first = parts[0].layer if parts else len(blocks_of(model))
        self.ids = text_device(model, text)
        self.last = len(text.ids) - text.prompt_length
        self.streams: dict[object, Tensor] = {}  # what each reader reads in the unsteered run
        self.written: dict[object, Tensor] = {}  # what each sublayer writes in it
        self.rows: dict[tuple[str, int], int] = {}  # the number of the first reader of each kind in each layer
        for number, reader in enumerate(graph.readers):
            self.rows.setdefault((reader.kind, reader.layer), number)
        with from_block(model, self.ids, self.first, 1), self._recording():
            self.base_logits = logits_of(model, self.ids, self.last)[0]

    def _recording(self) -> AbstractContextManager[None]:
        """Hooks that keep what the unsteered run reads and writes."""
        changes: list[Change] = []

        def keep(store: dict[object, Tensor], key: object, h: Tensor) -> Tensor:
            store[key] = h.clone()
            return h

        for part in self.parts:
            for port in (part.attention_port, part.mlp_port):
                assert port is not None
                changes.append((port.module, True, partial(keep, self.streams, port.module)))
            changes.append((part.output, True, partial(keep, self.written, ("z", part.layer))))
            changes.append((part.mlp_added, False, partial(keep, self.written, ("MLP", part.layer))))
        last = uncompiled(blocks_of(self.model)[-1])
        return splice_modules([*changes, (last, False, partial(keep, self.streams, "logits"))])

    def logits(self, kept: Bool[Tensor, "rows nodes readers"]) -> Float[Tensor, "rows tokens vocabulary"]:
        """The logits of each circuit."""
        run = _CircuitRun(self, kept)
        with from_block(self.model, self.ids, self.first, len(kept)), splice_modules(run.changes()):
            return logits_of(self.model, self.ids.expand(len(kept), -1), self.last)


class _CircuitRun:
    """One pass over several circuits: what nodes have written so far, and what readers make of it."""

    def __init__(self, engine: CircuitEngine, kept: Bool[Tensor, "rows nodes readers"]) -> None:
        self.engine, self.kept = engine, kept
        self.changed = [engine.text.delta.expand(len(kept), -1, -1)]  # of each node so far, (rows, tokens, d_model)

    def changes(self) -> list[Change]:
        """The hooks of the pass."""
        changes: list[Change] = []
        for part in self.engine.parts:
            assert part.mlp is not None
            projections: dict[int, nn.Module] = {id(r.module): r.module for kind in KINDS for r in part.readers[kind]}
            changes += [(m, False, partial(self._project, part, m)) for m in projections.values()]
            changes.append((part.output, True, partial(self._note_heads, part)))
            changes.append((part.mlp, True, partial(self._read_mlp, part)))
            changes.append((part.mlp_added, False, partial(self._note_mlp, part)))
        last = uncompiled(blocks_of(self.engine.model)[-1])
        return [*changes, (last, False, self._read_logits)]

    def _stream(self, key: object, first: int, count: int) -> Float[Tensor, "rows readers tokens d_model"]:
        """What ``count`` readers from ``first`` on read: the unsteered stream and what their kept edges bring."""
        base = self.engine.streams[key]
        nodes = len(self.changed)
        weights = self.kept[:, :nodes, first : first + count].to(base.device, base.dtype)
        brought = torch.stack([change.to(base.device) for change in self.changed])
        return base[:, None] + torch.einsum("untd,nur->nrtd", brought, weights)

    def _project(self, part: BlockParts, module: nn.Module, output: Tensor) -> Tensor:
        port = part.attention_port
        assert port is not None
        changed = output.clone()
        for kind in KINDS:
            readers: list[Reader] = part.readers[kind]
            if readers[0].module is not module:
                continue
            x = self._stream(port.module, self.engine.rows[kind, part.layer], len(readers))
            x = x if port.norm is None else port.norm(x)
            for number, reader in enumerate(readers):
                changed[..., reader.entries] = project(reader, x[:, number])
        return changed

    def _note_heads(self, part: BlockParts, z: Tensor) -> Tensor:
        base = self.engine.written["z", part.layer]
        self.changed += (part.written(z) - part.written(base)).unbind(-2)
        return z

    def _read_mlp(self, part: BlockParts, h: Tensor) -> Tensor:
        port = part.mlp_port
        assert port is not None
        x = self._stream(port.module, self.engine.rows["MLP", part.layer], 1)[:, 0]
        return (x if port.norm is None else port.norm(x)).reshape(h.shape)

    def _note_mlp(self, part: BlockParts, output: Tensor) -> Tensor:
        self.changed.append(output - self.engine.written["MLP", part.layer])
        return output

    def _read_logits(self, h: Tensor) -> Tensor:
        return self._stream("logits", len(self.engine.graph.readers) - 1, 1)[:, 0].reshape(h.shape)
