"""The graph through which steering acts: what writes to the stream, what reads it, and which reads which.

Nodes write: the steering itself, every head and every MLP. Readers are each head's query, key and value, every MLP, and
the logits. An edge is a node and a reader that comes after it.

    graph = SteeringGraph.of(parts)
    graph.nodes[0], graph.readers[-1]       "steering", "logits"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from fgsteer.mechanisms.parts import KINDS, BlockParts

STEERING, LOGITS = "steering", "logits"


@dataclass(frozen=True)
class Node:
    """What writes to the stream: kind "steering", "head" or "MLP", its layer and the number of the head."""

    kind: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        if self.kind == STEERING:
            return STEERING
        return f"L{self.layer}.H{self.head}" if self.kind == "head" else f"L{self.layer}.MLP"


@dataclass(frozen=True)
class GraphReader:
    """What reads the stream: kind "q", "k", "v", "MLP" or "logits", its layer and the number of the head or group."""

    kind: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        if self.kind == LOGITS:
            return LOGITS
        return f"L{self.layer}.MLP" if self.kind == "MLP" else f"L{self.layer}.{self.kind}{self.head}"


@dataclass(frozen=True)
class SteeringGraph:
    """Nodes and readers in the order of a forward pass.

    Args:
        nodes: What writes.
        readers: What reads; none but the logits where the blocks' readers are not known.
        parallel: The layers whose MLP reads what their attention reads.
        groups: {layer: how many heads share a key and a value}.
    """

    nodes: tuple[Node, ...]
    readers: tuple[GraphReader, ...]
    parallel: frozenset[int]
    groups: dict[int, int]

    @classmethod
    def of(cls, parts: Sequence[BlockParts]) -> SteeringGraph:
        """The graph of some blocks."""
        nodes, readers = [Node(STEERING)], []
        for part in parts:
            nodes += [Node("head", part.layer, head) for head in range(part.heads)] + [Node("MLP", part.layer)]
            if part.attention_port is not None:
                readers += [GraphReader(kind, part.layer, n) for kind in KINDS for n in range(len(part.readers[kind]))]
                readers.append(GraphReader("MLP", part.layer))
        groups = {part.layer: part.group for part in parts if part.attention_port is not None}
        parallel = frozenset(part.layer for part in parts if part.parallel)
        return cls(tuple(nodes), (*readers, GraphReader(LOGITS)), parallel, groups)

    @cached_property
    def edges(self) -> Bool[Tensor, "nodes readers"]:
        """Which readers come after which nodes."""
        written = torch.tensor(
            [2 * node.layer + (node.kind == "MLP") if node.layer >= 0 else -1 for node in self.nodes]
        )
        last = 2 * max((node.layer for node in self.nodes), default=0) + 2
        read = torch.tensor([last if r.kind == LOGITS else 2 * r.layer + self._late(r) for r in self.readers])
        return written[:, None] < read

    def _late(self, reader: GraphReader) -> bool:
        """Whether a reader sees the heads of its own block."""
        return reader.kind == "MLP" and reader.layer not in self.parallel

    def node_numbers(self, kind: str) -> list[int]:
        """The numbers of the nodes of a kind."""
        return [n for n, node in enumerate(self.nodes) if node.kind == kind]

    @cached_property
    def feeds(self) -> Bool[Tensor, "readers nodes"]:
        """Which node each reader is a part of: a key and a value are parts of every head of their group."""
        place = {(node.kind, node.layer, node.head): n for n, node in enumerate(self.nodes)}
        found = torch.zeros(len(self.readers), len(self.nodes), dtype=torch.bool)
        for r, reader in enumerate(self.readers):
            if reader.kind == "MLP":
                found[r, place["MLP", reader.layer, -1]] = True
            elif reader.kind != LOGITS:
                size = 1 if reader.kind == "q" else self.groups[reader.layer]
                for head in range(reader.head * size, (reader.head + 1) * size):
                    found[r, place["head", reader.layer, head]] = True
        return found

    def on_paths(self, kept: Bool[Tensor, "nodes readers"]) -> Bool[Tensor, "nodes readers"]:
        """The kept edges that lie on a path from the steering to the logits; the others change no logit."""
        reached = torch.zeros(len(self.nodes), dtype=torch.bool)
        reached[0] = True
        heard = torch.zeros(len(self.readers), dtype=torch.bool)
        heard[-1] = True
        for _ in range(len(self.nodes)):
            further = reached | self.feeds[(kept & reached[:, None]).any(0)].any(0)
            earlier = heard | self.feeds[:, (kept & heard).any(1)].any(1)
            if torch.equal(further, reached) and torch.equal(earlier, heard):
                break
            reached, heard = further, earlier
        return kept & reached[:, None] & heard
