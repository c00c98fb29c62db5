"""Best settings, averages and t intervals over prompts from a run's raw rows, loop by loop."""

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


def t_quantile(level, freedom, steps=200_000):
    """t with P(|T| <= t) = level, by adding up Student's density in small steps (the midpoint rule)."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi * freedom)
    # x = tan(u): equal steps of u reach to infinity
    width, inside = math.pi / 2 / steps, 0.0
    for n in range(steps):
        u = (n + 0.5) * width
        inside += 2 * scale * (1 + math.tan(u) ** 2 / freedom) ** (-(freedom + 1) / 2) / math.cos(u) ** 2 * width
        if inside >= level:
            return math.tan(u)
    raise ValueError(level)


def interval(strata, cluster, level=0.95):
    """(mean, low, high): strata of the same clusters are averaged into one mean a cluster, for clusters of one size."""
    groups = {}
    for stratum in strata:
        by_cluster = {}
        for unit, value in stratum.items():
            by_cluster.setdefault(cluster(unit), []).append(value)
        means = {name: mean(values) for name, values in by_cluster.items()}
        groups.setdefault(frozenset(means), []).append(means)
    total, variances = 0.0, []
    for names, members in groups.items():
        weight = len(members) / len(strata)
        points = [mean(member[name] for member in members) for name in names]
        centre = mean(points)
        total += weight * centre
        spread = sum((p - centre) ** 2 for p in points) / (len(points) - 1)
        variances.append((weight**2 * spread / len(points), len(points) - 1))
    variance = sum(v for v, _ in variances)
    freedom = variance**2 / sum(v**2 / d for v, d in variances)
    half = t_quantile(level, freedom) * math.sqrt(variance)
    return total, total - half, total + half


def effective(clusters):
    """Effective number of values in equal clusters: N / (1 + (m - 1) ICC), ICC of the one-way analysis of variance."""
    m, count = len(clusters[0]), len(clusters)
    everything = mean(x for cluster in clusters for x in cluster)
    between = m * sum((mean(c) - everything) ** 2 for c in clusters) / (count - 1)
    within = sum((x - mean(c)) ** 2 for c in clusters for x in c) / (count * (m - 1))
    icc = (between - within) / (between + (m - 1) * within)
    return count * m / (1 + (m - 1) * min(1, max(0, icc)))
