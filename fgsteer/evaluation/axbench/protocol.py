"""What a run of AxBench is: its settings, a concept's instructions, and how ratings become one score.

plan = AxBenchPlan(methods=("diffmean", "reps"), instructions=4)
harmonic_mean([2, 2, 1])                                                  1.5
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from fgsteer.errors import ArgumentError, DataError
from fgsteer.errors.checks import check_range, describe_value
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.axbench.contestants import check_settings, contestant
from fgsteer.steering.generation import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE

Mode = Literal["steer", "suppress"]
FACTORS = (*(round(0.2 * n, 1) for n in range(1, 11)), 2.5, 3.0, 4.0, 5.0)
TRAINED_FACTORS = (*(2.0 * n for n in range(1, 11)), 25.0, 30.0, 40.0, 50.0)
INSTRUCTIONS, NEW_TOKENS, TEMPERATURE = 10, 128, 1.0
HIGHEST_RATING = 2.0
MAX_FACTOR = 1e6


@dataclass(frozen=True, repr=False)
class AxBenchPlan(OneLineRepr):
    """Settings of a run of AxBench; the defaults are the published ones.

    Attributes:
        methods: Names of methods; None for all that the SAE and the effects at hand allow. "none", the unsteered model,
            is always among them.
        mode: "steer" adds the concept; "suppress" asks for it in the prompt and steers against it.
        factors: The factors f of ``h + f·a_max·v``.
        trained_factors: Those of vectors that were trained at factors of their own, for which a_max is 1.
        instructions: Instructions of a concept; factors are chosen on the first half of them, the others report.
        max_new_tokens: Tokens of an answer.
        temperature: What logits are divided by.
        top_k: How many of the likeliest tokens are drawn from; 50 is what the published code leaves at its default.
        settings: Keywords by method, such as {"reps": {"epochs": 6}, "fgaa": {"n_positive": 8}}.
        together: How many vectors are trained in common batches.
        batch_rows: Answers that are generated together, at most.
        seed: The seed of sampling, training and the random control.

    Raises:
        ArgumentError: A value is of another type.
        DataError: A value is out of range, or there is no such method or setting.
    """

    methods: tuple[str, ...] | None = None
    mode: Mode = "steer"
    factors: tuple[float, ...] = FACTORS
    trained_factors: tuple[float, ...] = TRAINED_FACTORS
    instructions: int = INSTRUCTIONS
    max_new_tokens: int = NEW_TOKENS
    temperature: float = TEMPERATURE
    top_k: int = 50
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    together: int = 8
    batch_rows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.methods is not None:
            if not isinstance(self.methods, tuple | list) or not self.methods:
                raise ArgumentError(f"methods = {describe_value(self.methods)}", "a list of names", "leave it out")
            object.__setattr__(self, "methods", tuple(dict.fromkeys(contestant(name).name for name in self.methods)))
        if self.mode not in get_args(Mode):
            raise DataError(f"mode = {self.mode!r:.60}", f"one of {', '.join(get_args(Mode))}")
        for name in ("factors", "trained_factors"):
            object.__setattr__(self, name, _factors(name, getattr(self, name)))
        check_range("instructions", self.instructions, 2, MAX_COUNT, whole=True)
        check_range("temperature", self.temperature, LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        for name in ("max_new_tokens", "top_k", "together", "batch_rows"):
            check_range(name, getattr(self, name), 1, MAX_COUNT, whole=True)
        check_range("seed", self.seed, 0, MAX_COUNT, whole=True)
        check_settings(self.settings)

    @property
    def sign(self) -> int:
        """1 where the concept is added, −1 where it is suppressed."""
        return 1 if self.mode == "steer" else -1

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON."""
        settings = {name: dict(keywords) for name, keywords in self.settings.items()}
        return {**asdict(self), "settings": settings, "methods": None if self.methods is None else list(self.methods)}


def _factors(name: str, values: Any) -> tuple[float, ...]:
    """Check factors and put them in order. Raises ArgumentError, DataError."""
    if not isinstance(values, tuple | list | range):
        raise ArgumentError(f"{name} = {describe_value(values)}", "a list of numbers")
    if not values:
        raise DataError(f"{name} = ()", "at least one factor")
    for value in values:
        check_range("a factor", value, 1e-6, MAX_FACTOR)
    return tuple(sorted({float(value) for value in values}))


def instructions_of(instructions: Sequence[str], count: int, concept_id: int) -> list[str]:
    """Draw a concept's instructions as ``DataFrame.sample(count, random_state=concept_id)`` of pandas does.

    Raises DataError where there are fewer.
    """
    if count > len(instructions):
        raise DataError(
            f"{len(instructions)} instructions, of which {count} are to be drawn",
            f"at least {count} instructions",
            "lower instructions=, or pass another file of them",
        )
    drawn = np.random.RandomState(concept_id).choice(len(instructions), size=count, replace=False)
    return [instructions[int(n)] for n in drawn]


def selection_size(instructions: int) -> int:
    """How many instructions, the first, choose the factor: ``n − round(n/2)``, with Python's rounding of halves."""
    return instructions - round(instructions / 2)


def harmonic_mean(ratings: Sequence[float]) -> float:
    """Combine ratings: ``k / Σ 1/r``, and 0 where one of them is 0."""
    if any(rating <= 0 for rating in ratings):
        return 0.0
    return len(ratings) / math.fsum(1 / rating for rating in ratings)


def text_score(concept: float, instruction: float, fluency: float, mode: Mode = "steer") -> float:
    """Score a text from its three ratings, 0 to 2; where a concept is suppressed, its rating r counts as 2 − r."""
    return harmonic_mean([concept if mode == "steer" else HIGHEST_RATING - concept, instruction, fluency])


def choose_factor(scores: Sequence[Sequence[float]], first: int) -> int:
    """Choose the factor whose texts score best on the first instructions, the first of equals.

    Args:
        scores: For each factor, in rising order of the signed factor, the scores of its texts by instruction.
        first: The number of instructions that choose.

    Returns:
        The number of the factor.
    """
    means = [math.fsum(row[:first]) / first for row in scores]
    return means.index(max(means))
