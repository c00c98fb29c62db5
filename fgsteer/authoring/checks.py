"""What may be wrong with contrast data: a function for each fault, which gives advice where it finds it.

for advice in length_difference(Sides.of(contrast)): print(advice)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

from fgsteer.authoring.languages import language_of
from fgsteer.authoring.similarity import near_duplicates, plain_form, words_of
from fgsteer.data.contrasts import ContrastSet
from fgsteer.display.tables import Cell
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.evaluation.judges.learning import plain_text

FEW_TEXTS = 20  # on a side
LARGE_EFFECT = 0.5  # Cohen's d of lengths
TELLING = 0.75  # the share of texts, averaged over sides, that a token alone puts on their side
CLEAR = 3.0  # standard errors of a log-odds ratio
SHOWN_TOKENS = 5
MIXED = 0.1  # a share of a side's texts in another language
UNLIKE = 0.25  # a difference of the sides' shares of a language
SHOWN_CHARACTERS = 120  # of an example
Tokenize = Callable[[str], Sequence[str]]


@dataclass(frozen=True, repr=False)
class Advice(OneLineRepr):
    """One fault of contrast data, and what to do about it.

    Args:
        check: The name of the check that found it.
        message: What was found and what to do, in sentences.
        number: The figure that it rests on; nan where there is none.
        example: A text or a token that shows it, "" for none.
        serious: Whether results on such data are wrong, rather than weaker or narrower than they look.
        details: Further figures, as plain JSON.
    """

    check: str
    message: str
    number: float
    example: str = ""
    serious: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = f" For example: “{escape_text(_shortened(self.example), keep='')}”." if self.example else ""
        return escape_text(self.message) + shown

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {
            "check": self.check,
            "number": self.number,
            "advice": self.message,
            "example": _shortened(self.example),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; a number that is not finite is null."""
        number = self.number if math.isfinite(self.number) else None
        return {
            "check": self.check,
            "serious": self.serious,
            "number": number,
            "message": self.message,
            "example": self.example,
            "details": self.details,
        }


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"


@dataclass(frozen=True)
class Sides:
    """A contrast set as plain texts: (prompt, completion) of each, and the texts that are held out.

    Args:
        name: The set's name.
        positive: The texts with the behavior.
        negative: The texts without it.
        held_out: Those that nothing is built from, or None.
        tokenize: Turns a text into its tokens.
    """

    name: str
    positive: list[tuple[str, str]]
    negative: list[tuple[str, str]]
    held_out: Sides | None
    tokenize: Tokenize = words_of

    @classmethod
    def of(cls, contrast: ContrastSet, tokenize: Tokenize = words_of) -> Sides:
        """The plain texts of a set."""
        positive, negative = (
            [(plain_text(prompt), plain_text(completion)) for prompt, completion in contrast.side(side)]
            for side in (True, False)
        )
        held_out = None if contrast.held_out is None else cls.of(contrast.held_out, tokenize)
        return cls(contrast.name, positive, negative, held_out, tokenize)

    def both(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """The sides with their words."""
        return [("positive", self.positive), ("negative", self.negative)]


def _whole(text: tuple[str, str]) -> str:
    """Prompt and completion as one text."""
    return "\n".join(filter(None, text))


def too_few_texts(sides: Sides) -> Iterator[Advice]:
    """Fewer than twenty texts on a side."""
    fewest = min(len(sides.positive), len(sides.negative))
    if fewest < FEW_TEXTS:
        yield Advice(
            "too_few_texts",
            f"A side has only {count(fewest, 'text')}, so that chance has a large part in a mean over it. Add texts, "
            f"at least {FEW_TEXTS} on either side; fg.samples_for tells how many a vector needs.",
            fewest,
        )


def empty_answers(sides: Sides) -> Iterator[Advice]:
    """Completions without a letter or a digit."""
    for word, texts in sides.both():
        empty = [text for text in texts if not words_of(text[1])]
        if empty:
            yield Advice(
                "empty_answers",
                f"{len(empty)} of the {count(len(texts), f'{word} text')} have no word in them. Leave these out, or "
                "write them anew.",
                len(empty),
                _whole(empty[0]),
                serious=True,
            )


def same_on_both_sides(sides: Sides) -> Iterator[Advice]:
    """Texts, with their prompts, that stand on either side."""
    negative = {plain_form(_whole(text)) for text in sides.negative}
    shared = [text for text in sides.positive if plain_form(_whole(text)) in negative]
    if shared:
        yield Advice(
            "same_on_both_sides",
            f"{count(len(shared), 'text')} of the positive side also stand on the negative side. They say nothing of "
            "the difference and count against it: decide where each belongs.",
            len(shared),
            _whole(shared[0]),
            serious=True,
        )


def duplicates(sides: Sides) -> Iterator[Advice]:
    """Texts that a side has twice, and texts of a side that are nearly the same."""
    for word, texts in sides.both():
        first: dict[str, str] = {}
        repeated = []
        for text in map(_whole, texts):
            form = plain_form(text)
            if form in first:
                repeated.append(text)
            first.setdefault(form, text)
        if repeated:
            yield Advice(
                "duplicates",
                f"{len(repeated)} of the {count(len(texts), f'{word} text')} repeat another one, but for case and "
                "punctuation. They count twice in every mean: keep one of each.",
                len(repeated),
                repeated[0],
            )
        unique = list(first.values())
        near = near_duplicates(unique)
        if near:
            later = {j for _, j, _ in near}
            best = max(near, key=lambda pair: pair[2])
            yield Advice(
                "near_duplicates",
                f"{len(later)} of the {count(len(texts), f'{word} text')} are nearly the same as another one: at least "
                "80% of their runs of three words are shared. The side is narrower than it looks: vary them, or keep "
                "one of each.",
                len(later),
                f"{unique[best[0]]} / {unique[best[1]]}",
                details={"most_alike": best[2]},
            )


def leakage(sides: Sides) -> Iterator[Advice]:
    """Held-out texts that are texts of the other part too, or nearly."""
    if sides.held_out is None:
        return
    built = [_whole(text) for _, texts in sides.both() for text in texts]
    kept = [_whole(text) for _, texts in sides.held_out.both() for text in texts]
    known = {plain_form(text) for text in built}
    same = [text for text in kept if plain_form(text) in known]
    advice = "What is measured on the held-out part is then not on new texts: take them out of one of the two."
    if same:
        yield Advice(
            "leakage",
            f"{len(same)} of the {count(len(kept), 'held-out text')} also stand in the part that vectors are built "
            f"from. {advice}",
            len(same),
            same[0],
            serious=True,
        )
    new = [text for text in kept if plain_form(text) not in known]
    near = [
        (i, j - len(built)) for i, j, _ in near_duplicates([*built, *new]) if i < len(built) <= j
    ]  # of one text of either part
    if near:
        i, j = near[0]
        yield Advice(
            "near_leakage",
            f"{len({j for _, j in near})} of the {count(len(kept), 'held-out text')} are nearly the same as a text "
            f"that vectors are built from. {advice}",
            len({j for _, j in near}),
            f"{built[i]} / {new[j]}",
            serious=True,
        )


def length_difference(sides: Sides) -> Iterator[Advice]:
    """Completions that are longer on one side: ``d = (m⁺ − m⁻)/√((s⁺² + s⁻²)/2)`` of their tokens."""
    lengths = [[len(sides.tokenize(completion)) for _, completion in texts] for _, texts in sides.both()]
    if min(map(len, lengths)) < 2:
        return
    means = [fmean(side) for side in lengths]
    spread = math.sqrt(fmean(variance(side) for side in lengths))
    gap = means[0] - means[1]
    d = gap / spread if spread else math.copysign(math.inf, gap) if gap else 0.0
    if abs(d) < LARGE_EFFECT:
        return
    longer, side = ("positive", 0) if gap > 0 else ("negative", 1)
    texts = (sides.positive, sides.negative)[side]
    example = texts[max(range(len(texts)), key=lengths[side].__getitem__)][1]
    size = f"{abs(d):.1f} standard deviations apart (Cohen's d)" if math.isfinite(d) else "and no side varies"
    yield Advice(
        "length_difference",
        f"The {longer} texts are longer: {means[side]:.1f} tokens on average against {means[1 - side]:.1f}, {size}. A "
        "vector may learn length in place of the behavior. Even the sides out, or read one token of each text "
        '(tokens="last").',
        d,
        example,
        details={"positive_mean": means[0], "negative_mean": means[1]},
    )


def one_sided_tokens(sides: Sides) -> Iterator[Advice]:
    """Tokens that alone tell the sides apart, by the log-odds of being in a text, ½ added to every count."""
    found = [Counter(t for _, text in texts for t in _distinct(sides.tokenize(text))) for _, texts in sides.both()]
    totals = (len(sides.positive), len(sides.negative))
    telling = []
    for token in {*found[0], *found[1]}:
        hits = (found[0][token], found[1][token])
        odds = [math.log((a + 0.5) / (n - a + 0.5)) for a, n in zip(hits, totals, strict=True)]
        error = math.sqrt(sum(1 / (a + 0.5) + 1 / (n - a + 0.5) for a, n in zip(hits, totals, strict=True)))
        right = (hits[0] / totals[0] + 1 - hits[1] / totals[1]) / 2
        log_odds = odds[0] - odds[1]
        if max(right, 1 - right) >= TELLING and abs(log_odds) >= CLEAR * error:
            telling.append((log_odds, token, hits))
    if not telling:
        return
    telling.sort(key=lambda entry: (-abs(entry[0]), entry[1]))
    shown = ", ".join(
        f"“{escape_text(token, keep='')}” in {a} of {totals[0]} positive and {b} of {totals[1]} negative texts"
        for _, token, (a, b) in telling[:SHOWN_TOKENS]
    )
    tells = "token alone tells" if len(telling) == 1 else "tokens alone tell"
    yield Advice(
        "one_sided_tokens",
        f"{len(telling)} {tells} most texts' sides: {shown}. A vector may learn the word in place of the behavior. "
        "Unless the word is the behavior, write texts that show it in other words, and negative texts with the word.",
        telling[0][0],
        telling[0][1],
        details={
            "tokens": [
                {"token": token, "log_odds": log_odds, "positive": a, "negative": b}
                for log_odds, token, (a, b) in telling
            ]
        },
    )


def _distinct(tokens: Sequence[str]) -> set[str]:
    """Tokens with a letter or a digit, without the spaces and the case of their places."""
    return {token.strip().casefold() for token in tokens if words_of(token)}


def prompts_that_differ(sides: Sides) -> Iterator[Advice]:
    """Prompts that only one side has."""
    prompts = [[plain_form(prompt) for prompt, _ in texts] for _, texts in sides.both()]
    if not any(map(any, prompts)):
        return
    alone = [
        (word, texts[n][0], prompt)
        for (word, texts), own, other in zip(sides.both(), prompts, reversed(prompts), strict=True)
        for n, prompt in enumerate(own)
        if prompt not in set(other)
    ]
    if alone:
        share = len(alone) / sum(map(len, prompts))
        word, example, _ = alone[0]
        yield Advice(
            "prompts_that_differ",
            f"{share:.0%} of the texts follow a prompt that the other side lacks, the first of them on the {word} "
            "side. What differs may then be the prompts and not the answers: give both the same prompts, as pairs.",
            share,
            example or "no prompt",
        )


def name_in_prompts(sides: Sides) -> Iterator[Advice]:
    """A word of the set's name that stands in prompts of one side only."""
    for word in {word for word in words_of(sides.name.replace("_", " ")) if len(word) > 3}:
        pattern = re.compile(rf"\b{re.escape(word)}\b", re.I)
        hits = [[prompt for prompt, _ in texts if pattern.search(prompt)] for _, texts in sides.both()]
        if bool(hits[0]) != bool(hits[1]):
            side, with_it = ("positive", hits[0]) if hits[0] else ("negative", hits[1])
            yield Advice(
                "name_in_prompts",
                f"“{word}” stands in {count(len(with_it), 'prompt')} of the {side} side and in none of the other. The "
                "prompt then asks for what the answers are to show: use prompts that do not name it, or name it on "
                "both sides.",
                len(with_it),
                with_it[0],
                serious=True,
            )


def language_mix(sides: Sides) -> Iterator[Advice]:
    """Sides in different languages, and sides in several."""
    shares: list[dict[str, float]] = []
    texts_in: list[dict[str, str]] = []
    for _, texts in sides.both():
        told = [(language, text) for _, text in texts if (language := language_of(text))]
        counts = Counter(language for language, _ in told)
        shares.append({name: n / len(told) for name, n in counts.items()} if told else {})
        texts_in.append(dict(reversed(told)))
    if not all(shares):
        return
    unlike = max(
        {*shares[0], *shares[1]}, key=lambda name: (abs(shares[0].get(name, 0.0) - shares[1].get(name, 0.0)), name)
    )
    pair = [side.get(unlike, 0.0) for side in shares]
    if abs(pair[0] - pair[1]) >= UNLIKE:
        yield Advice(
            "language_mix",
            f"{pair[0]:.0%} of the positive and {pair[1]:.0%} of the negative texts are {unlike}, as far as their "
            "words tell. Unless the language is the behavior, write both sides in the same one.",
            pair[0] - pair[1],
            texts_in[0 if pair[0] > pair[1] else 1][unlike],
        )
        return
    for (word, _), side, examples in zip(sides.both(), shares, texts_in, strict=True):
        most = max(side, key=lambda name: side[name])
        rest = 1 - side[most]
        if rest >= MIXED:
            other = max((name for name in side if name != most), key=lambda name: side[name])
            yield Advice(
                "language_mix",
                f"{rest:.0%} of the {word} texts are in another language than {most}, which most are in. A vector then "
                "mixes what differs between languages with the behavior: keep to one language.",
                rest,
                examples[other],
            )


CHECKS: tuple[Callable[[Sides], Iterator[Advice]], ...] = (
    empty_answers,
    same_on_both_sides,
    leakage,
    name_in_prompts,
    prompts_that_differ,
    length_difference,
    one_sided_tokens,
    language_mix,
    duplicates,
    too_few_texts,
)
