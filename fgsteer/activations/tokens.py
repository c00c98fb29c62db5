"""What each token of a text is: everything that turns texts into token ids is here.

A row of ids is made of spans, in this order:

    start     special tokens before the text: BOS, or EOS in its place
    prompt    what the completion follows
    content   the completion, or the whole text where there is no prompt
    tail      what a chat template writes after the content of the last message

EOS that a tokenizer appends is left out: nothing before it sees it, and no generation should follow it.

    with TokenReader(tokenizer, rule="answer") as reader:
        for rows in reader.rows([("2 + 2 =", "4", True)]): ...
    ids, mask = encode_prompts(tokenizer, ["I think", [{"role": "user", "content": "Hello"}]])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fgsteer.data.chat import Text
from fgsteer.data.contrasts import check_text
from fgsteer.data.rendering import Rendered, render, render_prompt
from fgsteer.errors import DataError, FgsteerWarning
from fgsteer.errors.checks import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenRule = Literal["all", "last", "answer", "letter", "tail"] | int
Triple = tuple[Text, Text, bool]  # prompt, completion, and whether it is a positive
T = TypeVar("T")
TEXTS_PER_CHUNK = 1024  # texts tokenised and sorted by length together: bounds memory, not results


@dataclass(frozen=True)
class TokenRow:
    """One text as token ids, with the indices that are read.

    ``index`` is its place in the input, ``where`` how messages name it. ``start`` special tokens stand before the
    text; ``prompt_length`` tokens before its completion: what ``generate`` would have been given, at least one. A
    text without a prompt is one as a whole, or, where its tokens are scored, none but the special tokens
    before it, its first word where there are none.
    """

    ids: Sequence[int]
    selected: Sequence[int]
    index: int
    positive: bool = True
    where: str = ""
    start: int = 1
    prompt_length: int = 1


@dataclass(frozen=True)
class Spans:
    """Token ids, and the index at which the text, its completion (None: not known) and its tail begin."""

    ids: list[int]
    start: int
    answer: int | None
    tail: int


def split_into_chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of TEXTS_PER_CHUNK items, the last of what is left."""
    rest = iter(items)
    while window := list(islice(rest, TEXTS_PER_CHUNK)):
        yield window


def special_starts(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that are no word where a text begins with them: every special token but that of unknown words."""
    return frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before texts: BOS, or EOS where a tokenizer has no BOS. Raises DataError without either."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise DataError(
            "a tokenizer without a BOS and an EOS token",
            "one of them, to put before texts as this SAE was trained",
            "set tokenizer.bos_token, or pass prepend_bos=False",
        )
    return int(found)


class _Encoder:
    """Strings to ids with the spans they are made of; ``prepend_bos`` None leaves BOS to the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None) -> None:
        if prepend_bos not in (None, True, False):
            raise DataError(f"prepend_bos={prepend_bos!r}", "True, False, or None for what the tokenizer does")
        self.tokenizer, self.prepend_bos = tokenizer, prepend_bos
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self.specials = special_starts(tokenizer)
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        words = [place for place, special in enumerate(mask) if not special] or [len(mask)]
        self.before, self.after = words[0], len(mask) - 1 - words[-1]  # special tokens that the tokenizer adds

    def spans(self, texts: Sequence[Rendered]) -> list[Spans]:
        """The spans of each text, in their order."""
        found: dict[int, Spans] = {}
        for special in (True, False):
            places = [place for place, text in enumerate(texts) if text.special == special]
            if not places:
                continue
            # not verbose: no warning of a text longer than the model's window, which is cut to it
            encoded = self.tokenizer(
                [texts[place].text for place in places],
                add_special_tokens=special,
                return_offsets_mapping=self.fast,
                verbose=False,
            )
            for row, place in enumerate(places):
                offsets = encoded["offset_mapping"][row] if self.fast else None
                found[place] = self._spans(texts[place], list(encoded["input_ids"][row]), offsets)
        return [found[place] for place in range(len(texts))]

    def _spans(self, text: Rendered, ids: list[int], offsets: list[tuple[int, int]] | None) -> Spans:
        ids, offsets, added = self._framed(ids, offsets, text.special)
        start = added or int(bool(ids) and ids[0] in self.specials)

        def first(character: int, edge: int) -> int:
            """The first token whose end (edge 1) is past a character, or whose beginning (edge 0) is not before it."""
            if offsets is None:
                return self._shared(ids, text.text[:character], text.special, 1 - edge)
            places = range(added, len(ids))
            return next((p for p in places if offsets[p][edge] >= character + edge), len(ids))

        answer = text.answer and first(text.answer, 1)
        tail = len(ids) if text.end == len(text.text) else first(text.end, 0)
        return Spans(ids, start, start if answer == 0 else answer, tail)

    def _framed(
        self, ids: list[int], offsets: list[tuple[int, int]] | None, special: bool
    ) -> tuple[list[int], list[tuple[int, int]] | None, int]:
        """Ids with BOS as asked for, never twice, and without EOS behind them; and how many of them were added."""
        drop, insert, added = 0, 0, self.before if special else 0
        if special:
            ids = ids[: len(ids) - self.after]
            if added and ids[added : 2 * added] == ids[:added]:  # the text brings its own, as a rendered chat does
                drop = added
        if self.prepend_bos is not None:
            bos = bos_id(self.tokenizer)
            leads = ids[drop : drop + 1] == [bos]
            if self.prepend_bos and not leads:
                insert = 1
            elif not self.prepend_bos and leads and added and not drop:
                drop, added = 1, added - 1
        ids = [bos_id(self.tokenizer)] * insert + ids[drop:]
        if offsets is not None:
            offsets = [(0, 0)] * insert + offsets[drop:]
        return ids, offsets, added + insert

    def _shared(self, ids: Sequence[int], text: str, special: bool, spanning: int) -> int:
        """How many of ids the beginning of their text has, by a tokenizer that does not tell where tokens stand.

        One that spans the beginning's end counts ``spanning``, 0 or 1.
        """
        own = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        begin = self._framed(own, None, special)[0]
        same = next((n for n, (x, y) in enumerate(zip(begin, ids, strict=False)) if x != y), min(len(begin), len(ids)))
        return same if same == len(begin) else min(same + spanning, len(ids))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], *, prepend_bos: bool | None = None
) -> tuple[Int[Tensor, "prompts tokens"], Int[Tensor, "prompts tokens"]]:
    """Ids and attention mask, each (prompts, tokens), of prompts to be continued, padded on the left.

    Prompts are strings or chat messages; BOS stands before each once at most, and EOS behind none. Raises DataError
    for no prompt, one without a token, or several with a tokenizer that cannot pad.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise DataError(f"prompts {prompts!r:.40}", "a list of at least one prompt")
    rows = _Encoder(tokenizer, prepend_bos).spans([render_prompt(tokenizer, prompt) for prompt in prompts])
    for number, row in enumerate(rows):
        if not row.ids:
            raise DataError(
                f"prompt {number} is empty, and this tokenizer puts no BOS before a text",
                "at least one token to go on from",
                "write a word, or the text of the token that your model's texts begin with",
            )
    if tokenizer.pad_token_id is None and len(rows) > 1:
        raise DataError(
            "a tokenizer without a pad token", "one that can pad", "set tokenizer.pad_token = tokenizer.eos_token"
        )
    return pad([row.ids for row in rows], tokenizer.pad_token_id or 0, side="left")


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right"
) -> tuple[Int[Tensor, "rows longest"], Int[Tensor, "rows longest"]]:
    """(ids, attention mask) of rows filled up to the longest."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad_id, side)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    place = torch.arange(ids.shape[1])
    return ids, (place < lengths if side == "right" else place >= ids.shape[1] - lengths).long()


def _letter_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answer: int, where: str) -> int:
    """Index of the one completion token that is the completion's letter. Raises DataError."""
    pieces = [tokenizer.decode([i]) for i in ids[answer:]]
    found = [n for n, piece in enumerate(pieces) if len(piece.strip()) == 1 and piece.strip().isalpha()]
    if len(found) != 1:
        raise DataError(
            f"{where} ends in tokens {pieces}",
            "exactly one token that is a single letter",
            'use tokens="answer" or rows whose letter is a token of its own',
        )
    return answer + found[0]


@dataclass(eq=False)
class TokenReader:
    """Turns texts into token rows by one rule, and says at its end how many of them were too long.

    ``rule``: all, last (of the content), answer (the completion's content), letter (its one token that is a single
    letter), tail (what a chat template writes after the content), or an index into the row, special tokens
    included. ``bos`` reads the special token before a text too. ``prepend_bos``: True puts BOS (EOS
    where there is none) before every text, False takes the tokenizer's away, None leaves it to the tokenizer.
    Rows keep their first ``max_tokens`` tokens, and never more than the ``window`` of the model. ``scored`` leaves
    out what no token stands before; ``skip_empty`` leaves out texts with nothing to read.
    """

    tokenizer: PreTrainedTokenizerBase
    rule: TokenRule = "all"
    bos: bool = False
    prepend_bos: bool | None = None
    max_tokens: int | None = None
    window: int | None = None
    joint: str | None = None
    skip_empty: bool = False
    scored: bool = False
    texts: int = 0
    too_long: int = 0

    def __post_init__(self) -> None:
        rule, least = self.rule, self.max_tokens
        if isinstance(rule, bool) or not (rule in ("all", "last", "answer", "letter", "tail") or isinstance(rule, int)):
            raise DataError(f"tokens={rule!r}", "all, last, answer, letter, tail or the index of a token")
        if not isinstance(self.bos, bool):
            raise DataError(f"bos={self.bos!r}", "True or False")
        if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 1):
            raise DataError(f"max_tokens={least!r}", "a whole number of tokens, at least 1")

    def __enter__(self) -> TokenReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.too_long:
            warn(
                f"{self.too_long} of {self.texts} texts are longer than the model's window of {self.window} tokens; "
                "only what fits was read. Shorten or split them, or say how much to read with max_tokens",
                FgsteerWarning,
            )

    @cached_property
    def _encoder(self) -> _Encoder:
        return _Encoder(self.tokenizer, self.prepend_bos)

    def rows(self, texts: Iterable[Triple], first: int = 0) -> Iterator[list[TokenRow]]:
        """Windows of rows sorted by length, from (prompt, completion, positive), numbered from ``first``.

        Raises DataError naming the text.
        """
        for window in split_into_chunks(enumerate(texts, first)):
            rendered = [self._rendered(index, prompt, completion) for index, (prompt, completion, _) in window]
            rows = []
            for (index, (_, _, positive)), text, spans in zip(
                window, rendered, self._encoder.spans(rendered), strict=True
            ):
                where = f"text {index} ({'positive' if positive else 'negative'}) {text.text!r:.60}"
                whole, spans = len(spans.ids), self._cut(spans)
                selected = self.select(spans, where)
                if selected:
                    length = self._prompt_length(spans)
                    rows.append(TokenRow(spans.ids, selected, index, positive, where, spans.start, length))
                elif not self.skip_empty:
                    if len(spans.ids) < whole:
                        raise DataError(
                            f"{where} has {whole} tokens, and none of the first {len(spans.ids)}, which the model's "
                            f"window or max_tokens leaves, is to be read under tokens={self.rule!r}",
                            "a text that is not cut before what is read",
                            "shorten its prompt",
                        )
                    raise DataError(
                        f"{where} has {len(spans.ids)} token(s) and none to read under tokens={self.rule!r}",
                        "at least one token besides the special one before the text",
                        "drop the text, choose another rule, or pass bos=True",
                    )
            self.texts += len(window)
            rows.sort(key=lambda row: (len(row.ids), row.index))
            yield rows

    def _rendered(self, index: int, prompt: Text, completion: Text) -> Rendered:
        where = f"text {index}"
        prompt = check_text(prompt, f"the prompt of {where}", empty=True)
        return render(self.tokenizer, prompt, check_text(completion, where, empty=True), self.joint)

    def _cut(self, spans: Spans) -> Spans:
        """The spans without what is past ``max_tokens`` or the window."""
        length = len(spans.ids)
        limit = min(length, self.max_tokens or length)
        if self.window is not None and limit > self.window:
            limit = self.window
            self.too_long += 1
        return Spans(spans.ids[:limit], spans.start, spans.answer, min(limit, spans.tail))

    def _prompt_length(self, spans: Spans) -> int:
        answer = spans.answer if spans.answer != spans.start else None
        if answer is None:
            return max(1, spans.start) if self.scored else len(spans.ids)
        return min(answer, len(spans.ids))

    def select(self, spans: Spans, where: str) -> list[int]:
        """Indices of the tokens that the rule reads, maybe none. Raises DataError."""
        length, rule = len(spans.ids), self.rule
        first = max(0 if self.bos else spans.start, int(self.scored))
        if rule == "all":
            return list(range(first, length))
        if rule == "tail":
            return list(range(max(first, spans.tail), length))
        if rule == "last":
            return [spans.tail - 1] if spans.tail > first else []
        if isinstance(rule, int):
            place = rule if rule >= 0 else length + rule
            if 0 <= place < first:
                raise DataError(
                    f"tokens={rule} is the special token before {where}", "a later token", "pass bos=True to read it"
                )
            return [place] if first <= place < length else []
        if spans.answer is None:
            raise DataError(
                f"{where} in a chat template that rewrites earlier turns",
                "one under which the prompt is where the conversation begins",
                'use tokens="last", or pass the prompt and the answer as strings',
            )
        if rule == "letter":
            ids = spans.ids[: spans.tail]
            return [_letter_token(self.tokenizer, ids, spans.answer, where)] if spans.answer < len(ids) else []
        return list(range(max(first, 0 if self.bos and spans.answer == spans.start else spans.answer), spans.tail))
