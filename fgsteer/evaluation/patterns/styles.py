"""One vector in and out of distribution: on what it was built from, in other templates, and in open generation.

replies = fg.load_contrast("cheerful").held_out
styles = {"replies": replies, "plain": plain_questions(replies), "A or B": ab_questions(replies)}
print(measure_styles(model, tokenizer, vec.add(2.0), styles))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fgsteer.data.chat import Text, check_text
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked, describe_value
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.judges.protocols import Judge
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval, wilson
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.steering.entries import Entry
from fgsteer.steering.generation import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPEN_TOKENS = 48


@dataclass(frozen=True, repr=False)
class OpenStyle(OneLineRepr):
    """Open generation: what a model writes after prompts, scored by a judge of the behavior.

    Args:
        prompts: Texts that are continued, or conversations that are answered.
        judge: The judge.
        concept: What the judge scores texts for.
        max_new_tokens: The tokens of each text, which are chosen greedily.
    """

    prompts: Sequence[Text]
    judge: Judge
    concept: str
    max_new_tokens: int = OPEN_TOKENS

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or len(self.prompts) < 2:
            raise DataError(f"prompts = {self.prompts!r:.40}", "a list of at least two prompts")
        for number, prompt in enumerate(self.prompts):
            check_text(prompt, f"prompts[{number}]")
        check_range("max_new_tokens", self.max_new_tokens, 1, MAX_COUNT, whole=True)


@dataclass(frozen=True, repr=False)
class StyleEffect(OneLineRepr):
    """What steering does in one style.

    Args:
        style: The style's name.
        unit: What the effect is in: "nats a token", "nats an answer", or the judge's score.
        effect: The mean over items of what steering changes.
        moved: The share of items that move the way that is asked for; one that does not move counts half.
        gap: By how much ``moved`` is larger in the first style; None for that one.
    """

    style: str
    unit: str
    effect: Interval
    moved: Interval
    gap: Interval | None

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {
            "style": self.style,
            "items": self.effect.units,
            "effect": self.effect.mean,
            "low": self.effect.low,
            "high": self.effect.high,
            "unit": self.unit,
            "moved": self.moved.mean,
            "gap": None if self.gap is None else self.gap.mean,
        }


@checked
def measure_styles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Entry,
    styles: Mapping[str, ContrastSet | OpenStyle],
    *,
    batch_tokens: int | None = None,
) -> Table[StyleEffect]:
    """The effect of one vector in several styles, the first of which is that it was built from (arXiv 2505.03189).

    An item of a contrast set is a pair, and its value ``log p(y⁺) − log p(y⁻)``, a token or an answer as ``Propensity``
    has it; an item of open generation is a prompt, and its value the judge's score. Styles have different units, so
    that the gap between them is that of the share of items that steering moves the way it should: ½ for a vector that
    has nothing to do with the behavior.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        steering: The intervention, or a list of them.
        styles: Contrast sets of pairs, or open generation, by name.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        A row for each style. Intervals (95 %) are Student's t for effects, Wilson's for shares, and Newcombe's for
        their differences (1998, method 10).

    Raises:
        DataError: There is no style, or one has fewer than two pairs.
    """
    if not isinstance(styles, Mapping) or not styles:
        raise DataError(describe_value(styles), "at least one style by its name", "pass styles={'replies': …}")
    rows: Table[StyleEffect] = Table()
    for name, style in styles.items():
        if isinstance(style, OpenStyle):
            changes, unit = _open_changes(model, tokenizer, steering, style), "score"
            clusters = [str(number) for number in range(len(changes))]
        else:
            clusters = [repr(pair.prompt) for pair in pairs_of(style)]
            changes, unit = _pair_changes(model, tokenizer, steering, style, batch_tokens)
        if len(set(clusters)) < 2:  # all pairs have one prompt, which is part of what is measured
            clusters = [str(number) for number in range(len(changes))]
        effect = mean_interval([dict(enumerate(changes.tolist()))], clusters.__getitem__)
        moved = wilson(float(((changes > 0).double() + 0.5 * (changes == 0).double()).sum()), len(changes))
        rows.append(StyleEffect(name, unit, effect, moved, _gap(rows[0].moved, moved) if rows else None))
    return rows


@checked
def ab_questions(replies: ContrastSet, *, chat: bool = True) -> ContrastSet:
    """Pairs of replies as questions with the answers A and B; the reply with the behavior is A in every other one.

    Args:
        replies: Pairs of replies to one prompt each, such as ``load_contrast("cheerful")``, with or without a held-out
            part.
        chat: Whether a question is a user's message, to which the letter is the reply.

    Raises:
        DataError: The set has texts that are no pairs, or a pair without a prompt.
    """

    def question(number: int, pair: ContrastPair) -> ContrastPair:
        first, second = (pair.positive, pair.negative) if number % 2 == 0 else (pair.negative, pair.positive)
        replies_text = f"(A) {_content(first)}\n(B) {_content(second)}\n"
        text = f"Which is the better reply to the question below?\n{_content(pair.prompt)}\n{replies_text}"
        answers = ("A", "B") if number % 2 == 0 else ("B", "A")
        if chat:
            return ContrastPair(*answers, prompt=[{"role": "user", "content": f"{text}Answer with A or B alone."}])
        return ContrastPair(*answers, prompt=f"{text}Answer:")

    return _mapped(replies, f"{replies.name}, A or B", question)


@checked
def plain_questions(replies: ContrastSet) -> ContrastSet:
    """Pairs of replies in a plain template, ``Question: …``, ``Answer: …``, instead of that of a chat.

    Args:
        replies: As in ``ab_questions``.

    Raises:
        DataError: As in ``ab_questions``.
    """

    def question(_: int, pair: ContrastPair) -> ContrastPair:
        prompt = f"Question: {_content(pair.prompt)}\nAnswer:"
        return ContrastPair(_content(pair.positive), _content(pair.negative), prompt=prompt)

    return _mapped(replies, f"{replies.name}, plain", question)


def pairs_of(contrast: ContrastSet) -> Sequence[ContrastPair]:
    """The pairs of a set of nothing else. Raises DataError for other texts, or a pair without a prompt."""
    pairs = contrast.pairs
    if not pairs or contrast.positives or contrast.negatives or not all(pair.prompt for pair in pairs):
        raise DataError(
            f"the contrast set {contrast.name!r} with {len(pairs)} pairs, and texts or pairs without a prompt",
            "pairs alone, each with a prompt",
            "pass pairs of replies, such as fg.load_contrast('cheerful')",
        )
    return pairs


def _gap(first: Interval, other: Interval) -> Interval:
    """The difference of two independent shares with Newcombe's interval, from their Wilson intervals."""
    gap = first.mean - other.mean
    low = math.hypot(first.mean - first.low, other.high - other.mean)
    high = math.hypot(first.high - first.mean, other.mean - other.low)
    return Interval(gap, gap - low, gap + high, units=min(first.units, other.units))


def _pair_changes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Entry,
    contrast: ContrastSet,
    batch_tokens: int | None,
) -> tuple[Float[Tensor, " pairs"], str]:
    """What steering changes of each pair's ``log p(y⁺) − log p(y⁻)``, and its unit."""
    values, unit = Propensity(contrast).values(model, tokenizer, [None, steering], batch_tokens)
    change, pairs = values[1] - values[0], len(contrast.pairs)
    return change[:pairs] - change[pairs:], unit


def _open_changes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steering: Entry, style: OpenStyle
) -> Float[Tensor, " prompts"]:
    """What steering changes of the judge's score of the text after each prompt."""
    scores = []
    for entry in (None, steering):
        texts = generate(
            model,
            tokenizer,
            list(style.prompts),
            steering=[entry] * len(style.prompts),
            per_row=True,
            max_new_tokens=style.max_new_tokens,
            do_sample=False,
        )
        scores.append(style.judge.score(texts, style.concept).double().cpu())
    return scores[1] - scores[0]


def _mapped(contrast: ContrastSet, name: str, change: Callable[[int, ContrastPair], ContrastPair]) -> ContrastSet:
    """A set with every pair changed, its held-out part too. Raises DataError as ``pairs_of`` does."""
    held_out = contrast.held_out and _mapped(contrast.held_out, f"{name}:held_out", change)
    pairs = tuple(change(number, pair) for number, pair in enumerate(pairs_of(contrast)))
    return replace(contrast, name=name, pairs=pairs, held_out=held_out)


def _content(text: Text) -> str:
    """A text, or what the last message of several says."""
    return text if isinstance(text, str) else text[-1]["content"]
