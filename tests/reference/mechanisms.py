"""Llama as loops over what writes to the residual stream and what reads it, apart from the package's hooks.

Every reader (a head's query, key or value, an MLP, the logits) gets a stream of its own, which the caller makes from
what the nodes have written so far.
"""

from __future__ import annotations

import torch


def rotated(x, cos, sin):
    """Rotary positions, (tokens, d_head)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


def llama(model, start, first, read, freeze=None):
    """A pass from block ``first`` on, of one text whose stream there is ``start`` (tokens, d_model).

    ``read(reader, written)`` makes the stream of a reader from {node: what it wrote}, which begins with "start";
    ``freeze(name, value)`` may put another value in the place of attention weights, values and outputs of MLPs.
    Returns the logits and what the nodes wrote.
    """
    freeze = freeze or (lambda name, value: value)
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    tokens = len(start)
    cos, sin = (t[0] for t in model.model.rotary_emb(start[None], torch.arange(tokens)[None]))
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    written = {"start": start}
    for layer in range(first, len(model.model.layers)):
        block = model.model.layers[layer]
        attention, outputs = block.self_attn, {}
        for head in range(heads):
            group = head // (heads // groups)
            made = []
            for kind, number in (("q", head), ("k", group), ("v", group)):
                weight = getattr(attention, f"{kind}_proj").weight[number * size : (number + 1) * size]
                made.append(block.input_layernorm(read(f"L{layer}.{kind}{number}", written)) @ weight.T)
            scores = rotated(made[0], cos, sin) @ rotated(made[1], cos, sin).T / size**0.5
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            z = freeze(f"qk{layer}.{head}", weights) @ freeze(f"ov{layer}.{head}", made[2])
            outputs[f"L{layer}.H{head}"] = z @ attention.o_proj.weight[:, head * size : (head + 1) * size].T
        written.update(outputs)
        own = block.mlp(block.post_attention_layernorm(read(f"L{layer}.MLP", written)))
        written[f"L{layer}.MLP"] = freeze(f"mlp{layer}", own)
    return model.lm_head(model.model.norm(read("logits", written))), written


def added(reader, written):
    """The stream as it is: the sum of what was written."""
    return sum(written.values())


def attribute(model, start, delta, first, positions, steps):
    """Effects of nodes and edges in one text, step by step, and both ends of M."""
    base, before = llama(model, start, first, added)
    steered, after = llama(model, start + delta, first, added)
    src, dest = base.argmax(-1), steered.argmax(-1)
    places = [p for p in positions if src[p] != dest[p]]

    def metric(logits):
        return sum(logits[p, src[p]] - logits[p, dest[p]] for p in places) / len(places)

    changes = {name: (before[name] - after[name]).detach() for name in before if name != "start"}
    changes["steering"] = -delta
    readers = []
    llama(model, start, first, lambda name, written: readers.append(name) or added(name, written))
    readers = list(dict.fromkeys(readers))
    nodes = dict.fromkeys(changes, 0.0)
    entries = torch.zeros(delta.shape[-1], dtype=torch.float64)
    edges = {}
    for k in range(steps):
        here = (start + (k + 0.5) / steps * delta).detach()
        offsets = {name: torch.zeros_like(here, requires_grad=True) for name in readers}
        seen = {}

        def read(name, written, offsets=offsets, seen=seen):
            seen[name] = ["steering" if node == "start" else node for node in written]
            return added(name, written) + offsets[name]

        value = metric(llama(model, here, first, read)[0])
        gradients = dict(zip(readers, torch.autograd.grad(value, list(offsets.values())), strict=True))
        for reader, gradient in gradients.items():
            for node in seen[reader]:
                effect = float((gradient * changes[node]).sum()) / steps
                edges[node, reader] = edges.get((node, reader), 0.0) + effect
                nodes[node] += effect
                if node == "steering":
                    entries += (gradient * changes[node]).sum(0).double() / steps
    return nodes, edges, entries, metric(base).item(), metric(steered).item(), len(places)


def circuit(model, start, delta, first, kept):
    """The logits of a circuit: each reader gets the unsteered stream, and what its kept edges bring."""
    _, before = llama(model, start, first, added)

    def read(name, written):
        stream = added(name, {node: before[node] for node in written})
        if ("steering", name) in kept:
            stream = stream + delta
        for node in written:
            if (node, name) in kept:
                stream = stream + written[node] - before[node]
        return stream

    return llama(model, start, first, read)[0]


def frozen(model, start, delta, first, names):
    """The logits of the steered run with parts of the unsteered one."""
    kept = {}
    llama(model, start, first, added, kept.setdefault)

    def freeze(name, value):
        return kept[name] if any(name.startswith(part) for part in names) else value

    return llama(model, start + delta, first, added, freeze)[0]
