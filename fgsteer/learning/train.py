"""Train steering vectors: one, or several in common batches.

vector = train(model, tokenizer, "cheerful", hookpoint=12)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fgsteer.data.chat import Text
from fgsteer.data.contrasts import ContrastSet
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import check_flags, checked, describe_value, is_whole_number
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.learning.examples import Trainable, examples_of, preference_set
from fgsteer.learning.learner import Learner
from fgsteer.learning.losses import loss_curve
from fgsteer.learning.objectives import OBJECTIVES, Rows, Texts
from fgsteer.learning.response_passes import ResponsePasses, device_at
from fgsteer.learning.run import Run
from fgsteer.learning.running_cost import TrainingNote
from fgsteer.learning.selections import Features, FeatureSelection, parse_selection, selected_features
from fgsteer.learning.settings import VectorTraining
from fgsteer.learning.spaces import FeatureSpace, ResidualSpace, Space, check_space
from fgsteer.methods.provenance import provenance
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.gradients import through_model
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing, model_identity, width_at
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.storage.locks import exclusive_lock
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEATURES = 256  # that are trained by default


@checked
@through_model
def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Trainable,
    *,
    objective: str | VectorTraining = "reps_relative",
    space: Literal["residual", "sae"] = "residual",
    hookpoint: Hookpoint | str | int | None = None,
    sae: SAE | None = None,
    features: Features = FEATURES,
    nonnegative: bool = False,
    scope: Scope = "all",
    batch_tokens: int | None = None,
    work: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = None,
) -> SteeringVector:
    """Train a steering vector by gradient descent through a model that stays as it is.

    With π steered, π₀ not, y_w the answer with the behavior, y_l the one without, and n their tokens, the objectives
    minimise the mean of

    | objective | loss | paper |
    |---|---|---|
    | ``lm``, ``lm_factors`` | ``−log π(y_w)`` by token, at strength 1 or a drawn one | arXiv 2501.17148, 2505.20809 |
    | ``bipo`` | ``−log σ(mβ[log π(y_w)/π₀(y_w) − log π(y_l)/π₀(y_l)])``, π at ``m·v``, m = ±1 | arXiv 2406.00045 |
    | ``reps`` | ``−log σ(c/n_w·log π(y_w) − 1/n_l·log π(y_l))``, and with v removed the reverse | arXiv 2505.20809 |
    | ``reft_r1`` | ``−log π(y)`` by token of both answers, at the strength that each text reads | arXiv 2501.17148 |
    | ``simpo`` | ``−log σ(β/n_w·log π(y_w) − β/n_l·log π(y_l) − γ)`` | arXiv 2405.14734 |

    where ``c = max(log π₀(y_l) − log π₀(y_w), 1)``. "reps_relative" and "lm_relative" are the third and the first
    with rates and strengths in units of the activations, which suit any model; the other names have the factors,
    rates and epochs of the papers. A vector is trained in float32, whatever the dtype of the model.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        data: A ContrastSet, the name of a shipped one, a path or pairs, as ``collect`` takes them, or a list of
            preferences (prompt, winning answer, losing answer). Texts without pairs are paired in their order.
        objective: "reps_relative" or "lm_relative"; or "lm", "lm_factors", "bipo", "reps", "reft_r1" or "simpo", with
            the published settings; or settings, such as ``VectorTraining.recipe("reps", epochs=6)``.
        space: Whether the vector itself is trained ("residual"), or weights of an SAE's features ("sae"), from which
            the vector is ``Σⱼ wⱼ W_dec[j]``.
        hookpoint: Where the vector acts; by default where the SAE does.
        sae: The SAE, for space "sae".
        features: Whose weights are trained: so many, those of the largest difference between the two sides' means;
            these ids; None for all of the SAE's; or a selection by name, with its number or without: "difference:256",
            "spare:0.07" (a share of all mutual information with the side, arXiv 2410.15999), "corrsteer:32" (the
            largest correlation of the largest activation with the side, arXiv 2508.12535) or "ssv:128" (the weights of
            ``sae_ssv``, arXiv 2505.16188).
        nonnegative: For space "sae": whether feature activations are kept from becoming negative, as in YaPO
            (arXiv 2601.08441). ``fg.ClampFeature(plus=vector.features, …)`` applies such a vector as it was trained.
        scope: The tokens that are steered in training, as ``vector.add`` takes it.
        batch_tokens: The tokens in a pass, with padding: this bounds memory, and changes results by rounding alone.
        work: A file for checkpoints: a call that was stopped goes on from there, to the same vector.
        fresh: Whether to start over.
        progress: As in ``collect``; a function is called with the steps that are done, and with their number.

    Returns:
        The vector. Its provenance holds the settings, the losses and, for "reft_r1", ``a_max``, the largest reading
        on an example, by which the paper multiplies strengths.

    Raises:
        DataError: A text has no token, sides are unequal, an argument is out of range, or the loss is not finite.
        SelectionError: There is no SAE for space "sae", or no feature to train.
        PairingError: The SAE does not fit, or ``work`` holds another run.
        HookpointError: The model lacks the hookpoint.
        SteeringError: The vector grew beyond what the model's dtype holds.
    """
    return train_many(
        model,
        tokenizer,
        {"vector": data},
        objective=objective,
        space=space,
        hookpoint=hookpoint,
        sae=sae,
        features=features,
        nonnegative=nonnegative,
        scope=scope,
        batch_tokens=batch_tokens,
        work=work,
        fresh=fresh,
        progress=progress,
    )["vector"]


@checked
@through_model
def train_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Trainable],
    *,
    objective: str | VectorTraining = "reps_relative",
    space: Literal["residual", "sae"] = "residual",
    hookpoint: Hookpoint | str | int | None = None,
    sae: SAE | None = None,
    features: Features = FEATURES,
    nonnegative: bool = False,
    scope: Scope = "all",
    batch_tokens: int | None = None,
    work: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = None,
) -> dict[str, SteeringVector]:
    """Train several vectors in common batches, each as ``train`` trains it alone.

    Every step reads a batch of each vector's examples; the answers of all vectors share forward passes, and a
    row is steered by its own vector. What comes out differs from one at a time by rounding alone.

    Args:
        model: As in ``train``.
        tokenizer: As in ``train``.
        data: What each vector learns from, by its name.
        objective: As in ``train``, and so are the others.
        space: As in ``train``.
        hookpoint: As in ``train``.
        sae: As in ``train``.
        features: As in ``train``; those that are selected are each vector's own.
        nonnegative: As in ``train``.
        scope: As in ``train``.
        batch_tokens: As in ``train``.
        work: As in ``train``.
        fresh: As in ``train``.
        progress: As in ``train``.

    Returns:
        The vectors by name.

    Raises:
        DataError: As in ``train``.
        SelectionError: As in ``train``.
        PairingError: As in ``train``.
        HookpointError: As in ``train``.
        SteeringError: As in ``train``.
    """
    chosen = objective if isinstance(objective, VectorTraining) else VectorTraining.recipe(objective)
    at = _place(model, space, hookpoint, sae, nonnegative)
    if space == "residual" and not (is_whole_number(features) and features == FEATURES):
        raise DataError(f"features={features!r:.60} for space 'residual'", "space='sae', whose features are trained")
    if chosen.objective == "reft_r1" and scope != "all":
        raise DataError(f"scope={scope!r} with reft_r1", "scope='all', as it reads every token", "leave scope out")
    if not isinstance(data, Mapping) or not data:
        raise DataError(f"{describe_value(data)} for data", "a dictionary of examples by name", "call train for one")
    selection = parse_selection(features)
    contrasts = {name: preference_set(examples) for name, examples in data.items()}
    examples = {name: examples_of(contrast, chosen.objective) for name, contrast in contrasts.items()}
    _check_counts(examples, chosen)
    device = device_at(model, at)
    spaces: dict[str, Space] = {}
    for name, contrast in contrasts.items():
        if space == "residual" or sae is None:
            spaces[name] = ResidualSpace(at, width_at(model, at), parse_scope(scope))
        else:
            ids = (
                selected_features(model, tokenizer, contrast, sae, selection, batch_tokens)
                if isinstance(selection, FeatureSelection)
                else selection
            )
            spaces[name] = FeatureSpace(sae, ids, device, parse_scope(scope), nonnegative=nonnegative)
        check_space(spaces[name], chosen.objective)
    rows: dict[str, list[Rows]] = {}
    pairs: list[tuple[Text, Text]] = []
    for name, listed in examples.items():
        rows[name] = []
        for winner, loser in listed:
            rows[name].append((len(pairs), None if loser is None else len(pairs) + 1))
            pairs += [winner] if loser is None else [winner, loser]
    passes = ResponsePasses(model, tokenizer, at, pairs, batch_tokens, checkpointing=chosen.checkpointing)
    texts = _texts(passes, chosen)
    learners = {name: Learner(chosen, spaces[name], passes, texts, rows[name], device) for name in data}
    checkpoint = None if work is None else Path(work)
    plan = {} if checkpoint is None else _plan(model, tokenizer, chosen, contrasts, spaces, sae, at, scope)
    total = sum(learner.steps for learner in learners.values())
    run = Run(passes, learners, plan, checkpoint)
    note = TrainingNote(model, tokenizer)
    what = "a vector" if len(data) == 1 else f"{len(data)} vectors"
    with reporting(progress, f"training {what} at {at}", total) as report:
        if checkpoint is None:
            run.run(report, note)
        else:
            with exclusive_lock(checkpoint):
                if fresh and checkpoint.is_file():
                    checkpoint.unlink()
                run.run(report, note)
    return {
        name: _vector(model, learner, contrasts[name], spaces[name], sae, selection, nonnegative=nonnegative)
        for name, learner in learners.items()
    }


def _place(
    model: PreTrainedModel, space: str, hookpoint: Hookpoint | str | int | None, sae: SAE | None, nonnegative: bool
) -> Hookpoint:
    """Where the vector acts. Raises DataError and SelectionError for what is missing."""
    check_flags(nonnegative=nonnegative)
    if space not in ("residual", "sae"):
        raise DataError(f"space = {space!r:.60}", "'residual' or 'sae'")
    if space == "sae" and sae is None:
        raise SelectionError("space='sae' without an SAE", "an SAE whose features are trained", "pass sae=")
    if space == "residual" and nonnegative:
        raise DataError("nonnegative=True for space 'residual'", "space='sae', whose activations are not negative")
    if hookpoint is None and sae is None:
        raise DataError("no hookpoint", "where the vector is to act", "pass hookpoint=12, or an SAE")
    at = sae.hookpoint if hookpoint is None and sae is not None else Hookpoint.parse(hookpoint)  # type: ignore[arg-type]
    if sae is not None and space == "sae":
        if at != sae.hookpoint:
            raise DataError(f"hookpoint={at} and an SAE of {sae.hookpoint}", "the SAE's", "leave hookpoint out")
        check_pairing(model, at, sae.d_model, sae.model_name, "SAE")
    return at


def _check_counts(examples: Mapping[str, Sequence[Any]], settings: VectorTraining) -> None:
    """Raises DataError for names that are no texts, and for too few examples to hold half of them out."""
    for name, listed in examples.items():
        if not isinstance(name, str):
            raise DataError(f"{describe_value(name)} as the name of a vector", "a text")
        if settings.patience is not None and len(listed) < 2:
            raise DataError(f"{len(listed)} example of {name!r} with patience", "at least 2, half to be held out")


def _texts(passes: ResponsePasses, settings: VectorTraining) -> Texts:
    """What losses need of each row."""
    rows = range(len(passes.rows))
    whole = settings.objective == "reps" and settings.compat
    tokens = torch.tensor([float(passes.tokens(n) if whole else passes.answer_tokens(n)) for n in rows])
    needs_base = OBJECTIVES[settings.objective].needs_base
    return Texts(tokens, passes.base_log_probabilities(list(rows)) if needs_base else torch.zeros(len(rows)))


def _plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: VectorTraining,
    contrasts: Mapping[str, ContrastSet],
    spaces: Mapping[str, Space],
    sae: SAE | None,
    hookpoint: Hookpoint,
    scope: Scope,
) -> dict[str, Any]:
    """All that a run depends on."""
    return {
        **run_fingerprint(model, tokenizer),
        "sae": sae_identity(sae),
        "hookpoint": str(hookpoint),
        "scope": str(scope),
        "settings": settings.as_dict(),
        "data": {name: contrast.sha256 for name, contrast in contrasts.items()},
        "spaces": {
            name: {"ids": space.ids, "nonnegative": space.nonnegative} if isinstance(space, FeatureSpace) else None
            for name, space in spaces.items()
        },
    }


def _vector(
    model: PreTrainedModel,
    learner: Learner,
    contrast: ContrastSet,
    space: Space,
    sae: SAE | None,
    selection: Any,
    *,
    nonnegative: bool,
) -> SteeringVector:
    """The vector of a training that has ended, with how it was made."""
    weights, direction = learner.result()
    settings = learner.settings.as_dict()
    objective = settings.pop("objective")
    in_features = isinstance(space, FeatureSpace)
    features = space.features(weights)
    settings |= {"space": "sae" if in_features else "residual", "scope": str(space.scope)}
    if in_features:
        settings |= {"trained_features": space.size, "nonnegative": nonnegative}
        if isinstance(selection, FeatureSelection):
            settings["selection"] = str(selection)
    record = provenance(objective, settings, sae=sae if in_features else None, features=features)
    record["model"] = model_identity(model)
    record["data"] = [
        {"name": contrast.name, "sha256": contrast.sha256, "count": [contrast.count(True), contrast.count(False)]}
    ]
    record["training"] = {"steps": learner.step, "losses": loss_curve(learner.losses)}
    if learner.held_out_losses:
        record["training"]["held_out_losses"] = learner.held_out_losses
    if objective == "reft_r1":
        record["training"]["a_max"] = learner.largest_reading()
    return SteeringVector(direction.cpu(), space.hookpoint, features=features, provenance=record)
