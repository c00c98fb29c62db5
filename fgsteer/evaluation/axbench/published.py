"""The figures of the papers, and what a run has to be to be compared with them.

differences({"model": "gemma-2-2b-it", "layer": 10, "judge": "endpoint:gpt-4o-mini", …})                ()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fgsteer.evaluation.axbench.protocol import FACTORS, INSTRUCTIONS, NEW_TOKENS, TEMPERATURE, TRAINED_FACTORS
from fgsteer.models.names import bare_name

JUDGE, CONCEPTS = "gpt-4o-mini", 500
WORDING = "the judge's questions are in words of fgsteer's own"


@dataclass(frozen=True)
class PublishedColumn:
    """Scores of one model and layer: harmonic means of three ratings from 0 to 2, judged by gpt-4o-mini.

    Attributes:
        name: What tables call it.
        model: The model.
        layer: The layer.
        scores: Mean scores by method.
    """

    name: str
    model: str
    layer: int
    scores: Mapping[str, float]


def _columns() -> tuple[PublishedColumn, ...]:
    """The leaderboard of AxBench (arXiv 2501.17148), with RePS (arXiv 2505.20809)."""
    places = (
        ("2B L10", "gemma-2-2b-it", 10),
        ("2B L20", "gemma-2-2b-it", 20),
        ("9B L20", "gemma-2-9b-it", 20),
        ("9B L31", "gemma-2-9b-it", 31),
    )
    scores = {
        "prompt": (0.698, 0.731, 1.075, 1.072),
        "RePS": (0.756, 0.606, 0.892, 0.624),
        "ReFT-r1": (0.633, 0.509, 0.630, 0.401),
        "DiffMean": (0.297, 0.178, 0.322, 0.158),
        "SAE": (0.177, 0.151, 0.191, 0.140),
        "SAE-A": (0.166, 0.132, 0.186, 0.143),
        "PCA": (0.107, 0.083, 0.128, 0.104),
        "probe": (0.095, 0.091, 0.108, 0.099),
    }
    return tuple(
        PublishedColumn(*place, {method: values[n] for method, values in scores.items()})
        for n, place in enumerate(places)
    )


COLUMNS = _columns()
# mean AUROC of detection, as far as it is published with its digits
DETECTION = {"SAE-A": 0.917, "Lang.": 0.912, "SAE": 0.695, "PCA": 0.652}


def column_of(model: str, layer: int) -> PublishedColumn | None:
    """The published column of a model and a layer, None for others."""
    found = (column for column in COLUMNS if (column.model, column.layer) == (bare_name(model), layer))
    return next(found, None)


def differences(run: Mapping[str, Any]) -> tuple[str, ...]:
    """What keeps a run from being compared with the published table, in words; () where nothing does.

    Args:
        run: Its "model", "layer", "site", "judge", "concepts" (how many) and "plan".
    """
    plan, found = run["plan"], []
    if column_of(run["model"], run["layer"]) is None:
        places = ", ".join(f"{column.model} at layer {column.layer}" for column in COLUMNS)
        found.append(f"the model is {bare_name(run['model']) or 'unnamed'} at layer {run['layer']}, not {places}")
    if run["site"] != "resid_post":
        found.append(f"vectors act at {run['site']}, not on the residual stream")
    if run["judge"] != f"endpoint:{JUDGE}":
        found.append(f"the judge is {run['judge'] or 'none'}, not {JUDGE}")
    if run["concepts"] != CONCEPTS:
        found.append(f"there are {run['concepts']} concepts, not {CONCEPTS}")
    if plan["mode"] != "steer":
        found.append("concepts are suppressed, not added")
    for name, published in (
        ("factors", list(FACTORS)),
        ("trained_factors", list(TRAINED_FACTORS)),
        ("instructions", INSTRUCTIONS),
        ("max_new_tokens", NEW_TOKENS),
        ("temperature", TEMPERATURE),
        ("top_k", 50),
    ):
        value = list(plan[name]) if isinstance(plan[name], tuple | list) else plan[name]
        if value != published:
            found.append(f"{name} is {_short(value)}, not {_short(published)}")
    if plan["settings"]:
        found.append(f"settings of {', '.join(sorted(plan['settings']))} were changed")
    return tuple(found)


def _short(value: Any) -> str:
    return f"{len(value)} values from {value[0]:g} to {value[-1]:g}" if isinstance(value, list) else f"{value:g}"


def verdict(run: Mapping[str, Any]) -> str:
    """One sentence: whether the published figures beside a run's may be compared with it, and why not."""
    found = differences(run)
    if found:
        return f"Not comparable with the published figures: {'; '.join(found)}."
    return f"Model, layer, judge and protocol are those of the published figures; {WORDING}, so compare with care."
