"""Activation scaling as loops: an example at a time, a token at a time."""

import torch


def last_logits(model, ids, factors, start=1):
    """The logits after ids; ``factors`` maps a layer to a function of (h, t), the factor of token t ≥ start."""

    def hook_of(factor):
        def hook(_, __, output):
            h = output[0] if isinstance(output, tuple) else output
            rows = [h[0, t] if t < start else factor(h[0, t], t) * h[0, t] for t in range(h.shape[1])]
            moved = torch.stack(rows)[None]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [model.model.layers[layer].register_forward_hook(hook_of(f)) for layer, f in factors.items()]
    try:
        return model(torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def other_divergence(base, logits, answers):
    """KL(p₀‖p) of the tokens that are no answer, each distribution among them alone."""
    others = [t for t in range(len(base)) if t not in answers]
    p = torch.softmax(base[others], 0)
    q = torch.softmax(logits[others], 0)
    return (p * (torch.log(p) - torch.log(q))).sum()


def loss(model, examples, factors_of, sizes, weights):
    """The mean over examples and both signs; ``factors_of(m)`` gives the factors by layer, ``sizes`` their ‖·‖₁."""
    terms = []
    for ids, answers in examples:
        with torch.no_grad():
            base = last_logits(model, ids, {})
        for m in (1.0, -1.0):
            logits = last_logits(model, ids, factors_of(m))
            d = logits[answers[0]] - logits[answers[1]]
            terms.append(torch.log(1 + torch.exp(-m * d)))
            terms.append(weights["faithfulness"] * other_divergence(base, logits, answers))
    return sum(terms) / (2 * len(examples)) + weights["l1"] * sizes
