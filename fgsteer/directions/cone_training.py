"""Training of refusal directions and cones by gradient: the loss, and the loop that keeps rows orthonormal.

vector = train_refusal_direction(model, tokenizer, refused, answered, found.vector)
cone = train_cone(model, tokenizer, refused, answered, found.vector, dimension=3)
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from fgsteer.data.chat import Text
from fgsteer.directions.cones import ConceptCone, orthant_weights, orthonormal, span, tangent
from fgsteer.directions.independence import changes
from fgsteer.directions.removal import ablate_everywhere
from fgsteer.directions.targets import Reply, Targets, reply_logits, write_targets
from fgsteer.display.progress import Progress, Report, reporting
from fgsteer.errors import ArgumentError, DataError, PairingError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.methods.provenance import provenance
from fgsteer.models.gradients import frozen, through_model
from fgsteer.models.pairing import check_pairing, model_identity
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BETAS, CLIP, REDUCTIONS, REDUCE = (0.9, 0.98), 10.0, 2, 0.1  # of the paper's optimiser


class ConeOptions(TypedDict, total=False):
    """The arguments that ``train_refusal_direction`` and ``train_cone`` share, as callers may pass them."""

    start: ConceptCone | Literal["direction", "random"]
    orthogonal_to: Sequence[SteeringVector]
    independent_of: Sequence[SteeringVector]
    addition: float
    retain: float
    independence: float
    kl_of: Literal["ablated", "base"]
    learning_rate: float
    batch_size: int
    epochs: int
    patience: int
    reply_tokens: int
    seed: int
    progress: Progress


@dataclass(frozen=True)
class ConeSettings:
    """The same with their defaults, those of the paper's code. Raises DataError for what is out of range."""

    start: ConceptCone | Literal["direction", "random"] = "direction"
    orthogonal_to: Sequence[SteeringVector] = ()
    independent_of: Sequence[SteeringVector] = ()
    addition: float = 0.2
    retain: float = 1.0
    independence: float = 200.0
    kl_of: Literal["ablated", "base"] = "ablated"
    learning_rate: float = 1e-2
    batch_size: int = 16
    epochs: int = 1
    patience: int = 5
    reply_tokens: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("addition", "retain", "independence", "learning_rate"):
            check_range(name, getattr(self, name), 0, sys.float_info.max)
        for name in ("batch_size", "epochs", "patience", "reply_tokens"):
            check_range(name, getattr(self, name), 1, MAX_COUNT, whole=True)
        check_range("seed", self.seed, 0, MAX_COUNT, whole=True)
        if self.kl_of not in ("ablated", "base"):
            raise DataError(f"kl_of = {self.kl_of!r:.40}", "'ablated' or 'base'")
        if not isinstance(self.start, ConceptCone) and self.start not in ("direction", "random"):
            raise DataError(f"start = {self.start!r:.40}", "'direction', 'random', or a cone to go on from")
        for name in ("orthogonal_to", "independent_of"):
            vectors = getattr(self, name)
            if not isinstance(vectors, list | tuple) or not all(isinstance(v, SteeringVector) for v in vectors):
                raise DataError(f"{name} = {vectors!r:.60}", "a list of vectors", f"pass {name}=[vector]")


@checked
@through_model
def train_refusal_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refused: Sequence[Text],
    answered: Sequence[Text],
    direction: SteeringVector,
    **options: Unpack[ConeOptions],
) -> SteeringVector:
    """Train a refusal direction by gradient (RDO, arXiv 2502.17420): ``train_cone`` in one dimension.

    Args:
        model: As in ``train_cone``.
        tokenizer: As in ``train_cone``.
        refused: As in ``train_cone``.
        answered: As in ``train_cone``.
        direction: As in ``train_cone``.
        **options: What else ``train_cone`` takes, but for ``dimension`` and ``samples``.

    Returns:
        The direction, with the norm and at the hookpoint of the one that it began from.

    Raises:
        DataError: As in ``train_cone``.
        PairingError: As in ``train_cone``.
        SelectionError: As in ``train_cone``.
        HookpointError: As in ``train_cone``.
    """
    parse_options(options)
    return train_cone(model, tokenizer, refused, answered, direction, dimension=1, **options).vector()


@checked
@through_model
def train_cone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refused: Sequence[Text],
    answered: Sequence[Text],
    direction: SteeringVector,
    *,
    dimension: int = 2,
    samples: int = 8,
    **options: Unpack[ConeOptions],
) -> ConceptCone:
    """Train a cone of refusal directions by gradient (arXiv 2502.17420).

    Its targets are what the model writes itself with ``direction`` r removed and added. For a unit vector v the loss is
    ``CE(reply under r's ablation | v ablated) + 0.2·CE(reply under +r | +‖r‖v) + KL(v ablated‖base)``: a mean over
    tokens for the cross-entropies, a sum over the last prompt token and the reply for the KL, of an answered request's
    own reply. The loss of a cone is the mean over its basis plus the mean over ``samples`` uniform draws from it. After
    each step of AdamW the rows are made orthonormal again. The cone of k rows begins with the trained one of k − 1 and
    a random row. Returned is the basis whose batch had the lowest loss with all weights at 1.

    Args:
        model: A Hugging Face causal language model, whose parameters stay as they are.
        tokenizer: Its tokenizer.
        refused: Requests that it refuses: texts, which a chat model gets as a user's messages, or conversations.
        answered: As many requests that it answers.
        direction: A refusal direction r at the input of a block, as ``select_direction`` finds it.
        dimension: The number of directions.
        samples: The draws in each step.
        **options: ``start``: the first row, the "direction" itself or a "random" one, or a cone to go on from;
            ``orthogonal_to``: vectors that every row stays orthogonal to; ``independent_of``: vectors that every
            direction is to be representationally independent of, on the refused requests, with the weight
            ``independence`` (200); ``addition`` (0.2) and ``retain`` (1.0): the weights of the loss; ``kl_of``: the
            distribution p of ``KL(p‖q)``, "ablated" as in the paper's code, or "base"; ``learning_rate`` (0.01);
            ``batch_size`` (16): the examples of a step; ``epochs`` (1); ``patience`` (5): the steps without a lower
            loss after which the rate falls to a tenth, twice, and training then ends; ``reply_tokens`` (30);
            ``seed``; ``progress``, by steps, as in ``collect``.

    Returns:
        The cone, at the direction's hookpoint and with its norm.

    Raises:
        DataError: There are other numbers of refused and answered requests, or an option is out of its range.
        PairingError: A vector or a cone has another width or place.
        SelectionError: No step had a finite loss, or no row is left beside ``orthogonal_to``.
        HookpointError: The blocks of the model add something else than their sublayers' outputs.
    """
    settings = parse_options(options)
    check_range("samples", samples, 1, MAX_COUNT, whole=True)
    _check(model, refused, answered, direction, dimension, settings)
    against = span(settings.orthogonal_to, direction.d_model)
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = [torch.randn(direction.d_model, generator=generator) for _ in range(dimension)]  # the n-th for row n
    basis = orthonormal(_first_rows(direction, settings, drawn[0]), against).float()
    with frozen(model):
        targets = write_targets(model, tokenizer, refused, answered, direction, settings.reply_tokens)
        trainer = _Trainer(model, targets, direction.hookpoint, direction.norm, settings, samples, against, generator)
        goes_on = isinstance(settings.start, ConceptCone) and len(basis) < dimension  # its rows are trained
        stages = range(len(basis) + goes_on, dimension + 1)
        steps = len(stages) * settings.epochs * math.ceil(len(refused) / settings.batch_size)
        with reporting(options.get("progress"), "training directions", steps) as report:
            for rows in stages:
                if len(basis) < rows:
                    basis = orthonormal(torch.stack([*basis, drawn[rows - 1]]), against).float()
                basis = trainer.train(basis, report)
    about = _about(model, settings, dimension, samples)
    return ConceptCone(basis, direction.hookpoint, direction.norm, tuple(trainer.losses), about)


def parse_options(options: ConeOptions) -> ConeSettings:
    """The settings of a training. Raises ArgumentError for one that there is not."""
    unknown = [name for name in options if name not in ConeOptions.__annotations__]
    if unknown:
        raise ArgumentError(f"an argument {unknown[0]!r:.40}", f"one of {', '.join(ConeOptions.__annotations__)}")
    given: dict[str, Any] = {name: value for name, value in options.items() if name != "progress"}
    return ConeSettings(**given)


def _check(
    model: PreTrainedModel,
    refused: Sequence[Text],
    answered: Sequence[Text],
    direction: SteeringVector,
    dimension: int,
    settings: ConeSettings,
) -> None:
    """Raises the errors of ``train_cone`` that need no pass."""
    check_pairing(model, direction.hookpoint, direction.d_model, "", "direction")
    least = settings.start.dimension if isinstance(settings.start, ConceptCone) else 1
    check_range("dimension", dimension, least, direction.d_model - len(settings.orthogonal_to), whole=True)
    if len(refused) != len(answered):
        raise DataError(
            f"{count(len(refused), 'refused request')} and {len(answered)} answered ones",
            "as many of one kind as of the other",
            "cut the longer list: each example is a pair",
        )
    if not direction.norm > 0:
        raise SelectionError("a direction of norm 0", "a refusal direction", "find one with fg.select_direction")
    start = settings.start
    if isinstance(start, ConceptCone) and (start.hookpoint, start.basis.shape[1]) != (
        direction.hookpoint,
        direction.d_model,
    ):
        raise PairingError(
            f"a cone at {start.hookpoint} of width {start.basis.shape[1]}",
            f"one at {direction.hookpoint} of width {direction.d_model}, as the direction is",
        )


def _first_rows(
    direction: SteeringVector, settings: ConeSettings, drawn: Float[Tensor, " d_model"]
) -> Float[Tensor, "k d_model"]:
    """The rows that training begins with."""
    if isinstance(settings.start, ConceptCone):
        return settings.start.basis.cpu()
    return (direction.direction.detach().cpu() if settings.start == "direction" else drawn)[None]


def _about(model: PreTrainedModel, settings: ConeSettings, dimension: int, samples: int) -> dict[str, Any]:
    """The provenance of a cone."""
    plain = {name: value for name, value in vars(settings).items() if isinstance(value, str | int | float)}
    numbers = {name: len(getattr(settings, name)) for name in ("orthogonal_to", "independent_of")}
    used = {"samples": samples} if dimension > 1 else {}
    about = provenance("rdo", {"dimension": dimension, **used, **plain, **numbers})
    return {**about, "model": model_identity(model)}


class _Trainer:
    """The loop of one dimension after the other, with the targets that all share."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Targets,
        hookpoint: Any,
        norm: float,
        settings: ConeSettings,
        samples: int,
        against: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.model, self.targets, self.hookpoint, self.norm = model, targets, hookpoint, norm
        self.settings, self.samples, self.against, self.generator = settings, samples, against, generator
        self.losses: list[float] = []
        self.done = 0

    def train(self, basis: Float[Tensor, "k d_model"], report: Report) -> Float[Tensor, "k d_model"]:
        """The rows of lowest unweighted loss. Raises SelectionError where no loss is finite."""
        rows = basis.clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([rows], self.settings.learning_rate, betas=BETAS, weight_decay=0.0, amsgrad=True)
        best, lowest, since, reductions = basis, math.inf, 0, 0
        for batch in self._batches():
            loss = self._backward(rows, batch)
            self.losses.append(loss)
            self.done += 1
            report(self.done)
            if loss < lowest:
                best, lowest, since = rows.detach().clone(), loss, 0
            else:
                since += 1
            if since == self.settings.patience:
                if reductions == REDUCTIONS:
                    break
                optimizer.param_groups[0]["lr"] *= REDUCE
                since, reductions = 0, reductions + 1
            assert rows.grad is not None
            rows.grad = tangent(rows.detach(), rows.grad)
            torch.nn.utils.clip_grad_norm_([rows], CLIP)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                rows.copy_(orthonormal(rows, self.against))
        if not math.isfinite(lowest):
            raise SelectionError(
                "no step with a finite loss", "a finite one", "check the model's activations: float16 may overflow"
            )
        return best

    def _batches(self) -> Iterator[list[int]]:
        """The numbers of the examples of each step, in an order drawn anew for each epoch."""
        draw = random.Random(self.settings.seed)
        numbers = list(range(len(self.targets.ablated)))
        for _ in range(self.settings.epochs):
            draw.shuffle(numbers)
            for start in range(0, len(numbers), self.settings.batch_size):
                yield numbers[start : start + self.settings.batch_size]

    def _backward(self, rows: Tensor, batch: Sequence[int]) -> float:
        """Add the gradient of a batch's loss to that of the rows; the loss with all weights at 1."""
        ablated, added, retained = (
            [part[n] for n in batch] for part in (self.targets.ablated, self.targets.added, self.targets.retained)
        )
        with torch.no_grad():
            base = [logits.double().log_softmax(-1) for logits in reply_logits(self.model, retained)]
        mixtures = [(row, 1 / len(rows)) for row in torch.eye(len(rows), dtype=torch.float64)]
        if len(rows) > 1:
            weights = orthant_weights(self.samples, len(rows), self.generator)
            mixtures += [(row, 1 / self.samples) for row in weights]
        total = 0.0
        for weights, share in mixtures:
            mixed = weights.float() @ rows
            v = SteeringVector(mixed / mixed.norm(), self.hookpoint)
            terms = self._terms(v, ablated, added, retained, base)
            factors = (1.0, self.settings.addition, self.settings.retain, self.settings.independence)
            loss = sum((factor * term for factor, term in zip(factors, terms, strict=False)), torch.tensor(0.0))
            (share * loss).backward()  # type: ignore[no-untyped-call]
            total += share * sum(float(term.detach()) for term in terms)
        return total

    def _terms(
        self,
        v: SteeringVector,
        ablated: Sequence[Reply],
        added: Sequence[Reply],
        retained: Sequence[Reply],
        base: Sequence[Tensor],
    ) -> list[Tensor]:
        """The terms of the loss of a unit direction, each a mean over examples, on the CPU."""
        both = reply_logits(self.model, [*ablated, *retained], ablate_everywhere(self.model, v))
        raised = reply_logits(self.model, added, [v.add(self.norm, bos=True)])
        kls = [self._kl(logits, q) for logits, q in zip(both[len(ablated) :], base, strict=True)]
        terms = [_reply_loss(both[: len(ablated)], ablated), _reply_loss(raised, added), torch.stack(kls).mean()]
        prompts = [one.prompt for one in ablated]
        moved = [changes(self.model, prompts, v, w).sum(0).mean() for w in self.settings.independent_of]
        return [term.cpu() for term in (*terms, *([torch.stack(moved).sum()] if moved else ()))]

    def _kl(self, logits: Tensor, base: Tensor) -> Tensor:
        """The KL divergence of next tokens, summed over positions, in float64."""
        p, q = logits.double().log_softmax(-1), base
        if self.settings.kl_of == "base":
            p, q = q, p
        return (p.exp() * (p - q)).sum()


def _reply_loss(logits: Sequence[Tensor], replies: Sequence[Reply]) -> Tensor:
    """The cross-entropy of replies, a mean over the tokens of each and then over replies, in float32 or wider."""
    losses = [
        cross_entropy(
            rows[:-1].to(torch.promote_types(rows.dtype, torch.float32)), torch.tensor(one.reply, device=rows.device)
        )
        for rows, one in zip(logits, replies, strict=True)
    ]
    return torch.stack(losses).mean()
