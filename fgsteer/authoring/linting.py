"""Contrast data looked through for what makes a vector learn something else than the behavior.

for advice in lint_contrast("pirate.json"): print(advice)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fgsteer.authoring.checks import CHECKS, Advice, Sides
from fgsteer.authoring.similarity import words_of
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.display.tables import Table
from fgsteer.errors.checks import checked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked
def lint_contrast(contrast: Contrastable, tokenizer: PreTrainedTokenizerBase | None = None) -> Table[Advice]:
    """Look through contrast data for faults, before any model reads it.

    | check | what it finds |
    |---|---|
    | ``empty_answers`` | completions without a word |
    | ``same_on_both_sides`` | texts that stand on either side, with the same prompt |
    | ``leakage``, ``near_leakage`` | held-out texts that vectors are built from too, or nearly |
    | ``name_in_prompts`` | a word of the set's name in prompts of one side only |
    | ``prompts_that_differ`` | prompts that only one side has |
    | ``length_difference`` | lengths that differ, with Cohen's d of 0.5 or more |
    | ``one_sided_tokens`` | tokens that alone put three quarters of the texts on their side, by log-odds |
    | ``language_mix`` | sides in different languages, or a side in several, as far as frequent words tell |
    | ``duplicates``, ``near_duplicates`` | texts of a side that are the same, or share 80 % of runs of three words |
    | ``too_few_texts`` | fewer than twenty texts on a side |

    ``diagnose`` goes on from there with what a model makes of the texts: whether differences agree in its activations,
    and whether the sides lie apart.

    Args:
        contrast: A contrast set, the name of a shipped one, a path, or what ``collect`` takes.
        tokenizer: Whose tokens are counted; by default words are.

    Returns:
        The advice, the serious first; empty where nothing was found. Each is printed as sentences, and ``as_dict`` is
        its machine form.

    Raises:
        DataError: The contrast cannot be used.
    """
    tokenize = words_of
    if tokenizer is not None:
        words = tokenizer

        def tokenize(text: str) -> list[str]:
            return [str(words.decode([i])) for i in words(text, add_special_tokens=False, verbose=False)["input_ids"]]

    sides = Sides.of(as_contrast(contrast), tokenize)
    found = [advice for check in CHECKS for advice in check(sides)]
    return Table(sorted(found, key=lambda advice: not advice.serious))
