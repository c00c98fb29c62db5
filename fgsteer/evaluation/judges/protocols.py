"""What scores texts: judges of behavior, and judges of coherence. Both are replaceable.

class Length:
    name = "length"
    def score(self, texts, concept): return torch.tensor([min(1.0, len(text) / 100) for text in texts])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from fgsteer.data.chat import check_unicode, refuse_one_text
from fgsteer.errors import DataError
from fgsteer.errors.wording import a


@runtime_checkable
class Judge(Protocol):
    """What scores how much texts show a concept.

    A judge may have an ``identity`` besides: plain JSON of all that its scores depend on. Runs under judges of
    another identity do not mix.
    """

    @property
    def name(self) -> str:
        """What records and reports call this judge."""

    def score(self, texts: Sequence[str], concept: str) -> Float[Tensor, " texts"]:
        """How much each text shows the concept, in [0, 1], (texts,)."""


@runtime_checkable
class CoherenceJudge(Protocol):
    """What scores how coherent texts are. It may have an ``identity``, as a ``Judge`` may."""

    @property
    def name(self) -> str:
        """What records and reports call this judge."""

    def coherence(self, texts: Sequence[str], prompts: Sequence[str]) -> Float[Tensor, " texts"]:
        """How coherent each text is after its prompt, in [0, 1], (texts,)."""


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list. Raises DataError for one string, or for an entry that is not a string."""
    refuse_one_text(texts)
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{a(type(text).__name__)} as texts[{number}]", "a text")
        check_unicode(text, f"texts[{number}]")
    return texts
