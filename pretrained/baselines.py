"""How few bits a byte needs without a neural network: a trigram model of the same tokens, and xz.

Why: bits per byte of a small language model mean little without something to hold them against.

    trigram = Trigram(np.load("train.npy"), vocabulary); trigram.bits(ids)
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable

import numpy as np


class Trigram:
    """Token trigrams with Witten–Bell interpolation down to the uniform distribution.

    ``p(w | c) = (n(c w) + T(c)·p(w | c')) / (n(c) + T(c))`` with T(c) the number of distinct tokens
    seen after the context c, and c' the context without its first token (Witten & Bell 1991).
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        stream = tokens.astype(np.int64)
        self.unigrams = np.bincount(stream, minlength=vocabulary)
        self.orders = [self._counts(stream, length) for length in (2, 3)]

    def _key(self, stream: np.ndarray, length: int) -> np.ndarray:
        """One number for each run of ``length`` tokens."""
        key = np.zeros(len(stream) - length + 1, dtype=np.int64)
        for n in range(length):
            key = key * self.vocabulary + stream[n : len(stream) - length + 1 + n]
        return key

    def _counts(self, stream: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
        """Sorted n-grams and their counts; sorted contexts with their counts and distinct followers."""
        grams, counts = np.unique(self._key(stream, length), return_counts=True)
        contexts, first = np.unique(grams // self.vocabulary, return_index=True)
        return grams, counts, contexts, np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))

    def bits(self, ids: np.ndarray) -> float:
        """Bits of all tokens of a text but its first, under the model."""
        stream = np.concatenate([ids[:1], ids]).astype(np.int64)  # a context of two for the second token
        words = stream[2:]
        seen = np.count_nonzero(self.unigrams)
        p = (self.unigrams[words] + seen / self.vocabulary) / (self.unigrams.sum() + seen)
        for length, (grams, counts, contexts, totals, kinds) in zip((2, 3), self.orders, strict=True):
            key = self._key(stream, length)[-len(words) :] if len(words) else words
            n = _look_up(grams, counts, key)
            total, kind = (_look_up(contexts, values, key // self.vocabulary) for values in (totals, kinds))
            known = total > 0
            p[known] = ((n + kind * p) / np.maximum(total + kind, 1))[known]
        return float(-np.log2(p).sum())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 for one that is not there."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of the texts, one after the other, compressed by xz at its strongest."""
    data = "\n".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(data))
