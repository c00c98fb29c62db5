"""Own-text KL as a benchmark's cost: what each text cost the model that wrote it, and strengths of a given cost.

meter = OwnTextMeter(model, tokenizer, prompts, sampling, rows=256)
own_strengths(meter, [vec.add], kls=[1.0, 4.0])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fgsteer.data.chat import Text
from fgsteer.data.shipped import load_neutral
from fgsteer.effects.rollouts import Sampling
from fgsteer.errors import DataError
from fgsteer.evaluation.bench.generators import Generator
from fgsteer.evaluation.metrics.own_text import check_untruncated, own_texts
from fgsteer.interventions import Intervention
from fgsteer.likelihood.calibration import CostMeter, solve_costs
from fgsteer.steering.ranges import activation_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION_SAMPLES = 2_000_000  # samples from this number on are those that strengths are set on
TOLERANCE = 0.1  # the relative error of a cost that is accepted: samples part as strength grows, so that costs jump
ROUNDS = 8  # of measuring, after which the last guess is taken


class OwnTextMeter:
    """Measures interventions by the mean KL, in nats a text, on texts that each of them writes after the same prompts.

    All of them draw with the same random numbers.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: What texts go on from.
        sampling: How they are drawn; nothing may be cut off.
        rows: Texts that are drawn in one batch, at most.
    """

    noun = "KL"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Text],
        sampling: Sampling,
        rows: int,
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.sampling = model, tokenizer, list(prompts), sampling
        self.size, self.dtype = max(1, rows // len(self.prompts)), activation_dtype(model)
        self._neutral = CostMeter(model, tokenizer, load_neutral()[0][:2], "target_kl", None)

    def __call__(self, items: Sequence[Intervention]) -> list[float]:
        """The cost of each intervention, in nats a text."""
        costs: list[float] = []
        for start in range(0, len(items), self.size):
            part = list(items[start : start + self.size])
            texts = own_texts(
                self.model, self.tokenizer, self.prompts, self.prompts, part, self.sampling, CALIBRATION_SAMPLES
            )
            costs += texts.nats.view(len(part), -1).mean(1).tolist()
        return costs

    def guess(self, item: Intervention, target: float) -> float:
        """A multiple of an intervention that may cost the target, as if neutral text cost as much."""
        return self._neutral.guess(item, target / self.sampling.max_new_tokens)


def own_strengths(
    meter: OwnTextMeter, makes: Sequence[Callable[[float], Intervention]], kls: Sequence[float]
) -> list[list[float]]:
    """For each function from a strength to an intervention, the strength of each cost; nan where it is not reached."""
    curves = solve_costs(meter, [kls] * len(makes), makes, tolerance=TOLERANCE, rounds=ROUNDS)
    return [curve.coefficients for curve in curves]


class Written(NamedTuple):
    """A text, with its KL and distinct 3-grams where they are measured."""

    text: str
    kl: float | None = None
    distinct: float | None = None


def write_own(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    plain: Sequence[Text],
    steering: Sequence[Intervention | None],
    sampling: Sampling,
    number: int,
) -> list[Written]:
    """Own texts by intervention, then prompt; ``plain`` are the prompts that the unsteered model reads."""
    own = own_texts(model, tokenizer, prompts, plain, steering, sampling, number)
    kls, shares = ([round(value, 6) for value in values.tolist()] for values in (own.nats, own.distinct))
    return [Written(*each) for each in zip(own.texts, kls, shares, strict=True)]


def check_own_texts(model: PreTrainedModel, sampling: Sampling, generator: Generator | None) -> None:
    """Raises DataError where sampling or the generator does not let own texts be measured."""
    check_untruncated(sampling, model.config.get_text_config().vocab_size)
    if generator is not None:
        raise DataError(
            f"own texts by {generator.name}",
            "the generator transformers, whose distributions are at hand",
            "leave generator= out, or set strength with ce_rises=",
        )
