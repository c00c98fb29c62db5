"""Refusal directions by gradient, cones and independence by loops: one prompt at a time."""

from __future__ import annotations

import random

import torch

from tests.reference.directions import hooked, removal_hooks


def adding_hooks(model, vector, layer):
    """A hook that adds a vector to a block's input."""
    return [(model.model.layers[layer], "in", lambda _, args: (args[0] + vector.to(args[0].dtype), *args[1:]))]


def greedy(model, prompt, tokens, hooks=()):
    """The most likely tokens after a prompt, without a cache."""
    ids = list(prompt)
    with torch.no_grad(), hooked(hooks):
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def nats(model, prompt, reply, hooks):
    """The mean over a reply's tokens of -log p."""
    with hooked(hooks):
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0]
    total = 0
    for n, token in enumerate(reply):
        total = total - logits[len(prompt) - 1 + n].log_softmax(-1)[token]
    return total / len(reply)


def kl(model, prompt, reply, hooks, of):
    """The sum over the last prompt token and the reply of the divergence between ablated and base."""
    ids = torch.tensor([[*prompt, *reply]])
    with hooked(hooks):
        changed = model(ids).logits[0].log_softmax(-1)
    with torch.no_grad():
        base = model(ids).logits[0].log_softmax(-1)
    total = 0
    for position in range(len(prompt) - 1, len(prompt) + len(reply)):
        p, q = (changed[position], base[position]) if of == "ablated" else (base[position], changed[position])
        total = total + (p.exp() * (p - q)).sum()
    return total


def cosines(model, prompt, direction, blocks, hooks=()):
    """The cosine with a direction of each block's input at the last token, after what hooks change."""
    seen = []
    watch = [(block, "in", lambda _, args: seen.append(args[0])) for block in model.model.layers[:blocks]]
    with hooked([*hooks, *watch]):
        model(torch.tensor([prompt]))
    out = []
    for h in seen:
        last, d = h[0, -1], direction.to(h.dtype)
        out.append((last @ d) / (last.norm() * d.norm()))
    return out


def dependence(model, prompt, v, w, blocks):
    """[[squared change of the cosine with v where w is gone, by block], [the same exchanged]]."""
    rows = []
    for one, other in ((v, w), (w, v)):
        before = cosines(model, prompt, one, blocks)
        after = cosines(model, prompt, one, blocks, removal_hooks(model, other))
        rows.append([(x - y) ** 2 for x, y in zip(after, before, strict=True)])
    return rows


def gram_schmidt(rows, against=()):
    done = list(against)
    for row in rows:
        for other in done:
            row = row - (row @ other) * other
        done.append(row / row.norm())
    return torch.stack(done[len(against) :])


def adam(state, row, gradient, rate):
    """One step of AdamW with amsgrad, betas .9 and .98, no decay."""
    state["n"] = state.get("n", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * gradient
    state["v"] = 0.98 * state.get("v", torch.zeros_like(gradient)) + 0.02 * gradient**2
    state["most"] = torch.maximum(state.get("most", torch.zeros_like(gradient)), state["v"])
    scale = (state["most"] / (1 - 0.98 ** state["n"])).sqrt() + 1e-8
    return row - rate * (state["m"] / (1 - 0.9 ** state["n"])) / scale


def train(model, targets, basis, layer, norm, draws, *, batch, epochs, of="ablated", other=None, blocks=0, seed=0):
    """(losses, the basis before each step): the loss of each basis row and of each drawn mixture, by loops.

    targets: [(refused, its reply, answered, its reply with +r, its own reply)]; draws: weights for each step.
    """
    order = random.Random(seed)
    numbers, losses, bases, state, step = list(range(len(targets))), [], [], {}, 0
    for _ in range(epochs):
        order.shuffle(numbers)
        for start in range(0, len(numbers), batch):
            rows = basis.clone().requires_grad_(True)
            bases.append(basis)
            mixtures = [(torch.eye(len(rows), dtype=rows.dtype)[n], 1 / len(rows)) for n in range(len(rows))]
            mixtures += [(w, 1 / len(draws[step])) for w in draws[step]] if draws else []
            loss, plain = 0, 0.0
            chosen = [targets[n] for n in numbers[start : start + batch]]
            for weights, share in mixtures:
                x = sum(w * row for w, row in zip(weights, rows, strict=True))
                x = x / x.norm()
                for refused, ablated, answered, added, retained in chosen:
                    terms = [
                        nats(model, refused, ablated, removal_hooks(model, x)),
                        nats(model, answered, added, adding_hooks(model, norm * x, layer)),
                        kl(model, answered, retained, removal_hooks(model, x), of),
                    ]
                    if other is not None:
                        moved = dependence(model, refused, x, other, blocks)
                        terms.append(sum(moved[0] + moved[1]) / blocks)
                    factors = (1.0, 0.2, 1.0, 200.0)[: len(terms)]
                    weighted = sum(f * t for f, t in zip(factors, terms, strict=True))
                    loss = loss + share * weighted / len(chosen)
                    plain = plain + share * float(sum(terms).detach()) / len(chosen)
            losses.append(plain)
            (gradient,) = torch.autograd.grad(loss, rows)
            gradient = torch.stack([g - (g @ row) * row for g, row in zip(gradient, basis, strict=True)])
            gradient = gradient * min(1.0, 10 / float(gradient.norm()))
            basis, step = gram_schmidt(adam(state, basis, gradient, 0.01)), step + 1
    return losses, bases
