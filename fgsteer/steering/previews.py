"""Prompts that are read ahead: a pass that nothing steers, before the one that is steered.

previews = Previews(model, readings)
previews.begin_pass(ids)                      in the hook before a pass of the decoder
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.activations.prompt_ends import reading_ahead
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import pad
from fgsteer.errors import SteeringError
from fgsteer.interventions.readings import Preview
from fgsteer.models.hookpoints import Hookpoint, blocks_of, decoder_of, uncompiled
from fgsteer.models.properties import input_device
from fgsteer.steering.gating import Readings


def read_ahead(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    prompt: Bool[Tensor, "batch tokens"],
    previews: Sequence[Preview],
) -> list[Float[Tensor, "batch 1"]]:
    """What each preview reads of the prompts, the tokens of a mask; those of equal tokens share a pass.

    It is nan for a prompt without the token that is read.
    """
    prompts = [row[mask].tolist() for row, mask in zip(ids.cpu(), prompt.cpu(), strict=True)]
    found: dict[int, Tensor] = {}
    for appended, position in dict.fromkeys((preview.appended, preview.position) for preview in previews):
        chosen = [p for p in previews if (p.appended, p.position) == (appended, position)]
        places = [part.hookpoint for preview in chosen for part in preview.parts]
        states = states_ahead(model, prompts, places, appended, position)
        has = torch.tensor([[len(row) + position >= 0] for row in prompts], device="cpu")
        for preview in chosen:
            h = torch.stack([states[part.hookpoint] for part in preview.parts], 1)
            found[id(preview)] = torch.where(has, preview.values(h).mean(1, keepdim=True), torch.nan)
    return [found[id(preview)] for preview in previews]


def states_ahead(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    places: Sequence[Hookpoint],
    appended: Sequence[int] = (),
    position: int = -1,
) -> dict[Hookpoint, Float[Tensor, "batch d_model"]]:
    """The activations at one token of each prompt, less those at the last appended token where there is any.

    They are in float32 on the CPU. No block steers the pass. Where a prompt lacks the token, another is read.
    """
    rows = [[*row, *appended] or [0] for row in prompts]
    padded, attention = (tensor.to(input_device(model)) for tensor in pad(rows, 0))
    with reading_ahead(model):
        states = record(model, padded, attention, places)
    number = torch.arange(len(rows), device="cpu")
    column = torch.tensor([max(0, len(row) + position) for row in prompts], device="cpu")
    last = torch.tensor([len(row) - 1 for row in rows], device="cpu")

    def at(h: Tensor, columns: Tensor) -> Tensor:
        return h[number.to(h.device), columns.to(h.device)].float().cpu()

    return {place: at(h, column) - at(h, last) if appended else at(h, column) for place, h in states.items()}


class Previews:
    """The previews of one steer block, which are read when a prompt comes.

    Args:
        model: The model that is steered.
        readings: The readings of its gates and strengths.

    Raises:
        SteeringError: There are some, and blocks of the model are compiled one by one.
    """

    def __init__(self, model: nn.Module, readings: Readings) -> None:
        self.model, self.readings = model, readings
        self.places = [place for place in readings.places if isinstance(place.reading, Preview)]
        modules = (decoder_of(model), *blocks_of(model)) if self.places else ()
        if any(uncompiled(m) is not m or m._compiled_call_impl is not None for m in modules):
            raise SteeringError(
                "a reading ahead (fg.Preview) in a model whose blocks are compiled one by one",
                "a model that is compiled as a whole, or not at all",
                "call torch.compile(model) instead, or use a gate that is read in the pass itself",
            )

    def begin_pass(self, ids: Tensor | None) -> None:
        """Read the prompt of a pass that begins ahead, or go by what was read. Raises SteeringError for embeddings."""
        if self.places:
            self._begin_pass(ids)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_pass(self, ids: Tensor | None) -> None:
        prompt, positions = self.readings.whole, self.readings.positions
        assert prompt is not None
        if not prompt.empty:
            self.places[0].refuse_parts()
            if ids is None or positions.virtual:
                raise SteeringError(
                    f"a reading ahead (fg.Preview) of {'virtual tokens' if positions.virtual else 'embeddings'}",
                    "prompts of token ids alone, which can be read twice",
                    "pass input_ids, or a gate that is read in the pass itself",
                )
            mask = torch.ones_like(ids, dtype=torch.bool) if prompt.mask is None else prompt.mask
            previews = [place.reading for place in self.places if isinstance(place.reading, Preview)]
            for place, value in zip(self.places, read_ahead(self.model, ids, mask, previews), strict=True):
                place.kept = value
        for place in self.places:
            place.value = place.for_rows(positions.batch)
