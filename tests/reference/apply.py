"""Interventions on one row of activations h (T, d), token by token, and the token positions that a scope covers."""

import math

import numpy as np

SCOPES = ("all", "prompt", "generated", "reply")


def _dot(a, b):
    """Inner product (helper, no equation)."""
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def _unit(r):
    """r / ||r||, the r-hat of METHODS 2."""
    r = np.array(r, dtype=np.float64)
    norm = math.sqrt(_dot(r, r))
    if norm == 0:
        raise ValueError("a zero vector has no direction")
    return r / norm


def _tokens(h, where):
    """Sorted distinct token indices to touch; None means every token (helper, no equation)."""
    n_tokens = len(h)
    if where is None:
        return list(range(n_tokens))
    indices = sorted({int(i) for i in where})
    for i in indices:
        if not 0 <= i < n_tokens:
            raise IndexError(f"token {i} of {n_tokens}")
    return indices


def add(h, v, c, where=None):
    """h + c v (METHODS 1; arXiv 2312.06681)."""
    out = np.array(h, dtype=np.float64)
    v = np.array(v, dtype=np.float64)
    for token in _tokens(out, where):
        out[token] = out[token] + c * v
    return out


def ablate(h, r, where=None):
    """h - (r-hat . h) r-hat (METHODS 2-3; arXiv 2406.11717)."""
    out = np.array(h, dtype=np.float64)
    direction = _unit(r)
    for token in _tokens(out, where):
        out[token] = out[token] - _dot(direction, out[token]) * direction
    return out


def clamp(h, r, target, where=None):
    """h + (target - r-hat . h) r-hat (DESIGN, interventions table, row Clamp)."""
    out = np.array(h, dtype=np.float64)
    direction = _unit(r)
    for token in _tokens(out, where):
        out[token] = out[token] + (target - _dot(direction, out[token])) * direction
    return out


def affine(h, r, reference, alpha, where=None):
    """h - proj_r(h) + proj_r(reference) + alpha r, reference = r- (METHODS 2; arXiv 2411.09003)."""
    out = np.array(h, dtype=np.float64)
    r = np.array(r, dtype=np.float64)
    direction = _unit(r)
    anchor = _dot(direction, reference) * direction
    for token in _tokens(out, where):
        projection = _dot(direction, out[token]) * direction
        out[token] = out[token] - projection + anchor + alpha * r
    return out


def clamp_feature(h, encode_fn, W_dec_row_dict, targets, where=None):
    """h + sum_j (t_j - f_j(h)) W_dec[j], every f_j read from the original h (DESIGN, table, row ClampFeature)."""
    original = np.array(h, dtype=np.float64)
    out = original.copy()
    for token in _tokens(out, where):
        acts = encode_fn(original[token].copy())
        for j, target in targets.items():
            out[token] = out[token] + (target - float(acts[j])) * np.array(W_dec_row_dict[j], dtype=np.float64)
    return out


def positions(scope, length, prompt_length, first, *, bos=False, real=None):
    """Token indices of a scope, padding and (unless bos) the BOS slot left out (DESIGN, scope; METHODS 1 and 5)."""
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}")
    allowed = set(range(length)) if real is None else {int(i) for i in real}
    is_real = [first <= i and i in allowed for i in range(length)]

    last_prompt = prompt_length  # a prompt without a real token: from the first generated token on
    for i in range(min(prompt_length, length)):
        if is_real[i]:
            last_prompt = i

    out = []
    for i in range(length):
        if not is_real[i]:
            continue
        if i == first and not bos:
            continue
        if scope == "prompt" and not i < prompt_length:
            continue
        if scope == "generated" and not i >= prompt_length:
            continue
        if scope == "reply" and not i >= last_prompt:
            continue
        out.append(i)
    return out
