"""Sparse autoencoder encodings and the statistics read from them, one number at a time."""

import math

import numpy as np


def _vector(values):
    """A float64 copy of a one-dimensional array (helper, no equation)."""
    out = np.array(values, dtype=np.float64)
    if out.ndim != 1:
        raise ValueError(f"expected one dimension, got shape {out.shape}")
    return out


def _per_feature(values, n_features):
    """A float64 (K,) array from a scalar or a (K,) array (helper, no equation)."""
    out = np.array(values, dtype=np.float64)
    if out.ndim == 0:
        out = np.full(n_features, float(out))
    if out.shape != (n_features,):
        raise ValueError(f"expected a scalar or shape ({n_features},), got {out.shape}")
    return out


def normalise_input(x, input_norm):
    """Input normalisation as sae-lens does it; layer_norm divides by the unbiased std + 1e-5."""
    x = _vector(x)
    d = len(x)
    if input_norm == "none":
        return x
    if input_norm == "layer_norm":
        mean = sum(float(v) for v in x) / d
        centred = [float(v) - mean for v in x]
        std = math.sqrt(sum(v * v for v in centred) / (d - 1))
        return np.array([v / (std + 1e-5) for v in centred], dtype=np.float64)
    if input_norm == "constant_norm_rescale":
        norm = math.sqrt(sum(float(v) ** 2 for v in x))
        return np.array([float(v) * math.sqrt(d) / norm for v in x], dtype=np.float64)
    raise ValueError(f"unknown input_norm {input_norm!r}")


def encode(
    x,
    W_enc,
    b_enc,
    W_dec,
    b_dec,
    *,
    activation,
    threshold=None,
    k=None,
    gate=None,
    apply_b_dec_to_input=True,
    rescale_acts_by_decoder_norm=False,
    input_norm="none",
):
    """E(x) of one activation (d,) -> (K,), the encoder; sae-lens's conventions."""
    W_enc = np.array(W_enc, dtype=np.float64)
    W_dec = np.array(W_dec, dtype=np.float64)
    b_dec = _vector(b_dec)
    d, n_features = W_enc.shape
    if rescale_acts_by_decoder_norm and activation != "topk":
        raise ValueError("rescale_acts_by_decoder_norm is defined for topk only")

    x = normalise_input(x, input_norm)
    if apply_b_dec_to_input:
        x = np.array([float(x[i]) - float(b_dec[i]) for i in range(d)], dtype=np.float64)

    linear = []  # x @ W_enc, without a bias
    for j in range(n_features):
        linear.append(sum(float(x[i]) * float(W_enc[i, j]) for i in range(d)))

    acts = np.zeros(n_features, dtype=np.float64)
    if activation == "gated":
        b_gate, r_mag, b_mag = (_per_feature(part, n_features) for part in gate)
        for j in range(n_features):
            if linear[j] + b_gate[j] > 0:
                scale = math.exp(r_mag[j])
                magnitude = sum(float(x[i]) * float(W_enc[i, j]) * scale for i in range(d)) + b_mag[j]
                acts[j] = max(magnitude, 0.0)
        return acts

    b_enc = _per_feature(b_enc, n_features)
    pre = [linear[j] + float(b_enc[j]) for j in range(n_features)]

    if activation == "relu":
        for j in range(n_features):
            acts[j] = max(pre[j], 0.0)
    elif activation == "jumprelu":
        threshold = _per_feature(threshold, n_features)
        for j in range(n_features):
            if pre[j] > threshold[j]:
                acts[j] = max(pre[j], 0.0)
    elif activation == "topk":
        if rescale_acts_by_decoder_norm:
            for j in range(n_features):
                pre[j] *= math.sqrt(sum(float(w) ** 2 for w in W_dec[j]))
        largest = sorted(range(n_features), key=lambda j: (-pre[j], j))[:k]
        for j in largest:
            acts[j] = max(pre[j], 0.0)
    else:
        raise ValueError(f"unknown activation {activation!r}")
    return acts


def moments(samples):
    """(count, mean, m2) of (n,) arrays by definition, in two passes; m2 = sum (x - mean)^2."""
    samples = [_vector(s) for s in samples]
    if not samples:
        raise ValueError("moments of no samples")
    n = len(samples[0])
    mean = np.zeros(n, dtype=np.float64)
    m2 = np.zeros(n, dtype=np.float64)
    for i in range(n):
        mean[i] = sum(float(s[i]) for s in samples) / len(samples)
    for i in range(n):
        m2[i] = sum((float(s[i]) - float(mean[i])) ** 2 for s in samples)
    return len(samples), mean, m2


def pooled(encodings):
    """Mean over tokens of the encodings, not the encoding of the mean."""
    total = None
    count = 0
    for block in encodings:
        for row in np.array(block, dtype=np.float64):
            total = row.copy() if total is None else total + row
            count += 1
    if count == 0:
        raise ValueError("pooled over no tokens")
    return total / count


def density(docs):
    """Token-level density without BOS, and share of firing documents with their argmax on BOS."""
    docs = [np.array(doc, dtype=np.float64) for doc in docs]
    if not docs:
        raise ValueError("density of no documents")
    n_features = docs[0].shape[1]
    rho = np.zeros(n_features, dtype=np.float64)
    bos_share = np.zeros(n_features, dtype=np.float64)
    for j in range(n_features):
        fired_tokens = 0
        tokens = 0
        fired_docs = 0
        bos_docs = 0
        for doc in docs:
            best_position = None
            best_value = 0.0
            for position in range(len(doc)):
                value = float(doc[position, j])
                if position > 0:
                    tokens += 1
                    if value > 0:
                        fired_tokens += 1
                if value > best_value:  # strict: the first position wins a tie
                    best_value = value
                    best_position = position
            if best_position is not None:
                fired_docs += 1
                if best_position == 0:
                    bos_docs += 1
        rho[j] = fired_tokens / tokens if tokens else 0.0
        bos_share[j] = bos_docs / fired_docs if fired_docs else 0.0
    return rho, bos_share
