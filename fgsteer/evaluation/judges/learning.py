"""What judges of a concept learn from, and how they are validated.

A vector is built from a concept's training sentences; a judge learns from its ``held_out`` sentences alone, so that
no text serves both. That leaves the training sentences to validate a judge with: the judge never saw them, though the
vectors did.

    positives, negatives, background = judging_texts(load_contrast("wedding"))
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from jaxtyping import Float
from torch import Tensor

from fgsteer.data.chat import Text
from fgsteer.data.contrast_files import load_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.data.shipped import load_neutral, shipped_contrasts
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import count
from fgsteer.evaluation.judges.protocols import Judge


def plain_text(text: Text) -> str:
    """A text as it is; messages as their contents, one a line."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _completions(contrast: ContrastSet, positive: bool) -> list[str]:
    """One side's completions as plain strings: the prompts are no part of the behavior."""
    return [plain_text(completion) for _, completion in contrast.side(positive)]


@cache
def _shipped_negatives() -> dict[str, list[str]]:
    """Held-out negatives of every shipped concept."""
    held_out = {name: load_contrast(name).held_out for name in shipped_contrasts()}
    return {name: _completions(part, False) for name, part in held_out.items() if part is not None}


def judging_texts(contrast: ContrastSet) -> tuple[list[str], list[str], list[str]]:
    """What a judge of a concept learns from.

    The background is the shipped neutral sentences and the held-out negatives of the other shipped concepts, less
    any sentence of this contrast set. Other concepts' positives stay out: concepts overlap (a wedding shows love),
    and they raise no AUC.

    Args:
        contrast: The contrast set, with a ``held_out`` part.

    Returns:
        Held-out positives, held-out negatives, and the background.

    Raises:
        DataError: The contrast set has no held-out part.
    """
    if contrast.held_out is None:
        raise DataError(
            f"The contrast set {contrast.name!r} has no held_out part.",
            "held-out sentences, which no vector is built from and the judge learns from",
            'add "held_out": {"positive": [...], "negative": [...]} to its file, or use contrast.hold_out()',
        )
    positives, negatives = (_completions(contrast.held_out, side) for side in (True, False))
    own = {*positives, *negatives, *_completions(contrast, True), *_completions(contrast, False)}
    background = [*load_neutral()[0]]
    for name, texts in _shipped_negatives().items():
        background += [] if name == contrast.name else texts
    return positives, negatives, [text for text in background if text not in own]


def auc(positive: Float[Tensor, "p *columns"], negative: Float[Tensor, "n *columns"]) -> Float[Tensor, "*columns"]:
    """Area under the ROC curve, ``P(s⁺ > s⁻) + P(s⁺ = s⁻)/2`` over all pairs of scores.

    Args:
        positive: Scores of the positives, (p, ...).
        negative: Scores of the negatives, (n, ...).

    Returns:
        The area of each column, (...), float64.

    Raises:
        DataError: A side has no score.
    """
    if not (len(positive) and len(negative)):
        sides = f"{count(len(positive), 'score')} of positives and {len(negative)} of negatives"
        raise DataError(sides, "at least one score of each side")
    difference = positive[:, None].double() - negative
    return (difference.sign() + 1).mean((0, 1)) / 2


@checked
def validation_auc(judge: Judge, contrast: ContrastSet) -> float:
    """Area under the ROC curve of a judge on the sentences of a contrast set, its held-out part aside.

    Judges that learn from held-out sentences never saw these; vectors of the concept are built from them. So the
    area says whether the judge knows the concept, not how it fares on steered text.

    Args:
        judge: The judge.
        contrast: The contrast set, whose name the judge knows.

    Returns:
        The area, in [0, 1]; 0.5 is chance.
    """
    sides = (judge.score(_completions(contrast, positive), contrast.name) for positive in (True, False))
    return float(auc(*sides))


class ContrastsByName:
    """Contrast sets by name: those of the user, then the shipped ones, then files."""

    def __init__(self, contrasts: Iterable[ContrastSet]) -> None:
        self._own = {contrast.name: contrast for contrast in contrasts}

    def __getitem__(self, concept: str) -> ContrastSet:
        return self._own[concept] if concept in self._own else load_contrast(concept)

    @property
    def identity(self) -> dict[str, list[str]]:
        """Hashes of the texts of the user's contrast sets."""
        return {name: [c.sha256, c.held_out.sha256 if c.held_out else ""] for name, c in self._own.items()}
