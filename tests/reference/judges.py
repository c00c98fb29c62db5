"""Logistic regression, the area under the ROC curve and derived keywords, in plain loops."""

import re

import numpy as np


def logistic(x, y, weight, ridge, steps=20_000):
    """Minimise sum_i a_i * log(1 + exp(-s_i * (x_i w + b))) + ridge / 2 * |w|^2, b free, by gradient descent.

    The step is 1/L, L a bound on the largest eigenvalue of the Hessian: the descent cannot overshoot.
    """
    n, d = x.shape
    w, b = np.zeros(d), 0.0
    bound = sum(weight[i] * (x[i] @ x[i] + 1) for i in range(n)) / 4 + ridge
    for _ in range(steps):
        z = x @ w + b
        error = weight * (1 / (1 + np.exp(-z)) - y)
        w, b = w - (x.T @ error + ridge * w) / bound, b - error.sum() / bound
    return w, b


def auc(positive, negative):
    """Share of (positive, negative) pairs in the right order, a tie counting one half."""
    right = 0.0
    for p in positive:
        for n in negative:
            right += 1.0 if p > n else 0.5 if p == n else 0.0
    return right / (len(positive) * len(negative))


def keywords(positives, others):
    """Words of three letters or more in any positive and in none of the others, lower case."""
    seen = {word for text in others for word in re.split(r"[\W\d_]+", text.lower())}
    found = set()
    for text in positives:
        for word in re.split(r"[\W\d_]+", text.lower()):
            if len(word) >= 3 and word not in seen:
                found.add(word)
    return found
