"""The builders of vectors, written straight from their equations."""

import math

import numpy as np


def _mean(vectors):
    """Arithmetic mean of a list of equal-length vectors (helper, no equation)."""
    if len(vectors) == 0:
        raise ValueError("mean of no vectors")
    total = np.zeros(len(vectors[0]), dtype=np.float64)
    for vector in vectors:
        total = total + np.array(vector, dtype=np.float64)
    return total / len(vectors)


def _norm(v):
    """Euclidean norm (helper, no equation)."""
    return math.sqrt(sum(float(a) * float(a) for a in v))


def unit(v):
    """v / ||v||, the hat of METHODS (x-hat is a unit vector)."""
    norm = _norm(v)
    if norm == 0:
        raise ValueError("a zero vector has no direction")
    return np.array(v, dtype=np.float64) / norm


def caa(pos, neg):
    """v = mean(h+) - mean(h-) (arXiv 2312.06681)."""
    return _mean(pos) - _mean(neg)


def signed_min_max(x):
    """n(x) = sign(x) (|x| - min|x|) / (max|x| - min|x|), zeros when max == min (arXiv 2505.20322)."""
    size = [abs(float(v)) for v in x]
    low, high = min(size), max(size)
    out = np.zeros(len(size), dtype=np.float64)
    if high == low:
        return out
    for j in range(len(size)):
        scaled = (size[j] - low) / (high - low)
        if x[j] > 0:
            out[j] = scaled
        elif x[j] < 0:
            out[j] = -scaled
    return out


def sta_statistics(z_pos, z_neg):
    """(delta_a, delta_f, s): amplitude, frequency and score (arXiv 2505.20322)."""
    delta_a = _mean(z_pos) - _mean(z_neg)
    n_features = len(delta_a)
    delta_f = np.zeros(n_features, dtype=np.float64)
    for j in range(n_features):
        delta_f[j] = sum(1 for z in z_pos if z[j] > 0) - sum(1 for z in z_neg if z[j] > 0)
    n_a = signed_min_max(delta_a)
    n_f = signed_min_max(delta_f)
    s = np.zeros(n_features, dtype=np.float64)
    for j in range(n_features):
        if (n_a[j] > 0 and n_f[j] > 0) or (n_a[j] < 0 and n_f[j] < 0):
            s[j] = n_f[j]
    return delta_a, delta_f, s


def sta(z_pos, z_neg, W_dec, v_caa, *, p=0.35, mode="act_and_freq", atoms="signed", compat=False, norm_match=True):
    """(direction, {feature: delta_a}) of Steering Target Atoms (arXiv 2505.20322)."""
    if mode not in ("act_and_freq", "act", "freq"):
        raise ValueError(f"unknown mode {mode!r}")
    if atoms not in ("signed", "positive"):
        raise ValueError(f"unknown atoms {atoms!r}")
    W_dec = np.array(W_dec, dtype=np.float64)
    delta_a, delta_f, s = sta_statistics(z_pos, z_neg)
    n_features = len(delta_a)

    kept = []
    if compat:
        k = int(p * n_features)
        if not 0 <= k < n_features:
            raise ValueError(f"there is no {k}-th (0-based) of {n_features} features; p must be in [0, 1)")
        tau_f = sorted((abs(float(v)) for v in s), reverse=True)[k]
        tau_a = sorted((abs(float(v)) for v in delta_a), reverse=True)[k]
        for j in range(n_features):
            enough_f = abs(s[j]) >= tau_f
            enough_a = abs(delta_a[j]) >= tau_a
            if (mode == "act" or enough_f) and (mode == "freq" or enough_a):
                kept.append(j)
    else:
        k = max(1, int(p * n_features))
        candidates = []
        for j in range(n_features):
            if (delta_a[j] != 0) if mode == "act" else (s[j] != 0):
                candidates.append(j)
        best_f = sorted(candidates, key=lambda j: (-abs(s[j]), j))[:k]
        best_a = sorted(candidates, key=lambda j: (-abs(delta_a[j]), j))[:k]
        for j in candidates:
            if (mode == "act" or j in best_f) and (mode == "freq" or j in best_a):
                kept.append(j)

    if atoms == "positive":
        kept = [j for j in kept if delta_a[j] > 0 and (mode == "act" or delta_f[j] > 0)]
    if not kept:
        raise ValueError("STA kept no feature")

    features = {j: float(delta_a[j]) for j in kept}
    direction = np.zeros(W_dec.shape[1], dtype=np.float64)
    for j, weight in features.items():
        direction = direction + weight * W_dec[j]
    if norm_match:
        direction = unit(direction) * _norm(v_caa)
    return direction, features


def fgaa_target(z_pos, z_neg, *, density=None, max_density=0.01, bos_features=(), n_positive, n_negative):
    """Target t (K,): difference, density filter, BOS filter, signed top-k (arXiv 2501.09929)."""
    difference = _mean(z_pos) - _mean(z_neg)
    n_features = len(difference)
    if density is not None:
        for j in range(n_features):
            if density[j] > max_density:
                difference[j] = 0.0
    for j in bos_features:
        difference[j] = 0.0

    positive = [j for j in range(n_features) if difference[j] > 0]
    negative = [j for j in range(n_features) if difference[j] < 0]
    positive.sort(key=lambda j: (-difference[j], j))
    negative.sort(key=lambda j: (difference[j], j))

    t = np.zeros(n_features, dtype=np.float64)
    for j in positive[:n_positive] + negative[:n_negative]:
        t[j] = difference[j]
    if not any(value != 0 for value in t):
        raise ValueError("every feature was filtered out")
    return t


def project_decoder(t, W_dec):
    """t @ W_dec without b_dec (arXiv 2411.02193 baseline)."""
    W_dec = np.array(W_dec, dtype=np.float64)
    direction = np.zeros(W_dec.shape[1], dtype=np.float64)
    for j in range(W_dec.shape[0]):
        direction = direction + float(t[j]) * W_dec[j]
    return direction


def reconstruction_error(z_pos, z_neg, h_pos, h_neg, W_dec, b_dec):
    """mean(h+ - x+) - mean(h- - x-), x = z W_dec + b_dec one text at a time: what the SAE does not reconstruct."""
    sides = []
    for zs, hs in ((z_pos, h_pos), (z_neg, h_neg)):
        errors = []
        for z, h in zip(zs, hs, strict=True):
            x = np.array(b_dec, dtype=np.float64)
            for j in range(len(z)):
                x = x + float(z[j]) * np.array(W_dec[j], dtype=np.float64)
            errors.append(np.array(h, dtype=np.float64) - x)
        sides.append(_mean(errors))
    return sides[0] - sides[1]


def caa_denoised(z_pos, z_neg, h_pos, h_neg, W_dec, *, shrinkage, threshold):
    """(direction, {feature: weight}): v_CAA less, of each feature, the share of its difference that is noise.

    Soft with threshold 1 is the posterior mean of d under the prior N(0, A), A maximising the likelihood of d.
    """
    v = caa(h_pos, h_neg)
    weights = {}
    for j in range(len(z_pos[0])):
        up, down = [float(z[j]) for z in z_pos], [float(z[j]) for z in z_neg]
        d = sum(up) / len(up) - sum(down) / len(down)
        squared_error = 0.0
        for side in (up, down):
            mean = sum(side) / len(side)
            squared_error += sum((x - mean) ** 2 for x in side) / (len(side) - 1) / len(side)
        noise = squared_error * threshold**2
        if shrinkage == "soft":
            prior = max(0.0, d * d - noise)
            kept = prior / (prior + noise) if prior + noise > 0 else 0.0
        else:
            kept = 1.0 if d * d >= noise else 0.0
        for i in range(len(v)):
            v[i] = v[i] - (1 - kept) * d * float(W_dec[j][i])
        if kept * d != 0:
            weights[j] = kept * d
    return v, weights


def project_effects(t, M, b, lambda_b=1.0):
    """M t/||M t|| - lambda_b M b/||M b||, not renormalised (arXiv 2411.02193)."""
    M = np.array(M, dtype=np.float64)
    d, n_features = M.shape
    towards = np.zeros(d, dtype=np.float64)
    bias = np.zeros(d, dtype=np.float64)
    for i in range(d):
        for j in range(n_features):
            towards[i] += M[i, j] * float(t[j])
            bias[i] += M[i, j] * float(b[j])
    out = unit(towards)
    if lambda_b != 0 and _norm(bias) > 0:  # a zero bias effect has nothing to subtract
        out = out - lambda_b * unit(bias)
    return out


def ridge(X, Y, lam):
    """M = (Xc'Xc + lam I)^-1 Xc'Yc (sums, not means), b = mean(Y) - mean(X) M (arXiv 2411.02193)."""
    X = np.array(X, dtype=np.float64)
    Y = np.array(Y, dtype=np.float64)
    n, d = X.shape
    n_features = Y.shape[1]
    x_mean = _mean(list(X))
    y_mean = _mean(list(Y))
    gram = np.zeros((d, d), dtype=np.float64)
    cross = np.zeros((d, n_features), dtype=np.float64)
    for row in range(n):
        x = X[row] - x_mean
        y = Y[row] - y_mean
        for i in range(d):
            for j in range(d):
                gram[i, j] += x[i] * x[j]
            for j in range(n_features):
                cross[i, j] += x[i] * y[j]
    for i in range(d):
        gram[i, i] += lam
    M = np.linalg.solve(gram, cross)
    b = np.zeros(n_features, dtype=np.float64)
    for j in range(n_features):
        b[j] = y_mean[j] - sum(float(x_mean[i]) * float(M[i, j]) for i in range(d))
    return M, b
