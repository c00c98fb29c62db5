"""How a steering vector is trained: its objective, and the constants of fgsteer's own recipes and of published ones.

VectorTraining.recipe("bipo", epochs=20)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from fgsteer.errors import ArgumentError, DataError
from fgsteer.errors.checks import check_flags, check_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr

Objective = Literal["lm", "bipo", "reps", "reft_r1", "simpo"]
Schedule = Literal["linear", "cosine", "constant"]
MAX_NUMBER = 1e6


@dataclass(frozen=True, repr=False)
class VectorTraining(OneLineRepr):
    """Settings of the training of a steering vector: by default the recipe "reps_relative", which suits any model.

    ``VectorTraining.recipe`` gives those of a paper.

    Attributes:
        objective: What is minimised: "lm", "bipo", "reps", "reft_r1" or "simpo"; ``train`` says what each is.
        lr: The learning rate of AdamW.
        epochs: How often every example is read.
        batch: Examples in a step of the optimizer.
        schedule: How the rate falls after the warm-up: "linear" or "cosine" to 0, or "constant".
        warm_up: Steps over which the rate rises from 0, at most half of all.
        clip: The largest norm of a gradient, which is scaled down to it; None clips nothing.
        weight_decay: AdamW's decay, as a share of the rate.
        init: What every trained number begins as; None draws them uniformly from ±1/√n, n being how many there are.
        factors: The strengths that are drawn from, with equal chances, for every answer.
        dropout: The share of the trained numbers that a step leaves out; the others are scaled up to make up for it.
        beta: β, what log-probabilities are multiplied by in "bipo" and "simpo".
        margin: γ of "simpo", in the units of β.
        top: How many tokens' readings "reft_r1" averages to a strength.
        l1: The weight, at the end of training, of the mean reading of all other tokens in "reft_r1".
        compat: Whether to do as the published code does where that is at odds with how its vectors are used: "reps"
            trains an offset of the strength that is then dropped, and divides by the tokens of prompt and answer;
            "bipo" draws the sign of each batch on its own, so that signs are unbalanced; "reft_r1" leaves the last
            step's norm on the vector.
        checkpointing: Whether the blocks above the hookpoint keep only what goes into them, and are computed again for
            gradients: less memory, for a second forward pass of theirs.
        patience: Hold out every second example, measure the loss on these after each epoch, stop after so many epochs
            without a better one, and return the best; None trains on all examples to the end.
        relative: Whether trained numbers are in units in which a vector of random signs is as long as the median
            activation of the examples, so that lr and factors mean the same in every model and space; the papers'
            constants are in the units of their own models.
        seed: The seed of first values, order, strengths and signs.

    Raises:
        ArgumentError: A value is of another type.
        DataError: A value is out of range.
    """

    objective: Objective = "reps"
    lr: float = 0.03
    epochs: int = 6
    batch: int = 6
    schedule: Schedule = "linear"
    warm_up: int = 0
    clip: float | None = 1.0
    weight_decay: float = 0.0
    init: float | None = None
    factors: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    dropout: float = 0.0
    beta: float = 1.0
    margin: float = 0.0
    top: int = 8
    l1: float = 0.005
    compat: bool = False
    checkpointing: bool = False
    patience: int | None = None
    relative: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("objective", get_args(Objective)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in known:
                raise DataError(f"{name} = {getattr(self, name)!r:.60}", f"one of {', '.join(known)}")
        for name, least in (("epochs", 1), ("batch", 1), ("warm_up", 0), ("top", 1), ("patience", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least, MAX_COUNT, whole=True)
        for name, low, high in (
            ("lr", 1e-9, MAX_NUMBER),
            ("clip", 1e-9, MAX_NUMBER),
            ("weight_decay", 0, MAX_NUMBER),
            ("init", -MAX_NUMBER, MAX_NUMBER),
            ("dropout", 0, 0.99),
            ("beta", 1e-9, MAX_NUMBER),
            ("margin", 0, MAX_NUMBER),
            ("l1", 0, MAX_NUMBER),
        ):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)
        check_flags(compat=self.compat, checkpointing=self.checkpointing, relative=self.relative)
        self._check_factors()
        if self.objective == "reft_r1" and self.relative:
            raise DataError("relative=True for reft_r1", "relative=False, as it keeps the vector at norm 1")
        if self.objective == "reps" and self.init == 0:
            raise DataError("init = 0 for reps", "first values other than 0, as it divides by the norm of the vector")

    def _check_factors(self) -> None:
        """Make the factors a tuple of floats. Raises DataError for none, or for one that is not above 0."""
        if not isinstance(self.factors, tuple | list | range):
            raise ArgumentError(f"factors = {self.factors!r:.60}", "a list of numbers", "pass factors=(2.0, 4.0)")
        for factor in self.factors:
            check_range("a factor", factor, 1e-6, MAX_NUMBER)
        if not self.factors:
            raise DataError("factors = ()", "at least one strength", "pass factors=(1.0,)")
        object.__setattr__(self, "factors", tuple(map(float, self.factors)))

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> VectorTraining:
        """Return the settings of a recipe in ``RECIPES``, with changes.

        Args:
            name: "reps_relative" or "lm_relative", which are fgsteer's own and suit any model, or one with the
                constants of a paper: "lm", "lm_factors", "bipo", "reps", "reft_r1" or "simpo".
            **changes: Settings that are to be others, such as ``epochs=20``.

        Raises:
            DataError: There is no such recipe, or a value is out of range.
            ArgumentError: There is no such setting, or a value is of another type.
        """
        if not isinstance(name, str) or name not in RECIPES:
            raise DataError(f"objective = {name!r:.60}", f"one of {', '.join(RECIPES)}")
        if unknown := [key for key in changes if key not in cls.__dataclass_fields__ or key == "objective"]:
            names = ", ".join(key for key in cls.__dataclass_fields__ if key != "objective")
            raise ArgumentError(f"the setting {unknown[0]!r:.60} of {name}", f"one of {names}")
        return replace(RECIPES[name], **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON."""
        return {**asdict(self), "factors": list(self.factors)}


EVEN_TO_TWENTY = tuple(2.0 * n for n in range(1, 11))  # of RePS and its control
_RAW = VectorTraining(objective="lm", clip=None, factors=(1.0,), relative=False)
RECIPES = {
    # fgsteer's own: rates, epochs and strengths, as shares of an activation's norm, chosen on six concepts
    "reps_relative": VectorTraining(),
    "lm_relative": VectorTraining(objective="lm", clip=None, init=0.0, factors=(1.0,)),
    # AxBench's Lang. (arXiv 2501.17148)
    "lm": replace(_RAW, objective="lm", lr=0.01, epochs=3, init=0.01),
    # the control of RePS (arXiv 2505.20809); batches of 6, two of them to a step
    "lm_factors": replace(_RAW, objective="lm", lr=0.04, epochs=6, batch=12, init=0.01, factors=EVEN_TO_TWENTY),
    # arXiv 2406.00045, and with YaPO's features 2601.08441, of 20 epochs
    "bipo": replace(
        _RAW,
        objective="bipo",
        lr=5e-4,
        epochs=100,
        batch=4,
        schedule="cosine",
        warm_up=100,
        init=0.0,
        beta=0.1,
        seed=11,
    ),
    # arXiv 2505.20809, as for Gemma-2-2B; for 9B it has lr 0.08 and dropout 0.1
    "reps": replace(_RAW, objective="reps", lr=0.04, epochs=18, clip=1.0, factors=EVEN_TO_TWENTY),
    # AxBench's ReFT-r1 (arXiv 2501.17148), as for Gemma-2-2B; for 9B it has lr 0.005. Batches of 6 texts, two a pair
    "reft_r1": replace(_RAW, objective="reft_r1", lr=0.01, epochs=3, batch=3, clip=1.0),
    # SimPO's loss (arXiv 2405.14734) with the schedule of RePS; β and γ are not those of a paper
    "simpo": replace(_RAW, objective="simpo", lr=0.04, epochs=18, clip=1.0, factors=EVEN_TO_TWENTY),
}
