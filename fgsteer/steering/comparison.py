"""Texts of a model unsteered and steered, side by side.

print(compare(model, tokenizer, ["I think", "The sea"], vec.add(8.0), max_new_tokens=32))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fgsteer.data.chat import Text, last_text
from fgsteer.display.tables import table_html
from fgsteer.errors.checks import checked
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.steering.entries import Steering
from fgsteer.steering.generation import generate, parse_prompts, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class Comparison(OneLineRepr):
    """Continuations of the same prompts, unsteered and steered; it shows as a table in a notebook.

    Where several continuations of a prompt were asked for, the prompt stands before each of them.
    """

    prompts: tuple[str, ...]
    unsteered: tuple[str, ...]
    steered: tuple[str, ...]

    def __str__(self) -> str:
        blocks = (
            f"{prompt}\n  unsteered: {before.strip()}\n    steered: {after.strip()}"
            for prompt, before, after in zip(self.prompts, self.unsteered, self.steered, strict=True)
        )
        return escape_text("\n\n".join(blocks))

    def _repr_html_(self) -> str:
        rows = list(zip(self.prompts, self.unsteered, self.steered, strict=True))
        return table_html(["prompt", "unsteered", "steered"], rows)


@checked
def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[Text],
    steering: Steering,
    *,
    per_row: bool | None = None,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Continuations of the prompts by the unsteered and by the steered model.

    Both draw the same random numbers, so that what differs is due to the steering; the caller's random numbers are
    left as they are.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        prompts: A text, several, or conversations, as ``generate`` takes them.
        steering: What ``generate`` takes: an intervention, a list that composes, or one entry per prompt.
        per_row: Says outright that ``steering`` has one entry per prompt, as in ``generate``.
        seed: Seed of the sampling, where ``do_sample=True`` is among the options.
        **options: What ``model.generate`` takes, such as ``max_new_tokens=32``.

    Returns:
        The prompts, and the continuations without and with steering, in the order of the prompts.

    Raises:
        ArgumentError, DataError, SteeringError: As ``generate`` does.
    """
    texts: list[tuple[str, ...]] = []
    for entries in (None, steering):
        with seeded(model, seed):
            texts.append(tuple(generate(model, tokenizer, prompts, steering=entries, per_row=per_row, **options)))
    listed = parse_prompts(prompts)
    copies = len(texts[0]) // len(listed) if listed else 0
    asked = tuple(last_text(prompt) for prompt in listed for _ in range(copies))
    return Comparison(asked, *texts)
