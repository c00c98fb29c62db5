"""Relevance, effects and interventions by component by loops, on a Llama-type model."""

from __future__ import annotations

import torch

from tests.reference.directions import hooked


def projection(model, ids, direction, layer, hooks=()):
    """The projection on a direction of block ``layer``'s output at the last token."""
    seen = []
    watch = (model.model.layers[layer], "out", lambda _, __, output: seen.append(output))
    with hooked([*hooks, watch]):
        model(torch.tensor([ids]))
    unit = direction.double() / direction.double().norm()
    return seen[0][0, -1] @ unit


def embedded(model, ids):
    return model.model.embed_tokens(torch.tensor(ids)).detach()


def replacing_embeddings(model, e):
    return [(model.model.embed_tokens, "out", lambda _, __, output: e[None])]


def gradient_at(model, ids, direction, layer, place, h):
    """The gradient of the projection with regard to activations (tokens, d) that are put into a place."""
    h = h.clone().requires_grad_(True)
    hooks = replacing_embeddings(model, h) if place < 0 else replacing_output(model, place, h)
    return torch.autograd.grad(projection(model, ids, direction, layer, hooks), h)[0]


def replacing_output(model, layer, h):
    return [(model.model.layers[layer], "out", lambda _, __, output: h[None])]


def integrated(model, ids, direction, layer, place, begin, end, steps):
    """The mean gradient at the midpoints of the line; place −1 is the embeddings, others a block's output."""
    total = 0
    for n in range(steps):
        point = begin + (n + 0.5) / steps * (end - begin)
        total = total + gradient_at(model, ids, direction, layer, place, point)
    return total / steps


def output_of(model, ids, layer):
    seen = []
    with hooked([(model.model.layers[layer], "out", lambda _, __, output: seen.append(output))]), torch.no_grad():
        model(torch.tensor([ids]))
    return seen[0][0]


def subtract(h, v, strength, limit):
    """h − strength · clip((v·h)/(v·v), ±limit) · v, one vector."""
    amount = float(v @ h) / float(v @ v)
    return h - strength * max(-limit, min(limit, amount)) * v


def subtracted_replies(model, prompt, tokens, change):
    """Greedy decoding in which a function changes every block's output at the last token of each pass.

    With a cache earlier tokens keep the change of the pass in which each was last: from the prompt's last token on.
    """
    ids = list(prompt)

    def after(_, __, output):
        rows = [change(h) if n >= len(prompt) - 1 else h for n, h in enumerate(output[0])]
        return torch.stack(rows)[None]

    with torch.no_grad(), hooked([(block, "out", after) for block in model.model.layers]):
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
