"""Best settings, averages and bootstrap intervals from a run's raw rows, loop by loop."""

import math


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def scores(rows, half, **wanted):
    """{(prompt, seed): BCS} of the rows of a half whose fields are as wanted."""
    return {
        (r["prompt"], r["seed"]): r["behavior"] * r["coherence"]
        for r in rows
        if r["half"] == half and all(r[k] == v for k, v in wanted.items())
    }


def best(rows, concept, method, matched=None, layer=None):
    """(layer, coefficient) of the highest mean BCS on "tune"."""
    tried = {
        (r["layer"], r["coefficient"])
        for r in rows
        if (r["concept"], r["method"], r["matched"]) == (concept, method, matched) and layer in (None, r["layer"])
    }
    ranked = []
    for at, c in tried:
        found = scores(rows, "tune", concept=concept, method=method, matched=matched, layer=at, coefficient=c)
        ranked.append((mean(found.values()), at, c))
    return max(ranked)[1:]


def quantile(values, q):
    """Linear interpolation between the order statistics at (n - 1) q (Hyndman & Fan 1996, definition 7)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def bootstrap(strata, draws_of, level=0.95):
    """Percentile interval of the mean of stratum means; draws_of: {units: rows of indices}."""
    count = len(next(iter(draws_of.values())))
    drawn = []
    for d in range(count):
        total = 0.0
        for stratum in strata:
            units = tuple(sorted(stratum))
            total += mean(stratum[units[i]] for i in draws_of[units][d])
        drawn.append(total / len(strata))
    return mean(mean(s.values()) for s in strata), quantile(drawn, (1 - level) / 2), quantile(drawn, (1 + level) / 2)
