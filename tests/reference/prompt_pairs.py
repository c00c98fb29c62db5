"""Activation addition by plain forward hooks, one unpadded prompt at a time and without a cache."""

import torch


def block_inputs(model, block, ids):
    """What comes into a block at every token, (tokens, d_model)."""
    seen = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0][0]


def vectors(model, block, positive, negative, c, pad):
    """c (h+_i - h-_i) of every token i, the shorter prompt padded on the right (arXiv 2308.10248)."""
    n = max(len(positive), len(negative))
    positive, negative = (row + [pad] * (n - len(row)) for row in (positive, negative))
    return c * (block_inputs(model, block, positive) - block_inputs(model, block, negative))


def logits(model, block, added, ids, prompt_length):
    """Logits (tokens, vocabulary) with the i-th vector added to the i-th token of the prompt, where there is one."""

    def add(_, args, kwargs):
        h = (args[0] if args else kwargs["hidden_states"]).clone()
        for i in range(min(len(added), prompt_length)):
            h[0, i] = h[0, i] + added[i]
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    handle = block.register_forward_pre_hook(add, with_kwargs=True)
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return out


def greedy(model, block, added, ids, new):
    """Greedy tokens after a prompt, all of it read again at every step."""
    out = list(ids)
    for _ in range(new):
        out.append(int(logits(model, block, added, out, len(ids))[-1].argmax()))
    return out[len(ids) :]
