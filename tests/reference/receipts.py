"""Own-text KL and the parts of a receipt, naively: one text, one token, one head, one pair at a time."""

from __future__ import annotations

import itertools
import math

import torch


def next_distribution(model, ids, change=None, layer=None, excluded=()):
    """The distribution of the token after ``ids``, with ``change`` added to a block's output by a hook of its own.

    The special token that a text begins with is not steered.
    """
    handle = None
    if change is not None:

        def add(_, __, output):
            rows = [row + 0 * change for row in output[0]]
            for n in range(int(ids[0] == model.config.bos_token_id), len(ids)):
                rows[n] = rows[n] + change
            return torch.stack(rows)[None]

        handle = model.model.layers[layer].register_forward_hook(add)
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    finally:
        if handle is not None:
            handle.remove()
    for token in excluded:
        logits[token] = -math.inf
    weights = [math.exp(value) if value > -math.inf else 0.0 for value in (logits - logits.max()).tolist()]
    return [weight / sum(weights) for weight in weights]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def token_divergences(model, prompt, plain, tail, change, layer, excluded=()):
    """KL before each token of one text."""
    found = []
    for n in range(len(tail)):
        steered = next_distribution(model, [*prompt, *tail[:n]], change, layer, excluded)
        unsteered = next_distribution(model, [*plain, *tail[:n]], None, None, excluded)
        found.append(divergence(steered, unsteered))
    return found


def all_texts(vocabulary, length, ends):
    """Every text of at most so many tokens: ended by a token of ``ends``, or of full length."""
    for n in range(1, length + 1):
        for text in itertools.product(range(vocabulary), repeat=n):
            ended = [token in ends for token in text]
            if not any(ended[:-1]) and (ended[-1] or n == length):
                yield text


def text_probability(model, prompt, text, change=None, layer=None):
    probability = 1.0
    for n, token in enumerate(text):
        probability *= next_distribution(model, [*prompt, *text[:n]], change, layer)[token]
    return probability


def distinct_grams(ids, size=3):
    grams = [tuple(ids[n + k] for k in range(size)) for n in range(len(ids)) if n + size <= len(ids)]
    different = []
    for gram in grams:
        if gram not in different:
            different.append(gram)
    return len(different) / len(grams) if grams else 1.0


def smallest_focus(weights, share):
    """How many keys the smallest set with a share of attention has, by trying all sets."""
    for size in range(1, len(weights) + 1):
        for keys in itertools.combinations(range(len(weights)), size):
            if sum(weights[k] for k in keys) >= share * sum(weights) * (1 - 1e-12):
                return size
    raise AssertionError


def head_risk(weight, sigma, v):
    """``(W v)ᵀ Σ (W v) / ‖W v‖²`` by loops over lists."""
    shift = [sum(w * x for w, x in zip(row, v, strict=True)) for row in weight]
    top = sum(shift[i] * sigma[i][j] * shift[j] for i in range(len(shift)) for j in range(len(shift)))
    return top / sum(x * x for x in shift)


def second_moments(model, rows, layer, pairs, focus, queries, generator):
    """Σ of each head of a Llama block from its hidden states and attention weights, in the order of the real draws."""
    block, config = model.model.layers[layer], model.config
    size = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    sums = [torch.zeros(size, size, dtype=torch.float64) for _ in range(config.num_attention_heads)]
    counts = [0] * config.num_attention_heads
    for ids in rows:
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=False)
            keys = block.self_attn.k_proj(block.input_layernorm(output.hidden_states[layer]))[0].double()
        for head in range(len(sums)):
            own = keys[:, (head // group) * size : (head // group + 1) * size]
            for token in range(len(ids) - max(1, round(queries * len(ids))), len(ids)):
                weights = output.attentions[layer][0, head, token, : token + 1].double().tolist()
                order = sorted(range(token + 1), key=lambda k: -weights[k])
                held, near = 0.0, []
                for key in order:
                    near.append(key)
                    held += weights[key]
                    if held >= focus * sum(weights) * (1 - 1e-12):
                        break
                far = [key for key in order if key not in near]
                if not far:
                    continue
                first = torch.randint(len(near), (pairs,), generator=generator).tolist()
                second = torch.randint(len(near), len(order), (pairs,), generator=generator).tolist()
                for a, b in zip(first, second, strict=True):
                    d = own[order[a]] - own[order[b]]
                    sums[head] += torch.outer(d, d)
                    counts[head] += 1
    return [total / max(1, number) for total, number in zip(sums, counts, strict=True)]
