"""The judge by keywords: 1 for a text with a word of the concept, else 0.

KeywordJudge().score(["The bride wore a white veil.", "The lamp stood in the hall."], "wedding")
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.data.contrasts import ContrastSet
from fgsteer.errors import DataError
from fgsteer.evaluation.judges.learning import ContrastsByName, judging_texts, validation_auc
from fgsteer.evaluation.judges.protocols import check_texts
from fgsteer.evaluation.judges.table import JudgeOptions

_WORD = re.compile(r"[^\W\d_]{3,}")


class KeywordJudge:
    """Scores 1 for a text with at least one keyword of the concept, else 0: a floor for the other judges.

    Keywords match whole words, in upper or lower case.

    Args:
        keywords: Keywords by concept. Those of any other concept are every word of three letters or more in its
            held-out positives that occurs in no held-out negative and nowhere in the background of
            ``judging_texts``.
        contrasts: Contrast sets besides the shipped ones.
    """

    name = "keywords"

    def __init__(
        self, keywords: Mapping[str, Sequence[str]] | None = None, *, contrasts: Iterable[ContrastSet] = ()
    ) -> None:
        self._keywords = {concept: tuple(words) for concept, words in (keywords or {}).items()}
        self._contrasts = ContrastsByName(contrasts)
        self._own_keywords = dict(self._keywords)

    @property
    def identity(self) -> dict[str, Any]:
        """What its scores depend on."""
        return {"name": self.name, "keywords": self._own_keywords, "contrasts": self._contrasts.identity}

    def keywords(self, concept: str) -> tuple[str, ...]:
        """The concept's keywords. Raises DataError where there are none."""
        if concept not in self._keywords:
            positives, negatives, background = judging_texts(self._contrasts[concept])
            self._keywords[concept] = tuple(sorted(_words(positives) - _words(negatives) - _words(background)))
        words = self._keywords[concept]
        if not words or not all(word.strip() for word in words):
            raise DataError(
                f"the keywords {list(words)} of {concept!r}",
                "at least one keyword, and none of them empty",
                "pass KeywordJudge(keywords={...}), or hold out more texts of the concept",
            )
        return words

    def score(self, texts: Sequence[str], concept: str) -> Float[Tensor, " texts"]:
        """1 where a keyword of the concept occurs in a text, else 0, (texts,). Raises DataError."""
        words = "|".join(re.escape(word.strip()) for word in self.keywords(concept))
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        found = [1.0 if pattern.search(text) else 0.0 for text in check_texts(texts)]
        return torch.tensor(found, dtype=torch.float32, device="cpu")

    def validate(self, concept: str) -> float:
        """``validation_auc`` on the concept's training sentences."""
        return validation_auc(self, self._contrasts[concept])


def make(options: JudgeOptions) -> KeywordJudge:
    """The judge of the command line."""
    return KeywordJudge(contrasts=options.contrasts)


def _words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in _WORD.findall(text.lower())}
