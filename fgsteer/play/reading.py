"""Reading: what steering did to the texts that were written, token by token, and to the features in them.

for event in read_texts(session, written, sae_key): ...      {"event": "tokens", "column": "steered", "seed": 0, …}
feature_movement(session, written, sae_key)                  features that rose and fell: predicted and observed
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text
from fgsteer.evaluation.metrics.coherence import distinct_share
from fgsteer.interventions import Add, AddRelative, Intervention
from fgsteer.methods.selection import PAPER_MAX_DENSITY
from fgsteer.models.properties import context_window
from fgsteer.play.measuring import activation_norm
from fgsteer.play.plan import FeatureItem, Plan
from fgsteer.play.session import PlaySession
from fgsteer.play.turns import Events
from fgsteer.play.writing import COLUMNS, Column, Written
from fgsteer.traces.changes import correlation, predicted_changes
from fgsteer.traces.parts import TracedText, TracedToken
from fgsteer.traces.results import Trace
from fgsteer.traces.trace import trace
from fgsteer.vector import SteeringVector

TOP_FEATURES = 8
MOVED = 12
"""How many features of either kind, risen and fallen, are shown."""


def read_texts(session: PlaySession, written: Written, key: str) -> Events:
    """What steering did to each token of each text: one event a text, then one with the features that moved."""
    plan = written.plan
    named = named_features(plan, key)
    features: list[int] = []
    for column in COLUMNS:
        for seed in plan.seeds:
            if not (text := written.texts.get((column, seed))):
                continue
            steering = written.steering[column] or written.steering["steered"]
            found = _trace(session, plan, steering, text, key, features)
            own = [feature.id for feature in found.features]
            if not features:  # those of the first text, so that colours mean the same in all
                features = list(dict.fromkeys([*named, *own]))[: 2 * TOP_FEATURES]
                found = found if features == own else _trace(session, plan, steering, text, key, features)
            traced = found.texts[0]
            yield {
                "event": "tokens",
                "column": column,
                "seed": seed,
                "tokens": [_token(token) for token in traced.written],
                "features": [{"id": f.id, "label": f.label} for f in found.features],
                **_figures(traced, column),
            }
    if written.texts.keys() & {("steered", seed) for seed in plan.seeds}:
        yield {"event": "features", "sae": key, **feature_movement(session, written, key)}


def named_features(plan: Plan, key: str) -> list[int]:
    """The features of an SAE that a plan steers with, changes, or reads for a gate."""
    named = [item.feature for item in plan.active if isinstance(item, FeatureItem) and item.sae == key]
    named += [item.gate.feature for item in plan.active if item.gate is not None and item.gate.sae == key]
    return list(dict.fromkeys(named))


def _trace(
    session: PlaySession, plan: Plan, steering: list[Intervention], text: str, key: str, features: list[int]
) -> Trace:
    return trace(
        session.model,
        session.tokenizer,
        [plan.text],
        steering or None,
        sae=session.sae(key),
        completions=[text],
        features=features or None,
        top=TOP_FEATURES,
    )


def _token(token: TracedToken) -> dict[str, Any]:
    """A token as the page shows it."""
    gates = [action.gate for action in token.actions if action.gate is not None]
    return {
        "text": token.text,
        "special": token.kind == "special",
        "kl": token.kl_steered_unsteered,
        "dose": token.dose,
        "gate": None if not gates else any(gates),
        "before": [[top.text, top.log_probability] for top in token.top_before],
        "after": [[top.text, top.log_probability] for top in token.top_after],
        "chosen": [token.log_probability_before, token.log_probability_after],
        "features": list(token.features_after),
        "features_before": list(token.features_before),
    }


def _figures(text: TracedText, column: Column) -> dict[str, Any]:
    """Figures of a whole text: its cost, how probable the unsteered model finds it, and how little it repeats."""
    words = [token for token in text.written if token.kind != "special"]
    before = [v for token in words if (v := token.log_probability_before) is not None]
    trigrams = list(zip(*([token.id for token in words][n:] for n in range(3)), strict=False))
    return {
        "kl": text.kl_steered_unsteered if column == "steered" else None,
        "surprise": -math.fsum(before) / len(before) if before else None,
        "distinct": distinct_share(trigrams, len(trigrams)) if trigrams else None,
    }


def feature_movement(session: PlaySession, written: Written, key: str) -> dict[str, Any]:
    """The features whose mean activation in the written text rose and fell, as predicted and as observed.

    Observed is ``mean_t f_j(steered text) − mean_t f_j(unsteered text)``, both read by the unsteered model, averaged
    over seeds, with the standard error over seeds where there are several. Features that fire on more than 1 % of
    tokens are left out, as any two texts differ in them, unless they are named in the plan. Predicted is what the
    effect approximator says of the sum of all vectors that are added at the SAE's hookpoint.

    Returns:
        ``rows`` (feature, label, observed, error, predicted), from what rose to what fell; ``correlation`` of predicted
        and observed over the rare features that differ in these texts; ``predicted_by``, "" where nothing is predicted,
        and then ``why``.
    """
    sae, plan = session.sae(key), written.plan
    differences = []
    for seed in plan.seeds:
        steered, unsteered = (
            _mean_features(session, key, plan.text, written.texts.get((column, seed), ""))
            for column in ("steered", "unsteered")
        )
        if steered is not None and unsteered is not None:
            differences.append(steered - unsteered)
    if not differences:
        return {"rows": [], "correlation": None, "predicted_by": "", "why": "A text is empty."}
    stacked = torch.stack(differences)
    observed = stacked.mean(0)
    error = stacked.std(0) / math.sqrt(len(stacked)) if len(stacked) > 1 else None
    predicted, why = _predicted(session, written, key)
    density = None if sae.density is None else sae.density.density
    rare = torch.ones(len(observed), dtype=torch.bool) if density is None else density.cpu() <= PAPER_MAX_DENSITY
    fires = (stacked.abs().amax(0) > 0) & rare
    shown = [j for j in named_features(plan, key) if j < len(observed)]
    for values in (observed, predicted):
        shown += [] if values is None else _strongest(values * rare)
    shown = list(dict.fromkeys(shown))
    rows = [
        {
            "feature": j,
            "label": sae.labels.get(j, ""),
            "observed": float(observed[j]),
            "error": None if error is None else float(error[j]),
            "predicted": None if predicted is None else float(predicted[j]),
            "density": None if density is None else float(density[j]),
        }
        for j in shown
    ]
    agreement = None if predicted is None else correlation(predicted[fires], observed[fires])
    return {
        "rows": sorted(rows, key=lambda row: -row["observed"]),
        "correlation": None if agreement is None or not math.isfinite(agreement) else agreement,
        "predicted_by": "" if predicted is None else "effects",
        "why": why,
        "seeds": len(differences),
        "fires": int(fires.sum()),
    }


def _strongest(values: Tensor) -> list[int]:
    """The features that rose and fell most."""
    half = min(MOVED // 2, len(values))
    risen, fallen = values.topk(half), (-values).topk(half)
    return [*risen.indices[risen.values > 0].tolist(), *fallen.indices[fallen.values > 0].tolist()]


@torch.no_grad()
def _mean_features(session: PlaySession, key: str, prompt: Text, text: str) -> Tensor | None:
    """The mean activation of each feature over a text's tokens, (d_sae,), read by the unsteered model."""
    if not text:
        return None
    sae = session.sae(key)
    at = sae.input_hookpoint
    with TokenReader(
        session.tokenizer,
        rule="answer",
        prepend_bos=sae.prepend_bos,
        window=context_window(session.model),
        joint="",
        skip_empty=True,
    ) as reader:
        batches = list(batch_texts(session.model, reader, [(prompt, text, True)], batch_tokens=1))
    for batch in batches:
        values = record_batch(session.model, batch, [at])[at][batch.selected]
        return sae.to(values.device, torch.float32).encode(values.float()).mean(0).cpu()
    return None


def _predicted(session: PlaySession, written: Written, key: str) -> tuple[Tensor | None, str]:
    """The predicted effect on each feature, or None and why there is none."""
    effects, chat = session.effects(key), written.plan.chat
    if effects is None:
        return None, "No effects were measured on this SAE (fgsteer effects measures them)."
    items = [_at_usual_norm(session, item, chat=chat) for item in written.steering["steered"]]
    predicted, note = predicted_changes(items, effects)
    return (None if predicted is None else predicted.float()), f"{note[:1].upper()}{note[1:]}." if note else ""


def _at_usual_norm(session: PlaySession, item: Intervention, *, chat: bool) -> Intervention:
    """An addition in shares of ‖h‖ as one to an activation of the usual norm; others as they are."""
    if not isinstance(item, AddRelative):
        return item
    vector = SteeringVector(item.direction.detach().float().cpu(), item.hookpoint).unit()
    amount = float(item.coefficient) * activation_norm(session, item.hookpoint, vector, chat=chat)
    return Add(
        direction=vector.direction, coefficient=amount, hookpoint=item.hookpoint, scope=item.scope, when=item.when
    )
