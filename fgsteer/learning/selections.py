"""Which features are trained: so many of the largest difference, named selections of the papers, or ids.

parse_selection("spare:0.07")                                            ("spare", 0.07)
selected_features(model, tokenizer, contrast, sae, parse_selection("corrsteer:16"))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fgsteer.data.contrasts import ContrastSet
from fgsteer.errors import SelectionError
from fgsteer.errors.checks import check_range, is_whole_number
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.methods.scores import mutual_information, pearson
from fgsteer.methods.selection import feature_contrast
from fgsteer.methods.separable import sae_ssv
from fgsteer.saes.sae import SAE
from fgsteer.selection.pooled import max_activations
from fgsteer.statistics.collecting import collect
from fgsteer.statistics.contrast import Contrast, ContrastStatistics
from fgsteer.statistics.moments import Moments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUMBERS: dict[str, float] = {"difference": 256, "spare": 0.07, "corrsteer": 32, "ssv": 128}
"""Selections by name, with the number that each has by itself; that of "spare" is a share, the paper's for Llama 3."""
SHARES = ("spare",)
_NAMED = re.compile(r"([a-z]+)(?::([0-9.]{1,15}))?")

Features = int | str | Sequence[int] | None  # what fg.train takes as features=


class FeatureSelection(NamedTuple):
    """A selection: its name, and how many features it chooses, or which share."""

    name: str
    number: float

    def __str__(self) -> str:
        return f"{self.name}:{self.number:g}"


def parse_selection(features: Features) -> FeatureSelection | list[int] | None:
    """A selection, the ids that are given, or None for all features.

    Raises SelectionError for another name, or what is no id, and DataError for a number that is out of range.
    """
    if features is None:
        return None
    if is_whole_number(features):
        check_range("features", features, 1, MAX_COUNT, whole=True)
        return FeatureSelection("difference", int(features))
    if isinstance(features, str):
        return _parse_name(features)
    if not isinstance(features, Sequence) or not all(map(is_whole_number, features)):
        raise SelectionError(
            f"features={features!r:.60}", "a number of features, ids, the name of a selection, or None for all"
        )
    return [int(j) for j in features]


def _parse_name(text: str) -> FeatureSelection:
    found = _NAMED.fullmatch(text)
    if found is None or found[1] not in NUMBERS:
        examples = ", ".join(str(FeatureSelection(*entry)) for entry in NUMBERS.items())
        raise SelectionError(f"features={text!r:.60}", f"a number, ids, None, or a selection such as {examples}")
    name, is_share = found[1], found[1] in SHARES
    try:
        number = NUMBERS[name] if found[2] is None else float(found[2]) if is_share else int(found[2])
    except ValueError as error:
        raise SelectionError(f"features={text!r:.60}", "a share" if is_share else "a whole number") from error
    if is_share:
        check_range(f"the share of {name}", number, 1e-9, 1)
    else:
        check_range(f"the number of {name}", number, 1, MAX_COUNT, whole=True)
    return FeatureSelection(name, number)


def selected_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: ContrastSet,
    sae: SAE,
    selection: FeatureSelection,
    batch_tokens: int | None = None,
) -> list[int]:
    """The ids of a selection, the first ones first, chosen on the answers of both sides.

    | name | number | which features |
    |---|---|---|
    | ``difference`` | how many | the largest ``|z̄⁺ − z̄⁻|``, z̄ the mean activation in an answer |
    | ``spare`` | share | the largest mutual information of firing and side, up to a share of the total (2410.15999) |
    | ``corrsteer`` | how many | the largest Pearson r > 0 of the largest activation with the side (2508.12535) |
    | ``ssv`` | how many | those of the largest F statistic to which ``sae_ssv`` gives a weight (2505.16188) |

    Raises SelectionError where none is left.
    """
    options: dict[str, Any] = {"tokens": "answer", "batch_tokens": batch_tokens, "progress": False}
    number = selection.number
    if selection.name == "corrsteer":
        ids = _by_correlation(max_activations(model, tokenizer, sae, contrast, halves=False, **options), int(number))
    else:
        stats = collect(model, tokenizer, contrast, sae=sae, **options)
        if selection.name == "ssv":
            ids = _by_separation(stats, sae, int(number))
        elif selection.name == "spare":
            ids = _by_information(feature_contrast(stats, sae), number)
        else:
            ids = _first(feature_contrast(stats, sae).difference.abs(), int(number))
    if not ids:
        raise SelectionError("no feature that differs between the sides", "at least one", "pass features=None for all")
    return ids


def _first(scores: torch.Tensor, number: int) -> list[int]:
    """The ids of the largest scores above 0, and of equal ones the lower first."""
    ids = torch.sort(scores, descending=True, stable=True).indices[:number]
    return [int(j) for j in ids[scores[ids] > 0]]


def _by_information(contrast: Contrast, share: float) -> list[int]:
    """The features of largest mutual information whose sum is at most a share of all features' sum, at least one."""
    information = mutual_information(contrast).abs()
    ranked = torch.sort(information, descending=True, stable=True).values
    within = ranked.cumsum(0) <= share * ranked.sum() * (1 + 1e-12)  # at 1 rounding leaves none out
    return _first(information, max(1, int(within.sum())))


def _by_correlation(activations: Any, number: int) -> list[int]:
    """The features whose largest activation in a text goes with the positive side."""
    sides = [Moments.of(activations.values[activations.positive == side]) for side in (True, False)]
    return _first(pearson(Contrast(*sides)), number)


def _by_separation(stats: ContrastStatistics, sae: SAE, number: int) -> list[int]:
    """The features to which SAE-SSV's closed form gives a weight, the largest first."""
    weights = sae_ssv(stats, sae, n_features=number).features
    return sorted(weights, key=lambda j: (-abs(weights[j]), j))
