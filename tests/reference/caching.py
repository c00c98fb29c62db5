"""Steering of cached keys and values, one unpadded prompt at a time, by passes and edits that are written out."""

import torch


def cached(model, ids):
    """[(keys, values)] of the last of these ids in every layer, each (n_kv_heads, d_head)."""
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    return [(layer.keys[0, :, -1], layer.values[0, :, -1]) for layer in cache.layers]


def mean_difference(model, sides, layer, which):
    """Mean over positive prompts less mean over negative ones of keys (0) or values (1)."""
    means = []
    for prompts in sides:
        total = 0.0
        for ids in prompts:
            total = total + cached(model, ids)[layer][which].double()
        means.append(total / len(prompts))
    return means[0] - means[1]


def greedy(model, ids, changes, new, edit=None):
    """Greedy tokens after a prompt, whose cache is changed before its last token is read.

    changes: {layer: (what is added to keys, to values)}; edit(hidden states, number of tokens before them, tokens of
    the prompt) changes what blocks give, where it is not None: {block: edit}.
    """
    before = 0

    def hooked(change):
        def hook(_, __, output):
            h = output[0] if isinstance(output, tuple) else output
            h = change(h, before, len(ids))
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    handles = [block.register_forward_hook(hooked(change)) for block, change in (edit or {}).items()]
    out = []
    with torch.no_grad():
        cache = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        for layer, (keys, values) in changes.items():
            held = cache.layers[layer]
            for name, added in (("keys", keys), ("values", values)):
                states = getattr(held, name).clone()
                states[0, :, -1] = states[0, :, -1] + added.to(states.dtype)
                setattr(held, name, states)
        token, before = ids[-1], len(ids) - 1
        for _ in range(new):
            token = int(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1].argmax())
            out.append(token)
            before += 1
    for handle in handles:
        handle.remove()
    return out
