"""Texts on which steering is taken apart: prompts, how one of both runs goes on, and what steering changes at its site.

texts = read_texts(model, tokenizer, ["I think that"], vec.add(8.0), max_new_tokens=16)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fgsteer.activations.recording import record
from fgsteer.data.chat import Text
from fgsteer.errors import DataError, HookpointError, SteeringError
from fgsteer.errors.checks import check_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.readings import Preview
from fgsteer.likelihood.lower_blocks import can_skip_blocks, output_of_blocks, skip_blocks
from fgsteer.models.hookpoints import Hookpoint, blocks_of, uncompiled
from fgsteer.models.properties import eos_ids, input_device, virtual_tokens
from fgsteer.steering.entries import Entry, interventions_of
from fgsteer.steering.generation import parse_prompts, prompt_inputs
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Run = Literal["steered", "unsteered"]


@dataclass(frozen=True, eq=False, repr=False)
class SteeredText(OneLineRepr):
    """A prompt and its continuation, with what steering adds to the stream at each token.

    Args:
        ids: The token ids of both, (tokens,).
        prompt_length: How many of them are the prompt.
        delta: What steering changes at its site, (tokens, d_model); 0 at tokens that it leaves alone.
    """

    ids: Int[Tensor, " tokens"]
    prompt_length: int
    delta: Float[Tensor, "tokens d_model"]

    @property
    def predicted(self) -> slice:
        """The tokens after which a token of the continuation comes."""
        return slice(self.prompt_length - 1, len(self.ids) - 1)


def site_of(model: nn.Module, steering: Entry) -> Hookpoint:
    """Where interventions act: one input or output of a block.

    Raises SteeringError for none or several places, HookpointError for another site.
    """
    items = interventions_of(steering)
    if any(isinstance(reading, Preview) for item in items for reading in item.readings):
        raise SteeringError(
            "steering by a gate or a strength that reads prompts ahead (fg.Preview)",
            "steering that is decided in the pass itself",
            "measure the same interventions without when=, on prompts where they act",
        )
    places = {item.hookpoint for item in items}
    if len(places) != 1:
        shown = " and ".join(sorted(map(str, places))) or "nothing"
        raise SteeringError(f"steering at {shown}", "interventions at one hookpoint", "take them one by one")
    (site,) = places
    if site.site not in ("resid_pre", "resid_post"):
        raise HookpointError(
            f"steering at {site}",
            "steering at resid_pre or resid_post, before or after a block",
            "what is added to a sublayer's output is added to the stream: steer at resid_post of that block",
        )
    if virtual_tokens(model):
        raise HookpointError("a model with virtual tokens before every text", "a model without", "merge the adapter")
    return site


def first_block(site: Hookpoint) -> int:
    """The first block that reads what is steered."""
    return site.layer + (site.site == "resid_post")


@torch.no_grad()
def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    steering: Entry,
    *,
    run: Run,
    completions: Sequence[str] | None = None,
    max_new_tokens: int,
) -> list[SteeredText]:
    """Prompts with the greedy continuation of one of both runs, or with given completions.

    Raises DataError for no prompts, or other numbers of completions.
    """
    check_range("max_new_tokens", max_new_tokens, 1, MAX_COUNT, whole=True)
    if run not in ("steered", "unsteered"):
        raise DataError(f"run = {run!r:.40}", "'steered' or 'unsteered'")
    asked = parse_prompts(prompts)
    if not asked:
        raise DataError("no prompts", "at least one prompt")
    site = site_of(model, steering)
    inputs = prompt_inputs(model, tokenizer, asked, max_new_tokens)
    heads = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    if completions is None:
        entry = steering if run == "steered" else None
        tails = _continued(model, tokenizer, inputs, entry, max_new_tokens)
    else:
        if isinstance(completions, str) or len(completions) != len(asked):
            raise DataError(
                f"{len(completions)} completions for {len(asked)} prompts", "one for each prompt, in a list"
            )
        encoded: Any = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
        tails = [torch.tensor(ids, dtype=torch.long) for ids in encoded]
        if not all(map(len, tails)):
            raise DataError("an empty completion", "completions of at least one token")
    texts = []
    for head, tail in zip(heads, tails, strict=True):
        ids = torch.cat([head, tail.to(head.device)])
        texts.append(SteeredText(ids, len(head), _delta(model, ids, len(head), site, steering)))
    return texts


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    steering: Entry,
    max_new_tokens: int,
) -> list[Int[Tensor, " tokens"]]:
    """The ids of greedy continuations, each up to its end of text."""
    options: Any = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0}
    with steer(model, interventions_of(steering)):
        output: Any = model.generate(**inputs, **options)
    ids: Tensor = output if isinstance(output, Tensor) else output.sequences
    ends = torch.tensor(sorted(eos_ids(model)), device=ids.device)
    tails = []
    for row in ids[:, inputs["input_ids"].shape[1] :]:
        stops = torch.isin(row, ends).nonzero()
        tails.append(row[: int(stops[0]) + 1] if len(stops) else row)
    return tails


def _delta(
    model: PreTrainedModel, ids: Tensor, prompt_length: int, site: Hookpoint, steering: Entry
) -> Float[Tensor, "tokens d_model"]:
    """What steering changes at its site, in the model's dtype."""
    row, mask = ids[None], torch.ones_like(ids)[None]
    before = record(model, row, mask, [site])[site][0]
    with steer(model, interventions_of(steering), prompt_lengths=[prompt_length]):
        return record(model, row, mask, [site])[site][0] - before


def logits_of(model: nn.Module, ids: Int[Tensor, "rows tokens"], last: int) -> Float[Tensor, "rows last vocabulary"]:
    """The logits that predict the last tokens of rows: those at all of the ``last + 1`` last columns but the last."""
    options = {}
    if "logits_to_keep" in inspect.signature(uncompiled(model).forward).parameters:
        options["logits_to_keep"] = last + 1
    mask = torch.ones_like(ids)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    return logits[:, -last - 1 : -1]


def from_block(model: nn.Module, ids: Int[Tensor, "1 tokens"], first: int, rows: int) -> AbstractContextManager[None]:
    """Let passes over ``rows`` copies of a text begin at a block, from what the blocks below give, where they can."""
    output = None
    if first and can_skip_blocks(model):
        with torch.no_grad():
            output = output_of_blocks(model, ids, torch.ones_like(ids), first)
    return nullcontext() if output is None else skip_blocks(model, first, output, rows)


def text_device(model: nn.Module, text: SteeredText) -> Int[Tensor, "1 tokens"]:
    """The ids of a text as a batch of one row, where the model takes them."""
    return text.ids[None].to(input_device(model))


def steered_blocks(model: nn.Module, site: Hookpoint) -> range:
    """The numbers of the blocks that read what is steered."""
    return range(first_block(site), len(blocks_of(model)))
