"""What a sweep answers: where steering works best, how it fades, and whether the negative sign is stronger.

Every answer is a rule over curves, one for each layer and sign, which compares at equal cost. Its interval is over
texts, which all layers and signs share.

    best_layer(curves, sign=1, cost=0.5, interval=interval).lead.clear
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from jaxtyping import Float

from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.metrics.propensity import Shares

SIGNS = (1, -1)

IntervalOf = Callable[[Shares], Interval]


@dataclass(frozen=True, eq=False)
class Curve:
    """One layer and sign, by rising strength: the push of each step, and what it costs.

    Args:
        layer: The layer.
        sign: +1 or −1.
        coefficients: The coefficient of each step.
        nominal: What steps are matched by: the cost that was asked for, which calibration meets within its
            tolerance, or else the measured cost.
        costs: Measured costs, in nats a token.
        pushes: The units' shares of each step's push, which add up to it, (steps, units). Push is the effect in the
            direction that was asked for, ``sign · effect``, in nats.
    """

    layer: int
    sign: int
    coefficients: tuple[float, ...]
    nominal: tuple[float, ...]
    costs: tuple[float, ...]
    pushes: Float[np.ndarray, "steps units"]

    def at(self, cost: float) -> tuple[float, Shares] | None:
        """(coefficient, pushes) where the curve first reaches a cost; None where it does not.

        Between steps, and from no steering to the first step, the curve is a straight line.
        """
        costs, coefficients = (0.0, *self.nominal), (0.0, *self.coefficients)
        pushes = np.concatenate([np.zeros_like(self.pushes[:1]), self.pushes])
        for k in range(len(self.nominal)):
            if costs[k] <= cost <= costs[k + 1]:
                share = (cost - costs[k]) / (costs[k + 1] - costs[k]) if costs[k + 1] > costs[k] else 1.0
                mixed = (1 - share) * coefficients[k] + share * coefficients[k + 1]
                return mixed, (1 - share) * pushes[k] + share * pushes[k + 1]
        return None


@dataclass(frozen=True)
class BestLayer:
    """The layer of the largest push at the matched cost, for one sign.

    ``lead`` is by how much it is ahead of ``runner_up``; both are None where there is one layer. ``level_with`` are the
    layers whose distance to it has an interval that includes 0. The layer was chosen on the same texts that intervals
    are over, so where many layers are close the lead is somewhat too large.
    """

    sign: int
    layer: int
    coefficient: float
    push: Interval
    runner_up: int | None
    lead: Interval | None
    level_with: tuple[int, ...]


@dataclass(frozen=True)
class Fade:
    """How one layer and sign fades as strength grows.

    ``per_nat`` is push divided by cost of each step, nan where steering costs nothing. At first push grows as c and
    cost about as c², so that it falls early. ``peak_cost`` is the measured cost of the step with the largest push,
    and ``fall`` is by how much the push of the dearest step is below that, None where the dearest step is the peak.
    """

    layer: int
    sign: int
    per_nat: tuple[float, ...]
    peak_cost: float
    peak: float
    fall: Interval | None

    @property
    def falls(self) -> bool:
        """Whether the push falls after its peak by an interval that excludes 0."""
        return self.fall is not None and self.fall.low > 0


@dataclass(frozen=True)
class SignDifference:
    """``push(−) − push(+)`` of a layer at the matched cost, above 0 where the negative sign is stronger.

    With ``layer`` None it is the mean over layers. It is ``−effect(−) − effect(+)``, not ``|effect(−)| − effect(+)``: a
    negative sign that moves the model the wrong way is weak, not strong, and a mean of absolute values of noise is
    above 0. Any change of the model may cost one side of the contrast more, which makes a sign look strong: ``net`` is
    ``difference + 2·damage``, from which the effect of random directions of equal cost is taken away; None where that
    is not known.
    """

    layer: int | None
    difference: Interval
    net: Interval | None


def best_layer(curves: Sequence[Curve], sign: int, cost: float, interval: IntervalOf) -> BestLayer | None:
    """The layer of the largest push at a cost, among those that reach it; None where none does."""
    by_layer = {curve.layer: at for curve in curves if curve.sign == sign and (at := curve.at(cost)) is not None}
    if not by_layer:
        return None
    layer, *others = sorted(by_layer, key=lambda name: (-by_layer[name][1].sum(), name))
    coefficient, pushes = by_layer[layer]
    leads = {other: interval(pushes - by_layer[other][1]) for other in others}
    level = tuple(sorted(other for other in others if not leads[other].clear))
    second, lead = next(iter(leads.items()), (None, None))
    return BestLayer(sign, layer, coefficient, interval(pushes), second, lead, level)


def fade(curve: Curve, interval: IntervalOf) -> Fade:
    """How a curve of at least one step fades."""
    pushes = curve.pushes.sum(1)
    peak = int(pushes.argmax())
    per_nat = tuple(float(p) / c if c > 0 else math.nan for p, c in zip(pushes, curve.costs, strict=True))
    fall = interval(curve.pushes[peak] - curve.pushes[-1]) if peak < len(pushes) - 1 else None
    return Fade(curve.layer, curve.sign, per_nat, curve.costs[peak], float(pushes[peak]), fall)


def sign_differences(
    curves: Sequence[Curve], cost: float, interval: IntervalOf, damage: Mapping[int, Shares]
) -> tuple[SignDifference, ...]:
    """Negative against positive at every layer where both reach the cost, then their mean over these layers.

    ``damage`` are the units' shares in the effect of random directions, by layer.
    """
    pushes = {(curve.layer, curve.sign): at[1] for curve in curves if (at := curve.at(cost)) is not None}
    layers = sorted(layer for layer, sign in pushes if sign > 0 and (layer, -1) in pushes)
    if not layers:
        return ()
    raw = {layer: pushes[layer, -1] - pushes[layer, 1] for layer in layers}
    net = {layer: raw[layer] + 2 * damage[layer] for layer in layers if layer in damage}
    rows = [SignDifference(n, interval(raw[n]), interval(net[n]) if n in net else None) for n in layers]
    mean_net = interval(np.mean(list(net.values()), axis=0)) if len(net) == len(layers) else None
    return (*rows, SignDifference(None, interval(np.mean(list(raw.values()), axis=0)), mean_net))


def in_words(
    best: Sequence[BestLayer], fades: Sequence[Fade], signs: Sequence[SignDifference], cost: float, unit: str
) -> tuple[str, str, str]:
    """The three answers, a sentence or two each."""
    at = f"at a cost of {cost:g} nats a token"
    where = " ".join(_best_in_words(one, unit) for one in best) or "no layer reaches this cost."
    return f"Where, {at}: {where}", f"Fading: {_fades_in_words(fades)}", f"Sign, {at}: {_signs_in_words(signs, unit)}"


def _best_in_words(best: BestLayer, unit: str) -> str:
    text = (
        f"({best.sign:+d}) works best at layer {best.layer} with coefficient {best.coefficient:.3g}, "
        f"{_in_figures(best.push)} {unit}"
    )
    if best.lead is not None:
        text += f", {_in_figures(best.lead)} ahead of layer {best.runner_up}"
    if best.level_with:
        text += f"; it cannot be told apart from {_named(best.level_with)}"
    return f"{text}."


def _fades_in_words(fades: Sequence[Fade]) -> str:
    ends = [(known[0], known[-1]) for one in fades if (known := [p for p in one.per_nat if math.isfinite(p)])]
    if not ends:
        return "no step has a cost."
    first, last = (median(column) for column in zip(*ends, strict=True))
    falling = [f"layer {one.layer} ({one.sign:+d}, peak at {one.peak_cost:.3g} nats)" for one in fades if one.falls]
    return (
        f"a nat of cost buys {first:.3g} at the cheapest step and {last:.3g} at the dearest (medians of {len(ends)} "
        f"curves). {len(falling)} of {len(fades)} curves peak and clearly fall after{': ' * bool(falling)}"
        f"{', '.join(falling)}."
    )


def _signs_in_words(signs: Sequence[SignDifference], unit: str) -> str:
    if not signs:
        return "no layer reaches this cost with both signs."
    *rows, mean = signs
    text = f"{_stronger([(row.layer, row.difference) for row in rows])}. "
    text += f"On average negative less positive is {_in_figures(mean.difference)} {unit}."
    net = [(row.layer, row.net) for row in rows if row.net is not None]
    if mean.net is not None:
        text += (
            f" Net of what random directions of equal cost do: {_stronger(net)}; on average {_in_figures(mean.net)}."
        )
    return text


def _stronger(rows: Sequence[tuple[int | None, Interval]]) -> str:
    by = {
        "negative is stronger at": [layer for layer, difference in rows if difference.low > 0],
        "positive is stronger at": [layer for layer, difference in rows if difference.high < 0],
        "they cannot be told apart at": [layer for layer, difference in rows if not difference.clear],
    }
    return "; ".join(f"{what} {_named(layers)}" for what, layers in by.items() if layers)


def _in_figures(value: Interval) -> str:
    return f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"


def _named(layers: Sequence[int | None]) -> str:
    """Layers in words: "layer 1", or "layers 1, 2 and 3"."""
    *before, last = map(str, layers)
    return f"layers {', '.join(before)} and {last}" if before else f"layer {last}"
