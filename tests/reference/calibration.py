"""Calibration in its plainest form: one strength at a time, doubled until it costs too much, then halved."""

import fgsteer as fg


def coefficient(cost, target, start=1.0, tolerance=0.02):
    """The strength at which a function of it meets a target, by doubling and bisection."""
    low, high = 0.0, start
    while (value := cost(high)) < target * (1 - tolerance):
        low, high = high, 2 * high
    guess = high
    while abs(value - target) > tolerance * target:
        low, high = (guess, high) if value < target else (low, guess)
        guess = (low + high) / 2
        value = cost(guess)
    return guess


def calibrate(model, tokenizer, make, texts, target):
    """The strength at which steering raises the cross-entropy of texts by a target."""
    base = fg.cross_entropy(model, tokenizer, texts)
    return coefficient(lambda c: fg.cross_entropy(model, tokenizer, texts, steering=make(c)) - base, target)
