"""How much a unit of strength moves a model, by layer and sign: the protocol of the scaling of steering.

vectors = [fg.caa(stats, hookpoint=layer) for layer in depth_layers(30)]
print(signed_slopes(model, tokenizer, vectors, fg.load_contrast("love").held_out, relative=True))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fgsteer.data.contrasts import ContrastSet
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_number, check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.answers import steerability
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.likelihood.strengths import StrengthMeter
from fgsteer.models.chat import is_chat_model
from fgsteer.models.hookpoints import blocks_of
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MULTIPLIERS = (0.5, 1.0, 1.5, 2.0)
DEPTH_STEP = 0.05
SHARE = 0.1  # of the activations' norm that a multiplier of 1 adds


@dataclass(frozen=True, repr=False)
class SignedSlopes(OneLineRepr):
    """How much a unit of strength moves the propensity at one layer, for each sign.

    Args:
        layer: The layer.
        depth: Its depth, from 0 at the first block to 1 at the last.
        size: ``‖v‖/‖h‖``, with the median norm of the activations of neutral text.
        positive: The slope of the propensity over positive strengths, in nats a unit of strength.
        negative: The slope over negative strengths; above 0 where a negative strength lowers the propensity.
        difference: ``negative − positive``, above 0 where the negative sign is stronger.
        unit: What propensities are in: "nats a token", or "nats an answer".
    """

    layer: int
    depth: float
    size: float
    positive: Interval
    negative: Interval
    difference: Interval
    unit: str

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {
            "layer": self.layer,
            "depth": self.depth,
            "‖v‖/‖h‖": self.size,
            "slope (+)": self.positive.mean,
            "slope (−)": self.negative.mean,
            "(−) less (+)": self.difference.mean,
            "low": self.difference.low,
            "high": self.difference.high,
        }


@checked
def depth_layers(blocks: int, step: float = DEPTH_STEP) -> list[int]:
    """The layers at equal steps of depth, from the first block to the last.

    Args:
        blocks: The number of the model's blocks.
        step: The step, as a share of the depth; by default 5 %.

    Raises:
        DataError: There is no block, or the step is not above 0 and at most 1.
    """
    check_range("blocks", blocks, 1, MAX_COUNT, whole=True)
    check_range("step", step, 0, 1)
    if not step > 0:
        raise DataError("step = 0", "a share of the depth above 0")
    count = math.floor(1 / step + 1e-9)  # 1/0.05 is a little below 20 or above it
    return sorted({round(k * step * (blocks - 1)) for k in range(count + 1)})


@checked
def signed_slopes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[SteeringVector],
    contrast: ContrastSet,
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
    relative: bool = False,
    share: float = SHARE,
    batch_tokens: int | None = None,
) -> Table[SignedSlopes]:
    """How much a unit of strength moves the propensity for a behavior, by layer and sign (arXiv 2507.11771).

    Propensity is ``mean⁺ − mean⁻`` of the two sides' log-probabilities; for answers of one token to the same prompt
    that is the difference of their logits. A slope is that of least squares through the strengths of one sign and 0.
    Probabilities would not do: near 0 and 1 they saturate, and make the sign that moves away from there seem strong.
    In a model whose output is linear in the activation, both signs have the same slope.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vectors: A vector for each layer, such as those at ``depth_layers``.
        contrast: The texts that propensity is measured on, from which no vector was built.
        multipliers: The strengths, above 0; each is tried with both signs.
        relative: Whether a multiplier m adds ``m · share · ‖h‖ v̂`` at each token rather than ``m v``, and a slope is by
            ``‖Δh‖/‖h‖``. Norms grow with depth and size, which alone can make late layers and large models look weak
            in raw units.
        share: As above; the sources give no value.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        A row for each vector. Intervals (95 %, Student's t) are over texts, the pairs of one prompt kept together.

    Raises:
        DataError: A multiplier is not above 0, there is no vector, or a side has fewer than two texts.
        SteeringError: A vector has norm 0.
    """
    for value in (share, *multipliers):
        check_number("a multiplier", value)
    sizes = sorted({float(m) * (float(share) if relative else 1.0) for m in multipliers})
    if not sizes or not sizes[0] > 0 or not math.isfinite(sizes[-1]) or not vectors:
        raise DataError(f"multipliers {list(multipliers)!r:.60} and {len(vectors)} vectors", "at least one of each")
    propensity, chat, blocks = Propensity(contrast), is_chat_model(model, tokenizer), len(blocks_of(model))
    passes = propensity.passes(model, tokenizer, batch_tokens)
    base, unit = propensity.values_of(passes, [None])
    rows: Table[SignedSlopes] = Table()
    for vector in vectors:
        meter = StrengthMeter(model, tokenizer, vector, vector.add, chat=chat)
        make = vector.add_relative if relative else vector.add
        values = propensity.values_of(passes, [make(sign * size) for sign in (1, -1) for size in sizes])[0] - base
        changes = np.stack([propensity.shares(change) for change in values])
        positive, negative = (
            _slope([sign * size for size in sizes], half)
            for sign, half in ((1, changes[: len(sizes)]), (-1, changes[len(sizes) :]))
        )
        layer = vector.hookpoint.layer
        rows.append(
            SignedSlopes(
                layer,
                layer / (blocks - 1) if blocks > 1 else 0.0,
                vector.norm / meter.activation_norm,
                propensity.interval(positive),
                propensity.interval(negative),
                propensity.interval(negative - positive),
                unit,
            )
        )
    return rows


def _slope(strengths: Sequence[float], changes: np.ndarray) -> np.ndarray:
    """What each unit adds to the slope of the propensity, from its change at some strengths; it is 0 at 0."""
    with_zero = torch.from_numpy(np.concatenate([np.zeros_like(changes[:1]), changes]))
    return steerability([0.0, *strengths], with_zero).slopes.numpy()
