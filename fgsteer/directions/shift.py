"""What tuning moved: the directions along which a tuned model's activations differ from its base's.

shifts = residual_shift(base, tuned, tokenizer, prompts)
print(shifts[12], shifts[12].effective_rank(0.9)); dominant = shifts[12].vector()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.batches import record_batch
from fgsteer.data.chat import Text
from fgsteer.directions.prompts import prompt_passes
from fgsteer.errors import DataError, PairingError, SelectionError
from fgsteer.errors.checks import check_range, checked, is_whole_number
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import d_model
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class ResidualShift(OneLineRepr):
    """The components of a shift at a hookpoint, the dominant one first.

    Args:
        hookpoint: Where activations were read.
        components: The directions v_k, of norm 1, (n, d_model). Each points to where the mean shift goes.
        variances: ``λ_k = s_k² / (N − 1)``, of the singular values s_k, in squared units of the stream, (n,).
        mean: The mean shift, (d_model,).
        prompts: The number N of prompts.
        model: What the tuned model is, for the provenance of vectors.
    """

    hookpoint: Hookpoint
    components: Float[Tensor, "n d_model"]
    variances: Float[Tensor, " n"]
    mean: Float[Tensor, " d_model"]
    prompts: int
    model: dict[str, object]

    @property
    def shares(self) -> Float[Tensor, " n"]:
        """The share of the squared shift that each component holds, (n,)."""
        return self.variances / self.variances.sum()

    @checked
    def effective_rank(self, share: float = 0.9) -> int:
        """The smallest number of components that hold a share of the squared shift.

        Args:
            share: The share, above 0 and up to 1.

        Raises:
            DataError: It is another number.
        """
        check_range("share", share, 0, 1)
        reached = self.shares.cumsum(0) >= share - 1e-12  # rounding of a sum of shares
        return int(reached.int().argmax()) + 1

    @checked
    def vector(self, component: int = 0) -> SteeringVector:
        """A component as a vector of norm 1; 0 is the dominant one. Raises SelectionError for one that there is not."""
        if not is_whole_number(component) or not 0 <= component < len(self.components):
            raise SelectionError(f"component {component}", f"a number from 0 to {len(self.components) - 1}")
        about = provenance("residual_shift", {"component": int(component)})
        return SteeringVector(
            self.components[component].float(), self.hookpoint, provenance={**about, "model": self.model}
        )


@checked
@torch.no_grad()
def residual_shift(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    hookpoints: Iterable[Hookpoint | str | int] | None = None,
    fit: Literal["difference", "linear"] = "difference",
    batch_tokens: int | None = None,
) -> dict[int, ResidualShift]:
    """The directions along which tuning moved activations: the singular vectors of ``R = H_tuned − H_base``.

    Rows of H are the activations at the last token of each prompt, and R is not centred (arXiv 2502.09674). With
    ``fit="linear"`` R is ``H_base W − H_base``, with W the least-squares map to H_tuned: the part of the shift that is
    linear in what the base model has.

    Args:
        base: The model before it was tuned.
        tuned: The same model after that.
        tokenizer: The tokenizer of both.
        prompts: Requests: texts, which a chat model gets as a user's messages, or conversations.
        hookpoints: Where the stream is read, one hookpoint a layer; by default the output of every block.
        fit: Whether R is the difference itself, or the linear part of it.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        {layer: its components}.

    Raises:
        PairingError: The models have other widths or numbers of blocks.
        DataError: There are fewer than two prompts, or for a linear fit no more than the model is wide, so that W would
            interpolate and nothing be left out.
        SelectionError: The activations of both are equal at a hookpoint.
    """
    if fit not in ("difference", "linear"):
        raise DataError(f"fit = {fit!r:.40}", "'difference' or 'linear'")
    _check_pair(base, tuned)
    least = d_model(base) + 1 if fit == "linear" else 2
    if len(prompts) < least:
        raise DataError(f"{count(len(prompts), 'prompt')} for fit={fit!r}", f"at least {least}", "pass more prompts")
    layers = range(len(blocks_of(base)))
    places = [Hookpoint.parse(h) for h in (layers if hookpoints is None else hookpoints)]
    before, after = (last_states(model, tokenizer, prompts, places, batch_tokens) for model in (base, tuned))
    return {place.layer: _components(place, before[place], after[place], fit, tuned) for place in places}


def last_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    places: Sequence[Hookpoint],
    batch_tokens: int | None,
) -> dict[Hookpoint, Float[Tensor, "prompts d_model"]]:
    """The activations at the last token of each prompt, in their order, in float64 on the CPU."""
    states = {place: torch.empty(len(prompts), d_model(model), dtype=torch.float64) for place in places}
    for batch in prompt_passes(model, tokenizer, prompts, batch_tokens=batch_tokens).batches:
        acts = record_batch(model, batch, places)
        number = torch.tensor([row.index for row in batch.rows])
        last = torch.tensor([len(row.ids) - 1 for row in batch.rows])
        for place, h in acts.items():
            states[place][number] = h[torch.arange(len(last)), last.to(h.device)].double().cpu()
    return states


def _check_pair(base: nn.Module, tuned: nn.Module) -> None:
    """Raises PairingError for models whose activations cannot be subtracted."""
    shapes = [(len(blocks_of(m)), d_model(m)) for m in (base, tuned)]
    if shapes[0] != shapes[1]:
        shown = [f"{blocks} blocks of width {width}" for blocks, width in shapes]
        raise PairingError(f"a tuned model of {shown[1]}", f"{shown[0]}, as the base has")


def _components(
    place: Hookpoint,
    before: Float[Tensor, "prompts d_model"],
    after: Float[Tensor, "prompts d_model"],
    fit: str,
    tuned: nn.Module,
) -> ResidualShift:
    """The singular vectors of a shift. Raises SelectionError where there is none."""
    moved = after if fit == "difference" else before @ torch.linalg.lstsq(before, after, driver="gelsd").solution
    shift = moved - before
    if not float(shift.norm()) > 0:
        raise SelectionError(f"equal activations of both models at {place}", "a tuned model that differs from its base")
    _, singular, right = torch.linalg.svd(shift, full_matrices=False)
    mean = shift.mean(0)
    right = right * torch.where(right @ mean < 0, -1.0, 1.0)[:, None]  # the sign of a singular vector is arbitrary
    return ResidualShift(place, right, singular.square() / (len(shift) - 1), mean, len(shift), model_identity(tuned))


@checked
@torch.no_grad()
def component_accuracies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shift: ResidualShift,
    prompts: Sequence[Text],
    labels: Sequence[bool],
    *,
    components: int = 8,
    batch_tokens: int | None = None,
) -> list[float]:
    """How well the projection on each component tells labelled prompts apart, such as refused ones from answered ones.

    A prompt is called positive where its projection ``v_k·h`` is beyond the quantile of the share of positive ones
    (arXiv 2502.09674). On which side is decided on every other prompt, and accuracy is that of the rest.

    Args:
        model: The model that reads the prompts; the paper's is the base.
        tokenizer: Its tokenizer.
        shift: The components.
        prompts: The prompts.
        labels: Whether each is positive.
        components: How many components are tried, from the dominant one on.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The accuracy of each component, from 0 to 1.

    Raises:
        DataError: There are other numbers of labels than prompts, or a half has one label alone.
    """
    truth = torch.tensor([bool(label) for label in labels])
    if len(truth) != len(prompts):
        raise DataError(f"{count(len(truth), 'label')} for {count(len(prompts), 'prompt')}", "a label for each prompt")
    if any(half.all() or not half.any() for half in (truth[::2], truth[1::2])):
        raise DataError(
            "labels that are all equal in one half", "prompts of both labels in either half, which alternate"
        )
    states = last_states(model, tokenizer, prompts, [shift.hookpoint], batch_tokens)[shift.hookpoint]
    scores = states @ shift.components[:components].T.double()
    accuracies = []
    for score in scores.T:
        halves = [(score[half::2], truth[half::2]) for half in (0, 1)]
        sign = max((1.0, -1.0), key=lambda s: _accuracy(s * halves[0][0], halves[0][1], s * halves[0][0]))
        accuracies.append(_accuracy(sign * halves[1][0], halves[1][1], sign * halves[0][0], halves[0][1]))
    return accuracies


def _accuracy(score: Tensor, truth: Tensor, chosen_on: Tensor, chosen_truth: Tensor | None = None) -> float:
    """The share of prompts that a threshold calls right: the quantile of the negatives' share among ``chosen_on``."""
    negatives = 1 - float((truth if chosen_truth is None else chosen_truth).double().mean())
    return float(((score > torch.quantile(chosen_on, negatives)) == truth).double().mean())
