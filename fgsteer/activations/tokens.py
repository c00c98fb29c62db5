"""What each token of a text is: everything that turns texts into token ids is here.

Which tokens of a forward pass are steered is decided in ``fgsteer/steering/positions.py``.

A row of ids is made of these parts, in this order:

    start     special tokens before the text: BOS, or EOS in its place
    prompt    what comes before the completion
    content   the completion, or the whole text where there is no prompt
    tail      what a chat template writes after the content of the last message

An EOS token that a tokenizer appends is left out: no token before it sees it, and no generation should follow it.

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

from fgsteer.activations.token_rules import TOKEN_RULES, TokenRule
from fgsteer.data.chat import Text, check_text
from fgsteer.data.rendering import Rendered, render, render_prompt
from fgsteer.errors import DataError, FgsteerWarning
from fgsteer.errors.checks import warn
from fgsteer.errors.wording import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LabelledText = tuple[Text, Text, bool]  # prompt, completion, and whether it is a positive example
T = TypeVar("T")
TEXTS_PER_CHUNK = 1024  # tokenised and sorted by length together: bounds memory, not results


@dataclass(frozen=True)
class TokenRow:
    """One text as token ids, with the indices of those that are read.

    Attributes:
        ids: The token ids.
        selected: Indices into ``ids`` of the tokens that are read.
        index: The number of the text in the input.
        positive: Whether the text is a positive example.
        where: How messages name the text.
        start: How many special tokens stand before the text.
        prompt_length: Number of tokens before the completion, at least 1. Without a prompt: the length of the whole
            row or, when its tokens are scored, the number of special tokens before the text (1 where there are none).
    """

    ids: Sequence[int]
    selected: Sequence[int]
    index: int
    positive: bool = True
    where: str = ""
    start: int = 1
    prompt_length: int = 1


@dataclass(frozen=True)
class TokenizedText:
    """A text as token ids, with the indices at which its parts begin.

    Attributes:
        ids: The token ids.
        start: Where the text begins, after the special tokens.
        completion_start: Where its completion begins; None where that is not known.
        tail: Where what a chat template writes after the content begins.
    """

    ids: list[int]
    start: int
    completion_start: int | None
    tail: int


def split_into_chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield lists of TEXTS_PER_CHUNK items; the last one may be shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, TEXTS_PER_CHUNK)):
        yield chunk


def special_starts(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the special-token ids, without that of the unknown token."""
    return frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands before texts: BOS, or EOS without a BOS. Raises DataError without either."""
    token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token_id is None:
        raise DataError(
            "one that has neither",
            "a tokenizer with a BOS or an EOS token, to put before texts as in the SAE's training",
            "set tokenizer.bos_token, or pass prepend_bos=False",
        )
    return int(token_id)


class _Encoder:
    """Turns strings into ids, with the parts that they consist of; ``prepend_bos`` None leaves BOS to the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None) -> None:
        if prepend_bos not in (None, True, False):
            raise DataError(f"prepend_bos = {prepend_bos!r}", "True, False, or None for what the tokenizer does")
        self.tokenizer, self.prepend_bos = tokenizer, prepend_bos
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self.specials = special_starts(tokenizer)
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        words = [index for index, special in enumerate(mask) if not special] or [len(mask)]
        self.before, self.after = words[0], len(mask) - 1 - words[-1]  # special tokens that the tokenizer adds

    def encode(self, texts: Sequence[Rendered]) -> list[TokenizedText]:
        """Return the ids and the parts of each text, in their order."""
        tokenized: dict[int, TokenizedText] = {}
        for special in (True, False):
            indices = [index for index, text in enumerate(texts) if text.special == special]
            if not indices:
                continue
            # not verbose: no warning of a text longer than the model's window, which is cut to it
            encoded = self.tokenizer(
                [texts[index].text for index in indices],
                add_special_tokens=special,
                return_offsets_mapping=self.fast,
                verbose=False,
            )
            for row, index in enumerate(indices):
                offsets = encoded["offset_mapping"][row] if self.fast else None
                tokenized[index] = self._find_parts(texts[index], list(encoded["input_ids"][row]), offsets)
        return [tokenized[index] for index in range(len(texts))]

    def _find_parts(self, text: Rendered, ids: list[int], offsets: list[tuple[int, int]] | None) -> TokenizedText:
        """Find the parts of one text in its ids."""
        ids, offsets, added = self._adjust_bos_and_eos(ids, offsets, text.special)
        start = added or int(bool(ids) and ids[0] in self.specials)

        def first(character: int, edge: int) -> int:
            """Find the first token that ends after a character (edge 1), or begins at or after it (edge 0)."""
            if offsets is None:
                return self._count_shared(ids, text.text[:character], text.special, 1 - edge)
            return next((i for i in range(added, len(ids)) if offsets[i][edge] >= character + edge), len(ids))

        completion_start = text.completion_start and first(text.completion_start, 1)
        tail = len(ids) if text.end == len(text.text) else first(text.end, 0)
        return TokenizedText(ids, start, start if completion_start == 0 else completion_start, tail)

    def _adjust_bos_and_eos(
        self, ids: list[int], offsets: list[tuple[int, int]] | None, special: bool
    ) -> tuple[list[int], list[tuple[int, int]] | None, int]:
        """Return ids with BOS as asked for, never twice, and no EOS after them; and how many of them were added."""
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

    def _count_shared(self, ids: Sequence[int], text: str, special: bool, spanning: int) -> int:
        """Count the ids that the beginning of their text has, for a tokenizer that does not tell where tokens stand.

        A token that spans the beginning's end counts ``spanning``, 0 or 1.
        """
        own = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        begin = self._adjust_bos_and_eos(own, None, special)[0]
        same = next((n for n, (x, y) in enumerate(zip(begin, ids, strict=False)) if x != y), min(len(begin), len(ids)))
        return same if same == len(begin) else min(same + spanning, len(ids))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], *, prepend_bos: bool | None = None
) -> tuple[Int[Tensor, "prompts tokens"], Int[Tensor, "prompts tokens"]]:
    """Encode prompts that are to be continued, padded on the left.

    BOS stands before each prompt at most once, and EOS after none.

    Args:
        tokenizer: The model's tokenizer.
        prompts: Strings or lists of chat messages.
        prepend_bos: As for ``TokenReader``.

    Returns:
        Ids and attention mask, each (prompts, tokens).

    Raises:
        DataError: There is no prompt, one has no token, or there are several and the tokenizer cannot pad.
    """
    rows = prompt_ids(tokenizer, prompts, prepend_bos=prepend_bos)
    if tokenizer.pad_token_id is None and len(rows) > 1:
        raise DataError(
            f"{len(rows)} prompts for a tokenizer without a pad token",
            "a tokenizer that can pad, or one prompt",
            "set tokenizer.pad_token = tokenizer.eos_token",
        )
    return pad(rows, tokenizer.pad_token_id or 0, side="left")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], *, prepend_bos: bool | None = None
) -> list[list[int]]:
    """The ids of each prompt, as ``encode_prompts`` pads them. Raises DataError for none, or one without a token."""
    if isinstance(prompts, str) or not len(prompts):
        raise DataError(f"prompts = {prompts!r:.40}", "a list of at least one prompt")
    rows = _Encoder(tokenizer, prepend_bos).encode([render_prompt(tokenizer, prompt) for prompt in prompts])
    for number, row in enumerate(rows):
        if not row.ids:
            raise DataError(
                f"Prompt {number} is empty, and this tokenizer puts no BOS before a text.",
                "at least one token to go on from",
                "write a word, or the text of the token that your model's texts begin with",
            )
    return [row.ids for row in rows]


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right"
) -> tuple[Int[Tensor, "rows longest"], Int[Tensor, "rows longest"]]:
    """Return (ids, attention mask), each (rows, longest), of rows filled up to the longest."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row, device="cpu") for row in rows], True, pad_id, side)
    lengths = torch.tensor([len(row) for row in rows], device="cpu")[:, None]
    place = torch.arange(ids.shape[1], device="cpu")
    return ids, (place < lengths if side == "right" else place >= ids.shape[1] - lengths).long()


def _letter_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], completion_start: int, where: str) -> int:
    """Return the index of the one completion token that is a single letter. Raises DataError."""
    pieces = [tokenizer.decode([i]) for i in ids[completion_start:]]
    letters = [n for n, piece in enumerate(pieces) if len(piece.strip()) == 1 and piece.strip().isalpha()]
    if len(letters) != 1:
        raise DataError(
            f"The completion of {where} has the tokens {pieces}.",
            "exactly one token that is a single letter",
            'use tokens="answer", or rows whose letter is a token of its own',
        )
    return completion_start + letters[0]


@dataclass(eq=False)
class TokenReader:
    """Turns texts into token rows by one rule, and warns at its end of texts that were too long.

    Attributes:
        tokenizer: The model's tokenizer.
        rule: Which tokens are read, as in ``collect``; an index counts special tokens too.
        bos: Whether the special token before a text is read too.
        prepend_bos: True puts BOS (EOS where there is none) before every text, False takes the tokenizer's away,
            None leaves it to the tokenizer.
        max_tokens: Tokens that are kept of a row, from its beginning.
        window: The model's window, in tokens; rows are cut to it.
        joint: What joins a prompt and its completion; None is a space unless one of them brings white space.
        skip_empty: Whether texts with nothing to read are left out; else they are an error.
        scored: Whether tokens are read in order to score them, which those that no token precedes cannot be.
        texts: How many texts were read.
        too_long: How many of them were longer than the window.
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
        rule, limit = self.rule, self.max_tokens
        if isinstance(rule, bool) or not (rule in TOKEN_RULES or isinstance(rule, int)):
            raise DataError(f"tokens = {rule!r}", f"{', '.join(TOKEN_RULES)} or the index of a token")
        if not isinstance(self.bos, bool):
            raise DataError(f"bos = {self.bos!r}", "True or False")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise DataError(f"max_tokens = {limit!r}", "a whole number of tokens, at least 1")

    def __enter__(self) -> TokenReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.too_long:
            warn(
                f"{self.too_long} of {self.texts} texts are longer than the model's window of {self.window} tokens. "
                "Only what fits was read. Shorten or split them, or say how much to read with max_tokens.",
                FgsteerWarning,
            )

    @cached_property
    def _encoder(self) -> _Encoder:
        return _Encoder(self.tokenizer, self.prepend_bos)

    def rows(self, texts: Iterable[LabelledText], first: int = 0) -> Iterator[list[TokenRow]]:
        """Yield chunks of rows sorted by length.

        Args:
            texts: (prompt, completion, positive) of each text.
            first: The number of the first text.

        Raises:
            DataError: A text has nothing to read under the rule; the error names the text.
        """
        for chunk in split_into_chunks(enumerate(texts, first)):
            rendered = [self._render(index, prompt, completion) for index, (prompt, completion, _) in chunk]
            rows = []
            for (index, (_, _, positive)), string, text in zip(
                chunk, rendered, self._encoder.encode(rendered), strict=True
            ):
                where = f"text {index} ({'positive' if positive else 'negative'}) {string.text!r:.60}"
                full_length, text = len(text.ids), self._cut(text)
                selected = self.select(text, where)
                if selected:
                    length = self._prompt_length(text)
                    rows.append(TokenRow(text.ids, selected, index, positive, where, text.start, length))
                elif not self.skip_empty:
                    raise self._nothing_to_read(where, len(text.ids), full_length)
            self.texts += len(chunk)
            rows.sort(key=lambda row: (len(row.ids), row.index))
            yield rows

    def _nothing_to_read(self, where: str, length: int, full_length: int) -> DataError:
        """Make the error of a text of which the rule selects no token."""
        if length < full_length:
            return DataError(
                f"tokens={self.rule!r} selects none of the first {length} of {full_length} tokens of {where}, "
                "which are what the model's window or max_tokens leaves.",
                "a text that is not cut before what is read",
                "shorten its prompt",
            )
        return DataError(
            f"tokens={self.rule!r} selects none of the {count(length, 'token')} of {where}.",
            "at least one token besides the special one before the text",
            "drop the text, choose another rule, or pass bos=True",
        )

    def _render(self, index: int, prompt: Text, completion: Text) -> Rendered:
        """Render a text as one string. Raises DataError."""
        where = f"text {index}"
        prompt = check_text(prompt, f"the prompt of {where}", empty=True)
        return render(self.tokenizer, prompt, check_text(completion, where, empty=True), self.joint)

    def _cut(self, text: TokenizedText) -> TokenizedText:
        """Return the text without what is past ``max_tokens`` or the window."""
        length = len(text.ids)
        limit = min(length, self.max_tokens or length)
        if self.window is not None and limit > self.window:
            limit = self.window
            self.too_long += 1
        return TokenizedText(text.ids[:limit], text.start, text.completion_start, min(limit, text.tail))

    def _prompt_length(self, text: TokenizedText) -> int:
        """Count the tokens before the completion, as ``TokenRow.prompt_length`` has them."""
        if text.completion_start in (None, text.start):
            return max(1, text.start) if self.scored else len(text.ids)
        return min(text.completion_start, len(text.ids))

    def select(self, text: TokenizedText, where: str) -> list[int]:
        """Return the indices of the tokens that the rule selects, maybe none. Raises DataError."""
        length, rule = len(text.ids), self.rule
        first = max(0 if self.bos else text.start, int(self.scored))
        if rule == "all":
            return list(range(first, length))
        if rule == "tail":
            return list(range(max(first, text.tail), length))
        if rule == "last":
            return [text.tail - 1] if text.tail > first else []
        if isinstance(rule, int):
            index = rule if rule >= 0 else length + rule
            if 0 <= index < first:
                raise DataError(
                    f"tokens = {rule}, which is the special token before {where}",
                    "the index of a later token",
                    "pass bos=True to read the special token",
                )
            return [index] if first <= index < length else []
        completion_start = text.completion_start
        if completion_start is None:
            raise DataError(
                f"The chat template rewrites the earlier turns of {where}, so that its answer cannot be told apart.",
                "a template under which a conversation begins with its prompt",
                'use tokens="last", or pass the prompt and the answer as strings',
            )
        if rule == "letter":
            ids = text.ids[: text.tail]
            return [_letter_token(self.tokenizer, ids, completion_start, where)] if completion_start < len(ids) else []
        return list(
            range(max(first, 0 if self.bos and completion_start == text.start else completion_start), text.tail)
        )
