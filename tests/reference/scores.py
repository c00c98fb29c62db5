"""The selection scores from raw examples (n, K) of the two sides, feature by feature, in plain Python floats."""

import math


def _columns(pos, neg):
    """Per feature, the values of both sides (helper, no equation)."""
    for j in range(len(pos[0])):
        yield [float(row[j]) for row in pos], [float(row[j]) for row in neg]


def _mean(values):
    """Arithmetic mean (helper, no equation)."""
    return sum(values) / len(values)


def _squares(values):
    """Sum of squared deviations from the mean, in two passes (helper, no equation)."""
    mean = _mean(values)
    return sum((v - mean) ** 2 for v in values)


def _quotient(top, bottom):
    """top / bottom, signed infinity over zero, 0 for 0/0 (fgsteer's convention)."""
    if top == 0:
        return 0.0
    return math.copysign(math.inf, top) if bottom == 0 else top / bottom


def mean_difference(pos, neg):
    """mean+ - mean- (arXiv 2501.09929 step 1)."""
    return [_mean(a) - _mean(b) for a, b in _columns(pos, neg)]


def frequency(pos, neg):
    """Difference of the shares of examples that fire, times the larger side (arXiv 2505.20322, equal sides: counts)."""
    larger = max(len(pos), len(neg))
    return [larger * (sum(v > 0 for v in a) / len(a) - sum(v > 0 for v in b) / len(b)) for a, b in _columns(pos, neg)]


def welch_t(pos, neg):
    """(mean+ - mean-) / sqrt(s2+/n+ + s2-/n-), s2 unbiased (Welch 1947)."""
    out = []
    for a, b in _columns(pos, neg):
        variance_a, variance_b = _squares(a) / (len(a) - 1), _squares(b) / (len(b) - 1)
        out.append(_quotient(_mean(a) - _mean(b), math.sqrt(variance_a / len(a) + variance_b / len(b))))
    return out


def f_statistic(pos, neg):
    """Mean square between the two groups (1 degree of freedom) over that within (N - 2); sign of mean+ - mean-."""
    out = []
    for a, b in _columns(pos, neg):
        grand = _mean(a + b)
        between = sum(len(side) * (_mean(side) - grand) ** 2 for side in (a, b)) / (2 - 1)
        within = sum(_squares(side) for side in (a, b)) / (len(a) + len(b) - 2)
        difference = _mean(a) - _mean(b)
        out.append(_quotient(math.copysign(between, difference) if difference != 0 else 0.0, within))
    return out


def pearson(pos, neg):
    """Correlation of value and label (1 or 0) over all examples, by its definition; 0 for a constant."""
    out = []
    for a, b in _columns(pos, neg):
        values, labels = a + b, [1.0] * len(a) + [0.0] * len(b)
        x, y = _mean(values), _mean(labels)
        covariance = sum((v - x) * (label - y) for v, label in zip(values, labels, strict=True))
        spread = math.sqrt(_squares(values) * _squares(labels))
        out.append(covariance / spread if len(set(values)) > 1 else 0.0)
    return out


def mutual_information(pos, neg):
    """sum over (fired, side) of p ln(p / (p_fired p_side)), signed by which side's share of firing is larger."""
    out = []
    for a, b in _columns(pos, neg):
        events = [(v > 0, "+") for v in a] + [(v > 0, "-") for v in b]
        total = len(events)
        information = 0.0
        for fired in (True, False):
            for side in "+-":
                joint = sum(e == (fired, side) for e in events) / total
                p_fired = sum(e[0] == fired for e in events) / total
                p_side = sum(e[1] == side for e in events) / total
                if joint > 0:
                    information += joint * math.log(joint / (p_fired * p_side))
        up, down = sum(v > 0 for v in a) * len(b), sum(v > 0 for v in b) * len(a)
        out.append(information * ((up > down) - (up < down)))
    return out


def output_score(logits, lens, k):
    """(1 - r/|V|) p of a feature, the best rank and probability of its k top lens tokens (arXiv 2505.20063)."""
    vocabulary = range(len(logits))
    top = sorted(vocabulary, key=lambda t: -lens[t])[:k]
    peak = max(logits)
    total = sum(math.exp(v - peak) for v in logits)
    order = sorted(vocabulary, key=lambda t: -logits[t])
    best_rank = min(order.index(t) for t in top)
    best_probability = max(math.exp(logits[t] - peak) / total for t in top)
    return (1 - best_rank / len(logits)) * best_probability
