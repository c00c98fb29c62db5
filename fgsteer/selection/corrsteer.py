"""CorrSteer: features whose activation while a model answers goes with how good its answers are.

found = corrsteer(model, tokenizer, [sae], questions, lambda number, answer: answer.strip() == gold[number])
fg.generate(model, tokenizer, questions, steering=found.steering)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import batch_rows, record_batch, tokens_in_batch
from fgsteer.data.chat import Text
from fgsteer.display.progress import Progress, Report, reporting
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import check_number, check_range, checked, is_number
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.base import Intervention
from fgsteer.methods.provenance import provenance
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import input_device
from fgsteer.saes.sae import SAE
from fgsteer.selection.correlation import Correlation, largest_chance_correlation
from fgsteer.selection.outcomes import OutcomeChange, change_of
from fgsteer.selection.pooled import pool_maxima
from fgsteer.selection.ranking import FeatureRanking
from fgsteer.steering.answers import ROWS, Answer, greedy_answers
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Variant = Literal["S", "A", "P"]
Reward = Callable[[int, str], float]
LEAST = 16  # prompts: eight choose, four validate, four report


@dataclass(frozen=True, repr=False)
class CorrSteer(OneLineRepr):
    """What ``corrsteer`` found.

    Attributes:
        vectors: One for each chosen feature, at its layer: the coefficient times its decoder row.
        rankings: The features of every SAE, by their correlation with the reward.
        report: What steering with all vectors does to the prompts that chose nothing.
        validation: What each layer's best feature alone does on the validating prompts, for variant "P".
        compared: The number of features that were compared, over all SAEs.
        chance: The largest |r| that as many unrelated features have by chance (the median).
        variant: "S", "A" or "P".
    """

    vectors: tuple[SteeringVector, ...]
    rankings: tuple[FeatureRanking, ...]
    report: OutcomeChange
    validation: tuple[OutcomeChange, ...]
    compared: int
    chance: float
    variant: Variant

    @property
    def steering(self) -> list[Intervention]:
        """All of the vectors, from the last token of the prompt on, as ``generate`` takes them."""
        return _interventions(self.vectors)


@checked
@torch.no_grad()
def corrsteer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: SAE | Sequence[SAE],
    prompts: Sequence[Text],
    reward: Reward,
    *,
    variant: Variant = "A",
    max_new_tokens: int = 16,
    correct_above: float = 0.5,
    min_fired: int = 1,
    rows: int = ROWS,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> CorrSteer:
    """Choose features by the correlation of their activation with the reward of generated answers (arXiv 2508.12535).

    The model answers every prompt greedily. For each feature j, ``r_j`` is Pearson's correlation, over prompts, of the
    reward and ``max_t f_j(h_t)`` over the positions t that chose a token of the answer, the prompt's last token among
    them. Features with r > 0 can be chosen. What is added is ``c_j·W_dec[j]`` from the prompt's last token on, where
    c_j is the mean of that largest activation over correct answers. "S" takes the one best feature, "A" the best of
    every layer, and "P" those of "A" that beat the unsteered model on prompts of their own.

    Of every four prompts, two choose features and coefficients, one validates, for "P", and one reports. The paper
    chooses on what it reports on, which makes r larger than it is: see ``chance``.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        saes: An SAE, or SAEs of several layers.
        prompts: The prompts, at least sixteen; the paper takes up to 4,000.
        reward: Called with the number of a prompt and an answer to it; it gives a number of Python, numpy or torch,
            such as 1 for a correct answer and 0 for others.
        variant: "S", "A" or "P".
        max_new_tokens: The tokens of an answer, at most.
        correct_above: The reward above which an answer is correct.
        min_fired: A feature is compared if it fires in at least so many of the answers that choose. The paper compares
            all; one that fires in two or three of them correlates highly by chance.
        rows: The prompts that are answered together.
        batch_tokens: The tokens in a pass that reads answers, as in ``collect``.
        progress: As in ``collect``; a function is called with the number of answers.

    Returns:
        The vectors, the rankings, and what steering does on prompts that chose nothing.

    Raises:
        SelectionError: The reward does not vary, no answer is correct, no feature goes with it, or no layer helps.
        DataError: There are too few prompts, or a reward is no finite number.
        PairingError: An SAE does not fit the model, or two of them are at one hookpoint.
    """
    chosen = [saes] if isinstance(saes, SAE) else list(saes)
    _check(model, chosen, prompts, reward, variant)
    check_number("correct_above", correct_above)
    for name, value in (("max_new_tokens", max_new_tokens), ("min_fired", min_fired)):
        check_range(name, value, 1, MAX_COUNT, whole=True)
    check_range("rows", rows, 1, MAX_COUNT, whole=True)
    tokens = tokens_in_batch(batch_tokens, input_device(model))
    parts = [[n for n in range(len(prompts)) if n % 4 in keep] for keep in ((0, 1), (2,), (3,))]
    chooses, validates, reports = parts
    steered_runs = (len(validates) * len(chosen) if variant == "P" else 0) + len(reports)
    with reporting(progress, "answering prompts", len(prompts) + steered_runs) as report:
        trial = _Trial(model, tokenizer, prompts, reward, max_new_tokens, rows, report)
        answers, rewards = trial.answer(range(len(prompts)))
        if len({rewards[n] for n in chooses}) < 2:
            raise SelectionError(
                f"a reward of {rewards[chooses[0]]:g} for all {len(chooses)} answers that choose",
                "a reward that varies, as nothing goes with one that does not",
                "look at the answers, and pass prompts that the model answers well and badly",
            )
        readings = _read(model, tokenizer, chosen, [answers[n] for n in chooses + reports], tokens)
        found = [
            _correlate(
                sae, pooled, [[rewards[n] for n in part] for part in (chooses, reports)], correct_above, min_fired
            )
            for sae, pooled in zip(chosen, readings, strict=True)
        ]
        rankings = [ranking for ranking, _ in found]
        compared = sum(ranking.compared for ranking in rankings)
        vectors = [
            _vector(sae, ranking, coefficients, variant)
            for sae, (ranking, coefficients) in zip(chosen, found, strict=True)
            if float(ranking.scores[0]) > 0
        ]
        if not vectors:
            raise SelectionError(
                "no feature with a positive correlation", "at least one", "pass more prompts, or another reward"
            )
        validation: list[OutcomeChange] = []
        if variant == "S":
            vectors = [max(vectors, key=lambda vector: vector.provenance["hyperparameters"]["r"])]
        if variant == "P":
            before = [rewards[n] for n in validates]
            validation = [change_of(before, trial.answer(validates, _interventions([v]))[1]) for v in vectors]
            helping = [v for v, change in zip(vectors, validation, strict=True) if change.after > change.before]
            if not helping:
                raise SelectionError(
                    f"no layer of {len(vectors)} that beats the unsteered model on {len(validates)} prompts",
                    "at least one",
                    'pass more prompts, or variant="A"',
                )
            vectors = helping
        after = trial.answer(reports, _interventions(vectors))[1]
    return CorrSteer(
        tuple(vectors),
        tuple(rankings),
        change_of([rewards[n] for n in reports], after),
        tuple(validation),
        compared,
        largest_chance_correlation(len(chooses), compared),
        variant,
    )


def _interventions(vectors: Sequence[SteeringVector]) -> list[Intervention]:
    return [vector.add(1.0, scope="reply", bos=True) for vector in vectors]


def _check(model: PreTrainedModel, saes: Sequence[SAE], prompts: Sequence[Text], reward: object, variant: str) -> None:
    """Raises DataError and PairingError for what cannot be used, before anything is generated."""
    if variant not in get_args(Variant):
        raise DataError(f"variant={variant!r:.40}", f"one of {', '.join(get_args(Variant))}")
    if not callable(reward):
        raise DataError(f"{reward!r:.60} for reward", "a function of a prompt's number and an answer")
    if isinstance(prompts, str) or len(prompts) < LEAST:
        got = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise DataError(
            got, f"at least {LEAST} prompts, of which half choose, a quarter validates and a quarter reports"
        )
    if not saes:
        raise DataError("no SAE", "at least one SAE")
    if len({sae.hookpoint for sae in saes}) < len(saes):
        raise DataError("two SAEs at one hookpoint", "SAEs of different layers")
    for sae in saes:
        check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")


@dataclass
class _Trial:
    """Prompts that are answered and rewarded, again and again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Text]
    reward: Reward
    max_new_tokens: int
    rows: int
    report: Report
    done: int = 0

    def answer(self, numbers: Sequence[int], steering: list[Intervention] | None = None) -> tuple[list[Answer], Any]:
        """The answers to some prompts, and their rewards. Raises DataError for a reward that is no finite number."""
        answers = greedy_answers(
            self.model,
            self.tokenizer,
            [self.prompts[n] for n in numbers],
            max_new_tokens=self.max_new_tokens,
            steering=steering,
            rows=self.rows,
            progress=lambda n: self.report(self.done + n),
        )
        self.done += len(numbers)
        rewards = [self.reward(n, answer.text) for n, answer in zip(numbers, answers, strict=True)]
        values = [_as_float(value) for value in rewards]
        for n, value, given in zip(numbers, values, rewards, strict=True):
            if not math.isfinite(value):
                raise DataError(f"the reward {given!r:.40} of an answer to prompt {n}", "a finite number")
        return answers, values


def _as_float(reward: object) -> float:
    """A reward of Python, numpy or torch, True and False among them, as a float; nan for what is no number."""
    if isinstance(reward, np.ndarray | torch.Tensor):
        values = np.asarray(reward.detach().cpu() if isinstance(reward, torch.Tensor) else reward)
        reward = values.item() if values.size == 1 else None
    if isinstance(reward, bool | np.bool_) or is_number(reward):
        return float(reward)  # type: ignore[arg-type]
    return math.nan


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Sequence[SAE],
    answers: Sequence[Answer],
    batch_tokens: int,
) -> list[list[Tensor]]:
    """For each SAE the largest activation of every feature while each answer was chosen, (d_sae,) each, on the CPU."""
    device = input_device(model)
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    rows = sorted((answer.row(n) for n, answer in enumerate(answers)), key=lambda row: (len(row.ids), row.index))
    pooled: list[list[Tensor]] = [[torch.empty(0)] * len(answers) for _ in saes]
    local: dict[tuple[int, torch.device], SAE] = {}
    for batch in batch_rows(rows, batch_tokens=batch_tokens, pad_id=pad_id, device=device):
        states = record_batch(model, batch, [sae.input_hookpoint for sae in saes])
        for number, sae in enumerate(saes):
            h = states[sae.input_hookpoint]
            if (number, h.device) not in local:
                local[number, h.device] = sae.to(h.device, torch.float32)
            here = local[number, h.device]
            for row, maxima in zip(batch.rows, pool_maxima(here, h, batch.selected).cpu(), strict=True):
                pooled[number][row.index] = maxima
    return pooled


def _correlate(
    sae: SAE, pooled: Sequence[Tensor], rewards: Sequence[Sequence[float]], correct_above: float, min_fired: int
) -> tuple[FeatureRanking, Float[Tensor, " d_sae"]]:
    """The ranking of an SAE's features by r, and their mean activations over correct answers.

    ``rewards`` are those of the answers that choose and of those that report, in the order of ``pooled``.
    Raises SelectionError where no answer is correct.
    """
    chooses = rewards[0]
    halves = []
    for start, part in ((0, chooses), (len(chooses), rewards[1])):
        found = Correlation.empty(sae.d_sae)
        for n, reward in enumerate(part):
            found.add(pooled[start + n][None], torch.tensor([reward]))
        halves.append(found)
    correct = [pooled[n] for n, reward in enumerate(chooses) if reward > correct_above]
    if not correct:
        raise SelectionError(
            f"no answer with a reward above {correct_above:g}", "at least one correct answer", "pass correct_above="
        )
    total = torch.zeros(sae.d_sae, dtype=torch.float64)
    for maxima in correct:
        total += maxima.double()
    r = torch.where(halves[0].x.fired >= min_fired, halves[0].r(), torch.nan)
    compared = int((~r.isnan()).sum())
    ranking = FeatureRanking.of(
        "correlation",
        r,
        sae,
        held_out=halves[1].r(),
        chance=largest_chance_correlation(len(chooses), compared) if compared else None,
        settings={"answers": len(chooses), "correct": len(correct), "hookpoint": str(sae.hookpoint)},
    )
    return ranking, total / len(correct)


def _vector(
    sae: SAE, ranking: FeatureRanking, coefficients: Float[Tensor, " d_sae"], variant: Variant
) -> SteeringVector:
    """The vector of an SAE's best feature."""
    feature, r = ranking[0], float(ranking.scores[0])
    coefficient = float(coefficients[feature])
    settings = {"variant": variant, "r": r, "compared": ranking.compared, "chance": ranking.chance}
    return SteeringVector(
        coefficient * sae.direction(feature).float(),
        sae.hookpoint,
        features={feature: coefficient},
        provenance=provenance("corrsteer", settings, sae=sae, features=[feature]),
    )
