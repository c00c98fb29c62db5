"""How well a map gives the activations of another model, on texts that it was not fitted to.

quality = measure_transfer(transfer, model_a, tokenizer_a, model_b, tokenizer_b, held_out)
quality.fvu, quality.fvu_median, quality.fvu_above_one, quality.cosine, quality.ce, quality.ce_spliced
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import batch_rows, tokens_in_batch
from fgsteer.data.chat import Text
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.likelihood.scoring import next_token_loss
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import input_device
from fgsteer.statistics.sinks import MASSIVE
from fgsteer.steering.splicing import splice
from fgsteer.transfer.mapping import TransferMap
from fgsteer.transfer.pairs import MAX_TOKENS, PairedActivations, PairedText, Side, pair_texts, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class TransferQuality(OneLineRepr):
    """What was measured of a map on held-out texts.

    FVU is the fraction of variance unexplained, ``Σ‖y − f(x)‖² / Σ‖y − mean(y)‖²``. Over all dimensions together it is
    decided by the few with massive values, which is why it is counted in each dimension too.

    Args:
        tokens: Pairs of tokens: none at position 0, special, or of a massive norm.
        left_out: Pairs of a massive norm in either model.
        fvu: The FVU over all dimensions together.
        fvu_median: The median over dimensions of their own FVU.
        fvu_above_one: The share of dimensions whose mean does better than the map.
        cosine: The mean cosine of ``f(x)`` and y.
        centred_cosine: The mean cosine of what is left of both without model B's mean on the texts of the fit.
        ce: The cross-entropy of model B as it is, in nats a token.
        ce_spliced: The same with ``f(x)`` in the place of the activations of paired tokens.
        ce_ablated: The same with the mean of the fit in their place.
        spliced: The share of model B's tokens that have a partner, and were replaced for that.
        fvu_by_dimension: The FVU of each dimension, (d_target,).
    """

    tokens: int
    left_out: int
    fvu: float
    fvu_median: float
    fvu_above_one: float
    cosine: float
    centred_cosine: float
    ce: float
    ce_spliced: float
    ce_ablated: float
    spliced: float
    fvu_by_dimension: Float[Tensor, " d_target"]

    def as_dict(self) -> dict[str, Any]:
        """All figures but those of each dimension, as plain JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fvu_by_dimension"}


@checked
@torch.no_grad()
def measure_transfer(
    transfer: TransferMap,
    model_a: PreTrainedModel,
    tokenizer_a: PreTrainedTokenizerBase,
    model_b: PreTrainedModel,
    tokenizer_b: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    max_tokens: int | None = MAX_TOKENS,
    prepend_bos: bool | None = None,
    max_norm_ratio: float | None = MASSIVE,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> TransferQuality:
    """Measure a map on texts that it was not fitted to.

    Args:
        transfer: The map.
        model_a: The model that it maps from.
        tokenizer_a: Its tokenizer.
        model_b: The model that it maps to.
        tokenizer_b: Its tokenizer.
        texts: Held-out texts.
        max_tokens: As in ``fit_transfer``.
        prepend_bos: As in ``fit_transfer``.
        max_norm_ratio: As in ``fit_transfer``.
        batch_tokens: As in ``fit_transfer``.
        progress: As in ``collect``; a function is called with the number of texts done.

    Raises:
        DataError: There is no pair of tokens.
        PairingError: A model has another width than the map.
    """
    for model, place, width, about in (
        (model_a, transfer.source, transfer.d_source, transfer.source_model),
        (model_b, transfer.target, transfer.d_target, transfer.target_model),
    ):
        check_pairing(model, place, width, str(about.get("name") or ""), "map")
    sides = Side(model_a, tokenizer_a, transfer.source), Side(model_b, tokenizer_b, transfer.target)
    pairs = pair_texts(*sides, texts, max_tokens=max_tokens, prepend_bos=prepend_bos)
    acts = PairedActivations(*sides, max_norm_ratio, batch_tokens)
    measured = _Measured(transfer, acts)
    with reporting(progress, "measuring the map", len(pairs)) as report:
        done = 0
        for piece in pieces(pairs):
            measured.add(piece)
            done += len(piece)
            report(done)
    return measured.result()


class _Measured:
    """Sums over pieces of texts, in float64."""

    def __init__(self, transfer: TransferMap, acts: PairedActivations) -> None:
        self.transfer, self.acts = transfer, acts
        self.tokens = self.scored = self.of_target = 0
        self.residual, self.sum, self.squares = (torch.zeros(transfer.d_target, dtype=torch.float64) for _ in range(3))
        self.cosines = [0.0, 0.0]
        self.losses = dict.fromkeys(("ce", "ce_spliced", "ce_ablated"), 0.0)

    def add(self, piece: Sequence[PairedText]) -> None:
        """Measure some texts."""
        x, y, kept = self.acts.read(piece)
        mapped = self.transfer(x)
        mean = self.transfer.mean.to(y)
        self.tokens += len(y)
        self.residual += (y - mapped).double().square().sum(0).cpu()
        self.sum += y.double().sum(0).cpu()
        self.squares += y.double().square().sum(0).cpu()
        for number, origin in enumerate((torch.zeros_like(mean), mean)):
            both = torch.nn.functional.cosine_similarity(mapped - origin, y - origin, dim=1)
            self.cosines[number] += float(both.double().sum())
        lengths = [len(pair.target.selected) for pair in piece]
        places, new = {}, {}
        ends = torch.split(kept, lengths)
        values = torch.split(mapped, [int(each.sum()) for each in ends])
        for pair, own, value in zip(piece, ends, values, strict=True):
            places[pair.target.index] = torch.tensor(pair.target.selected)[own.cpu()]
            new[pair.target.index] = value
        self._losses(piece, places, new)

    def _losses(self, piece: Sequence[PairedText], places: dict[int, Tensor], new: dict[int, Tensor]) -> None:
        """Add the losses of model B as it is, with mapped activations, and with their mean."""
        side = self.acts.target
        device = input_device(side.model)
        pad_id = side.tokenizer.pad_token_id
        rows = sorted((pair.target for pair in piece), key=lambda row: len(row.ids))
        for batch in batch_rows(
            rows,
            batch_tokens=tokens_in_batch(self.acts.batch_tokens, device),
            pad_id=pad_id if isinstance(pad_id, int) else 0,
            device=device,
        ):
            owner = torch.cat([torch.full_like(places[row.index], n) for n, row in enumerate(batch.rows)])
            column = torch.cat([places[row.index] for row in batch.rows])
            mapped = torch.cat([new[row.index] for row in batch.rows])
            mean = self.transfer.mean.expand(len(mapped), -1)
            loss, scored = next_token_loss(side.model, batch)
            self.losses["ce"] += loss
            self.scored += scored
            self.of_target += int(batch.attention.sum())
            for name, values in (("ce_spliced", mapped), ("ce_ablated", mean)):

                def put(hidden: Tensor, values: Tensor = values) -> Tensor:
                    where = owner.to(hidden.device), column.to(hidden.device)  # noqa: B023 - called in this turn
                    return hidden.index_put(where, values.to(hidden))

                with splice(side.model, side.hookpoint, put):
                    self.losses[name] += next_token_loss(side.model, batch)[0]

    def result(self) -> TransferQuality:
        """The figures of all texts. Raises DataError where there was none."""
        if self.tokens < 2:
            raise DataError(
                f"{self.tokens} pairs of tokens", "at least two to measure on", "pass more texts, or longer ones"
            )
        variance = (self.squares - self.sum.square() / self.tokens).clamp(min=0)
        by_dimension = torch.where(
            variance > 0, self.residual / variance, torch.where(self.residual > 0, torch.inf, 0.0)
        )
        return TransferQuality(
            tokens=self.tokens,
            left_out=self.acts.left_out,
            fvu=float(self.residual.sum() / variance.sum()),
            fvu_median=float(by_dimension.median()),
            fvu_above_one=float((by_dimension > 1).double().mean()),
            cosine=self.cosines[0] / self.tokens,
            centred_cosine=self.cosines[1] / self.tokens,
            spliced=self.tokens / self.of_target,
            fvu_by_dimension=by_dimension,
            **{name: loss / self.scored for name, loss in self.losses.items()},
        )
