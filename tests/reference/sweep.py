"""A sweep cell in plain loops: one text, one layer and one coefficient at a time; intervals one draw at a time."""

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


def interval_of_sides(positives, negatives, draw_positive, draw_negative):
    """Percentile interval of mean+ - mean-, each side drawn again with its own indices."""
    drawn = []
    for up, down in zip(draw_positive, draw_negative, strict=True):
        drawn.append(propensity([positives[i] for i in up], [negatives[i] for i in down]))
    drawn.sort()

    def quantile(q):  # linear between order statistics
        place = q * (len(drawn) - 1)
        low = int(place)
        high = min(low + 1, len(drawn) - 1)
        return drawn[low] + (place - low) * (drawn[high] - drawn[low])

    return quantile(0.025), quantile(0.975)
