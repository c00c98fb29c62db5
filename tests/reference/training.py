"""Training of vectors written straight from the equations: a text at a time, a token at a time, Adam by hand."""

import math

import torch


def log_probability(model, layer, ids, start, change):
    """Σ log p(ids[t] | ids[:t]) over t ≥ start, where ``change`` maps the activations (tokens, d) after a block.

    The first token is a start token, and is not changed.
    """

    def hook(_, __, output):
        h = output[0] if isinstance(output, tuple) else output
        moved = torch.cat([h[:, :1], change(h[0, 1:])[None]], 1)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        logits = model(torch.tensor([ids])).logits[0]
    finally:
        handle.remove()
    total = 0.0
    for t in range(start, len(ids)):
        row = logits[t - 1]
        total = total + row[ids[t]] - torch.log(torch.exp(row - row.max()).sum()) - row.max()
    return total


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def bipo(pi_w, pi_l, w0, l0, beta, m):
    return -torch.log(sigmoid(m * beta * ((pi_w - w0) - (pi_l - l0))))


def reps(pi_w, pi_l, w0, l0, n_w, n_l):
    c = l0 - w0
    if c < 1:
        c = torch.ones_like(c)
    return -torch.log(sigmoid(c / n_w * pi_w - 1 / n_l * pi_l))


def simpo(pi_w, pi_l, n_w, n_l, beta, gamma):
    return -torch.log(sigmoid(beta / n_w * pi_w - beta / n_l * pi_l - gamma))


def null_out(h, v, b):
    """Each h less relu(v·h + b)/‖v‖² of v."""
    rows = []
    for row in h:
        amount = (row * v).sum() + b
        rows.append(row - (amount if amount > 0 else amount * 0) / (v * v).sum() * v)
    return torch.stack(rows)


def shift(h, z, a, rows):
    """h + Σⱼ (relu(zⱼ + aⱼ) − zⱼ)·rowsⱼ for one token."""
    total = h.clone()
    for j in range(len(a)):
        after = z[j] + a[j]
        total = total + ((after if after > 0 else after * 0) - z[j]) * rows[j]
    return total


def batch_loss(model, layer, examples, objective, v, strength, options, share):
    """The loss of a batch of (winner ids, its prompt's length, loser ids, its prompt's length).

    ``strength`` is the factor, or BiPO's sign; ``share`` is how far the training has come.
    """

    def add(s):
        return lambda h: h + s * v

    def score(ids, start, change):
        return log_probability(model, layer, ids, start, change)

    def read(ids, start):
        """The log-probability at the strength that the text reads, and the readings that do not count for it."""
        rest = []

        def change(h):
            readings = [torch.relu((row * v).sum()) for row in h]
            order = sorted(range(len(readings)), key=lambda t: -float(readings[t].detach()))
            top = order[: options["top"]]
            rest.extend(readings[t] for t in order[options["top"] :])
            return h + sum(readings[t] for t in top) / len(top) * v

        return score(ids, start, change), rest

    if objective == "lm":
        tokens = sum(len(w) - a for w, a, _, _ in examples)
        return sum(-score(w, a, add(strength)) for w, a, _, _ in examples) / tokens
    if objective == "reft_r1":
        texts = [pair for w, a, lost, b in examples for pair in ((w, a), (lost, b))]
        found = [read(*text) for text in texts]
        rest = [value for _, values in found for value in values]
        cross_entropy = sum(-value for value, _ in found) / sum(len(ids) - start for ids, start in texts)
        return cross_entropy + options["l1"] * share * sum(rest) / max(1, len(rest))
    losses = []
    for w, a, lost, b in examples:
        n_w, n_l = len(w) - a, len(lost) - b
        with torch.no_grad():
            w0, l0 = score(w, a, lambda h: h), score(lost, b, lambda h: h)
        pi_w, pi_l = score(w, a, add(strength)), score(lost, b, add(strength))
        if objective == "bipo":
            losses.append(bipo(pi_w, pi_l, w0, l0, options["beta"], strength))
        elif objective == "simpo":
            losses.append(simpo(pi_w, pi_l, n_w, n_l, options["beta"], options["margin"]))
        else:
            losses.append(reps(pi_w, pi_l, w0, l0, n_w, n_l))
            gone_w, gone_l = (score(ids, start, lambda h: null_out(h, v, 0.0)) for ids, start in ((w, a), (lost, b)))
            losses.append(reps(gone_l, gone_w, l0, w0, n_l, n_w))
    return sum(losses) / len(losses)


def train(model, layer, examples, objective, options, rows=None, strengths=None):
    """The numbers after some full-batch steps of Adam, and the loss of each step.

    Args:
        rows: Decoder rows, whose weights are trained; None for the vector itself.
        strengths: The strength of each step; as many as steps.
    """
    size = model.config.hidden_size if rows is None else len(rows)
    w = torch.full((size,), options["init"], dtype=torch.float64)
    m, s = torch.zeros_like(w), torch.zeros_like(w)
    losses = []
    steps = len(strengths)
    for step, strength in enumerate(strengths):
        if objective == "reft_r1":
            v = w if rows is None else sum(w[j] * rows[j] for j in range(size))
            w = w / math.sqrt(float((v * v).sum()))
        leaf = w.clone().requires_grad_()
        v = leaf if rows is None else sum(leaf[j] * rows[j] for j in range(size))
        loss = batch_loss(model, layer, examples, objective, v, strength, options, step / steps)
        losses.append(float(loss.detach()))
        (g,) = torch.autograd.grad(loss, leaf)
        if objective == "reft_r1":
            g = g - (g * w).sum() / (w * w).sum() * w
        size_g = math.sqrt(float((g * g).sum()))
        if options["clip"] is not None and size_g > options["clip"]:
            g = g * options["clip"] / size_g
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        rate = options["lr"] * (1 - step / steps)
        w = w - rate * (m / (1 - 0.9 ** (step + 1))) / (torch.sqrt(s / (1 - 0.999 ** (step + 1))) + 1e-8)
    return w, losses


def separable_descent(z_t, z_s, l1, steps, rate):
    """v after gradient descent on the mean of ‖z + v − c_t‖² − ½‖z + v − c_s‖² + l1·‖v‖₁ over z of the source."""
    c_t, c_s = z_t.mean(0), z_s.mean(0)
    v = torch.zeros(z_s.shape[1], dtype=torch.float64)
    for _ in range(steps):
        g = 2 * (z_s + v - c_t) - (z_s + v - c_s)  # of each z
        moved = v - rate * g.mean(0)
        v = moved.sign() * (moved.abs() - rate * l1).clamp(min=0)  # the proximal step of the penalty
    return v
