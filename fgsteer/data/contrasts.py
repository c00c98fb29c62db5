"""Contrast sets: texts that show a behavior and texts that do not.

A ``ContrastSet`` holds pairs, or positives and negatives of any two sizes. Texts are strings or chat messages;
an optional prompt comes before a pair's two completions. Of two conversations, what both begin with is the prompt.

    ContrastSet("love", positives=["I love you"], negatives=["The bus is late"])
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from fgsteer.data.chat import Text, check_text
from fgsteer.data.conversations import after_prompt, separate, split_prompt
from fgsteer.errors import DataError
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import a, count
from fgsteer.storage.json_files import text_sha256

MIN_TEXTS_TO_HOLD_OUT = 6  # on either side, so that a third of them can be put aside
MAX_NAME_BYTES = 100  # of a name that files are called by
_NAME = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True, repr=False)
class ContrastPair(OneLineRepr):
    """Two completions of one prompt, with and without the behavior.

    Each is a string or a list of chat messages. Two whole conversations are taken apart: the messages that both
    begin with become the prompt (as in TRL); one that ``prompt`` holds as well is not repeated.

    Attributes:
        positive: The completion with the behavior.
        negative: The completion without it.
        prompt: What comes before both, "" for nothing.

    Raises:
        DataError: A completion is empty, or anything is neither a text nor a list of messages.
    """

    positive: Text
    negative: Text
    prompt: Text = ""

    def __post_init__(self) -> None:
        positive, negative = check_text(self.positive, "positive"), check_text(self.negative, "negative")
        prompt = check_text(self.prompt, "prompt", empty=True)
        for name, text in zip(("prompt", "positive", "negative"), separate(prompt, positive, negative), strict=True):
            object.__setattr__(self, name, text)


@dataclass(frozen=True, repr=False)
class ContrastSet(OneLineRepr):
    """Texts with and without a behavior: ``pairs``, or ``positives`` and ``negatives``, or both.

    The two sides need not be of equal size.

    Attributes:
        name: What the set is called.
        pairs: Pairs of completions of one prompt.
        positives: Texts with the behavior, besides the pairs.
        negatives: Texts without it, besides the pairs.
        held_out: A set of the same behavior from which nothing is built.
        description: What the behavior is, for a judge that is a language model.

    Raises:
        DataError: A side is empty, or an entry is no text.
    """

    name: str
    pairs: Sequence[ContrastPair] = ()
    positives: Sequence[Text] = ()
    negatives: Sequence[Text] = ()
    held_out: ContrastSet | None = None
    description: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        for field in ("positives", "negatives"):
            texts = getattr(self, field)
            if isinstance(texts, str):
                raise DataError(
                    f"one string for {field} of {self.name!r}", "a list of texts", "put the text into a list"
                )
            object.__setattr__(
                self, field, tuple(check_text(t, f"{field}[{i}] of {self.name!r}") for i, t in enumerate(texts))
            )
        pairs = tuple(self.pairs)
        for number, pair in enumerate(pairs):
            if not isinstance(pair, ContrastPair):
                raise DataError(
                    f"{a(type(pair).__name__)} for pairs[{number}] of {self.name!r}",
                    "a ContrastPair",
                    "write ContrastPair(positive, negative, prompt)",
                )
        object.__setattr__(self, "pairs", pairs)
        for positive, word in ((True, "positive"), (False, "negative")):
            if not self.count(positive):
                raise DataError(
                    f"The contrast set {self.name!r} has no {word} text.", "at least one text on either side"
                )

    def side(self, positive: bool) -> Iterator[tuple[Text, Text]]:
        """Yield (prompt, completion) of every text of one side, in order; without a prompt it is "".

        The completion of a single conversation is its last message by the assistant.
        """
        for pair in self.pairs:
            yield after_prompt(pair.prompt, pair.positive if positive else pair.negative)
        for text in self.positives if positive else self.negatives:
            yield split_prompt(text)

    def count(self, positive: bool) -> int:
        """Return the number of texts of one side."""
        return len(self.pairs) + len(self.positives if positive else self.negatives)

    def hold_out(self) -> ContrastSet:
        """Return the set with every third pair and text of either side held out; itself where it has a held-out part.

        Raises DataError for fewer than six texts on a side.
        """
        if self.held_out is not None:
            return self
        fewest = min(self.count(True), self.count(False))
        if fewest < MIN_TEXTS_TO_HOLD_OUT:
            raise DataError(
                f"the contrast set {self.name!r} with {count(fewest, 'text')} on a side and no held_out part",
                f"at least {MIN_TEXTS_TO_HOLD_OUT} texts on either side, of which every third is held out, or a "
                "held_out part of its own",
                'add "held_out": {"positive": [...], "negative": [...]} to its file',
            )

        def part(name: str, out: bool) -> ContrastSet:
            pairs, positives, negatives = (
                [entry for number, entry in enumerate(entries) if (number % 3 == 2) == out]
                for entries in (self.pairs, self.positives, self.negatives)
            )
            return ContrastSet(name, pairs, positives, negatives)  # type: ignore[arg-type]  # each of its own kind

        held_out = part(f"{self.name}:held_out", out=True)
        return dataclasses.replace(part(self.name, out=False), held_out=held_out, description=self.description)

    @cached_property
    def sha256(self) -> str:
        """Hash of the texts, in order; the name and the held-out part do not count."""
        plain = [
            [[_plain(prompt), _plain(completion)] for prompt, completion in self.side(positive)]
            for positive in (True, False)
        ]
        return text_sha256(plain)


def _plain(text: Text) -> str | list[dict[str, str]]:
    """Return a text, or messages as plain dicts, for JSON."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def check_name(name: str) -> str:
    """Return a contrast set's name. Raises DataError for one that a file cannot have."""
    if not _NAME.fullmatch(name) or len(name.encode()) > MAX_NAME_BYTES or name.endswith((" ", ".", ".running")):
        raise DataError(
            f"a contrast set named {name[:MAX_NAME_BYTES]!r}",
            f"a name that a file can have: letters, digits, spaces and . + - _, at most {MAX_NAME_BYTES} bytes",
            'give its file another name, or a "name" of its own',
        )
    return name
