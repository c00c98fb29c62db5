"""Fit a map from the activations of one model to those of another: ``fit_transfer``.

transfer = fit_transfer(model_a, tokenizer_a, model_b, tokenizer_b, texts, hookpoint_a, hookpoint_b)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fgsteer.data.chat import Text, refuse_one_text
from fgsteer.display.progress import Progress, reporting
from fgsteer.effects.ridge import LinearMoments, ridge_path
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_flags, check_range, checked
from fgsteer.errors.wording import count
from fgsteer.models.gradients import gradients_on
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import model_identity, width_at
from fgsteer.statistics.sinks import MASSIVE
from fgsteer.storage.json_files import text_sha256
from fgsteer.transfer.autoencoder import AutoencoderTraining, train_autoencoder
from fgsteer.transfer.mapping import TransferMap
from fgsteer.transfer.pairs import MAX_TOKENS, PairedActivations, PairedText, Side, pair_texts, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("affine", "autoencoder")
HELD_OUT = 10  # every so many texts one is held out, to choose λ or to stop training
# tried as λ, in mean eigenvalues of X_cᵀX_c. The spectrum of a residual stream is steep, so that directions far below
# the mean eigenvalue carry what counts: λ begins where float64 still solves for them.
RIDGES = tuple(10 ** (step / 2) for step in range(-20, 5))


@checked
@gradients_on()
def fit_transfer(
    model_a: PreTrainedModel,
    tokenizer_a: PreTrainedTokenizerBase,
    model_b: PreTrainedModel,
    tokenizer_b: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    hookpoint_a: Hookpoint | str | int,
    hookpoint_b: Hookpoint | str | int,
    *,
    kind: Literal["affine", "autoencoder"] = "affine",
    ridge: float | None = None,
    identity: bool = False,
    training: AutoencoderTraining | None = None,
    max_tokens: int | None = MAX_TOKENS,
    prepend_bos: bool | None = None,
    max_norm_ratio: float | None = MASSIVE,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> TransferMap:
    """Learn what an activation of model A is in model B, from both models' passes over the same texts.

    The map f minimises ``‖f(h_A) − h_B‖²`` over tokens (arXiv 2503.04429), every dimension of B counted in units of its
    standard deviation, as a few massive dimensions would decide it otherwise. Tokens pair one by one where both
    tokenizers give the same ids, else by the character of the text at which they end. Left out are position 0, special
    tokens, and tokens of a massive norm in either model. Of ten texts one is held out: it chooses λ, or stops training.

    The paper's abstract and code openings do not say its mask, alignment or optimiser; these are the ones here. Take
    twenty to forty times as many tokens as the models are wide.

    Args:
        model_a: The model that is mapped from.
        tokenizer_a: Its tokenizer.
        model_b: The model that is mapped to.
        tokenizer_b: Its tokenizer.
        texts: Texts that both models read; conversations too, where both tokenizers give the same ids.
        hookpoint_a: Where model A is read.
        hookpoint_b: Where model B is.
        kind: "affine", ``f(x) = W x + b`` by ridge regression in closed form; or "autoencoder",
            ``f(x) = W₂ ReLU(W₁x + b₁) + b₂``, trained with Adam.
        ridge: λ of the affine map in mean eigenvalues of the centred ``XᵀX``; 0 is least squares. By default the λ with
            the least error on the held-out texts, on which the fit is then made too.
        identity: Whether λ of the affine map holds it to the identity instead of to zero: ``f(x) = x + V x + b``, with
            V from ridge regression of ``h_B − h_A``. It is for a base model and one that was tuned from it, whose
            difference is small.
        training: The size, schedule and seed of an autoencoder; by default those of ``AutoencoderTraining``.
        max_tokens: Tokens that are read of a text, from its beginning; None reads all.
        prepend_bos: As in ``collect``, for both models.
        max_norm_ratio: Tokens whose norm is more than this many times the median are left out; None leaves none out.
        batch_tokens: Padded tokens in a forward pass, which bound memory.
        progress: As in ``collect``; a function is called with the number of texts read.

    Returns:
        The map, with what it was fitted to in ``about``. ``held_out_error`` there is the mean squared error on held-out
        tokens in variances of what is fitted: h_B, or its difference to h_A.

    Raises:
        DataError: There are too few texts or tokens, they cannot be aligned, or a value is out of its range.
        HookpointError: A model lacks its hookpoint.
    """
    if kind not in KINDS:
        raise DataError(f"kind = {kind!r:.40}", f"one of {', '.join(KINDS)}")
    refuse_one_text(texts)
    sides = (
        Side(model_a, tokenizer_a, Hookpoint.parse(hookpoint_a)),
        Side(model_b, tokenizer_b, Hookpoint.parse(hookpoint_b)),
    )
    widths = [width_at(side.model, side.hookpoint) for side in sides]
    check_flags(identity=identity)
    if identity and (kind != "affine" or widths[0] != widths[1]):
        raise DataError(
            f'identity=True with kind="{kind}" between widths {widths[0]} and {widths[1]}',
            "an affine map between models of one width",
            "leave identity out",
        )
    if ridge is not None:
        check_range("ridge", ridge, 0, 1e12)
    numbered = list(enumerate(texts))
    halves = [
        [text for n, text in numbered if (n % HELD_OUT == HELD_OUT - 1) == held_out] for held_out in (False, True)
    ]
    if not halves[1]:
        raise DataError(
            f"{count(len(numbered), 'text')}", f"at least {HELD_OUT} texts, as every tenth is held out", "pass more"
        )
    paired = [pair_texts(*sides, half, max_tokens=max_tokens, prepend_bos=prepend_bos) for half in halves]
    if not all(paired):
        raise DataError(
            "texts without a pair of tokens", "texts of at least two tokens that both models read", "pass longer texts"
        )
    acts = PairedActivations(*sides, max_norm_ratio, batch_tokens)
    with reporting(progress, "reading paired texts", sum(map(len, paired))) as report:
        if kind == "affine":
            parts, figures = _fit_affine(acts, paired, ridge, identity, report)
        else:
            parts, figures = _fit_autoencoder(acts, paired, training or AutoencoderTraining(), report)
    about = {
        **figures,
        "texts": len(numbered),
        "texts_sha256": text_sha256(list(texts)),
        "left_out": acts.left_out,
        "max_tokens": max_tokens,
        "prepend_bos": prepend_bos,
        "max_norm_ratio": max_norm_ratio,
    }
    identities = (model_identity(model_a), model_identity(model_b))
    return TransferMap(
        **{name: part.cpu() for name, part in parts.items()},
        source=sides[0].hookpoint,
        target=sides[1].hookpoint,
        source_model=identities[0],
        target_model=identities[1],
        about=about,
    )


def _fit_affine(
    acts: PairedActivations,
    paired: Sequence[Sequence[PairedText]],
    ridge: float | None,
    identity: bool,
    report: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The affine map from streamed moments in float64; λ chosen on held-out texts, on which the fit is made too."""
    unit: Tensor | None = None
    moments: list[LinearMoments] = []
    done = 0
    for half in paired:
        total: LinearMoments | None = None
        for piece in pieces(half):
            x, y, _ = acts.read(piece)
            wanted = y.double() - x.double() if identity else y.double()
            if unit is None:  # any positive unit gives the same fit for the same λ; this one weighs dimensions alike
                unit = _unit_of(wanted)
            part = LinearMoments.of(x, wanted / unit)
            total = part if total is None else total + part
            done += len(piece)
            report(done)
        assert total is not None
        moments.append(total)
    assert unit is not None
    train, held_out = moments
    everything = train + held_out
    if train.count < 2 or held_out.count < 2:
        raise DataError(
            f"{train.count} tokens to fit to and {held_out.count} held out", "at least two of each", "pass more texts"
        )
    deviations = held_out.about(torch.zeros_like(train.x), train.y / train.count).yy
    share = _best_ridge(train, held_out, deviations) if ridge is None else ridge
    fitted, intercept = train.fit(share * train.mean_eigenvalue())
    error = held_out.squared_error(fitted, intercept) / deviations if deviations > 0 else 0.0
    M, b = everything.fit(share * everything.mean_eigenvalue())
    parts = {"weight": (M * unit).T, "bias": b * unit, "mean": everything.y / everything.count * unit}
    if identity:
        parts["weight"] = parts["weight"] + torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        parts["mean"] = parts["mean"] + everything.x / everything.count
    figures = {
        "kind": "affine",
        "tokens": train.count,
        "held_out_tokens": held_out.count,
        "ridge_in_mean_eigenvalues": share,
        "identity": identity,
        "held_out_error": max(error, 0.0),  # rounding, where the fit is exact
    }
    return {name: part.float().contiguous() for name, part in parts.items()}, figures


def _best_ridge(train: LinearMoments, held_out: LinearMoments, deviations: float) -> float:
    """The λ with the least error on held-out tokens, in mean eigenvalues; the largest where there is nothing to fit."""
    if not deviations > 0:
        return RIDGES[-1]
    scale = train.mean_eigenvalue()
    scores = ridge_path(train, held_out, [scale * share for share in RIDGES])
    return RIDGES[max(range(len(RIDGES)), key=lambda n: scores[n])]


def _unit_of(y: Tensor) -> Tensor:
    """The standard deviation of each dimension of y in float64; 1 where it does not vary."""
    unit = y.std(0)
    return torch.where(unit > 0, unit, 1.0)


def _fit_autoencoder(
    acts: PairedActivations,
    paired: Sequence[Sequence[PairedText]],
    training: AutoencoderTraining,
    report: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The map with a hidden layer, trained on activations that are held in memory."""
    halves = []
    done = 0
    for half in paired:
        parts = []
        for piece in pieces(half):
            parts.append(acts.read(piece)[:2])
            done += len(piece)
            report(done)
        x, y = (torch.cat(each) for each in zip(*parts, strict=True))
        if len(x) < 2:
            raise DataError(f"{count(len(x), 'token')}", "at least two to fit to and two held out", "pass more texts")
        halves.append((x, y))
    layers, errors = train_autoencoder(*halves[0], *halves[1], training)
    figures = {
        "kind": "autoencoder",
        "tokens": len(halves[0][0]),
        "held_out_tokens": len(halves[1][0]),
        **vars(training),
        "hidden": len(layers.hidden_bias),
        "epochs": len(errors),
        "held_out_error": min(errors),
    }
    return {**layers._asdict(), "mean": halves[0][1].double().mean(0).float()}, figures
