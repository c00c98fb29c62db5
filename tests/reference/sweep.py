"""A sweep cell in plain loops: one text, one layer and one coefficient at a time."""

from tests.reference.evaluation import log_probability, next_token_log_probabilities


def scored(model, ids, first, block, vector):
    """(sum of log p of the tokens from ``first`` on, how many they are), the vector added to a block."""
    log_p = next_token_log_probabilities(model, ids, block, vector)
    return log_probability(log_p, ids, first), len(ids) - max(1, first)


def per_token(model, rows, block=None, vector=None):
    """log p a token of each (ids, first)."""
    out = []
    for ids, first in rows:
        total, count = scored(model, ids, first, block, vector)
        out.append(total / count)
    return out


def sums(model, rows, block=None, vector=None):
    """log p of each (ids, first), summed over tokens."""
    return [scored(model, ids, first, block, vector)[0] for ids, first in rows]


def cross_entropy(model, rows, block=None, vector=None):
    """Nats a token over all texts, every token alike."""
    total = count = 0
    for ids, first in rows:
        s, n = scored(model, ids, first, block, vector)
        total, count = total + s, count + n
    return -total / count


def propensity(positives, negatives):
    """Mean over positives less mean over negatives."""
    return sum(positives) / len(positives) - sum(negatives) / len(negatives)
