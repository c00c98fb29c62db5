"""Attribution of steering: how much of its effect on the next tokens each head, each MLP and each edge carries.

found = attribute_steering(model, tokenizer, ["I think that", "The sea"], vec.add(8.0))
print(found.table()); print(found.error)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.data.chat import Text
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_flags, check_range, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.mechanisms.gradients import Captured, edge_effects, node_changes
from fgsteer.mechanisms.graph import SteeringGraph
from fgsteer.mechanisms.parts import BlockParts, block_parts
from fgsteer.mechanisms.texts import (
    Run,
    SteeredText,
    first_block,
    from_block,
    logits_of,
    read_texts,
    site_of,
    text_device,
)
from fgsteer.models.gradients import through_model
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.steering.entries import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Metric = Literal["logits", "kl"]
MAX_STEPS = 1000


@dataclass(frozen=True)
class NodeEffect:
    """The effect of one head or MLP: in units of the metric, and as a share of the whole effect of steering."""

    name: str
    layer: int
    head: int | None
    effect: float
    share: float

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {"component": self.name, "effect": self.effect, "share": round(self.share, 4)}


@dataclass(frozen=True, eq=False, repr=False)
class SteeringAttribution(OneLineRepr):
    """What carries a steering's effect ``M(src) − M(dest)``, M being the mean metric over the positions that count.

    Args:
        hookpoint: Where steering acts.
        steering: The interventions.
        metric: "logits" or "kl".
        run: Whose continuation was read.
        steps: The number of steps of the integral.
        difference: ``M(src) − M(dest)``, averaged over texts by their positions.
        effects: The effect of each entry of the stream at the steered site, (d_model,), float64.
        graph: The nodes and readers.
        node_effects: The effect of each node, (nodes,); the first is the steering itself.
        by_text: The same for each text, (texts, nodes).
        edge_effects: The effect of each edge, (nodes, readers), 0 where there is none; None where not asked for.
        texts: The texts that were read.
        positions: How many positions of each text count.
        left_out: How many texts were left out, as steering changes no next token in them.
    """

    hookpoint: Hookpoint
    steering: Entry
    metric: Metric
    run: Run
    steps: int
    difference: float
    effects: Float[Tensor, " d_model"]
    graph: SteeringGraph
    node_effects: Float[Tensor, " nodes"]
    by_text: Float[Tensor, "texts nodes"]
    edge_effects: Float[Tensor, "nodes readers"] | None
    texts: tuple[SteeredText, ...]
    positions: tuple[int, ...]
    left_out: int

    @property
    def error(self) -> float:
        """The error of completeness: ``|Σ e − (M(src) − M(dest))|`` at the steered site, in the metric's units."""
        return abs(float(self.effects.sum()) - self.difference)

    def table(self) -> Table[NodeEffect]:
        """The heads and MLPs, the largest effect first."""
        rows = []
        for node, effect in zip(self.graph.nodes[1:], self.node_effects[1:].tolist(), strict=True):
            head = node.head if node.kind == "head" else None
            share = effect / self.difference if self.difference else math.nan
            rows.append(NodeEffect(str(node), node.layer, head, effect, share))
        return Table(sorted(rows, key=lambda row: -abs(row.effect)))


@checked
@through_model
def attribute_steering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    steering: Entry,
    *,
    completions: Sequence[str] | None = None,
    run: Run = "steered",
    metric: Metric = "logits",
    steps: int = 10,
    edges: bool = True,
    max_new_tokens: int = 16,
) -> SteeringAttribution:
    """How much of a steering's effect each head, MLP and edge carries, by integrated gradients (arXiv 2604.08524).

    One run reads its own continuation (*dest*), the other one reads it too (*src*). M is the mean, over positions at
    which both would go on with other tokens, of ``logit[src's token] − logit[dest's token]``; or, over all positions
    of the continuation, ``KL(dest‖·) − KL(src‖·)``. Along ``x(α) = h + α·Δ``, where Δ is what steering changes at its
    site and ``α_k = (k + ½)/n`` (the midpoint rule), a node that writes x has the effect

        ``e = mean_k ∂M/∂x · (x_src − x_dest)``, summed over positions.

    At the steered site the effects add up to ``M(src) − M(dest)``, but for the error of the rule, which is reported.
    An edge has the effect of what its node writes through what its reader alone reads, norm included: both are in
    units of the stream, and the edges out of a node add up to its effect. What a head writes is read after the norm
    that follows attention, where there is one.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts or conversations.
        steering: An intervention, or several at one hookpoint, before or after a block.
        completions: Continuations that are read; by default the greedy ones of ``run``.
        run: The run whose continuation is read, *dest*.
        metric: M: of logits at positions where both runs differ, or of KL divergences at all of the continuation.
        steps: The number n of steps.
        edges: Whether edges are attributed too.
        max_new_tokens: The tokens of each continuation.

    Returns:
        The effects, averaged over texts weighted by their positions.

    Raises:
        DataError: Steering changes no next token in any text, or an option is out of range.
        HookpointError: The model's heads or MLPs are of an unknown form, or steering acts elsewhere.
        SteeringError: Steering acts at several hookpoints.
    """
    check_range("steps", steps, 1, MAX_STEPS, whole=True)
    check_flags(edges=edges)
    if metric not in ("logits", "kl"):
        raise DataError(f"metric = {metric!r:.40}", "'logits' or 'kl'")
    site = site_of(model, steering)
    parts = block_parts(model, first_block(site), readers=edges)
    graph = SteeringGraph.of(parts)
    texts = read_texts(
        model, tokenizer, prompts, steering, run=run, completions=completions, max_new_tokens=max_new_tokens
    )
    job = _Job(model, site, parts, graph, run, metric, steps, edges)
    results = [(text, found) for text in texts if (found := job.attribute(text)) is not None]
    if not results:
        raise DataError(
            f"{count(len(texts), 'text')} in which steering changes no next token",
            "at least one token that the steered model would write and the unsteered one not",
            "steer more strongly, read more tokens (max_new_tokens), or use metric='kl'",
        )
    weights = torch.tensor([found.positions for _, found in results], dtype=torch.float64)
    weights = weights / weights.sum()

    def averaged(values: Sequence[Tensor]) -> Tensor:
        return torch.einsum("t,t...->...", weights, torch.stack(list(values)))

    return SteeringAttribution(
        hookpoint=site,
        steering=steering,
        metric=metric,
        run=run,
        steps=int(steps),
        difference=float(averaged([found.difference for _, found in results])),
        effects=averaged([found.effects for _, found in results]),
        graph=graph,
        node_effects=averaged([found.nodes for _, found in results]),
        by_text=torch.stack([found.nodes for _, found in results]),
        edge_effects=averaged([found.edges for _, found in results]) if edges else None,  # type: ignore[misc]
        texts=tuple(text for text, _ in results),
        positions=tuple(found.positions for _, found in results),
        left_out=len(texts) - len(results),
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """What one text gives, on the CPU in float64."""

    positions: int
    difference: Tensor
    effects: Tensor
    nodes: Tensor
    edges: Tensor | None


@dataclass(frozen=True, eq=False)
class _Job:
    """The attribution of one steering, text by text."""

    model: nn.Module
    site: Hookpoint
    parts: Sequence[BlockParts]
    graph: SteeringGraph
    run: Run
    metric: Metric
    steps: int
    edges: bool

    def attribute(self, text: SteeredText) -> _Found | None:
        """The effects in one text; None where no position counts."""
        ids = text_device(self.model, text)
        alphas = torch.tensor([0.0, 1.0, *((k + 0.5) / self.steps for k in range(self.steps))], dtype=torch.float64)
        caught = Captured(self.model, self.site, self.parts, text.delta, alphas, self.edges)
        with from_block(self.model, ids, first_block(self.site), len(alphas)), caught.hooks():
            logits = logits_of(self.model, ids.expand(len(alphas), -1), len(ids[0]) - text.prompt_length)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        dest = int(self.run == "steered")  # rows 0 and 1 are the unsteered and the steered run
        if self.metric == "logits":
            values, positions = logit_metric(logits, 1 - dest, dest)
        else:
            values, positions = kl_metric(logits, 1 - dest, dest), logits.shape[1]
        if not positions:
            return None
        gradients = caught.gradients(values[2:].sum())
        changes = node_changes(caught, 1 - dest, dest)  # (nodes, tokens, d_model)
        steering = gradients.nodes[0] * changes[0]
        nodes = torch.stack([(g * change).sum() for g, change in zip(gradients.nodes, changes, strict=True)])
        edges = edge_effects(gradients, changes, self.graph) if self.edges else None
        difference = (values[1 - dest] - values[dest]).detach().double().cpu()
        return _Found(positions, difference, steering.sum(0), nodes, edges)


def logit_metric(logits: Float[Tensor, "runs tokens vocabulary"], src: int, dest: int) -> tuple[Tensor, int]:
    """``mean(logit[src's token] − logit[dest's token])`` of every run where these tokens differ, and how many do."""
    tokens: Any = [logits[row].detach().argmax(-1) for row in (src, dest)]
    differ = tokens[0] != tokens[1]
    columns = differ.nonzero()[:, 0]
    first, second = (logits[:, columns, which[differ]] for which in tokens)
    return (first - second).mean(-1), len(columns)


def kl_metric(logits: Float[Tensor, "runs tokens vocabulary"], src: int, dest: int) -> Float[Tensor, " runs"]:
    """``mean(KL(dest‖run) − KL(src‖run))`` of every run, over all tokens, in nats."""
    logs = logits.log_softmax(-1)
    divergences = []
    for row in (dest, src):
        own = logs[row].detach()
        divergences.append((own.exp() * (own - logs)).sum(-1).mean(-1))
    return divergences[0] - divergences[1]
