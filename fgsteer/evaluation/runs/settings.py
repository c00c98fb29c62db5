"""Settings chosen on one half: the coefficient, and the layer, of the highest mean BCS on "tune".

What they score is read on the half "report", which chose nothing.

    best_settings(load_run("bench.jsonl"))["wedding", "fgaa"].coefficient
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from fgsteer.evaluation.metrics.intervals import paired_differences
from fgsteer.evaluation.runs.records import Run, Setting


def best_coefficients(run: Run, matched: float | None = None) -> dict[tuple[str, str, int | None], Setting]:
    """The setting of highest mean BCS on "tune" for each (concept, method, layer).

    Of equal ones the smaller coefficient, then the positive; a setting without a rival is taken as it
    is. ``matched``: a target of ``run.targets``, None for the grid. Raises DataError where a rival has
    no record on "tune", PairingError where rivals were tried on other prompts or seeds.
    """
    settings = [setting for setting in run.settings if setting.matched == matched]
    return {key: _best(run, rivals) for key, rivals in _groups(settings, lambda s: s[:3]).items()}


@lru_cache(maxsize=4)
def best_settings(run: Run, matched: float | None = None) -> dict[tuple[str, str], Setting]:
    """The best of ``best_coefficients`` over layers for each (concept, method); of equals the lower layer."""
    rivals = _groups(best_coefficients(run, matched).values(), lambda s: s[:2])
    return {key: _best(run, settings) for key, settings in rivals.items()}


def _groups(settings: Iterable[Setting], key: Callable[[Setting], Any]) -> dict[Any, list[Setting]]:
    groups: dict[Any, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(key(setting), []).append(setting)
    return groups


def _best(run: Run, rivals: Sequence[Setting]) -> Setting:
    if len(rivals) == 1:
        return rivals[0]
    first = run.values(rivals[0], "tune")
    for rival in rivals[1:]:
        paired_differences(run.values(rival, "tune"), first, f"tuning {rival.describe()}")

    def rank(s: Setting) -> tuple[float, ...]:
        return run.mean(s, "tune"), -(s.layer or 0), -abs(s.coefficient), s.coefficient

    return max(rivals, key=rank)
