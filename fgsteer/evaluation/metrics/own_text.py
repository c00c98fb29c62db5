"""KL on the steered model's own text: what steering costs where it acts, and the least that a behavior can cost.

own = own_text_kl(model, tokenizer, ["I think", "The sea"], vec.add(8.0))
own.kl                                         nats a text, with its interval over prompts
least_kl(0.1, 0.6)                             no steering raises an event from 0.1 to 0.6 for less
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.activations.batches import tokens_in_batch
from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.tokens import pad, prompt_ids
from fgsteer.data.chat import Text
from fgsteer.effects.rollouts import Sampling, rollout
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_flags, check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval
from fgsteer.likelihood.lower_blocks import has_plain_blocks
from fgsteer.likelihood.passes import MAX_LOGITS
from fgsteer.models.hookpoints import uncompiled
from fgsteer.models.properties import eos_ids, input_device, virtual_tokens
from fgsteer.steering.entries import Entry, interventions_of
from fgsteer.steering.generation import parse_prompts
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 32
GRAM = 3  # tokens of what repeats itself
HALVINGS = 200  # of the bracket of a tilt: more than a float64 has bits


@dataclass(frozen=True, eq=False, repr=False)
class OwnTextKL(OneLineRepr):
    """What steering costs on texts that the steered model itself wrote.

    Args:
        nats: The divergence of each text, summed over its tokens, (samples, prompts), float64.
        distinct: The share of different ones among each text's 3-grams of tokens, (samples, prompts), float64.
        lengths: The tokens of each text, with the end-of-text token where it ended, (samples, prompts).
        max_new_tokens: The most tokens of a text.
        texts: The texts, by sample, then prompt.
    """

    nats: Float[Tensor, "samples prompts"]
    distinct: Float[Tensor, "samples prompts"]
    lengths: Int[Tensor, "samples prompts"]
    max_new_tokens: int
    texts: Sequence[Sequence[str]]

    @property
    def kl(self) -> Interval:
        """Nats a text, with the interval over prompts."""
        return over_prompts(self.nats)

    @property
    def distinct_3grams(self) -> Interval:
        """The share of different 3-grams, with the interval over prompts: texts in loops are cheap, and have few."""
        return over_prompts(self.distinct)

    @property
    def per_token(self) -> float:
        """Nats a token over all texts together; a text in a loop lowers it, however much its beginning cost."""
        return float(self.nats.sum() / self.lengths.sum())


def over_prompts(values: Float[Tensor, "samples prompts"]) -> Interval:
    """The mean with its interval over prompts, whose samples are one cluster each. Raises DataError for one prompt."""
    units = {(p, s): float(values[s, p]) for s in range(len(values)) for p in range(values.shape[1])}
    return mean_interval([units], lambda unit: unit[0])


@checked
@torch.no_grad()
def own_text_kl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    steering: Entry,
    *,
    max_new_tokens: int = NEW_TOKENS,
    samples: int = 1,
    seed: int = 0,
    may_end: bool = True,
    plain_prompts: Sequence[Text] | None = None,
    batch_tokens: int | None = None,
) -> OwnTextKL:
    """The KL divergence of the steered model from the unsteered one on texts that the steered model writes.

    ``Σ_t KL(π_s(·|x, y_<t) ‖ π₀(·|x, y_<t))`` over the full vocabulary, for a text y of n tokens that is drawn from
    the steered model at temperature 1, with nothing cut off. Its expectation is the divergence of the distributions
    of whole texts, ``KL(π_s(y|x) ‖ π₀(y|x))``, and no steering that raises an event from a rate p to q has less than
    ``least_kl(p, q)``. Steering that acts on some texts alone pays here where it acts, which it need not do on neutral
    text. Nats a token would reward texts in loops, so that a text is what is counted.

    A text ends at an end-of-text token, which is scored as any other; what would follow it contributes 0, and so the
    sum is still the divergence of whole texts.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: At least two texts or conversations, which intervals are over.
        steering: An intervention, a list of them that compose, or None, which costs 0.
        max_new_tokens: The most tokens n of a text.
        samples: The texts that are drawn for each prompt.
        seed: The seed of the samples; entries of one seed draw with the same random numbers.
        may_end: Whether texts may end. Without, end-of-text is ruled out of both models, whose distributions are
            normalised without it, so that every text has n tokens.
        plain_prompts: What the unsteered model reads in place of ``prompts``, where these hold examples or an
            instruction, which would cost nothing else.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The divergence and the distinct 3-grams of every text, and the texts.

    Raises:
        DataError: There are fewer than two prompts, other numbers of ``plain_prompts``, or a number is out of range.
        SteeringError: A ``CacheSteering`` is among the steering.
    """
    check_range("samples", samples, 1, MAX_COUNT, whole=True)
    check_range("max_new_tokens", max_new_tokens, 1, MAX_COUNT, whole=True)
    check_flags(may_end=may_end)
    asked = parse_prompts(prompts)
    if isinstance(prompts, str) or len(asked) < 2:
        raise DataError(count(len(asked), "prompt"), "a list of at least two prompts, which intervals are over")
    plain = asked if plain_prompts is None else parse_prompts(plain_prompts)
    if len(plain) != len(asked):
        raise DataError(f"{count(len(plain), 'plain prompt')} for {count(len(asked), 'prompt')}", "one for each prompt")
    interventions_of(steering)
    sampling = Sampling(max_new_tokens, 1.0, MAX_COUNT, 1.0, seed)
    drawn = [
        own_texts(model, tokenizer, asked, plain, [steering], sampling, n, may_end=may_end, batch_tokens=batch_tokens)
        for n in range(samples)
    ]
    return OwnTextKL(
        torch.stack([one.nats for one in drawn]),
        torch.stack([one.distinct for one in drawn]),
        torch.stack([one.lengths for one in drawn]),
        max_new_tokens,
        [one.texts for one in drawn],
    )


@dataclass(frozen=True, eq=False, repr=False)
class OwnTexts(OneLineRepr):
    """Texts by entry, then prompt, with what each costs: see ``OwnTextKL``."""

    texts: list[str]
    nats: Float[Tensor, " texts"]
    distinct: Float[Tensor, " texts"]
    lengths: Int[Tensor, " texts"]


def check_untruncated(sampling: Sampling, vocabulary: int) -> None:
    """Raises DataError for texts that are not drawn from the whole distribution at temperature 1.

    What was cut off counts in the divergence, and is never drawn: the sum over a text is then no divergence of texts,
    and may be below what its behavior costs.
    """
    if sampling.temperature != 1 or sampling.truncates(vocabulary):
        raise DataError(
            f"texts drawn at temperature {sampling.temperature:g} from the {sampling.top_k} likeliest tokens "
            f"(top_p = {sampling.top_p:g})",
            f"temperature 1, top_k of at least {vocabulary} (the vocabulary) and top_p = 1",
            "KL on the steered model's own text is that of the distribution that it draws from: cut nothing off",
        )


@torch.no_grad()
def own_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    plain_prompts: Sequence[Text],
    entries: Sequence[Entry],
    sampling: Sampling,
    number: int = 0,
    *,
    may_end: bool = False,
    batch_tokens: int | None = None,
) -> OwnTexts:
    """Draw a text of every prompt under every entry, and measure it. Raises DataError for truncated sampling."""
    heads, plain = prompt_ids(tokenizer, prompts), prompt_ids(tokenizer, plain_prompts)
    padded = pad(heads, tokenizer.pad_token_id or 0, side="left")
    check_untruncated(sampling, model.config.get_text_config().vocab_size)
    ids, _ = rollout(model, padded, entries, sampling, number, may_end=may_end)
    tails = ids[:, padded[0].shape[1] :].cpu()
    kept = _until_end(tails, eos_ids(model)) if may_end else torch.ones_like(tails, dtype=torch.bool)
    by_row = [entry for entry in entries for _ in heads]
    nats = token_divergences(
        model,
        heads * len(entries),
        plain * len(entries),
        tails,
        by_row,
        excluded=() if may_end else eos_ids(model),
        batch_tokens=batch_tokens,
    )
    rows = [tail[keep].tolist() for tail, keep in zip(tails, kept, strict=True)]
    return OwnTexts(
        list(tokenizer.batch_decode(rows, skip_special_tokens=True)),
        (nats * kept).sum(1),
        torch.tensor([distinct_grams(row) for row in rows], dtype=torch.float64),
        kept.sum(1),
    )


def _until_end(tails: Int[Tensor, "rows n"], ends: Iterable[int]) -> Bool[Tensor, "rows n"]:
    """Which tokens are of the text: all up to the first end-of-text token, and that one."""
    ended = torch.isin(tails, torch.tensor(sorted(ends), dtype=tails.dtype))
    return ended.long().cumsum(1) - ended.long() == 0


def distinct_grams(ids: Sequence[int], size: int = GRAM) -> float:
    """The share of different ones among a text's n-grams of tokens; 1 for a text that is too short to have any."""
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


@torch.no_grad()
def token_divergences(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    plain_prompts: Sequence[Sequence[int]],
    tails: Int[Tensor, "rows n"],
    entries: Sequence[Entry],
    *,
    excluded: Iterable[int] = (),
    batch_tokens: int | None = None,
) -> Float[Tensor, "rows n"]:
    """``KL(π_s ‖ π₀)`` of the next token's distribution before each token of a continuation, in nats.

    Args:
        model: The model.
        prompts: The ids of each row's prompt.
        plain_prompts: Those of the prompt that the unsteered model reads.
        tails: The ids of the continuations.
        entries: What steers each row.
        excluded: Tokens that are ruled out of both distributions, which are normalised without them.
        batch_tokens: The tokens in a forward pass.

    Returns:
        Divergences, (rows, n), in float64.
    """
    longest = max(map(len, [*prompts, *plain_prompts])) + tails.shape[1]
    fits = min(
        tokens_in_batch(batch_tokens, input_device(model)),
        MAX_LOGITS // model.config.get_text_config().vocab_size,
    )
    size, columns = max(1, fits // longest), sorted(excluded)
    divergences = []
    for start in range(0, len(tails), size):
        rows = slice(start, start + size)
        log_p = _next_log_probabilities(model, prompts[rows], tails[rows], entries[rows], columns)
        log_q = _next_log_probabilities(model, plain_prompts[rows], tails[rows], None, columns).to(log_p.device)
        p = log_p.exp()
        divergences.append(torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).double().cpu())  # 0 log 0 is 0
    return torch.cat(divergences)


def _next_log_probabilities(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tails: Int[Tensor, "rows n"],
    entries: Sequence[Entry] | None,
    excluded: Sequence[int],
) -> Float[Tensor, "rows n vocabulary"]:
    """The log-probabilities of every token in the place of each token of the continuations, in float32 at least."""
    ids, mask = pad([[*prompt, *tail] for prompt, tail in zip(prompts, tails.tolist(), strict=True)], 0)
    lengths = [len(prompt) for prompt in prompts]
    columns = torch.tensor(lengths)[:, None] - 1 + torch.arange(tails.shape[1])
    options: dict[str, Any] = {}
    forward: Callable[..., Any] = uncompiled(model).forward
    is_plain = has_plain_blocks(model) and not virtual_tokens(model)
    if "logits_to_keep" in inspect.signature(forward).parameters and is_plain:
        kept, columns = torch.unique(columns, return_inverse=True)
        options["logits_to_keep"] = kept.to(input_device(model))
    device = input_device(model)
    steered = nullcontext() if entries is None else steer(model, list(entries), per_row=True)
    with note_prompt_ends(model, lengths), steered:
        logits: Tensor = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options
        ).logits
    logits = logits if options else logits[:, -ids.shape[1] :]  # without those of virtual tokens
    rows = torch.arange(len(ids), device=logits.device)[:, None]
    chosen = logits[rows, columns.to(logits.device)]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    if excluded:
        chosen[..., list(excluded)] = -torch.inf
    return nn.functional.log_softmax(chosen, -1)


@checked
def least_kl(base: float, steered: float) -> float:
    """The least KL divergence, in nats, at which an event of rate ``base`` becomes one of rate ``steered``.

    ``q ln(q/p) + (1 − q) ln((1 − q)/(1 − p))``, by the data processing inequality. It is attained by the unsteered
    distribution tilted towards the event: what shows it made q/p times as probable, and the rest (1 − q)/(1 − p)
    times. For the mean of a score in [0, 1] the same holds, and no better bound follows from the two means alone: with
    an event that a text of score x shows with probability x, the means are its rates. ``least_kl_of_scores`` is a
    larger bound, from all scores of the unsteered model. Averages over prompts may be put in, because the function is
    convex in both rates together.

    Args:
        base: The rate p of the unsteered model, or the mean of its score.
        steered: The rate q of the steered model, or the mean of its score.

    Returns:
        Nats a text; infinite where the unsteered model never shows what the steered one does.

    Raises:
        DataError: A rate is not a number from 0 to 1.
    """
    for name, rate in (("base", base), ("steered", steered)):
        check_range(name, rate, 0, 1)
    return _part(steered, base) + _part(1 - steered, 1 - base)


def _part(q: float, p: float) -> float:
    """``q ln(q/p)``, 0 for q = 0."""
    return 0.0 if q == 0 else math.inf if p == 0 else q * math.log(q / p)


@checked
def least_kl_of_scores(scores: Sequence[float] | Float[Tensor, " texts"], steered: float) -> float:
    """The least KL divergence, in nats, at which the mean of a bounded score becomes ``steered``.

    ``sup_t (t·m − ln E₀[e^{tX}])`` (Donsker & Varadhan 1975), with the scores X of the unsteered model's texts taken
    for its distribution. It is attained by that distribution tilted by ``e^{tX}``, and at least ``least_kl`` of the two
    means, with which it agrees where every score is 0 or 1. Few texts lack the tails that steering can use: beyond
    their largest score it is infinite, though the model's own need not be.

    Args:
        scores: Scores of the unsteered model's texts, each in [0, 1].
        steered: The mean score m of the steered model.

    Returns:
        Nats a text.

    Raises:
        DataError: There is no score, or a number is not from 0 to 1.
    """
    x = torch.as_tensor(scores, dtype=torch.float64).flatten().cpu()
    if not len(x) or not bool(((x >= 0) & (x <= 1)).all()):
        raise DataError("scores outside [0, 1], or none", "at least one number from 0 to 1")
    check_range("steered", steered, 0, 1)
    ends = float(x.min()), float(x.max())
    if not ends[0] < steered < ends[1]:
        at_end = float((x == steered).double().mean())
        return -math.log(at_end) if at_end else math.inf
    low, high = -1.0, 1.0
    while _tilted_mean(x, low) > steered:
        low *= 2
    while _tilted_mean(x, high) < steered:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _tilted_mean(x, middle) < steered else (low, middle)
    tilt = (low + high) / 2
    return max(0.0, tilt * steered - float((tilt * x).logsumexp(0)) + math.log(len(x)))


def _tilted_mean(x: Float[Tensor, " texts"], tilt: float) -> float:
    """The mean of scores weighted by ``e^{tX}``."""
    return float((tilt * x).softmax(0) @ x)
