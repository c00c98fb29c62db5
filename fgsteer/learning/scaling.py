"""Train factors that activations are multiplied by (activation scaling, arXiv 2410.04962).

found = train_scaling(model, tokenizer, [("The capital of France is", "Paris", "Rome")], hookpoints=[8, 12])
fg.generate(model, tokenizer, prompts, steering=found.interventions(-1.0))         towards the second answers
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fgsteer.activations.batches import default_batch_tokens
from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import TokenReader, TokenRow, pad
from fgsteer.data.chat import Text
from fgsteer.display.progress import Progress, reporting
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_flags, check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.scaling import Scale
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.learning.learner import rate
from fgsteer.learning.response_passes import device_at
from fgsteer.models.gradients import frozen, through_model
from fgsteer.models.hookpoints import Hookpoint, uncompiled
from fgsteer.models.pairing import width_at
from fgsteer.models.properties import context_window, input_device, virtual_tokens
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScalingTraining:
    """Settings of ``train_scaling``. Its sources give neither weights nor optimizer: these are our own.

    Attributes:
        lr: The learning rate of Adam, which falls to 0 in a line.
        steps: Steps of the optimizer.
        batch: Examples in a step.
        faithfulness: The weight of the KL divergence over all other tokens, in nats.
        l1: The weight of the sum of the sizes of the factors.
        seed: The seed of the order of examples.

    Raises:
        DataError: A value is out of range.
        ArgumentError: A value is of another type.
    """

    lr: float = 0.02
    steps: int = 200
    batch: int = 8
    faithfulness: float = 1.0
    l1: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("lr", self.lr, 1e-9, 1e6)
        for name in ("faithfulness", "l1"):
            check_range(name, getattr(self, name), 0, 1e6)
        for name, least in (("steps", 1), ("batch", 1), ("seed", 0)):
            check_range(name, getattr(self, name), least, MAX_COUNT, whole=True)


@dataclass(frozen=True, repr=False)
class ScalingRow(OneLineRepr):
    """One trained factor.

    Args:
        hookpoint: Where it acts.
        scope: The tokens that it acts on.
        coefficient: α.
        read_norm: ‖θ‖, where each activation sets its factor.
    """

    hookpoint: Hookpoint
    scope: Scope
    coefficient: float
    read_norm: float | None = None

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {
            "hookpoint": str(self.hookpoint),
            "scope": str(self.scope),
            "α": round(self.coefficient, 4),
            "‖θ‖": None if self.read_norm is None else round(self.read_norm, 4),
        }


@dataclass(frozen=True, eq=False, repr=False)
class ActivationScaling(OneLineRepr):
    """Factors that were trained, and how.

    Args:
        scales: The interventions that lead to the first answers.
        losses: The loss of each step, in nats.
        flipped: The share of examples whose more likely answer is the wanted one, at strength 1, and at −1.
        settings: How they were trained, as plain JSON.
    """

    scales: tuple[Scale, ...]
    losses: tuple[float, ...]
    flipped: tuple[float, float]
    settings: dict[str, Any]

    def interventions(self, strength: float = 1.0) -> list[Scale]:
        """The interventions at a strength: 1 leads to the first answers, −1 to the second, and 0 does nothing.

        Raises SteeringError for a strength that is not finite.
        """
        return [
            Scale(
                hookpoint=item.hookpoint,
                width=item.width,
                coefficient=strength * item.coefficient,
                read=None if item.read is None else strength * item.read,
                scope=item.scope,
                model_name=item.model_name,
                method="activation_scaling",
            )
            for item in self.scales
        ]

    def table(self) -> Table[ScalingRow]:
        """The factors by place, the largest first."""
        rows = [
            ScalingRow(s.hookpoint, s.scope, float(s.coefficient), None if s.read is None else float(s.read.norm()))
            for s in self.scales
        ]
        return Table(sorted(rows, key=lambda row: -(abs(row.coefficient) + (row.read_norm or 0.0))))


@checked
@through_model
def train_scaling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[Text, str, str]],
    *,
    hookpoints: Hookpoint | str | int | Sequence[Hookpoint | str | int],
    scopes: Sequence[Scope] = ("prompt",),
    dynamic: bool = False,
    settings: ScalingTraining | None = None,
    progress: Progress = None,
) -> ActivationScaling:
    """Train factors of activations that lead to one answer, and reversed to another (arXiv 2410.04962).

    Each hookpoint and scope has a factor of its own, ``h' = (1 + m·α)·h``, or with ``dynamic`` one that each activation
    sets itself, ``h' = (1 + m·(α + θ·h))·h``, for texts of other lengths. With d the difference of the logits of the
    two answers' first tokens after the prompt, and p and p₀ the distributions of all other tokens, steered and not,
    what is minimised is the mean over examples, and over m = 1 and m = −1, of

        −log σ(m·d) + λ_f·KL(p₀‖p) + λ₁·‖(α, n·θ)‖₁

    which are effectiveness both ways, faithfulness, and a small number of factors; n is the median norm of the prompts'
    activations, so that α and θ count alike. Training begins at 0, where nothing is changed. How the paper weights and
    optimises is not known to us: see ``ScalingTraining``.

    Args:
        model: A Hugging Face causal language model, which stays as it is.
        tokenizer: Its tokenizer.
        examples: (prompt, first answer, second answer), of which answers the first token counts.
        hookpoints: Where activations are multiplied, of any site.
        scopes: The tokens that factors are for, such as ``[fg.at([n]) for n in range(1, 9)]`` for
            prompts of one length; a start token is left out.
        dynamic: Whether activations set their factors.
        settings: How it is trained.
        progress: As in ``train``.

    Returns:
        The factors, as interventions: ``fg.save_steering(path, found.interventions())`` keeps them.

    Raises:
        DataError: There is no example, hookpoint or scope, or the two answers of one begin with the same token.
        SteeringError: A scope is none, or a factor grew beyond what the model's dtype holds.
        HookpointError: The model lacks a hookpoint.
    """
    chosen = ScalingTraining() if settings is None else settings
    check_flags(dynamic=dynamic)
    listed: list[Any] = list(hookpoints) if isinstance(hookpoints, list | tuple | range) else [hookpoints]
    places = sorted(dict.fromkeys(map(Hookpoint.parse, listed)))
    parsed = list(dict.fromkeys(map(parse_scope, [scopes] if isinstance(scopes, str) else scopes)))
    if not places or not parsed:
        raise DataError("no hookpoint or no scope", "at least one of each", "pass hookpoints=[8, 12]")
    trainer = _Trainer(model, tokenizer, examples, [(at, scope) for at in places for scope in parsed], dynamic, chosen)
    with frozen(model), reporting(progress, f"training {len(trainer.sites)} factors", chosen.steps) as report:
        losses = trainer.run(report)
        flipped = (trainer.share(1.0), trainer.share(-1.0))
    scales = tuple(item.detach() for item in trainer.scales(1.0))
    made = {**asdict(chosen), "dynamic": dynamic, "examples": len(trainer.rows)}
    return ActivationScaling(scales, tuple(losses), flipped, made)


class _Trainer:
    """The factors, the prompts with their two answers, and the loop."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Any,
        sites: Sequence[tuple[Hookpoint, Scope]],
        dynamic: bool,
        settings: ScalingTraining,
    ) -> None:
        self.model, self.sites, self.settings = model, list(sites), settings
        self.device = input_device(model)
        self.pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
        self.rows, self.answers = _prompts_and_answers(model, tokenizer, examples)
        self.alphas = [nn.Parameter(torch.zeros((), device=device_at(model, at))) for at, _ in sites]
        self.widths = [width_at(model, at) for at, _ in sites]
        self.thetas: list[nn.Parameter] = []  # n·θ
        if dynamic:
            self.norms = self._norms()
            self.thetas = [
                nn.Parameter(torch.zeros(width, device=alpha.device))
                for width, alpha in zip(self.widths, self.alphas, strict=True)
            ]
        plain = not virtual_tokens(model)
        self._picks_columns = plain and "logits_to_keep" in inspect.signature(uncompiled(model).forward).parameters

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.alphas, *self.thetas]

    @torch.no_grad()
    def _norms(self) -> list[float]:
        """The median norm of activations at each site, on the first prompts, without those of a start token."""
        rows = self.rows[: self.settings.batch]
        ids, attention = (t.to(self.device) for t in pad([row.ids for row in rows], self.pad_id))
        with note_prompt_ends(self.model, [len(row.ids) for row in rows]):
            found = record(self.model, ids, attention, [at for at, _ in self.sites])
        real = attention.bool()
        for n, row in enumerate(rows):
            real[n, : row.start] = False
        return [float(found[at][real.to(found[at].device)].float().norm(dim=-1).median()) for at, _ in self.sites]

    def scales(self, sign: float) -> list[Scale]:
        """The interventions as they are now."""
        return [
            Scale(
                hookpoint=at,
                width=self.widths[n],
                coefficient=sign * self.alphas[n],
                read=sign / self.norms[n] * self.thetas[n] if self.thetas else None,
                scope=scope,
                model_name=getattr(getattr(self.model, "config", None), "_name_or_path", "") or "",
                method="activation_scaling",
            )
            for n, (at, scope) in enumerate(self.sites)
        ]

    def run(self, report: Any) -> list[float]:
        """Take all steps; the loss of each. Raises DataError for one that is not finite."""
        optimizer = torch.optim.Adam(self.parameters, self.settings.lr)
        random = torch.Generator().manual_seed(self.settings.seed)
        losses: list[float] = []
        order: list[int] = []
        for step in range(self.settings.steps):
            if not order:
                order = torch.randperm(len(self.rows), generator=random).tolist()
            batch, order = order[: self.settings.batch], order[self.settings.batch :]
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * rate("linear", step, self.settings.steps, 0)
            optimizer.zero_grad(set_to_none=True)
            losses.append(self.backward(batch))
            if not math.isfinite(losses[-1]):
                raise DataError(f"a loss of {losses[-1]} at step {step}", "a finite loss", "lower lr")
            optimizer.step()
            report(step + 1, self.settings.steps, note=lambda: f"loss {losses[-1]:.3f}")
        return losses

    def backward(self, batch: Sequence[int]) -> float:
        """The loss of a batch, whose gradients are added up in what is trained."""
        total = 0.0
        for part in self._parts(batch):
            with torch.no_grad():
                base = self.logits(part, [])
            for sign in (1.0, -1.0):
                loss = self.losses(part, self.logits(part, self.scales(sign)), base, sign).sum() / (2 * len(batch))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        size = torch.stack([p.abs().sum().to(self.alphas[0].device) for p in self.parameters]).sum()
        (self.settings.l1 * size).backward()  # type: ignore[no-untyped-call]
        return total + self.settings.l1 * float(size.detach())

    def losses(
        self,
        numbers: Sequence[int],
        logits: Float[Tensor, "examples vocabulary"],
        base: Float[Tensor, "examples vocabulary"],
        sign: float,
    ) -> Float[Tensor, " examples"]:
        """Effectiveness and faithfulness of each example."""
        answers = torch.tensor([self.answers[n] for n in numbers], device=logits.device)
        chosen = logits.gather(1, answers)
        effect = -logsigmoid(sign * (chosen[:, 0] - chosen[:, 1]))
        lowest = torch.finfo(logits.dtype).min
        p, q = (x.scatter(1, answers, lowest).log_softmax(-1) for x in (base, logits))
        return effect + self.settings.faithfulness * (p.exp() * (p - q)).sum(-1)

    def logits(self, numbers: Sequence[int], steering: Sequence[Scale]) -> Float[Tensor, "examples vocabulary"]:
        """The logits after each prompt, in float32."""
        rows = [self.rows[n] for n in numbers]
        ids, attention = (t.to(self.device) for t in pad([row.ids for row in rows], self.pad_id))
        columns, options = torch.tensor([len(row.ids) - 1 for row in rows]), {}
        if self._picks_columns:
            kept, columns = torch.unique(columns, return_inverse=True)
            options["logits_to_keep"] = kept.to(self.device)
        steered = steer(self.model, list(steering)) if steering else nullcontext()
        with note_prompt_ends(self.model, [len(row.ids) for row in rows]), steered:
            logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False, **options).logits
        logits = logits if options else logits[:, -ids.shape[1] :]  # without those of virtual tokens
        last: Tensor = logits[torch.arange(len(rows), device=logits.device), columns.to(logits.device)]
        return last.float()

    @torch.no_grad()
    def share(self, sign: float) -> float:
        """The share of examples whose wanted answer is the more likely one."""
        won = 0
        for part in self._parts(range(len(self.rows))):
            logits = self.logits(part, self.scales(sign))
            pairs = logits.gather(1, torch.tensor([self.answers[n] for n in part], device=logits.device))
            won += int((sign * (pairs[:, 0] - pairs[:, 1]) > 0).sum())
        return won / len(self.rows)

    def _parts(self, numbers: Sequence[int]) -> list[list[int]]:
        """Examples in lists that fit into a pass."""
        longest = max(len(self.rows[n].ids) for n in numbers)
        size = max(1, default_batch_tokens(self.device) // longest)
        return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def _prompts_and_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Any
) -> tuple[list[TokenRow], list[list[int]]]:
    """Each prompt as a row that ends where its answer begins, and the first tokens of its two answers.

    Raises DataError for what is no example, and for answers that begin alike.
    """
    if not isinstance(examples, list | tuple) or not examples:
        raise DataError("no examples", "a list of (prompt, first answer, second answer)", "pass at least one")
    for number, entry in enumerate(examples):
        if isinstance(entry, str) or not isinstance(entry, list | tuple) or len(entry) != 3:
            raise DataError(f"example {number}: {entry!r:.60}", "(prompt, first answer, second answer)")
    texts = [(prompt, answer, True) for prompt, *answers in examples for answer in answers]
    with TokenReader(tokenizer, rule="answer", window=context_window(model), scored=True) as reader:
        rows = sorted((row for chunk in reader.rows(texts) for row in chunk), key=lambda row: row.index)
    prompts, found = [], []
    for number, (first, second) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        ids = [row.ids[row.selected[0]] for row in (first, second)]
        before = [list(row.ids[: row.selected[0]]) for row in (first, second)]
        if ids[0] == ids[1] or before[0] != before[1]:
            raise DataError(
                f"example {number}, whose answers begin with the tokens {ids[0]} and {ids[1]}",
                "answers whose first tokens differ, after the same prompt",
                "move what both begin with into the prompt",
            )
        prompts.append(TokenRow(before[0], [], number, start=first.start, prompt_length=len(before[0])))
        found.append(ids)
    return prompts, found
