"""Rankings of features by loops: over pairs of texts, over thresholds, over prompts and tokens one at a time."""

from __future__ import annotations

import math

import torch


def auroc(values, positive):
    """P(a+ > a-) + P(a+ = a-)/2 over all pairs, of one list of values."""
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, p in zip(values, positive, strict=True)
        if p
        for b, q in zip(values, positive, strict=True)
        if not q
    ]
    return sum(pairs) / len(pairs)


def f1_of_rates(tpr, fpr, base_rate):
    """F1 of a detector with these rates where a share ``base_rate`` is positive."""
    tp, fp, fn = tpr * base_rate, fpr * (1 - base_rate), (1 - tpr) * base_rate
    return 2 * tp / (2 * tp + fp + fn)


def best_f1(values, positive, base_rate):
    """The best F1 at that base rate over thresholds at which a text has to fire."""
    total, others = sum(positive), len(positive) - sum(positive)
    best = 0.0
    for threshold in {value for value in values if value > 0}:
        tpr = sum(p for v, p in zip(values, positive, strict=True) if v >= threshold) / total
        fpr = sum(not p for v, p in zip(values, positive, strict=True) if v >= threshold) / others
        if tpr:
            best = max(best, f1_of_rates(tpr, fpr, base_rate))
    return best


def pearson(x, y):
    """Pearson's r, or None where either does not vary."""
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    sxy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    sxx, syy = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
    return sxy / math.sqrt(sxx * syy) if sxx and syy else None


def next_logits(model, ids, layer=None, vector=None, position=-1):
    """The logits after a row of ids, with a vector added at one position of a block's output."""
    hooks = []
    if vector is not None:

        def add(_, __, output):
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            changed[0, position] += vector
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        hooks.append(model.model.layers[layer].register_forward_hook(add))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    for hook in hooks:
        hook.remove()
    return logits


def confidence(logits, k):
    """−(1/k)·Σ log p of the k likeliest tokens."""
    p = sorted((float(x) for x in torch.softmax(logits, 0)), reverse=True)
    return -sum(math.log(x) for x in p[:k]) / k


def hidden(model, ids, layer):
    """The activations (tokens, d_model) at the end of a block."""
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


def largest(sae, states):
    """The largest activation of each feature over rows of activations, as a list."""
    found = [0.0] * sae.d_sae
    for state in states:
        for j, value in enumerate(sae.encode(state).tolist()):
            found[j] = max(found[j], value)
    return found


def greedy(model, ids, new):
    """So many tokens, the likeliest each time, without a cache; none of them ends the text."""
    ids = list(ids)
    for _ in range(new):
        ids.append(int(next_logits(model, ids).argmax()))
    return ids


def corrsteer(model, tokenizer, sae, prompts, rewards, new):
    """r of each feature (None where it does not vary) and its coefficient, from the prompts given and their rewards."""
    layer = sae.hookpoint.layer
    pooled = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        text = greedy(model, ids, new)
        pooled.append(largest(sae, hidden(model, text, layer)[len(ids) - 1 : -1]))
    r, coefficients = [], []
    for j in range(sae.d_sae):
        column = [row[j] for row in pooled]
        r.append(pearson(column, rewards))
        right = [value for value, reward in zip(column, rewards, strict=True) if reward > 0.5]
        coefficients.append(sum(right) / len(right))
    return r, coefficients


def learn_mask(model, layer, rows, writes, order, *, lr, sparsity, first, last):
    """The numbers m of a mask after Adam, and the losses; rows are (ids, where the answer begins); in float64."""
    m = [0.0] * len(writes)
    mean, square = [0.0] * len(m), [0.0] * len(m)
    losses = []
    for step, batch in enumerate(order):
        temperature = first * (last / first) ** (step / max(1, len(order) - 1))
        gate = [torch.tensor(1 / (1 + math.exp(-x / temperature)), dtype=torch.float64, requires_grad=True) for x in m]
        vector = sum(g * w for g, w in zip(gate, writes, strict=True))
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for row in batch:
            ids, start = rows[row]

            def add(_, __, output, vector=vector):
                changed = output.clone()
                changed[:, 1:] += vector.to(output.dtype)  # all but the start token
                return changed

            hook = model.model.layers[layer].register_forward_hook(add)
            logits = model(torch.tensor([ids])).logits[0]
            hook.remove()
            for place in range(start, len(ids)):
                total = total - torch.log_softmax(logits[place - 1], 0)[ids[place]]
                tokens += 1
        loss = total / tokens + sparsity * sum(gate) / len(gate)
        gradients = torch.autograd.grad(loss, gate)
        losses.append(float(loss.detach()))
        for j, gradient in enumerate(gradients):
            g = float(gate[j].detach())
            slope = float(gradient) * g * (1 - g) / temperature
            mean[j] = 0.9 * mean[j] + 0.1 * slope
            square[j] = 0.999 * square[j] + 0.001 * slope**2
            size = math.sqrt(square[j] / (1 - 0.999 ** (step + 1))) + 1e-8
            m[j] -= lr * mean[j] / (1 - 0.9 ** (step + 1)) / size
    return m, losses
