"""A stand-in for a model of embeddings."""

from __future__ import annotations

import zlib

import torch


class BagOfWords:
    """Stands for a sentence-transformers model: counts of hashed words. It notes what it was given."""

    def __init__(self, width=48):
        self.width, self.given = width, []

    def encode(self, texts, **_):
        self.given += texts
        rows = torch.zeros(len(texts), self.width)
        for row, text in zip(rows, texts, strict=True):
            row[0] = 0.1  # no text is the zero vector
            for word in text.lower().split():
                row[zlib.crc32(word.strip('.,!?"').encode()) % self.width] += 1
        return rows
