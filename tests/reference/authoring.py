"""Contrast data looked at by loops: pairs of similar texts, lengths, words of one side."""

from __future__ import annotations

import math
import re


def runs(text, size=3):
    """The runs of three words of a text, or the one that a shorter text is."""
    words = re.findall(r"\w+", text.casefold())
    if len(words) <= size:
        return {tuple(words)}
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def similar_pairs(texts, least):
    """(i, j, share) of every two texts that share at least so much, by comparing all with all."""
    found = []
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            a, b = runs(texts[i]), runs(texts[j])
            share = len(a & b) / len(a | b)
            if share >= least:
                found.append((i, j, share))
    return found


def cohens_d(a, b):
    """(mean a − mean b) over the root of the mean of the unbiased variances."""
    means, variances = [], []
    for side in (a, b):
        mean = sum(side) / len(side)
        means.append(mean)
        variances.append(sum((x - mean) ** 2 for x in side) / (len(side) - 1))
    return (means[0] - means[1]) / math.sqrt(sum(variances) / 2)


def log_odds(a, n, b, m):
    """The log of the ratio of odds of a in n and b in m, ½ added to each of the four counts."""
    return math.log(((a + 0.5) / (n - a + 0.5)) / ((b + 0.5) / (m - b + 0.5)))
