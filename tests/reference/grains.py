"""GrAInS by loops: one pair, one point of the integral and one token at a time."""

from __future__ import annotations

from typing import Any

import torch


def embed(model, ids):
    """The embeddings of some tokens, as the model's own module gives them."""
    return model.get_input_embeddings()(torch.tensor(ids)).detach()


def log_probability(model, embeddings, ids, length):
    """The log-probability of the tokens after the first ``length``, given embeddings of all."""
    logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    total = 0
    for place in range(length, len(ids)):
        total = total + logits[place - 1].double().log_softmax(-1)[ids[place]]
    return total


def difference(model, prompt, positive, negative, scale):
    """f at the prompt's embeddings times a factor, and the factor's gradient by embedding of the prompt."""
    scaled = (scale * embed(model, prompt)).requires_grad_()
    f: Any = 0
    for sign, completion in ((1, positive), (-1, negative)):
        embeddings = torch.cat([scaled, embed(model, completion)])
        f = f + sign * log_probability(model, embeddings, [*prompt, *completion], len(prompt))
    (gradient,) = torch.autograd.grad(f, scaled)
    return float(f), gradient.double()


def part(model, prompt, positive, negative, step, steps):
    """What one of the equal parts of the way adds to the attribution of each token of the prompt."""
    _, gradient = difference(model, prompt, positive, negative, (step + 0.5) / steps)
    return [float(row.double() @ along) / steps for row, along in zip(embed(model, prompt), gradient, strict=True)]


def attributions(model, prompt, positive, negative, steps):
    """Integrated gradients of each token of the prompt, at the middles of equal parts."""
    out = [0.0] * len(prompt)
    for step in range(steps):
        for token, value in enumerate(part(model, prompt, positive, negative, step, steps)):
            out[token] += value
    return out


def last_state(model, ids, layer):
    """The output of a block at the last token."""
    seen = []
    block = model.model.layers[layer]

    def keep(_, __, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    handle = block.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0].view(-1, seen[0].shape[-1])[-1].double()


def vector(model, pairs, layer, top, steps, special, replaced_by):
    """(mean v⁺ − mean v⁻, all differences by sign) of pairs (prompt, positive, negative) of ids."""
    moved = {1: [], -1: []}
    for prompt, positive, negative in pairs:
        values = attributions(model, prompt, positive, negative, steps)
        for sign in (1, -1):
            order = sorted(range(len(prompt)), key=[-sign * value for value in values].__getitem__)
            order = [n for n in order if prompt[n] not in special and sign * values[n] > 0][:top]
            if not order:
                continue
            without = [replaced_by if n in order else token for n, token in enumerate(prompt)]
            for completion in (positive, negative):
                moved[sign].append(
                    last_state(model, [*prompt, *completion], layer) - last_state(model, [*without, *completion], layer)
                )
    means = {}
    for sign, rows in moved.items():
        total = torch.zeros_like(rows[0])
        for row in rows:
            total = total + row
        means[sign] = total / len(rows)
    return means[1] - means[-1], moved
