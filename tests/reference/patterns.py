"""Patterns of steering by loops: plain hooks on a Llama-type model, one text and one token at a time."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.reference.directions import hooked


def trace(rows):
    """The trace of the unbiased covariance of rows, value by value."""
    total = 0.0
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        total += sum((value - mean) ** 2 for value in column) / (len(column) - 1)
    return total


def mean_of(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def expected_cosine(positive, negative, samples, *, paired, to):
    """The closed form of the cosine, from the rows of both sides."""
    difference = [a - b for a, b in zip(mean_of(positive), mean_of(negative), strict=True)]
    if paired:
        parts = [([[a - b for a, b in zip(p, n, strict=True)] for p, n in zip(positive, negative, strict=True)])]
    else:
        parts = [positive, negative]
    square = sum(value**2 for value in difference)
    if to == "full":
        noise = sum(trace(rows) * (1 / samples - 1 / len(rows)) for rows in parts)
        return (1 + noise / square) ** -0.5
    one = sum(trace(rows) for rows in parts)
    signal = square - sum(trace(rows) / len(rows) for rows in parts)
    return (1 + one / (samples * signal)) ** -0.5


def adding(vector, strength, relative):
    """A hook that adds to every token but the first one, BOS."""

    def add(_, __, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for row in hidden:
            for h in row[1:]:
                size = strength * h.norm() / vector.norm() if relative else strength
                h += size * vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return add


def log_probability(model, prompt_ids, answer_ids, changes=()):
    """Σ log p of the answer's tokens after the prompt."""
    with hooked(changes), torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0].double().log_softmax(-1)
    first = len(prompt_ids) - 1
    return sum(float(logits[first + n, token]) for n, token in enumerate(answer_ids))


def slope(points):
    """Least squares through (strength, value) points, with an intercept."""
    x = [p[0] for p in points]
    y = [p[1] for p in points]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in points) / sum((a - mx) ** 2 for a in x)


def wilson(share, trials):
    """The shares p at which share lies 1.96 standard errors away: (share − p)² = z² p (1 − p) / n."""
    z = 1.959963984540054
    roots = np.roots([1 + z**2 / trials, -2 * share - z**2 / trials, share**2])
    return min(roots.real), max(roots.real)


def newcombe(share, trials, other_share, other_trials):
    """Difference of two shares with the square-and-add interval of two Wilson intervals."""
    low, high = wilson(share, trials)
    other_low, other_high = wilson(other_share, other_trials)
    gap = share - other_share
    return (
        gap,
        gap - math.sqrt((share - low) ** 2 + (other_high - other_share) ** 2),
        gap + math.sqrt((high - share) ** 2 + (other_share - other_low) ** 2),
    )


def mean_projection(model, rows, block, unit):
    """The mean over rows of ids of unit·h at the last token, after a block."""
    total = 0.0
    for ids in rows:
        seen = []

        def keep(_, __, output, seen=seen):
            seen.append(output[0] if isinstance(output, tuple) else output)

        with hooked([(block, "out", keep)]), torch.no_grad():
            model(torch.tensor([ids]))
        total += float(seen[0][0, -1].double() @ unit.double())
    return total / len(rows)


def one_hot_gradient(model, rows, places, block, unit, vocabulary):
    """d Σ unit·h / d one-hot of each token of the suffix, by autograd through one-hot rows times the embedding."""
    table = model.get_input_embeddings().weight.detach()
    total = torch.zeros(len(places[0]), vocabulary)
    for ids, where in zip(rows, places, strict=True):
        one_hot = torch.nn.functional.one_hot(torch.tensor(ids), vocabulary).to(table.dtype).requires_grad_()
        seen = []

        def keep(_, __, output, seen=seen):
            seen.append(output[0] if isinstance(output, tuple) else output)

        with hooked([(block, "out", keep)]):
            model(inputs_embeds=(one_hot @ table)[None])
        (slope,) = torch.autograd.grad(seen[0][0, -1] @ unit, one_hot)
        total += slope[where]
    return total
