"""Train a model so that it stays as it is under steering: KL-then-steer (arXiv 2406.15518).

tuned = kl_then_steer(model, tokenizer, texts, ["cheerful", "formal"])
fg.generate(tuned, tokenizer, prompts, steering=vector.add(1.5))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.batches import tokens_in_batch
from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.tokens import TokenReader, TokenRow, pad
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import ArgumentError, DataError, MissingError
from fgsteer.errors.changes import Changes, temporary_change
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.adding import Add
from fgsteer.likelihood.scoring import Scored, scored_pairs
from fgsteer.models.gradients import through_model
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.properties import context_window, input_device
from fgsteer.statistics.collecting import collect
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER_BLOCKS, PAPER_LAYERS = (3, 21), 32  # outputs of blocks 3 to 21 of 32 were steered
ADAPTER = "kl_then_steer"


@dataclass(frozen=True)
class KLThenSteerTraining:
    """Settings of ``kl_then_steer``; all but ``alpha``, ``batch`` and ``weight_decay`` are the paper's.

    Attributes:
        rank: The rank of a LoRA adapter on all linear layers; None trains all of the model's weights, which takes a
            copy of the model, and weights of a dtype in which steps of ``lr`` are not lost, as they are in bfloat16.
        alpha: LoRA's scale times the rank; None is the rank, a scale of 1.
        lr: The learning rate of AdamW.
        epochs: How often every text is read.
        batch: Texts in a step.
        probability: How often a step is steered.
        strength: The largest strength, in units of the difference of means; it is drawn uniformly from ± this.
        weight_decay: AdamW's: each step takes lr times this from what is trained. The paper does not say its own.
        seed: The seed of order, strengths and concepts.

    Raises:
        DataError: A value is out of range.
        ArgumentError: A value is of another type.
    """

    rank: int | None = 128
    alpha: int | None = None
    lr: float = 1e-5
    epochs: int = 1
    batch: int = 4
    probability: float = 0.125
    strength: float = 1.5
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("alpha", 1), ("epochs", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least, MAX_COUNT, whole=True)
        if self.epochs is None or self.batch is None or self.seed is None:
            raise ArgumentError("None", "a number of epochs, a batch and a seed")
        ranges = {"lr": (1e-12, 1e3), "probability": (0, 1), "strength": (0, 1e6), "weight_decay": (0, 1e3)}
        for name, (low, high) in ranges.items():
            check_range(name, getattr(self, name), low, high)


@checked
@through_model
def kl_then_steer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Scored],
    contrasts: Sequence[Contrastable],
    *,
    hookpoints: Sequence[Hookpoint | str | int] | None = None,
    settings: KLThenSteerTraining | None = None,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> PreTrainedModel:
    """Train a model to stay close to what it was while random concepts are steered (KTS, arXiv 2406.15518).

    A step is steered with a probability of 1/8, at the strength ``c = 1.5·U(−1, 1)``, else c = 0. The steered step adds
    ``c·v_ℓ`` to every token at each of the hookpoints, where v is the difference of means of a concept that is drawn,
    collected anew from the model as it is then. What is minimised is

        mean over tokens of KL(π_c ‖ π₀), π_c the steered model in training, π₀ the model as it was, unsteered

    Padding does not count, unlike in the paper's code. It is the model that is trained, not a vector: the vectors to
    steer with afterwards are built from the model that this returns.

    Args:
        model: A Hugging Face causal language model. It is changed: it gets an adapter, or its weights are trained.
        tokenizer: Its tokenizer.
        texts: Texts on which it is to stay as it is: strings, or pairs (prompt, answer), of which all tokens count.
        contrasts: What is steered, each as ``collect`` takes it.
        hookpoints: Where; by default the outputs of the blocks from 3/32 to 21/32 of the depth, as in the paper.
        settings: How it is trained.
        batch_tokens: The tokens in a pass, with padding: this bounds memory, and changes results by rounding alone.
        progress: As in ``train``.

    Returns:
        With a rank a PEFT model, in eval mode, whose ``save_pretrained`` writes the adapter and whose
        ``merge_and_unload()`` is a plain model; without one the model itself.

    Raises:
        DataError: There is no text or contrast, a text has no token, a number is out of range, or a loss not finite.
        MissingError: There is a rank, and peft is not installed.
        ArgumentError: The model has an adapter already.
        HookpointError: The model lacks a hookpoint.
    """
    chosen = KLThenSteerTraining() if settings is None else settings
    sets = [as_contrast(contrast) for contrast in contrasts]
    if not sets:
        raise DataError("no contrast", "at least one, to steer with", 'pass contrasts=["cheerful"]')
    places = _places(model, hookpoints)
    rows = _rows(model, tokenizer, texts)
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ArgumentError("a model with an adapter", "one without", "merge it first: model.merge_and_unload()")
    with _student(model, chosen) as student:
        trainer = _Trainer(student, tokenizer, rows, sets, places, chosen, batch_tokens)
        steps = chosen.epochs * math.ceil(len(rows) / chosen.batch)
        with reporting(progress, "training a model to stay as it is under steering", steps) as report:
            for step in range(steps):
                trainer.step(step)
                report(step + 1, steps, note=lambda: f"KL {trainer.losses[-1]:.4f}")
        trained: PreTrainedModel = student.model
    return trained


@dataclass(frozen=True, eq=False)
class Student:
    """The model in training, and how the model that it was is run.

    Args:
        model: The model, or a PEFT model around it.
        parameters: What is trained.
        teacher: A copy of the model as it was; None where that is the model without its adapter.
    """

    model: Any
    parameters: list[nn.Parameter]
    teacher: Any

    @contextmanager
    def as_it_was(self) -> Iterator[Any]:
        """A block with the model as it was before training."""
        with nullcontext() if self.teacher is not None else self.model.disable_adapter():
            yield self.model if self.teacher is None else self.teacher


@temporary_change
def _student(changes: Changes, model: nn.Module, settings: KLThenSteerTraining) -> Iterator[Student]:
    """The model as it is trained; afterwards it is in eval mode, and none of its weights requires another gradient.

    After an exception, such as Ctrl-C, it is the model that it was: half-trained weights look like trained ones.
    """
    modules = [(module, dict(module._modules), module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    teacher = None if settings.rank is not None else copy.deepcopy(model).eval().requires_grad_(False)
    is_trained = False

    def give_back() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        if not is_trained:
            if teacher is not None:
                model.load_state_dict(teacher.state_dict())
            for module, inside, _ in modules:
                module._modules.update(inside)  # in the place of layers with an adapter
            vars(model).pop("peft_config", None)
        if teacher is not None or not is_trained:
            for module, _, training in modules:
                module.training = training
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)

    changes.undo_by(give_back)
    student = cast(Any, model)  # PEFT's models have methods of their own
    if teacher is not None:
        model.requires_grad_(True)
    else:
        student = _with_adapter(model, settings)
    student.eval()  # dropout would be a difference from the teacher that nothing can learn away
    yield Student(student, [p for p in student.parameters() if p.requires_grad], teacher)
    is_trained = True


def _with_adapter(model: nn.Module, settings: KLThenSteerTraining) -> Any:
    """The model with a LoRA adapter on all linear layers but the head. Raises MissingError without peft."""
    if find_spec("peft") is None:
        raise MissingError(
            "KL-then-steer with an adapter, without peft",
            "the package peft",
            "install it with pip install 'fgsteer[peft]', or train all weights: KLThenSteerTraining(rank=None)",
        )
    from peft import LoraConfig, get_peft_model

    rank = settings.rank or 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # of A; B is 0
        return get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=rank if settings.alpha is None else settings.alpha,
                target_modules="all-linear",
                lora_dropout=0.0,
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )


def _places(model: nn.Module, hookpoints: Any) -> list[Hookpoint]:
    """Where the model is steered. Raises DataError for nowhere."""
    if hookpoints is None:
        layers = len(blocks_of(model))
        first, last = (round(block * layers / PAPER_LAYERS) for block in PAPER_BLOCKS)
        return [Hookpoint(layer) for layer in range(min(first, layers - 1), min(last, layers - 1) + 1)]
    places = list(dict.fromkeys(map(Hookpoint.parse, hookpoints)))
    if not places:
        raise DataError("no hookpoint", "at least one", "leave hookpoints out for those of the paper")
    return places


def _rows(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Any) -> list[TokenRow]:
    """The texts as rows of tokens. Raises DataError for none."""
    pairs = scored_pairs(texts, [])
    with TokenReader(tokenizer, rule="all", window=context_window(model)) as reader:
        rows = [row for chunk in reader.rows((prompt, answer, True) for prompt, answer in pairs) for row in chunk]
    return sorted(rows, key=lambda row: row.index)


class _Trainer:
    """The loop: an optimizer step at a time."""

    def __init__(
        self,
        student: Student,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[TokenRow],
        contrasts: Sequence[ContrastSet],
        places: Sequence[Hookpoint],
        settings: KLThenSteerTraining,
        batch_tokens: int | None = None,
    ) -> None:
        self.student, self.tokenizer, self.settings = student, tokenizer, settings
        self.rows, self.contrasts, self.places = list(rows), list(contrasts), list(places)
        self.device = input_device(student.model)
        self.pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
        self.batch_tokens = tokens_in_batch(batch_tokens, self.device)
        self.optimizer = torch.optim.AdamW(student.parameters, settings.lr, weight_decay=settings.weight_decay)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.order: list[int] = []
        self.losses: list[float] = []
        self.strengths: list[float] = []

    def step(self, number: int) -> None:
        """Take a step. Raises DataError for a loss that is not finite."""
        if not self.order:
            self.order = torch.randperm(len(self.rows), generator=self.random).tolist()
        batch, self.order = self.order[: self.settings.batch], self.order[self.settings.batch :]
        chance, where = torch.rand(2, generator=self.random, dtype=torch.float64).tolist()
        concept = int(torch.randint(len(self.contrasts), (), generator=self.random))
        steered = chance < self.settings.probability
        self.strengths.append(self.settings.strength * (2 * where - 1) if steered else 0.0)
        steering = self.steering(concept, self.strengths[-1]) if steered else []
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(self.backward(batch, steering))
        if not math.isfinite(self.losses[-1]):
            raise DataError(f"a loss of {self.losses[-1]} at step {number}", "a finite loss", "lower lr or strength")
        self.optimizer.step()

    @torch.no_grad()
    def steering(self, concept: int, strength: float) -> list[Add]:
        """The differences of means of the model as it is now, times the strength, on every token."""
        stats = collect(
            self.student.model, self.tokenizer, self.contrasts[concept], hookpoints=self.places, progress=False
        )
        return [
            Add(direction=stats.at("residual", at)[1].difference.float(), coefficient=strength, hookpoint=at, bos=True)
            for at in self.places
        ]

    def backward(self, batch: Sequence[int], steering: Sequence[Add]) -> float:
        """The mean divergence over a batch's tokens; its gradients are added up in what is trained."""
        total, tokens = 0.0, sum(len(self.rows[n].ids) for n in batch)
        for part in self._parts(batch):
            with self.student.as_it_was() as teacher, torch.no_grad():
                base = self._logits(teacher, part)
            with steer(self.student.model, list(steering)) if steering else nullcontext():
                logits = self._logits(self.student.model, part)
                loss = divergence(logits, base).sum() / tokens
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _logits(self, model: Any, numbers: Sequence[int]) -> Float[Tensor, "tokens vocabulary"]:
        """The logits of every token of some texts."""
        rows = [self.rows[n] for n in numbers]
        ids, attention = (t.to(self.device) for t in pad([row.ids for row in rows], self.pad_id))
        with note_prompt_ends(model, [row.prompt_length for row in rows]):
            logits: Tensor = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        return logits[attention.bool().to(logits.device)]

    def _parts(self, batch: Sequence[int]) -> Iterator[list[int]]:
        """Texts in lists that fit into a pass, of similar lengths."""
        rest = sorted(batch, key=lambda n: -len(self.rows[n].ids))
        while rest:
            size = max(1, self.batch_tokens // len(self.rows[rest[0]].ids))
            yield rest[:size]
            rest = rest[size:]


def divergence(
    student: Float[Tensor, "tokens vocabulary"], teacher: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """``KL(p‖q)`` of each token, p the student's distribution and q the teacher's, in nats and in float32 or wider."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (logits.to(wide).log_softmax(-1) for logits in (student, teacher.to(student.device)))
    return (log_p.exp() * (log_p - log_q)).sum(-1)
