"""Conditional defences by loops: plain hooks on a Llama-type model, one prompt after the other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch


def states(model, ids):
    """(inputs, outputs) of every block for one prompt, each a list of float64 arrays (tokens, d_model)."""
    inputs, outputs = [], []
    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].double().numpy())))
        handles.append(
            block.register_forward_hook(
                lambda _, __, out: outputs.append(
                    (out[0] if isinstance(out, tuple) else out).view(-1, 32).double().numpy()
                )
            )
        )
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def greedy(model, ids, change, new):
    """Greedy tokens of one prompt without a cache; ``change(layer, h, prompt_length)`` adds to a block's output."""
    length, ids = len(ids), list(ids)
    for _ in range(new):
        handles = []
        for number, block in enumerate(model.model.layers):

            def hook(_, __, out, number=number):
                h = (out[0] if isinstance(out, tuple) else out).view(-1, 32)
                moved = torch.as_tensor(change(number, h.double().numpy(), length)).float()[None]
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            handles.append(block.register_forward_hook(hook))
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        ids.append(int(logits.argmax()))
    return ids[length:]


def dot(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += float(x) * float(y)
    return total


def cosine(a, b):
    size = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / size if size else 0.0


def published_similarity(h, c):
    """cos(h, tanh(ĉ ĉᵀ h)) entry by entry."""
    size = math.sqrt(dot(c, c))
    unit = [float(x) / size for x in c]
    along = dot(unit, h)
    return cosine(h, [math.tanh(along * x) for x in unit])


def mean(rows):
    total = np.zeros(len(rows[0]))
    for row in rows:
        total = total + row
    return total / len(rows)


def first_component(rows):
    """The leading eigenvector of Σ rows rowsᵀ, uncentred, that points along the rows' mean."""
    outer = np.zeros((len(rows[0]), len(rows[0])))
    for row in rows:
        outer += np.outer(row, row)
    _, vectors = np.linalg.eigh(outer)
    first = vectors[:, -1]
    return -first if dot(first, mean(rows)) < 0 else first


def best_f1(positive, negative):
    """The best F1 over thresholds between values and both sides."""
    values = sorted({*positive, *negative})
    thresholds = [values[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1] + 1]
    best = 0.0
    for threshold in thresholds:
        for above in (True, False):
            hit = sum((v > threshold) == above and v != threshold for v in positive)
            wrong = sum((v > threshold) == above and v != threshold for v in negative)
            best = max(best, 2 * hit / (hit + wrong + len(positive)))
    return best


def sigma(model, ids, appended, anchors, layers):
    """SCANS's score of one prompt: the mean over blocks of cos(h[last of prompt] − h[last appended], anchor)."""
    _, outputs = states(model, [*ids, *appended])
    total = 0.0
    for layer in layers:
        u = outputs[layer][len(ids) - 1] - outputs[layer][-1]
        total += cosine(u, anchors[layer])
    return total / len(layers)


def anchors(model, prompts, appended, layers):
    """The mean of h[last of prompt] − h[last appended] over prompts, by block."""
    moved = {layer: [] for layer in layers}
    for ids in prompts:
        _, outputs = states(model, [*ids, *appended])
        for layer in layers:
            moved[layer].append(outputs[layer][len(ids) - 1] - outputs[layer][-1])
    return {layer: mean(rows) for layer, rows in moved.items()}


def coordinate(h, a, b):
    """AdaSteer's t: 0 at a, 100 at b."""
    return 100 * dot(h - a, b - a) / dot(b - a, b - a)


def clip(x, low, high):
    if low is not None and x < low:
        return low
    return high if high is not None and x > high else x
