"""KL-then-steer as loops: a text at a time, a token at a time."""

import torch


def logits(model, ids, layers=(), vectors=(), strength=0.0):
    """The logits of every token (tokens, vocabulary), with strength·v added to every token after each block."""

    def hook_of(v):
        def hook(_, __, output):
            h = output[0] if isinstance(output, tuple) else output
            moved = torch.stack([h[0, t] + strength * v for t in range(h.shape[1])])[None]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [
        model.get_decoder().layers[layer].register_forward_hook(hook_of(v))
        for layer, v in zip(layers, vectors, strict=True)
    ]
    try:
        return model(torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def loss(student, teacher, texts, layers=(), vectors=(), strength=0.0):
    """The mean over all tokens of all texts of Σ p log(p/q), p of the steered student and q of the teacher."""
    terms = []
    for ids in texts:
        with torch.no_grad():
            base = logits(teacher, ids)
        found = logits(student, ids, layers, vectors, strength)
        for own, other in zip(found, base, strict=True):
            p, q = torch.softmax(own, 0), torch.softmax(other, 0)
            terms.append((p * (torch.log(p) - torch.log(q))).sum())
    return sum(terms) / len(terms)


def mean_difference(model, layer, positives, negatives):
    """The difference of the sides' means, each text a mean over its tokens but the start token."""

    def mean(side):
        means = []
        for ids in side:
            with torch.no_grad():
                h = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            means.append(sum(h[t] for t in range(1, len(ids))) / (len(ids) - 1))
        return sum(means) / len(means)

    return mean(positives) - mean(negatives)
