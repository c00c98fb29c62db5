"""What one pass over all steps of the integral gives: gradients at every node and reader, and what every node changed.

caught = Captured(model, site, parts, delta, alphas, readers=True)
with caught.hooks(): logits = model(ids.expand(len(alphas), -1)).logits
gradients = caught.gradients(metric(logits)); changes = node_changes(caught, src=0, dest=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.mechanisms.graph import SteeringGraph
from fgsteer.mechanisms.parts import KINDS, BlockParts
from fgsteer.models.hookpoints import Hookpoint, blocks_of, resolve, uncompiled
from fgsteer.steering.splicing import Change, splice_modules

ENDS = 2  # the first rows of a pass: both ends of the path, where no gradient is taken


@dataclass(frozen=True, eq=False)
class Gradients:
    """Mean gradients over the steps, float64 on the CPU: of what each node writes, and through each reader alone."""

    nodes: list[Float[Tensor, "tokens d_model"]]
    readers: Float[Tensor, "readers tokens d_model"] | None


class Captured:
    """The tensors of a pass whose rows go from the unsteered to the steered activations.

    Args:
        model: A Hugging Face causal language model.
        site: Where steering acts.
        parts: The blocks above.
        delta: What steering changes, (tokens, d_model).
        alphas: The share of it in each row; those of the first two are 0 and 1.
        readers: Whether gradients through each reader are wanted too.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Hookpoint,
        parts: Sequence[BlockParts],
        delta: Float[Tensor, "tokens d_model"],
        alphas: Float[Tensor, " rows"],
        readers: bool,
    ) -> None:
        self.model, self.site, self.parts, self.delta, self.alphas = model, site, parts, delta, alphas
        self.readers = readers
        self.tensors: dict[Any, Tensor] = {}

    def hooks(self) -> AbstractContextManager[None]:
        """The hooks that steer the rows and keep tensors, for a block."""
        changes: list[Change] = [(*resolve(self.model, self.site), self._steer)]
        for part in self.parts:
            changes.append((part.output, True, self._keep(("z", part.layer))))
            changes.append((part.attention_added, False, self._keep(("head", part.layer))))
            changes.append((part.mlp_added, False, self._keep(("MLP", part.layer))))
            if self.readers:
                changes += self._reader_changes(part)
        last = uncompiled(blocks_of(self.model)[-1])
        return splice_modules([*changes, (last, False, self._keep("logits"))])

    def _reader_changes(self, part: BlockParts) -> list[Change]:
        assert part.attention_port is not None
        assert part.mlp_port is not None
        assert part.mlp is not None
        ports = {id(port.module): port.module for port in (part.attention_port, part.mlp_port)}
        changes: list[Change] = [(module, True, self._keep(("port", key))) for key, module in ports.items()]
        projections = {id(reader.module): reader.module for kind in KINDS for reader in part.readers[kind]}
        changes += [(module, False, self._keep(("made", key))) for key, module in projections.items()]
        changes.append((part.mlp, True, partial(self._keep_copy, ("read", part.layer))))
        return changes

    def _steer(self, h: Tensor) -> Tensor:
        shares = self.alphas.to(h.device, h.dtype)[:, None, None]
        rows = (h.detach() + shares * self.delta.to(h.device)).requires_grad_()
        self.tensors["steering"] = rows
        return rows.clone()

    def _keep(self, key: Any) -> Callable[[Tensor], Tensor]:
        def keep(h: Tensor) -> Tensor:
            if not h.requires_grad:
                h = h.detach().requires_grad_()  # what is not reached by steering, such as an unsteered block's
            self.tensors[key] = h
            return h.clone()  # what others change in place stays what was kept

        return keep

    def _keep_copy(self, key: Any, h: Tensor) -> Tensor:
        """Keep what this module alone reads, where others read the same tensor, as in parallel blocks."""
        self.tensors[key] = h.clone()
        return self.tensors[key]

    def gradients(self, total: Tensor) -> Gradients:
        """The mean gradients over the steps of a sum over them."""
        keys: list[Any] = ["steering"]
        for part in self.parts:
            keys += [("head", part.layer), ("MLP", part.layer)]
        made = [key for key in self.tensors if self.readers and key[0] in ("made", "read")]
        wanted = [*keys, *made, "logits"]
        found = torch.autograd.grad(
            total, [self.tensors[key] for key in wanted], retain_graph=self.readers, materialize_grads=True
        )
        by_key = dict(zip(wanted, found, strict=True))
        nodes = [_mean(by_key["steering"])]
        for part in self.parts:
            nodes += [_mean(by_key["head", part.layer])] * part.heads + [_mean(by_key["MLP", part.layer])]
        return Gradients(nodes, torch.stack(self._through_readers(by_key)) if self.readers else None)

    def _through_readers(self, by_key: dict[Any, Tensor]) -> list[Float[Tensor, "tokens d_model"]]:
        """The gradient with respect to the stream, through each reader alone."""
        through = []
        for part in self.parts:
            assert part.attention_port is not None
            assert part.mlp_port is not None
            port = self.tensors["port", id(part.attention_port.module)]
            for kind in KINDS:
                for reader in part.readers[kind]:
                    key = "made", id(reader.module)
                    own = torch.zeros_like(by_key[key])
                    own[..., reader.entries] = by_key[key][..., reader.entries]
                    through.append(_mean(_pull(self.tensors[key], port, own)))
            read = "read", part.layer
            port = self.tensors["port", id(part.mlp_port.module)]
            through.append(_mean(_pull(self.tensors[read], port, by_key[read])))
        return [*through, _mean(by_key["logits"])]


def _pull(output: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of ``gradient · output`` with respect to what it was made of."""
    if output is source:  # a sublayer that reads the stream without a norm
        return gradient
    (found,) = torch.autograd.grad(output, source, gradient, retain_graph=True)
    return found


def _mean(gradient: Float[Tensor, "rows tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
    return gradient[ENDS:].double().mean(0).cpu()


@torch.no_grad()
def node_changes(caught: Captured, src: int, dest: int) -> list[Float[Tensor, "tokens d_model"]]:
    """What each node writes in the run *src* less what it writes in *dest*, in units of the stream, float64."""
    kept = caught.tensors
    changes = [kept["steering"][src] - kept["steering"][dest]]
    for part in caught.parts:
        z = kept["z", part.layer]
        heads = part.written(z[src]) - part.written(z[dest])
        changes += [*heads.unbind(-2), kept["MLP", part.layer][src] - kept["MLP", part.layer][dest]]
    return [change.detach().double().cpu() for change in changes]


def edge_effects(
    gradients: Gradients, changes: Sequence[Float[Tensor, "tokens d_model"]], graph: SteeringGraph
) -> Float[Tensor, "nodes readers"]:
    """The effect of each edge: what its node changed times the gradient through its reader, summed over tokens."""
    assert gradients.readers is not None
    effects = torch.stack(list(changes)).flatten(1) @ gradients.readers.flatten(1).T
    return effects * graph.edges
