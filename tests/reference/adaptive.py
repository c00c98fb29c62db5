"""PSR as loops: a token at a time, a text at a time, Adam by hand, in units in which every entry varies by 1."""

import math

import torch


def strength(h, a, b):
    """relu(a·h + b) of one token."""
    value = sum(a[i] * h[i] for i in range(len(h))) + b
    return value if value > 0 else value * 0


def entry_units(texts):
    """The mean and the standard deviation of each entry over all tokens of all texts."""
    tokens = [h for text in texts for h in text]
    mean = sum(tokens) / len(tokens)
    return mean, torch.sqrt(sum((h - mean) ** 2 for h in tokens) / len(tokens))


def mean_change(changes):
    """The mean over all tokens of all texts."""
    tokens = [d for text in changes for d in text]
    return sum(tokens) / len(tokens)


def values(w, s, c, tau, mean, spread):
    """u, a and b of what is trained."""
    a = [tau * s[i] / spread[i] for i in range(len(s))]
    b = tau * c - sum(a[i] * mean[i] for i in range(len(s)))
    return w / torch.sqrt((w * w).sum()), torch.stack(a), b


def penalty(texts, a, b, weight):
    """The mean over texts of max(0, 1 − Σ λ)."""
    total = 0.0
    for text in texts:
        short = 1 - sum(strength(h, a, b) for h in text)
        total = total + (short if short > 0 else short * 0)
    return weight * total / len(texts)


def squared_error(texts, changes, scores, u, a, b):
    """The mean over tokens of ‖s·λ·u − Δ‖², as a share of the mean ‖Δ‖² over these texts."""
    error, size, count = 0.0, 0.0, 0
    for text, change, score in zip(texts, changes, scores, strict=True):
        for h, delta in zip(text, change, strict=True):
            difference = score * strength(h, a, b) * u - delta
            error, size, count = error + (difference**2).sum(), size + (delta**2).sum(), count + 1
    return error / count / (size / count)


def log_probability(model, ids, start, changes):
    """Σ log p(ids[t] | ids[:t]) over t ≥ start; ``changes`` maps a layer to a function of one token's activation.

    It acts on the last token of the prompt and all after it.
    """

    def hook_of(change):
        def hook(_, __, output):
            h = output[0] if isinstance(output, tuple) else output
            rows = [h[0, t] if t < start - 1 else change(h[0, t]) for t in range(h.shape[1])]
            moved = torch.stack(rows)[None]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [model.model.layers[layer].register_forward_hook(hook_of(f)) for layer, f in changes.items()]
    try:
        logits = model(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    total = 0.0
    for t in range(start, len(ids)):
        row = logits[t - 1]
        total = total + row[ids[t]] - torch.log(torch.exp(row - row.max()).sum()) - row.max()
    return total


def train(first, loss_of, lr, steps):
    """Values after steps of Adam on all examples, and the loss of each step; ``first`` is a list of tensors."""
    now = [x.clone().double() for x in first]
    m, v = [torch.zeros_like(x) for x in now], [torch.zeros_like(x) for x in now]
    losses = []
    for step in range(steps):
        leaves = [x.clone().requires_grad_() for x in now]
        loss = loss_of(*leaves)
        losses.append(float(loss.detach()))
        grads = torch.autograd.grad(loss, leaves)
        rate = lr * (1 - step / steps)
        for n, g in enumerate(grads):
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            size = (m[n] / (1 - 0.9 ** (step + 1))) / (torch.sqrt(v[n] / (1 - 0.999 ** (step + 1))) + 1e-8)
            now[n] = now[n] - rate * size
    return now, losses


def norm(x):
    """‖x‖."""
    return math.sqrt(float((x * x).sum()))
