"""What a vector is learned from: prompts with an answer that shows the behavior and one that does not.

examples_of(preference_set([("How are you?", "Splendid!", "Fine.")]), "reps")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fgsteer.data.chat import Text
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.errors import DataError
from fgsteer.errors.wording import count
from fgsteer.learning.settings import Objective

Trainable = Contrastable  # what preference_set accepts: as collect, and lists of (prompt, winner, loser)


class Example(NamedTuple):
    """One example: pairs (prompt, answer), of which the second is not looked at by "lm"."""

    winner: tuple[Text, Text]
    loser: tuple[Text, Text] | None


def preference_set(data: Trainable) -> ContrastSet:
    """Make a contrast set of what ``train`` accepts; of three texts the first is the prompt, the second wins.

    Raises DataError naming the entry that cannot be used.
    """
    if not isinstance(data, list | tuple):
        return as_contrast(data)
    entries = [_as_preference(entry) for entry in data]
    return as_contrast(entries)


def _as_preference(entry: Any) -> Any:
    if not isinstance(entry, str | Mapping) and isinstance(entry, Sequence) and len(entry) == 3:
        prompt, winner, loser = entry
        return ContrastPair(winner, loser, prompt)
    return entry


def examples_of(contrast: ContrastSet, objective: Objective) -> list[Example]:
    """List the examples of a set, in order; texts without a pair are paired in their order.

    Raises DataError where an objective that compares answers has unequal numbers of them.
    """
    winners, losers = list(contrast.side(True)), list(contrast.side(False))
    if objective == "lm":
        return [Example(winner, None) for winner in winners]
    if len(winners) != len(losers):
        raise DataError(
            f"{count(len(winners), 'positive text')} and {count(len(losers), 'negative text')} in {contrast.name!r}",
            f"a losing answer for each winning one, which {objective} compares",
            'give pairs, or as many texts on either side, or train with objective="lm"',
        )
    return [Example(winner, loser) for winner, loser in zip(winners, losers, strict=True)]
