"""The refusal direction by loops: plain hooks on a Llama-type model, one prompt at a time."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch


@contextmanager
def hooked(pairs):
    """Forward hooks (module, kind, function) for the length of a block."""
    handles = [
        module.register_forward_pre_hook(function) if kind == "in" else module.register_forward_hook(function)
        for module, kind, function in pairs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probabilities(model, ids):
    """The next token's distribution after one prompt."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def score(p, tokens):
    """S = log(p + 1e-8) - log(1 - p + 1e-8) of the tokens' probability together."""
    refusal = sum(float(p[token]) for token in tokens)
    return math.log(refusal + 1e-8) - math.log(1 - refusal + 1e-8)


def candidates(model, refused, answered, positions):
    """r[p][l]: the mean over refused prompts of block l's input at a position, less that over answered ones."""
    out = {}
    for layer, block in enumerate(model.model.layers):
        for position in positions:
            means = []
            for side in (refused, answered):
                total = 0
                for ids in side:
                    seen = []
                    keep = [(block, "in", lambda _, args, seen=seen: seen.append(args[0]))]
                    with hooked(keep), torch.no_grad():
                        model(torch.tensor([ids]))
                    total = total + seen[0][0, position].double()
                means.append(total / len(side))
            out[position, layer] = means[0] - means[1]
    return out


def remove(h, r):
    """h without its part along r, token by token."""
    unit = r.to(h.dtype) / r.to(h.dtype).norm()
    return h - (h @ unit)[..., None] * unit


def removal_hooks(model, r):
    """Hooks that take r out of every block's input, attention output and MLP output."""

    def before(_, args):
        return remove(args[0], r), *args[1:]

    def after(_, __, output):
        return (remove(output[0], r), *output[1:]) if isinstance(output, tuple) else remove(output, r)

    pairs = []
    for block in model.model.layers:
        pairs += [(block, "in", before), (block.self_attn, "out", after), (block.mlp, "out", after)]
    return pairs


def scores(model, refused, answered, tokens, r, layer):
    """(bypass, induce, KL), each a mean over prompts."""
    bypass, induce, kl = [], [], []
    for ids in refused:
        with hooked(removal_hooks(model, r)):
            bypass.append(score(probabilities(model, ids), tokens))
    for ids in answered:
        plain = probabilities(model, ids)
        add = [(model.model.layers[layer], "in", lambda _, args: (args[0] + r.to(args[0].dtype), *args[1:]))]
        with hooked(add):
            induce.append(score(probabilities(model, ids), tokens))
        with hooked(removal_hooks(model, r)):
            other = probabilities(model, ids)
        kl.append(float((plain * ((plain + 1e-6).log() - (other + 1e-6).log())).sum()))
    return tuple(sum(values) / len(values) for values in (bypass, induce, kl))
