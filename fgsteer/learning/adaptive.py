"""Train a strength that depends on the token, at one layer or at several (PSR, arXiv 2605.03907).

(vector,) = train_adaptive(model, tokenizer, triples, hookpoints=12)
fg.generate(model, tokenizer, prompts, steering=vector.adaptive_add(scope="reply"))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.data.chat import Text, check_text
from fgsteer.display.progress import Progress, Report, reporting
from fgsteer.errors import DataError, FgsteerWarning, SelectionError
from fgsteer.errors.checks import check_range, checked, warn
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.adding import AdaptiveAdd
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.learning.changes import AnswerActivations, answer_activations, answer_changes
from fgsteer.learning.learner import rate
from fgsteer.learning.losses import loss_curve
from fgsteer.learning.response_passes import ResponsePasses, device_at
from fgsteer.methods.provenance import provenance
from fgsteer.models.gradients import frozen, through_model
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import model_identity, width_at
from fgsteer.steering.hooks import steer
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKS = 20  # of the held-out loss over a training
FIRST_DOSE = 0.1  # of ‖h‖, the first strength where no instructed prompt says how strong it should be
LEAST_SPREAD = 1e-3  # of the mean standard deviation: entries that hardly vary are read as if they varied so much

Example = tuple[Text, Text | None, Text]


@dataclass(frozen=True)
class AdaptiveTraining:
    """Settings of ``train_adaptive``. The paper does not say how it optimises: rates and steps are our own.

    Attributes:
        objective: "ll" maximises the answers' log-likelihood, "mse" fits what the instruction changes.
        lr: The learning rate of Adam, in units in which every entry of an activation varies by 1, and the first
            strength is 1.
        steps: Steps of the optimizer, along which the rate falls to 0 in a line.
        batch: Examples in a step.
        penalty: The weight of ``max(0, 1 − Σ_t λ_t)``, a mean over texts, against a strength that is never above 0.
        hold_out: Whether every second example is held out, and the values with the lowest loss there are returned.
        seed: The seed of the order of examples.

    Raises:
        DataError: A value is out of range.
        ArgumentError: A value is of another type.
    """

    objective: Literal["ll", "mse"] = "ll"
    lr: float = 0.05
    steps: int = 200
    batch: int = 8
    penalty: float = 1.0
    hold_out: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("ll", "mse"):
            raise DataError(f"objective = {self.objective!r:.60}", "'ll' or 'mse'")
        check_range("lr", self.lr, 1e-9, 1e6)
        check_range("penalty", self.penalty, 0, 1e6)
        for name, least in (("steps", 1), ("batch", 1), ("seed", 0)):
            check_range(name, getattr(self, name), least, MAX_COUNT, whole=True)


OBJECTIVES = {"ll": AdaptiveTraining("ll"), "mse": AdaptiveTraining("mse", steps=600)}  # mse needs no passes


class TokenStrength(nn.Module):
    """The trained values of one hookpoint, ``λ(h) = relu(a·h + b)`` and u, in units in which training is even.

    With the mean μ and the standard deviation σ of each entry of activations, and a first strength τ, what is trained
    is w, s and c of ``u = w/‖w‖``, ``a = τ·s/σ`` and ``b = τ·(c − s·μ/σ)``. It begins at s = 0 and c = 1, where it adds
    τ·u to every token.

    Args:
        activations: Activations (n, d_model), whose mean and spread are taken.
        direction: The first u, of any norm.
        strength: τ.
    """

    def __init__(
        self, activations: Float[Tensor, "n d_model"], direction: Float[Tensor, " d_model"], strength: float
    ) -> None:
        super().__init__()
        spread = activations.std(0, correction=0)
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", activations.mean(0))
        self.register_buffer("spread", spread.clamp(min=max(float(spread.mean()) * LEAST_SPREAD, 1e-12)))
        self.first = strength
        self.write = nn.Parameter(direction / direction.norm())
        self.slope = nn.Parameter(torch.zeros_like(direction))
        self.offset = nn.Parameter(torch.ones((), device=direction.device))

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """u, of norm 1."""
        unit: Tensor = self.write / self.write.norm()
        return unit

    @property
    def read(self) -> Float[Tensor, " d_model"]:
        """a."""
        return self.first * self.slope / self.spread

    @property
    def bias(self) -> Float[Tensor, ""]:
        """b."""
        return self.first * self.offset - self.read @ self.mean

    def forward(self, h: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """λ of activations."""
        strength: Tensor = (h.float() @ self.read + self.bias).relu()
        return strength


@checked
@through_model
def train_adaptive(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[Text, ...]],
    *,
    hookpoints: Hookpoint | str | int | Sequence[Hookpoint | str | int],
    objective: str | AdaptiveTraining = "ll",
    scores: Sequence[float] | None = None,
    scope: Scope = "reply",
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> list[SteeringVector]:
    """Train a strength that depends on the token: ``h' = h + s·relu(a·h + b)·u``, ‖u‖ = 1 (PSR, arXiv 2605.03907).

    An example is (x, x′, y′): a prompt, the same with an instruction that asks for the behavior, and an answer to it.
    With ``λ_t = relu(a·h_t + b)`` the objectives minimise

    | objective | loss |
    |---|---|
    | ``ll`` | ``−log π(y′|x)`` by token, π steered at s = 1, plus the penalty |
    | ``mse`` | ``Σ_ℓ mean_t ‖s·λ_t·u − Δ_ℓt‖² / mean_t ‖Δ_ℓt‖²``, plus the penalty |

    with the penalty ``max(0, 1 − Σ_t λ_t)`` of each text, on the activations of the unsteered model. Δ is the change
    ``h(x′y′) − h(xy′)`` on the tokens of y′: at one hookpoint that which has accumulated up to there (S-PSR), at
    several what each adds to the one below (A-PSR). "mse" fits activations of the unsteered model, without passes.
    Training begins at the mean change, added to every token; an a of 0 and b = 1 are the same as ``Add``.

    Args:
        model: A Hugging Face causal language model, which stays as it is.
        tokenizer: Its tokenizer.
        examples: Triples (x, x′, y′); for "ll" also pairs (x, y′), where training begins at the gradient's direction.
        hookpoints: Where it acts: one, or several.
        objective: "ll", "mse", or settings; by name they have 200 and 600 steps.
        scores: s of each example in "mse", such as a judge's score of how much of the behavior it shows; by default 1.
        scope: The tokens that are steered in the passes of "ll", as ``adaptive_add`` takes it.
        batch_tokens: The tokens in a pass, with padding: this bounds memory, and changes results by rounding alone.
        progress: As in ``train``.

    Returns:
        A vector for each hookpoint, from below upwards, with u as its direction, and a and b as its ``read`` and
        ``bias``. ``[v.adaptive_add(s, scope=scope) for v in vectors]`` applies them together, and ``save_steering``
        keeps that. The provenance holds the losses, and ``active_share``, the share of the answers' tokens with λ > 0.

    Raises:
        DataError: An example is no triple, an answer has no token or other tokens after x′, or a loss is not finite.
        SelectionError: The instruction changes nothing.
        HookpointError: The model lacks a hookpoint.

    Warns:
        FgsteerWarning: λ is 0 for every token of the answers at some hookpoint.
    """
    if not isinstance(objective, AdaptiveTraining) and objective not in OBJECTIVES:
        raise DataError(f"objective = {objective!r:.60}", "'ll', 'mse' or an AdaptiveTraining")
    settings = objective if isinstance(objective, AdaptiveTraining) else OBJECTIVES[objective]
    places = _parse_places(model, hookpoints)
    parsed = _parse_examples(examples, settings)
    weights = _parse_scores(scores, len(parsed), settings)
    found = answer_changes(model, tokenizer, parsed, places, batch_tokens)
    passes = None
    if settings.objective == "ll":
        passes = ResponsePasses(model, tokenizer, places[0], [(x, y) for x, _, y in parsed], batch_tokens)
    with frozen(model):
        if found.changes:
            strengths = {at: _at_mean_change(model, at, found.activations[at], found.changes[at]) for at in places}
        else:
            assert passes is not None  # mse has changes
            strengths = _at_gradient(model, passes, places, found.activations, parse_scope(scope))
        trainer = _Trainer(settings, strengths, found.activations, found.changes, weights, passes, parse_scope(scope))
        with reporting(progress, f"training strengths at {', '.join(map(str, places))}", settings.steps) as report:
            trainer.run(report)
    vectors = [_vector(model, at, strengths[at], trainer, len(parsed)) for at in places]
    shares = active_shares(model, tokenizer, [(x, y) for x, _, y in parsed], vectors, scope, batch_tokens)
    for vector, share in zip(vectors, shares, strict=True):
        vector.provenance["training"]["active_share"] = share
        if not share:
            warn(
                f"The trained strength at {vector.hookpoint} is 0 for every token of the answers, so that it adds "
                "nothing. Lower lr, or raise the penalty in AdaptiveTraining.",
                FgsteerWarning,
            )
    return vectors


def active_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Text, Text]],
    vectors: Sequence[SteeringVector],
    scope: Scope = "reply",
    batch_tokens: int | None = None,
) -> list[float]:
    """The share of the answers' tokens at which each vector adds anything, where those below it act too."""
    shares = []
    for number, vector in enumerate(vectors):
        below = [v.adaptive_add(scope=scope) for v in vectors[:number]]
        with steer(model, below) if below else nullcontext():
            _, acts = answer_activations(model, tokenizer, pairs, [vector.hookpoint], batch_tokens)
        h = torch.cat(acts[vector.hookpoint]).float()
        assert vector.read is not None
        shares.append(float((h @ vector.read + float(vector.bias) > 0).double().mean()))
    return shares


def _parse_places(model: nn.Module, hookpoints: Any) -> list[Hookpoint]:
    """Hookpoints from below upwards. Raises DataError for none, and HookpointError for one that the model lacks."""
    listed = hookpoints if isinstance(hookpoints, list | tuple | range) else [hookpoints]
    places = list(dict.fromkeys(map(Hookpoint.parse, listed)))
    if not places:
        raise DataError("no hookpoint", "at least one", "pass hookpoints=12")
    for at in places:
        width_at(model, at)  # raises for one that it lacks
    return sorted(places)


def _parse_examples(examples: Any, settings: AdaptiveTraining) -> list[Example]:
    """Triples (x, x′, y′), of which x′ may be None for "ll". Raises DataError."""
    least = 3 if settings.objective == "mse" else 2
    if not isinstance(examples, list | tuple) or not examples:
        raise DataError("no examples", "a list of (prompt, instructed prompt, answer)", "pass at least one")
    parsed: list[Example] = []
    for number, entry in enumerate(examples):
        if isinstance(entry, str) or not isinstance(entry, list | tuple) or not least <= len(entry) <= 3:
            raise DataError(
                f"example {number}: {entry!r:.60}",
                "(prompt, instructed prompt, answer)" + (", or (prompt, answer) for 'll'" if least == 2 else ""),
            )
        texts = [check_text(text, f"example {number}", empty=True) for text in entry]
        parsed.append((texts[0], texts[1] if len(texts) == 3 else None, texts[-1]))
    if settings.hold_out and len(parsed) < 2:
        raise DataError("1 example with hold_out", "at least 2, half of which are held out")
    return parsed


def _parse_scores(scores: Sequence[float] | None, count: int, settings: AdaptiveTraining) -> list[float]:
    """A score for each example. Raises DataError for another number of them, and for scores of "ll"."""
    if scores is None:
        return [1.0] * count
    if settings.objective != "mse" or len(scores) != count:
        raise DataError(f"{len(scores)} scores for {count} examples of {settings.objective}", "a score each, for 'mse'")
    for score in scores:
        check_range("a score", score, 0, 1e6)
    return list(map(float, scores))


def _at_mean_change(
    model: nn.Module, at: Hookpoint, activations: Sequence[Tensor], changes: Sequence[Tensor]
) -> TokenStrength:
    """Values that add the mean change to every token. Raises SelectionError where that is nothing."""
    device, mean = device_at(model, at), torch.cat(list(changes)).mean(0)
    norm = float(mean.norm())
    if not 0 < norm < math.inf:
        raise SelectionError(
            f"a mean change of norm {norm:g} at {at}", "an instruction that changes activations", "check the triples"
        )
    return TokenStrength(torch.cat(list(activations)).float().to(device), mean.to(device), norm)


def _at_gradient(
    model: nn.Module,
    passes: ResponsePasses,
    places: Sequence[Hookpoint],
    activations: AnswerActivations,
    scope: Scope,
) -> dict[Hookpoint, TokenStrength]:
    """Values that add the direction in which the answers' likelihood grows fastest, at a tenth of activations' norm."""
    vectors = {at: torch.zeros(width_at(model, at), device=device_at(model, at), requires_grad=True) for at in places}
    rows = range(len(passes.rows))
    entry = [SteeringVector(v, at).add(scope=scope) for at, v in vectors.items()]
    for part in passes.split(rows, lambda n: [n]):
        (-passes.log_probabilities(part, [entry] * len(part)).sum()).backward()  # type: ignore[no-untyped-call]
    strengths = {}
    for at, v in vectors.items():
        h = torch.cat(activations[at]).float().to(v.device)
        assert v.grad is not None
        if not 0 < float(v.grad.norm()) < math.inf:
            raise SelectionError(f"a gradient of norm {float(v.grad.norm()):g} at {at}", "answers that it can change")
        strengths[at] = TokenStrength(h, -v.grad, FIRST_DOSE * float(h.norm(dim=-1).mean()))
    return strengths


class _Trainer:
    """The loop: Adam on the values of all hookpoints together."""

    def __init__(
        self,
        settings: AdaptiveTraining,
        strengths: dict[Hookpoint, TokenStrength],
        activations: AnswerActivations,
        changes: AnswerActivations,
        scores: Sequence[float],
        passes: ResponsePasses | None,
        scope: Scope,
    ) -> None:
        self.settings, self.strengths, self.activations, self.changes = settings, strengths, activations, changes
        self.scores, self.passes, self.scope = scores, passes, scope
        self.parameters = [p for strength in strengths.values() for p in strength.parameters()]
        self.sizes = {at: float(torch.cat(list(d)).square().sum(1).mean()) for at, d in changes.items()}
        numbers = list(range(len(scores)))
        self.trained = numbers[::2] if settings.hold_out else numbers
        self.held_out = numbers[1::2] if settings.hold_out else []
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []

    def run(self, report: Report) -> None:
        """Take all steps. Raises DataError for a loss that is not finite."""
        optimizer = torch.optim.Adam(self.parameters, self.settings.lr)
        best: list[Tensor] = []
        every = max(1, self.settings.steps // CHECKS)
        for step, batch in zip(range(self.settings.steps), self._batches(), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * rate("linear", step, self.settings.steps, 0)
            optimizer.zero_grad(set_to_none=True)
            self.losses.append(self._loss(batch))
            if not math.isfinite(self.losses[-1]):
                raise DataError(f"a loss of {self.losses[-1]} at step {step}", "a finite loss", "lower lr")
            optimizer.step()
            if self.held_out and ((step + 1) % every == 0 or step + 1 == self.settings.steps):
                with torch.no_grad():
                    self.held_out_losses.append(self._loss(self.held_out))
                if self.held_out_losses[-1] == min(self.held_out_losses):
                    best = [p.detach().clone() for p in self.parameters]
            report(step + 1, self.settings.steps, note=lambda: f"loss {self.losses[-1]:.3f}")
        with torch.no_grad():
            for parameter, value in zip(self.parameters, best, strict=False):
                parameter.copy_(value)

    def _batches(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed(self.settings.seed)
        while True:
            order = [self.trained[n] for n in torch.randperm(len(self.trained), generator=random).tolist()]
            for start in range(0, len(order), self.settings.batch):
                yield order[start : start + self.settings.batch]

    def _loss(self, batch: Sequence[int]) -> float:
        """The loss of a batch; where gradients are on, they are added up in the values."""
        loss = self._fit(batch) if self.passes is None else self._likelihood(batch, self.passes)
        for at, strength in self.strengths.items():
            h = torch.cat([self.activations[at][n] for n in batch]).to(strength.offset.device)
            sums = [part.sum() for part in strength(h).split([len(self.activations[at][n]) for n in batch])]
            term = self.settings.penalty * (1 - torch.stack(sums)).relu().mean()
            loss += self._backward(term)
        return loss

    def _fit(self, batch: Sequence[int]) -> float:
        """The squared error of what is added, as a share of the squared change."""
        loss = 0.0
        for at, strength in self.strengths.items():
            device = strength.offset.device
            h = torch.cat([self.activations[at][n] for n in batch]).to(device)
            target = torch.cat([self.changes[at][n] for n in batch]).to(device)
            scores = torch.cat([torch.full((len(self.changes[at][n]),), self.scores[n]) for n in batch]).to(device)
            added = (scores * strength(h))[:, None] * strength.direction
            loss += self._backward((added - target).square().sum(1).mean() / self.sizes[at])
        return loss

    def _likelihood(self, batch: Sequence[int], passes: ResponsePasses) -> float:
        """The cross-entropy of the answers, by token."""
        loss, tokens = 0.0, sum(passes.answer_tokens(n) for n in batch)
        for part in passes.split(batch, lambda n: [n]):
            entry = [
                AdaptiveAdd(direction=s.direction, read=s.read, bias=s.bias, hookpoint=at, scope=self.scope)
                for at, s in self.strengths.items()
            ]
            loss += self._backward(-passes.log_probabilities(part, [entry] * len(part)).sum() / tokens)
        return loss

    @staticmethod
    def _backward(term: Tensor) -> float:
        if term.requires_grad:
            term.backward()  # type: ignore[no-untyped-call]
        return float(term.detach())


@torch.no_grad()
def _vector(
    model: PreTrainedModel, at: Hookpoint, strength: TokenStrength, trainer: _Trainer, count: int
) -> SteeringVector:
    """The vector of a hookpoint, with how it was made."""
    settings = asdict(trainer.settings)
    method = f"psr_{settings.pop('objective')}"
    record = provenance(method, {**settings, "scope": str(trainer.scope)})
    record["model"] = model_identity(model)
    record["data"] = [{"name": "examples", "count": [count, 0]}]
    record["training"] = {"steps": len(trainer.losses), "losses": loss_curve(trainer.losses)}
    if trainer.held_out_losses:
        record["training"]["held_out_losses"] = trainer.held_out_losses
    direction, read = strength.direction.detach().cpu(), strength.read.detach().cpu()
    return SteeringVector(direction, at, read=read, bias=float(strength.bias), provenance=record)
