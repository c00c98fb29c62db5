"""Interventions on one row of activations h (T, d), token by token, and the token positions that a scope covers."""

import math
from collections.abc import Callable

import numpy as np

SCOPES = ("all", "prompt", "generated", "reply", "last_prompt")


def _dot(a, b):
    """Inner product (helper, no equation)."""
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def _unit(r):
    """r / ||r||, the unit direction r-hat."""
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
    """h + c v (arXiv 2312.06681)."""
    out = np.array(h, dtype=np.float64)
    v = np.array(v, dtype=np.float64)
    for token in _tokens(out, where):
        out[token] = out[token] + c * v
    return out


def scale(h, alpha, theta=None, where=None):
    """(1 + alpha + theta . h) h (arXiv 2410.04962)."""
    out = np.array(h, dtype=np.float64)
    for token in _tokens(out, where):
        factor = 1 + alpha + (0.0 if theta is None else _dot(theta, out[token]))
        out[token] = [factor * x for x in out[token]]
    return out


def ablate(h, r, where=None):
    """h - (r-hat . h) r-hat (arXiv 2406.11717)."""
    out = np.array(h, dtype=np.float64)
    direction = _unit(r)
    for token in _tokens(out, where):
        out[token] = out[token] - _dot(direction, out[token]) * direction
    return out


def clamp(h, r, target, where=None):
    """h + (target - r-hat . h) r-hat."""
    out = np.array(h, dtype=np.float64)
    direction = _unit(r)
    for token in _tokens(out, where):
        out[token] = out[token] + (target - _dot(direction, out[token])) * direction
    return out


def affine(h, r, reference, alpha, where=None):
    """h - proj_r(h) + proj_r(reference) + alpha r, reference = r- (arXiv 2411.09003)."""
    out = np.array(h, dtype=np.float64)
    r = np.array(r, dtype=np.float64)
    direction = _unit(r)
    anchor = _dot(direction, reference) * direction
    for token in _tokens(out, where):
        projection = _dot(direction, out[token]) * direction
        out[token] = out[token] - projection + anchor + alpha * r
    return out


def clamp_feature(h, encode_fn, W_dec_row_dict, targets, where=None):
    """h + sum_j (t_j - f_j(h)) W_dec[j], every f_j read from the original h."""
    original = np.array(h, dtype=np.float64)
    out = original.copy()
    for token in _tokens(out, where):
        acts = encode_fn(original[token].copy())
        for j, target in targets.items():
            out[token] = out[token] + (target - float(acts[j])) * np.array(W_dec_row_dict[j], dtype=np.float64)
    return out


def positions(scope, length, prompt_length, first, *, bos=False, real=None):
    """Token indices of a scope, padding and (unless bos) the BOS slot left out."""
    kind, _, numbers = scope.partition(":")
    if scope not in SCOPES and kind not in ("first", "last", "ends", "at"):
        raise ValueError(f"unknown scope {scope!r}")
    counts = [int(number) for number in numbers.split(",") if number]
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
        if scope == "last_prompt" and not i == last_prompt < prompt_length:
            continue
        if counts and not i < prompt_length:
            continue
        out.append(i)
    if kind == "first":
        return out[: counts[0]]
    if kind == "last":
        prompt = [i for i in range(min(prompt_length, length)) if is_real[i]]
        return [i for i in out if i in prompt[-counts[0] :]]
    if kind == "ends":
        prompt = [i for i in range(min(prompt_length, length)) if is_real[i]]
        return sorted(set(out[: counts[0]]) | {i for i in out if i in prompt[-counts[1] :]})
    if kind == "at":
        prompt = [i for i in range(min(prompt_length, length)) if is_real[i]]
        return [i for i in out if prompt.index(i) in counts]
    return out


def add_relative(h, v, c):
    """h + c ||h|| v-hat, token by token."""
    out = np.array(h, dtype=np.float64)
    direction = _unit(v)
    for token in range(len(out)):
        out[token] = out[token] + c * math.sqrt(_dot(out[token], out[token])) * direction
    return out


def add_keeping_norm(h, v, c):
    """(h + c v) ||h|| / ||h + c v||."""
    out = np.array(h, dtype=np.float64)
    for token in range(len(out)):
        moved = out[token] + c * np.array(v, dtype=np.float64)
        out[token] = moved * math.sqrt(_dot(out[token], out[token])) / math.sqrt(_dot(moved, moved))
    return out


def adaptive_add(h, u, a, b, s):
    """h + s relu(a . h + b) u."""
    out = np.array(h, dtype=np.float64)
    for token in range(len(out)):
        out[token] = out[token] + s * max(_dot(a, out[token]) + b, 0.0) * np.array(u, dtype=np.float64)
    return out


def bound(h, r, at_least=-math.inf, at_most=math.inf):
    """Each token moved along r-hat until its projection is within bounds."""
    out = np.array(h, dtype=np.float64)
    direction = _unit(r)
    for token in range(len(out)):
        projection = _dot(direction, out[token])
        out[token] = out[token] + (min(max(projection, at_least), at_most) - projection) * direction
    return out


def clamp_subspace(h, directions, targets):
    """The nearest point to h with the given projections, by least squares."""
    out = np.array(h, dtype=np.float64)
    units = np.stack([_unit(direction) for direction in directions])
    for token in range(len(out)):
        wanted = np.array(targets, dtype=np.float64) - units @ out[token]
        out[token] = out[token] + np.linalg.lstsq(units, wanted, rcond=None)[0]
    return out


def rotate(h, first, other, by=None, to=None):
    """In-plane polar coordinates (radius, angle): the angle changed by, or set to, so many degrees."""
    out = np.array(h, dtype=np.float64)
    b1 = _unit(first)
    b2 = _unit(np.array(other, dtype=np.float64) - _dot(b1, other) * b1)
    for token in range(len(out)):
        x, y = _dot(b1, out[token]), _dot(b2, out[token])
        radius, angle = math.hypot(x, y), math.atan2(y, x)
        angle = math.radians(to) if by is None else angle + math.radians(by)
        out[token] = out[token] + (radius * math.cos(angle) - x) * b1 + (radius * math.sin(angle) - y) * b2
    return out


def remap(h, weight, bias, hidden_weight=None, hidden_bias=None, strength=1.0):
    """(1 - s) h + s f(h), f(h) = W h + b, or W relu(W1 h + b1) + b."""
    out = np.array(h, dtype=np.float64)
    for token in range(len(out)):
        x = [float(value) for value in out[token]]
        if hidden_weight is not None:
            x = [max(_dot(row, x) + float(b), 0.0) for row, b in zip(hidden_weight, hidden_bias, strict=True)]
        mapped = np.array([_dot(row, x) + float(b) for row, b in zip(weight, bias, strict=True)])
        out[token] = (1 - strength) * out[token] + strength * mapped
    return out


def edit_features(h, encode_fn, W_dec_row_dict, edits):
    """h + sum_j (f'_j - f_j) W_dec[j], with f'_j of the edit's rule."""
    rules: dict[str, Callable[[float, float], float]] = {
        "set": lambda f, x: x,
        "at_least": max,
        "at_most": min,
        "plus": lambda f, x: max(f + x, 0.0),
        "times": lambda f, x: f * x,
    }
    out = np.array(h, dtype=np.float64)
    for token in range(len(out)):
        acts = encode_fn(np.array(h[token], dtype=np.float64))
        for j, (rule, x) in edits.items():
            change = rules[rule](float(acts[j]), x) - float(acts[j])
            out[token] = out[token] + change * np.array(W_dec_row_dict[j], dtype=np.float64)
    return out
