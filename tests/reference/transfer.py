"""Maps between models by loops: which tokens pair, ridge regression as padded least squares, figures token by token."""

import numpy as np
import torch


def states(model, ids, layer):
    """The residual stream after a block, token by token, (T, d) in float64, from a full pass with a plain hook."""
    kept = []
    block = model.get_decoder().layers[layer]
    handle = block.register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    try:
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
    finally:
        handle.remove()
    return kept[0].reshape(len(ids), -1).double().numpy()


def paired_states(model_a, ids_a, layer_a, model_b, ids_b, layer_b, pairs):
    """Rows of A and B, (n, d_a) and (n, d_b), of every pair (text, place in A, place in B), in their order."""
    a = [states(model_a, ids, layer_a) for ids in ids_a]
    b = [states(model_b, ids, layer_b) for ids in ids_b]
    return np.stack([a[t][i] for t, i, _ in pairs]), np.stack([b[t][j] for t, _, j in pairs])


def ridge(x, y, share):
    """(W, b) that minimise Σ‖y − Wx − b‖² + λ‖W‖², λ = share · mean eigenvalue, one output at a time (S2)."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    lam = share * sum(float(value) ** 2 for value in centred.flatten()) / x.shape[1]
    padded = np.concatenate([centred, np.sqrt(lam) * np.eye(x.shape[1])])
    rows = []
    for n in range(y.shape[1]):
        target = np.concatenate([y[:, n] - y_mean[n], np.zeros(x.shape[1])])
        rows.append(np.linalg.lstsq(padded, target, rcond=None)[0])
    weight = np.stack(rows)
    return weight, y_mean - weight @ x_mean


def autoencoder(x, w2, b2, w1, b1):
    """W₂ ReLU(W₁x + b₁) + b₂, row by row, unit by unit (S2)."""
    out = []
    for row in x:
        hidden = [max(float(np.dot(w, row)) + float(b), 0.0) for w, b in zip(w1, b1, strict=True)]
        out.append([float(np.dot(w, hidden)) + float(b) for w, b in zip(w2, b2, strict=True)])
    return np.array(out)


def figures(y, mapped, mean):
    """FVU together and by dimension, and the mean cosines, plain and about a mean."""
    by_dimension = []
    for n in range(y.shape[1]):
        residual = sum((y[t, n] - mapped[t, n]) ** 2 for t in range(len(y)))
        by_dimension.append(residual / sum((y[t, n] - y[:, n].mean()) ** 2 for t in range(len(y))))
    total = ((y - mapped) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()

    def cosine(origin):
        pairs = [(u - origin, v - origin) for u, v in zip(y, mapped, strict=True)]
        return sum(float(u @ v) / np.sqrt(float(u @ u) * float(v @ v)) for u, v in pairs) / len(pairs)

    return total, np.array(by_dimension), cosine(np.zeros_like(mean)), cosine(mean)


def spliced_loss(model, ids, layer, replaced):
    """The sum of cross-entropies of one text's tokens but the first, with {place: vector} put after a block."""

    def put(_, __, out):
        h = (out[0] if isinstance(out, tuple) else out).clone()
        for place, value in replaced.items():
            h[0, place] = torch.as_tensor(value).to(h)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    handle = model.get_decoder().layers[layer].register_forward_hook(put)
    try:
        with torch.no_grad():
            log_p = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    finally:
        handle.remove()
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)))
