"""Evaluation figures in plain Python floats: one text, one token and one number at a time."""

import math

import torch


def next_token_log_probabilities(model, ids, block=None, vector=None):
    """At each place t of one row run alone, log p(. | ids[..t]); the vector is added to a block from place 1 on."""

    def hook(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for place in range(1, hidden.shape[1]):
            hidden[0, place] = hidden[0, place] + vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(hook) if vector is not None else None
    try:
        with torch.no_grad():
            logits = model(torch.tensor([list(ids)])).logits[0].tolist()
    finally:
        if handle is not None:
            handle.remove()
    out = []
    for row in logits:
        peak = max(row)
        log_total = peak + math.log(sum(math.exp(v - peak) for v in row))
        out.append([v - log_total for v in row])
    return out


def log_probability(log_p, ids, first):
    """Sum of log p(ids[t] | ids[..t-1]) over t >= first."""
    return sum(log_p[t - 1][ids[t]] for t in range(max(1, first), len(ids)))


def kl(log_p, log_q, length):
    """KL(p || q) at each place but the last of one row, summed."""
    total = 0.0
    for t in range(length - 1):
        for a, b in zip(log_p[t], log_q[t], strict=True):
            total += math.exp(a) * (a - b)
    return total


def slope(xs, ys):
    """b of the line a + b x with the least squared error, by the normal equations (2 x 2, Cramer's rule)."""
    n, sx, sy = len(xs), sum(xs), sum(ys)
    sxx, sxy = sum(x * x for x in xs), sum(x * y for x, y in zip(xs, ys, strict=True))
    return (n * sxy - sx * sy) / (n * sxx - sx * sx)


def distinct_share(bigrams, window):
    """Mean over all runs of ``window`` bigrams of the share that is distinct."""
    shares = []
    for start in range(len(bigrams) - window + 1):
        shares.append(len(set(bigrams[start : start + window])) / window)
    return sum(shares) / len(shares)


def bigrams(tokens):
    """Pairs of neighbours."""
    return [(tokens[i], tokens[i + 1]) for i in range(len(tokens) - 1)]


def coherence(ce, tokens, sample_ces, samples):
    """exp(-max(0, CE - mean CE of samples)) times the squared distinct share relative to samples, at most 1."""
    lengths = sorted(len(sample) - 1 for sample in samples)
    window = min(len(tokens) - 1, lengths[(len(lengths) - 1) // 2])
    expected = [distinct_share(bigrams(s), window) for s in samples if len(s) - 1 >= window]
    ratio = distinct_share(bigrams(tokens), window) / (sum(expected) / len(expected))
    return math.exp(-max(0.0, ce - sum(sample_ces) / len(sample_ces))) * min(1.0, ratio) ** 2


def _dot(a, b):
    """Sum of products (helper, no equation)."""
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def _minus(a, b):
    """a - b (helper, no equation)."""
    return [float(x) - float(y) for x, y in zip(a, b, strict=True)]


def _mean(rows):
    """Mean of vectors (helper, no equation)."""
    return [sum(float(row[j]) for row in rows) / len(rows) for j in range(len(rows[0]))]


def agreement(pos, neg, v, paired):
    """Mean cosine to v of h+_i - h-_i, or of h+_i - mean- and mean+ - h-_i (arXiv 2505.22637)."""
    if paired:
        differences = [_minus(a, b) for a, b in zip(pos, neg, strict=True)]
    else:
        differences = [_minus(a, _mean(neg)) for a in pos] + [_minus(_mean(pos), b) for b in neg]
    cosines = [_dot(d, v) / math.sqrt(_dot(d, d) * _dot(v, v)) for d in differences]
    return sum(cosines) / len(cosines)


def rms_agreement(pos, neg, v):
    """Over every positive a and negative b: mean of (a - b).v/|v| over the root of the mean of |a - b|^2."""
    differences = [_minus(a, b) for a in pos for b in neg]
    along = sum(_dot(d, v) for d in differences) / len(differences) / math.sqrt(_dot(v, v))
    return along / math.sqrt(sum(_dot(d, d) for d in differences) / len(differences))


def d_prime(pos, neg, v):
    """(mu+ - mu-) / sqrt((var+ + var-)/2) of the projections on v, variances over n - 1."""

    def stats(rows):
        values = [_dot(row, v) for row in rows]
        mean = sum(values) / len(values)
        return mean, sum((x - mean) ** 2 for x in values) / (len(values) - 1)

    (mean_a, var_a), (mean_b, var_b) = stats(pos), stats(neg)
    return (mean_a - mean_b) / math.sqrt((var_a + var_b) / 2)
