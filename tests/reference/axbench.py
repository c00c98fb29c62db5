"""AxBench's rules as plain loops, written apart from the package."""

from __future__ import annotations

import math


def harmonic(ratings):
    """Three ratings to one: 3/(1/a + 1/b + 1/c), and 0 with a 0."""
    total = 0.0
    for rating in ratings:
        if rating == 0:
            return 0.0
        total += 1.0 / rating
    return 3.0 / total


def area(positives, negatives):
    """The share of pairs in which the positive reads more, a tie counting half."""
    won = 0.0
    for p in positives:
        for n in negatives:
            won += 1.0 if p > n else 0.5 if p == n else 0.0
    return won / (len(positives) * len(negatives))


def roc_threshold(positives, negatives):
    """The first threshold of the falling list [inf, values...] at which tpr − fpr is largest; None for inf."""
    values = sorted(set(positives) | set(negatives), reverse=True)
    gains = [0.0]
    for value in values:
        tpr = sum(1 for p in positives if p >= value) / len(positives)
        fpr = sum(1 for n in negatives if n >= value) / len(negatives)
        gains.append(tpr - fpr)
    first = gains.index(max(gains))
    return None if first == 0 else values[first - 1]


def best_factor(factors, scores, instructions):
    """(factor, mean of the other half): groups in rising order of the factor, and the first maximum."""
    first = instructions - round(instructions / 2)
    best = None
    for factor in sorted(factors):
        row = scores[factor]
        mean = sum(row[:first]) / first
        if best is None or mean > best[1]:
            best = (factor, mean)
    rest = scores[best[0]][first:]
    return best[0], sum(rest) / len(rest)


def unit_mean_difference(positives, negatives):
    """Each text a list of token vectors: the mean over all tokens of one side less that of the other, of norm 1."""
    means = []
    for texts in (positives, negatives):
        total, count = None, 0
        for tokens in texts:
            for token in tokens:
                values = [float(x) for x in token]
                total = values if total is None else [a + b for a, b in zip(total, values, strict=True)]
                count += 1
        means.append([x / count for x in total])
    difference = [a - b for a, b in zip(*means, strict=True)]
    norm = math.sqrt(sum(x * x for x in difference))
    return [x / norm for x in difference]
