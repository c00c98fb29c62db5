"""Freezing under steering: attention weights, values or MLP outputs of the unsteered run, in the steered one.

print(freeze_steering(model, found, ["qk", "ov", "mlp"]))
generate_frozen(model, tokenizer, ["I think that"], vec.add(8.0), freeze=["qk"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fgsteer.activations.tokens import pad
from fgsteer.data.chat import Text
from fgsteer.display.tables import Table
from fgsteer.errors import DataError, HookpointError
from fgsteer.errors.changes import Changes, temporary_change
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import a
from fgsteer.mechanisms.agreement import Agreement, Faithful
from fgsteer.mechanisms.attribution import SteeringAttribution
from fgsteer.mechanisms.parts import BlockParts, block_parts
from fgsteer.mechanisms.texts import first_block, logits_of, site_of, text_device
from fgsteer.models.hookpoints import decoder_of
from fgsteer.models.properties import eos_ids, input_device
from fgsteer.models.registering import registered
from fgsteer.steering.entries import Entry, interventions_of
from fgsteer.steering.generation import parse_prompts, prompt_inputs
from fgsteer.steering.hooks import steer
from fgsteer.steering.splicing import Change, splice_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Part = Literal["qk", "ov", "mlp"]
PARTS = ("qk", "ov", "mlp")
ROUNDING = 64  # times the dtype's: how far weights times values may be from the heads' outputs


@checked
@torch.no_grad()
def freeze_steering(
    model: PreTrainedModel,
    attribution: SteeringAttribution,
    freezes: Sequence[Part | Sequence[Part]] | None = None,
) -> Table[Faithful]:
    """How much of steering is left with parts of the unsteered run held fixed, on an attribution's texts.

    Frozen at all blocks that read what is steered: attention weights ("qk"), values ("ov") or the outputs of MLPs
    ("mlp"), at every token what the unsteered run has there (arXiv 2604.08524). With all three, only
    ``W_U·Norm(h + v)`` is left of it, with h what the last block gives unsteered. Attention is computed outright
    ("eager") in all runs, which in Gemma 2 differs from the fused kernels.

    Args:
        model: The model that was attributed.
        attribution: The attribution, which holds steering and texts.
        freezes: What is frozen, one part or several at once; by default each alone, attention as a whole, and all.

    Returns:
        A row for each.

    Raises:
        DataError: A part is unknown.
        HookpointError: The model's attention is of an unknown form.
    """
    default: list[Any] = ["qk", "ov", "mlp", ("qk", "ov"), PARTS]
    sets = [parse_parts(freeze) for freeze in (default if freezes is None else freezes)]
    parts = block_parts(model, first_block(attribution.hookpoint))
    agreements, weights = [Agreement() for _ in sets], any("qk" in names for names in sets)
    with eager_attention(model):
        for text in attribution.texts:
            ids, last = text_device(model, text), len(text.ids) - text.prompt_length
            base = FrozenRun(model, parts, ids, weights=weights)
            lengths = [text.prompt_length]
            steered = base.steered_logits(attribution.steering, (), lengths, last)[0]
            for names, agreement in zip(sets, agreements, strict=True):
                frozen = base.steered_logits(attribution.steering, names, lengths, last)[0]
                agreement.add(base.logits[0, -last - 1 : -1], steered, frozen)
    return Table(Faithful.of(" + ".join(names), agreement) for names, agreement in zip(sets, agreements, strict=True))


@checked
@torch.no_grad()
def generate_frozen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[Text],
    steering: Entry,
    freeze: Part | Sequence[Part],
    *,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy continuations of a steered model whose attention weights, values or MLP outputs are the unsteered ones.

    For each token, the unsteered model reads what the frozen run has written so far, and the frozen run takes its
    parts (arXiv 2604.08524). Nothing is cached, so that each token costs two passes over the whole text.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: A text, or a list of texts or of conversations.
        steering: An intervention, or several at one hookpoint, before or after a block.
        freeze: What is frozen: "qk" (attention weights), "ov" (values), "mlp" (outputs of MLPs), or several.
        max_new_tokens: The tokens of each continuation.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        DataError: A part is unknown, or a prompt cannot be read.
        HookpointError: The model's attention is of an unknown form, or steering acts elsewhere.
    """
    names = parse_parts(freeze)
    check_range("max_new_tokens", max_new_tokens, 1, MAX_COUNT, whole=True)
    parts = block_parts(model, first_block(site_of(model, steering)))
    inputs = prompt_inputs(model, tokenizer, parse_prompts(prompts), max_new_tokens)
    rows = [ids[m.bool()].tolist() for ids, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    lengths, ends = [len(row) for row in rows], eos_ids(model)
    running = set(range(len(rows)))
    with eager_attention(model):
        for _ in range(max_new_tokens):
            numbers = sorted(running)
            if not numbers:
                break
            ids, mask = (
                t.to(input_device(model)) for t in pad([rows[n] for n in numbers], tokenizer.pad_token_id or 0)
            )
            run = FrozenRun(model, parts, ids, mask, weights="qk" in names)
            logits = run.steered_logits(steering, names, [lengths[n] for n in numbers])
            for place, n in enumerate(numbers):
                token = int(logits[place, len(rows[n]) - 1].argmax())
                rows[n].append(token)
                if token in ends:
                    running.remove(n)
    tails = [row[length:] for row, length in zip(rows, lengths, strict=True)]
    return list(tokenizer.batch_decode(tails, skip_special_tokens=True))


def parse_parts(freeze: Part | Sequence[Part]) -> tuple[Part, ...]:
    """The parts that are frozen, each once. Raises DataError for an unknown one."""
    names = (freeze,) if isinstance(freeze, str) else tuple(freeze) if isinstance(freeze, Sequence) else ("",)
    if not set(names) <= set(PARTS):
        raise DataError(f"freeze = {freeze!r:.60}", f"one or several of {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in names)  # type: ignore[misc]


@temporary_change
def eager_attention(changes: Changes, model: PreTrainedModel) -> Iterator[None]:
    """Let the decoder compute attention weights outright for the block. Raises HookpointError where it cannot.

    All its layers do, as they share a configuration; other parts of the model, such as one for images, stay as they
    are. Each configuration gets its own setting back, whatever happens in the block.
    """
    decoder: Any = decoder_of(model)
    for config in reversed(_configs(decoder)):  # the outer ones get theirs back first: it reaches those inside too
        changes.undo_by(partial(setattr, config, "_attn_implementation", config._attn_implementation))
    try:
        decoder.set_attn_implementation("eager")
    except ValueError as error:
        raise HookpointError(f"{a(type(model).__name__)} without eager attention", "a model that has it") from error
    yield


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model's modules, each once, and those inside them after them."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if hasattr(config, "sub_configs") and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


class FrozenRun:
    """What an unsteered pass computes, and steered passes over the same tokens that take parts of it.

    Args:
        model: The model, with eager attention.
        parts: The blocks whose parts may be frozen.
        ids: The tokens, padded on the right.
        mask: Their attention mask; by default no token is padding.
        weights: Whether attention weights are to be frozen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Sequence[BlockParts],
        ids: Int[Tensor, "rows tokens"],
        mask: Int[Tensor, "rows tokens"] | None = None,
        *,
        weights: bool = True,
    ) -> None:
        self.model, self.parts, self.ids = model, parts, ids
        self.mask = torch.ones_like(ids) if mask is None else mask
        self.kept: dict[tuple[str, int], Tensor] = {}
        changes: list[Change] = []
        for part in parts:
            for name, module, is_input in (
                ("ov", part.readers["v"][0].module, False),
                ("z", part.output, True),
                ("mlp", part.mlp_added, False),
            ):
                changes.append((module, is_input, partial(self._keep, (name, part.layer))))
        with splice_modules(changes), self._keeping_weights(parts if weights else ()):
            self.logits = self._pass()
        for part in parts if weights else ():
            self._check(part)

    def _pass(self) -> Float[Tensor, "rows tokens vocabulary"]:
        logits: Tensor = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        return logits

    def _keep(self, key: tuple[str, int], h: Tensor) -> Tensor:
        self.kept[key] = h.clone()
        return h

    def _keeping_weights(self, parts: Sequence[BlockParts]) -> AbstractContextManager[None]:
        """Hooks that keep the attention weights that attention modules return beside their output."""

        def keep(layer: int, module: nn.Module, _: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                raise _other_attention(module, "that returns no weights")
            self.kept["qk", layer] = weights

        return registered((part.attention, False, partial(keep, part.layer)) for part in parts)

    def _check(self, part: BlockParts) -> None:
        """Raises HookpointError where the heads' outputs are not the weights times the values."""
        z = self.kept["z", part.layer]
        own = self._mixed(part, self.kept["ov", part.layer])
        real = self.mask.bool().to(z.device)
        error = float((own - z)[real].abs().max()) / max(float(z[real].abs().max()), 1e-30)
        eps = max(torch.finfo(z.dtype).eps, torch.finfo(torch.float32).eps)  # softmax is float32 in float64 models too
        if not error < ROUNDING * eps:
            raise _other_attention(part.attention, "whose heads give something else than weights times values")

    def _mixed(self, part: BlockParts, output: Tensor) -> Float[Tensor, "rows tokens width"]:
        """The unsteered attention weights times some values, side by side for all heads."""
        values = part.values(output).repeat_interleave(part.group, 2)  # (rows, tokens, heads, d_head)
        weights = self.kept["qk", part.layer].to(values)
        return torch.einsum("nhqk,nkhd->nqhd", weights, values).flatten(2)

    def steered_logits(
        self, steering: Entry, freeze: Sequence[Part], prompt_lengths: Sequence[int], last: int | None = None
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """The logits of the steered model with these parts frozen; those that predict the ``last`` tokens, or all."""
        with (
            splice_modules([change for part in self.parts for change in self._changes(part, freeze)]),
            steer(self.model, interventions_of(steering), prompt_lengths=list(prompt_lengths)),
        ):
            return self._pass() if last is None else logits_of(self.model, self.ids, last)

    def _changes(self, part: BlockParts, freeze: Sequence[Part]) -> list[Change]:
        changes: list[Change] = []
        values: dict[str, Tensor] = {}
        module = part.readers["v"][0].module
        if "ov" in freeze:
            changes.append((module, False, partial(self._frozen_values, part)))
        if "qk" in freeze:

            def note(output: Tensor) -> Tensor:
                values["own"] = output
                return output

            changes.append((module, False, note))
            changes.append((part.output, True, lambda z: self._mixed(part, values.pop("own")).to(z)))
        if "mlp" in freeze:
            changes.append((part.mlp_added, False, lambda _: self.kept["mlp", part.layer].clone()))
        return changes

    def _frozen_values(self, part: BlockParts, output: Tensor) -> Tensor:
        frozen = output.clone()
        for reader in part.readers["v"]:
            frozen[..., reader.entries] = self.kept["ov", part.layer][..., reader.entries]
        return frozen


def _other_attention(module: nn.Module, what: str) -> HookpointError:
    return HookpointError(
        f"{a(type(module).__name__)} {what}", "attention that mixes values by weights", "freeze MLPs alone"
    )
