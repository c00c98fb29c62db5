"""Sampled continuations under many vectors at once, with the same random numbers for all of them.

The change of a feature's mean activation that a vector causes is a small difference of
noisy numbers. Every vector, and the unsteered model beside them, therefore samples with
the same Gumbel noise: token = argmax(log p + g), so texts part only where steering parts them.

    acts = rollout_features(model, tokenizer, sae, prompts, [None, vec.add(8.0)], rollout=0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgsteer.activations.pooling import PoolingIndex, pool_features
from fgsteer.activations.recording import record
from fgsteer.errors.changes import Changes, temporary_change
from fgsteer.errors.checks import check_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.base import Intervention
from fgsteer.models.properties import check_window, eos_ids, input_device
from fgsteer.saes.sae import SAE
from fgsteer.steering.entries import Entry
from fgsteer.steering.generation import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn; the defaults are those of SAE-TS (arXiv 2411.02193).

    Args:
        max_new_tokens: The tokens of each continuation.
        temperature: What logits are divided by.
        top_k: How many of the likeliest tokens are drawn from.
        top_p: The probability that the likeliest tokens must hold together to be drawn from alone.
        seed: The seed of the random numbers.

    Raises:
        DataError: A value is out of its range.
    """

    max_new_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, 1, MAX_COUNT, whole=True)
        check_range("temperature", self.temperature, LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
        check_range("top_k", self.top_k, 1, MAX_COUNT, whole=True)
        check_range("top_p", self.top_p, 1e-20, 1)
        check_range("seed", self.seed, -(2**63), 2**63 - 1, whole=True)

    def truncates(self, vocabulary: int) -> bool:
        """Whether some tokens of a vocabulary of so many can never be drawn, however likely the model finds them."""
        return self.top_k < vocabulary or self.top_p < 1

    def noise(self, rollout: int, step: int, prompts: int, vocabulary: int) -> Float[Tensor, "prompts vocabulary"]:
        """Standard Gumbel noise for one step, one row per prompt, the same on every device."""
        seed = (self.seed * 1_000_003 + rollout) * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        return (
            -torch.empty(prompts, vocabulary, dtype=torch.float32, device="cpu").exponential_(generator=generator).log()
        )


def choose(
    logits: Float[Tensor, "rows vocabulary"], noise: Float[Tensor, "prompts vocabulary"], sampling: Sampling
) -> Int[Tensor, " rows"]:
    """Choose one token id for each row: ``argmax(log p + g)`` among the top k that hold the top p of probability.

    Row i takes the noise of prompt i mod prompts. With Gumbel noise g this samples from p;
    rows with equal noise and close p choose alike.
    """
    if not sampling.truncates(logits.shape[-1]):
        rows = torch.arange(len(logits), device=logits.device) % len(noise)
        return (logits.float() / sampling.temperature + noise.to(logits.device)[rows]).argmax(-1)
    top, ids = (logits.float() / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    shares = top.softmax(-1)
    outside = shares.cumsum(-1) - shares >= sampling.top_p  # the likeliest token always stays
    prompt = torch.arange(len(ids), device=ids.device) % len(noise)
    token_noise = noise.to(top.device)[prompt[:, None], ids]
    best = (top + token_noise).masked_fill(outside, -torch.inf).argmax(-1, keepdim=True)
    return ids.gather(-1, best)[:, 0]


@temporary_change
def _without_own_settings(changes: Changes, model: PreTrainedModel) -> Iterator[None]:
    """A block in which ``model.generate`` ignores the model's settings: penalties, biases, beams, ends of text."""
    from transformers import GenerationConfig

    changes.set_attribute(model, "generation_config", GenerationConfig())
    yield


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    prompts: tuple[Tensor, Tensor],
    steering: Sequence[Entry],
    sampling: Sampling,
    number: int = 0,
    *,
    may_end: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw one continuation of every prompt under every entry.

    Args:
        model: A Hugging Face causal language model.
        prompts: The ids and the mask of the prompts, (prompts, tokens).
        steering: The entries: interventions, lists of them that compose, or None for the unsteered model.
        sampling: How continuations are drawn; nothing of the model's own generation config acts.
        number: The number of the rollout, which the random numbers depend on.
        may_end: Whether end-of-text is drawn as any other token; what follows it then means nothing.

    Returns:
        Ids and mask, (entries × prompts, tokens): by entry, then prompt, the prompt's ids and then exactly
        ``max_new_tokens`` new ones, end-of-text never among them unless it may be.
    """
    device = input_device(model)
    ids, mask = (part.repeat(len(steering), 1).to(device) for part in prompts)
    length, count = ids.shape[1], len(prompts[0])
    check_window(
        model, length + sampling.max_new_tokens, f"a prompt of {length} tokens and {sampling.max_new_tokens} new ones"
    )
    ends = [] if may_end else sorted(eos_ids(model))

    def keep_chosen(so_far: Tensor, logits: Tensor) -> Tensor:
        if ends:
            logits[:, ends] = -torch.inf
        noise = sampling.noise(number, so_far.shape[1] - length, count, logits.shape[-1])
        chosen = choose(logits, noise, sampling)
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    entries = [item for item in steering for _ in range(count)]
    with steer(model, entries, per_row=True), _without_own_settings(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=[keep_chosen],
            pad_token_id=0,
        )
    return output, torch.cat([mask, mask.new_ones(len(mask), sampling.max_new_tokens)], 1)


@torch.no_grad()
def rollout_features(
    model: PreTrainedModel,
    prompts: tuple[Tensor, Tensor],
    sae: SAE,
    steering: Sequence[Intervention | None],
    sampling: Sampling,
    number: int = 0,
) -> Float[Tensor, "interventions d_sae"]:
    """The mean feature activations of the texts that each intervention makes the model write.

    They are those of ``prompt_features``, averaged over prompts.
    """
    return prompt_features(model, prompts, sae, steering, sampling, number).mean(1)


@torch.no_grad()
def prompt_features(
    model: PreTrainedModel,
    prompts: tuple[Tensor, Tensor],
    sae: SAE,
    steering: Sequence[Entry],
    sampling: Sampling,
    number: int = 0,
) -> Float[Tensor, "entries prompts d_sae"]:
    """The mean feature activations of the text that each entry makes the model write after each prompt.

    The texts of ``rollout`` are read again by the unsteered model; activations are averaged over new tokens. The
    arguments are those of ``rollout``, and the SAE whose features are read.
    """
    ids, mask = rollout(model, prompts, steering, sampling, number)
    length = ids.shape[1]
    # padding goes to the right, where learned positions do not count it
    order = (torch.arange(length, device=ids.device) + (mask == 0).sum(1, keepdim=True)) % length
    new = order >= length - sampling.max_new_tokens
    values = record(model, ids.gather(1, order), mask.gather(1, order), [sae.input_hookpoint])[sae.input_hookpoint]
    local = sae if sae.W_enc.device == values.device else sae.to(values.device)
    pooled = pool_features(local, values[new.to(values.device)], PoolingIndex.from_mask(new))
    return pooled.view(len(steering), -1, sae.d_sae)
