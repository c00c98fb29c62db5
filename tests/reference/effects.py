"""Effects of a vector on generated text, one row, one token and one number at a time."""

import math

import numpy as np
import torch

END = 2  # end-of-text of the tiny models, which is never drawn


def _run(model, block, ids, vector, first):
    """Logits (T, V) and block output (T, d) of one row without cache; vector is added from position ``first`` on."""
    seen = {}

    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if vector is not None:
            hidden = hidden.clone()
            for position in range(first, hidden.shape[1]):
                hidden[0, position] = hidden[0, position] + vector
        seen["h"] = hidden[0]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
    finally:
        handle.remove()
    return logits, seen["h"]


def pick(logits, noise, temperature, top_k, top_p):
    """argmax of log p + g over the fewest likeliest tokens, at most top_k, that hold top_p of their probability."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    weights = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    total = sum(weights)
    best, best_value, before = None, -math.inf, 0.0
    for token, weight in zip(order, weights, strict=True):
        if before / total >= top_p:
            break
        before += weight
        value = logits[token] / temperature + noise[token]
        if value > best_value:
            best, best_value = token, value
    return best


def effect(model, block, encode, prompts, vector, noise, sampling, rollouts):
    """Mean features of sampled texts, steered minus unsteered, with the same noise: (K,).

    ``prompts`` are token id lists that start with a beginning-of-text token, which is not
    steered; ``encode`` maps (T, d) to (T, K); ``noise(rollout, step)`` gives (prompts, V).
    """
    means = []
    for steering in (vector, None):
        rows = []
        for rollout in rollouts:
            for number, prompt in enumerate(prompts):
                ids = list(prompt)
                for step in range(sampling.max_new_tokens):
                    logits, _ = _run(model, block, ids, steering, 1)
                    values = [-math.inf if token == END else float(v) for token, v in enumerate(logits[-1])]
                    g = [float(v) for v in noise(rollout, step)[number]]
                    ids.append(pick(values, g, sampling.temperature, sampling.top_k, sampling.top_p))
                _, hidden = _run(model, block, ids, None, 1)
                rows.extend(np.asarray(encode(hidden[len(prompt) :]), dtype=np.float64))
        means.append(sum(rows) / len(rows))
    return means[0] - means[1]


def ridge(x, y, penalty):
    """(M, b) of the normal equations on centred data, column by column."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    x_mean = sum(x) / len(x)
    y_mean = sum(y) / len(y)
    gram = penalty * np.eye(x.shape[1])
    for row in x:
        gram = gram + np.outer(row - x_mean, row - x_mean)
    M = np.zeros((x.shape[1], y.shape[1]))
    for j in range(y.shape[1]):
        right = sum((row - x_mean) * (value - y_mean[j]) for row, value in zip(x, y[:, j], strict=True))
        M[:, j] = np.linalg.solve(gram, right)
    return M, y_mean - x_mean @ M


def r2(x, y, M, b, mean):
    """1 − Σ(y − xM − b)² / Σ(y − mean)²."""
    error = total = 0.0
    for row, values in zip(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), strict=True):
        for j in range(len(values)):
            error += (values[j] - (row @ M[:, j] + b[j])) ** 2
            total += (values[j] - mean[j]) ** 2
    return 1 - error / total
