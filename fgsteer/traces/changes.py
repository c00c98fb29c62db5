"""``feature_changes``: features that rise and fall in what a steered model writes, observed and predicted.

found = feature_changes(model, tokenizer, sae, prompts, vec.add(8.0), effects=fg.load_effects())
print(found)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.chat import Text
from fgsteer.display.tables import Cell, Table, html_text, title_html
from fgsteer.effects.approximator import EffectApproximator
from fgsteer.effects.rollouts import Sampling, prompt_features
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.evaluation.metrics.intervals import LEVEL, t_quantile
from fgsteer.interventions.adding import Add
from fgsteer.interventions.scopes import is_of_prompt
from fgsteer.models.pairing import check_pairing
from fgsteer.saes.sae import SAE
from fgsteer.steering.entries import Entry, checked_rows, items_of
from fgsteer.steering.generation import parse_prompts
from fgsteer.traces.trace import check_features

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST_CLUSTERS = 4  # two to choose features on, two to measure them on
MOST_ROLLOUTS = 1024
ROWS_AT_ONCE = 64  # rows of a batch; another number draws other texts
ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Changes below this share of the largest mean activation are none: rows of one batch round differently."""


@dataclass(frozen=True, repr=False)
class FeatureChange(OneLineRepr):
    """How far one feature's mean activation in generated text changed.

    Args:
        id: The feature's number in its SAE.
        label: What it is said to mean, "" where no label is known.
        unsteered: Its mean activation in texts of the unsteered model.
        steered: Its mean activation in texts of the steered model.
        change: Their difference.
        low: The lower end of the difference's 95 % interval; nan where it was not measured on two prompts or seeds.
        high: The upper end.
        predicted: The difference that the effect approximator predicts; None without a prediction.
    """

    id: int
    label: str
    unsteered: float
    steered: float
    change: float
    low: float
    high: float
    predicted: float | None = None

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {
            "feature": self.id,
            "label": self.label,
            "unsteered": self.unsteered,
            "steered": self.steered,
            "change": self.change,
            "95 %": f"[{self.low:.3g}, {self.high:.3g}]",
            "predicted": self.predicted,
        }


@dataclass(frozen=True, repr=False)
class FeatureChanges(OneLineRepr):
    """Features that rose and fell in generated text under steering, or those that were asked for.

    Args:
        rose: The features that rose most on the prompts that choose, most first; empty where features were asked for.
        fell: Those that fell most there, likewise.
        asked: The features that were asked for, in their order.
        correlation: Pearson's correlation over all features of the predicted with the observed changes; None without a
            prediction.
        split_half: The same of the changes observed on one half of the prompts (or seeds) with those on the other: how
            well the measurement agrees with itself on half of the texts.
        over: What intervals are over: "prompts", or, of fewer than four prompts, the "seeds" of their texts.
        chosen_on: On how many of those the features were chosen; 0 where they were asked for.
        measured_on: On how many others they were measured.
        note: Why there is no prediction, or how it differs from what was observed; "" where neither.
        settings: What was asked for, as plain JSON.
    """

    rose: Table[FeatureChange]
    fell: Table[FeatureChange]
    asked: Table[FeatureChange]
    correlation: float | None
    split_half: float
    over: Literal["prompts", "seeds"]
    chosen_on: int
    measured_on: int
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The changes as plain JSON; a number that is not finite is None."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rows = {name: [_finite(asdict(row)) for row in table] for name, table in self._tables()}
        return {**_finite(plain), **rows}

    def _tables(self) -> list[tuple[str, Table[FeatureChange]]]:
        return [("rose", self.rose), ("fell", self.fell), ("asked", self.asked)]

    def __str__(self) -> str:
        return "\n\n".join([*(f"{name}\n{table}" for name, table in self._tables() if table), self._summary()])

    def _repr_html_(self) -> str:
        tables = [title_html(name) + table._repr_html_() for name, table in self._tables() if table]
        return "".join(tables) + f"<p>{html_text(self._summary())}</p>"

    def _summary(self) -> str:
        lines = []
        if self.correlation is not None:
            lines.append(f"predicted and observed changes of all features correlate by {self.correlation:.3f}")
        lines.append(f"those of two halves of the {self.over} by {self.split_half:.3f}")
        measured = f"intervals are over {count(self.measured_on, self.over.removesuffix('s'))}"
        lines.append(f"{measured}, others than the {self.chosen_on} that chose" if self.chosen_on else measured)
        return "; ".join([*lines, *([self.note] if self.note else [])])


@checked
@torch.no_grad()
def feature_changes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    prompts: str | Sequence[Text],
    steering: Entry,
    *,
    effects: EffectApproximator | None = None,
    features: Sequence[int] | None = None,
    top: int = 8,
    rollouts: int = 4,
    sampling: Sampling | None = None,
) -> FeatureChanges:
    """Which features rise and fall in the texts that a steered model writes, and what was predicted.

    A feature's change is ``mean f_j(steered texts) − mean f_j(unsteered texts)``, over the new tokens of all
    continuations, which the unsteered model reads; both models sample with the same random numbers. It is what SAE-TS
    measures (arXiv 2411.02193) and an ``EffectApproximator`` predicts, as ``x M + b`` for ``x = c·v``.

    Features are chosen on every other prompt and measured on the rest, so that the largest changes are not those that
    noise made large. With fewer than four prompts, seeds take their place, and intervals say nothing of other prompts.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are read.
        prompts: A text, or a list of texts or of conversations.
        steering: One intervention, or a list of them that compose.
        effects: What predicts the changes, for interventions that add a vector where it was measured.
        features: The features that are measured, by id, on all texts; by default those that change most are chosen.
        top: How many features that rose, and how many that fell.
        rollouts: How many continuations of each prompt each model writes.
        sampling: How they are drawn; by default as effects are measured.

    Returns:
        The changes, with 95 % t intervals over prompts, or over seeds.

    Raises:
        DataError: There are no prompts, or fewer than four prompts and fewer than four rollouts.
        SelectionError: A feature is not one of the SAE's.
        HookpointError, PairingError: An intervention, the SAE or the effects do not fit.
        SteeringError: As ``generate`` raises it.
    """
    texts, items = parse_prompts(prompts), items_of(steering)
    checked_rows(model, [items], True)
    chosen = check_features(sae, features, top)
    check_range("rollouts", rollouts, 1, MOST_ROLLOUTS, whole=True)
    check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    if effects is not None:
        effects.check(sae)
    by_prompt = len(texts) >= LEAST_CLUSTERS
    if not texts or not (by_prompt or rollouts >= LEAST_CLUSTERS):
        raise DataError(
            f"{count(len(texts), 'prompt')} and {count(rollouts, 'rollout')}",
            f"at least {LEAST_CLUSTERS} prompts, or one prompt and {LEAST_CLUSTERS} rollouts",
            "pass more prompts, or a larger rollouts=",
        )
    how = Sampling() if sampling is None else sampling
    acts = _activations(model, tokenizer, texts, items, sae, rollouts, how)
    clusters = acts.mean(0) if by_prompt else acts.mean(1)  # (clusters, 2, d_sae)
    predicted, note = predicted_changes(items, effects)
    changes = clusters[:, 1] - clusters[:, 0]
    observed = changes.mean(0)
    measured, chooser = clusters[1::2], changes[::2].mean(0)
    if chosen is not None:
        measured, chooser = clusters, torch.zeros_like(observed)
    least = ROUNDING * float(clusters.abs().max())
    rose, fell, asked = (
        Table(_row(sae, j, measured, predicted) for j in ids)
        for ids in (_largest(chooser, top, least), _largest(-chooser, top, least), chosen or [])
    )
    return FeatureChanges(
        rose,
        fell,
        asked,
        None if predicted is None else correlation(predicted, observed),
        correlation(changes[::2].mean(0), changes[1::2].mean(0)),
        "prompts" if by_prompt else "seeds",
        len(clusters) - len(measured),
        len(measured),
        note,
        {"prompts": len(texts), "rollouts": int(rollouts), **asdict(how), "hookpoint": str(sae.input_hookpoint)},
    )


def _activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    items: Sequence[Any],
    sae: SAE,
    rollouts: int,
    sampling: Sampling,
) -> Float[Tensor, "rollouts prompts 2 d_sae"]:
    """The mean activations in each continuation of the unsteered and of the steered model, in float64."""
    at_once = ROWS_AT_ONCE // 2
    batches = [texts[start : start + at_once] for start in range(0, len(texts), at_once)]
    encoded = [encode_prompts(tokenizer, batch, prepend_bos=sae.prepend_bos) for batch in batches]
    wide = sae.to(next(model.parameters()).device, torch.float32)
    found = []
    for rollout in range(rollouts):
        parts = [
            prompt_features(model, prompts, wide, [None, list(items)], sampling, rollout * len(batches) + n)
            for n, prompts in enumerate(encoded)
        ]
        found.append(torch.cat(parts, 1).transpose(0, 1).double().cpu())
    return torch.stack(found)


def predicted_changes(items: Sequence[Any], effects: EffectApproximator | None) -> tuple[Tensor | None, str]:
    """What the effects predict of interventions together, in float64, or None; and a note on it."""
    if effects is None:
        return None, "no effect approximator was given"
    for item in items:
        kind = type(item).__name__
        if not isinstance(item, Add):
            return None, f"effects predict what adding a vector does, not {kind}"
        if item.hookpoint != effects.hookpoint:
            return None, f"effects were measured at {effects.hookpoint}, and {kind} acts at {item.hookpoint}"
        if item.when is not None or is_of_prompt(item.scope):
            return None, "effects predict a vector that is added to every token, without a gate"
    if not items:
        return None, "nothing is added"
    vector = sum(item.coefficient * item.direction.detach().double().cpu() for item in items)
    note = "" if all(item.scope == "all" for item in items) else "effects were measured with scope='all'"
    return effects.predict(torch.as_tensor(vector)).double().cpu(), note


def _largest(values: Tensor, top: int, least: float) -> list[int]:
    """The features of the largest values above the least, largest first."""
    chosen: list[int] = values.topk(min(top, int((values > least).sum()))).indices.tolist()
    return chosen


def _row(sae: SAE, feature: int, clusters: Tensor, predicted: Tensor | None) -> FeatureChange:
    unsteered, steered = clusters[:, :, feature].T
    changes = steered - unsteered
    half = math.nan
    if len(changes) > 1:
        half = t_quantile(LEVEL, len(changes) - 1) * float(changes.std()) / math.sqrt(len(changes))
    mean = float(changes.mean())
    return FeatureChange(
        feature,
        sae.labels.get(feature, ""),
        float(unsteered.mean()),
        float(steered.mean()),
        mean,
        mean - half,
        mean + half,
        None if predicted is None else float(predicted[feature]),
    )


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation; nan where one of them is constant."""
    a, b = first - first.mean(), second - second.mean()
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else math.nan


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
