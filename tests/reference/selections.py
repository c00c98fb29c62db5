"""Selections of features as loops: a feature at a time, a text at a time."""

import math


def mutual_information(fired, positive):
    """Σ p(f, s) log(p(f, s)/(p(f) p(s))) over whether a feature fired and the side, in nats."""
    n, total = len(fired), 0.0
    for f in (True, False):
        for s in (True, False):
            both = sum(a == f and b == s for a, b in zip(fired, positive, strict=True)) / n
            one = sum(a == f for a in fired) / n
            other = sum(b == s for b in positive) / n
            if both:
                total += both * math.log(both / (one * other))
    return total


def up_to_share(values, share):
    """Ids of the largest values, as long as their sum is at most a share of the sum of all; at least one."""
    order = sorted(range(len(values)), key=lambda j: (-values[j], j))
    chosen, total = [], 0.0
    for j in order:
        total += values[j]
        if values[j] > 0 and (not chosen or total <= share * sum(values)):
            chosen.append(j)
    return chosen


def pearson(values, positive):
    """r of numbers with the side; 0 where one does not vary."""
    labels = [1.0 if p else 0.0 for p in positive]
    n = len(values)
    a, b = sum(values) / n, sum(labels) / n
    covariance = sum((x - a) * (y - b) for x, y in zip(values, labels, strict=True))
    spread = sum((x - a) ** 2 for x in values) * sum((y - b) ** 2 for y in labels)
    return 0.0 if not spread else covariance / math.sqrt(spread)


def f_statistic(values, positive):
    """F of a one-way analysis of variance of two sides."""
    sides = [[v for v, p in zip(values, positive, strict=True) if p == s] for s in (True, False)]
    means = [sum(side) / len(side) for side in sides]
    n = len(values)
    all_mean = sum(values) / n
    between = sum(len(side) * (m - all_mean) ** 2 for side, m in zip(sides, means, strict=True))
    within = sum((v - m) ** 2 for side, m in zip(sides, means, strict=True) for v in side) / (n - 2)
    return 0.0 if not between else math.inf if not within else between / within
