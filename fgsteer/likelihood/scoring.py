"""How likely a model finds given texts: log-probabilities, cross-entropy and KL under many interventions.

One forward pass serves many texts and many interventions. Only tokens that are scored leave
it, and their log-softmax is taken in float32, whatever the model's dtype.

    cross_entropies(model, tokenizer, texts, [None, vec.add(4.0), vec.add(8.0)])      nats a token
    log_probabilities(model, tokenizer, [("2 + 2 =", "4")], [None]).sums              (1, 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from fgsteer.activations.batches import Batch
from fgsteer.data.chat import Text, check_text
from fgsteer.data.conversations import split_prompt
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import checked, describe_value
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.scopes import is_of_prompt
from fgsteer.likelihood.passes import TextPasses
from fgsteer.steering.entries import Entry, Steering, interventions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_FLOAT32_LOGITS = 1 << 21  # turned to float32 at once

Scored = str | tuple[Text, Text]  # a text whose every token but the first is scored, or (prompt, completion)


@dataclass(frozen=True, eq=False, repr=False)
class LogProbabilities(OneLineRepr):
    """Log-probabilities of texts under interventions, in float64.

    Args:
        sums: The log-probability of each text's scored tokens together, in nats, (interventions, texts).
        counts: The number of scored tokens of each text, (texts,).
    """

    sums: Float[Tensor, "interventions texts"]
    counts: Float[Tensor, " texts"]

    @property
    def cross_entropy(self) -> Float[Tensor, "interventions texts"]:
        """The cross-entropy of each text, in nats per token; nan for a text without a scored token."""
        return -self.sums / self.counts


def target_log_probabilities(logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The log-softmax of the logits at the targets, in float32, piece by piece to stay in a processor's cache."""
    size = max(1, MAX_FLOAT32_LOGITS // logits.shape[-1])
    log_probabilities = []
    for start in range(0, len(logits), size):
        piece = logits[start : start + size].float()
        target_logits = piece.gather(-1, targets[start : start + size, None])[:, 0]
        log_probabilities.append(target_logits - piece.logsumexp(-1))
    return torch.cat(log_probabilities)


def _row_sums(batch: Batch, values: Float[Tensor, "interventions n"]) -> Float[Tensor, "interventions batch"]:
    """The sum over each row's scored tokens, in float64 on the CPU."""
    owner = batch.selected[:, 1:].nonzero()[:, 0].cpu()
    return torch.zeros(len(values), len(batch.ids), dtype=torch.float64).index_add_(1, owner, values.cpu().double())


@checked
@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[Text, Text]],
    steering: Sequence[Entry] = (None,),
    *,
    joint: str | None = None,
    skip_empty: bool = False,
    batch_tokens: int | None = None,
) -> LogProbabilities:
    """The log-probability of each completion after its prompt, ``Σ_t log p(c_t | prompt, c_<t)``, for each entry.

    Scopes hold as in ``generate``: what comes before the completion is the prompt, and its tokens are the generated
    ones, as if they were fed one by one. The prompt is context and is not scored; without one, the first token (BOS,
    where the tokenizer writes it) is context, and all others are scored. What a chat template writes after the
    completion is not scored. A token that spans prompt and completion is the completion's.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: Pairs (prompt, completion), or conversations, which end in the completion.
        steering: What is compared: interventions, lists of them to compose, or None for unsteered.
        joint: What stands between prompt and completion: "" joins them as they are; None puts a space, as ``collect``
            does, unless one of them brings white space.
        skip_empty: Whether a text without a token to score counts 0 tokens instead of raising.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        Sums and counts of log-probabilities by entry and text.

    Raises:
        DataError: A text is no pair and no conversation, or has no token to score.
    """
    pairs = [_pair(text, number) for number, text in enumerate(texts)]
    passes = TextPasses(model, tokenizer, pairs, batch_tokens=batch_tokens, joint=joint, skip_empty=skip_empty)
    return text_log_probabilities(passes, len(texts), steering)


@torch.no_grad()
def text_log_probabilities(passes: TextPasses, texts: int, steering: Sequence[Entry]) -> LogProbabilities:
    """The log-probabilities of so many texts that are in batches already, as ``log_probabilities`` gives them."""
    sums = torch.zeros(len(steering), texts, dtype=torch.float64)
    counts = torch.zeros(texts, dtype=torch.float64)
    for batch, numbers, logits in passes.scored_logits(steering):
        indices = [row.index for row in batch.rows]
        counts[indices] = batch.selected[:, 1:].sum(1).cpu().double()
        targets = batch.ids[:, 1:][batch.selected[:, 1:]]
        by_token = rearrange(logits, "interventions n vocabulary -> (interventions n) vocabulary")
        chosen = target_log_probabilities(by_token, targets.to(logits.device).repeat(len(logits)))
        by_intervention = rearrange(chosen, "(interventions n) -> interventions n", interventions=len(logits))
        sums[torch.tensor(numbers)[:, None], torch.tensor(indices)] = _row_sums(batch, by_intervention)
    return LogProbabilities(sums, counts)


def _pairs(texts: Sequence[Scored]) -> list[tuple[Text, Text]]:
    """A pair (prompt, completion) for each text. Raises DataError for none, one string, or a text that is neither."""
    if isinstance(texts, str) or not len(texts):
        raise DataError(f"{texts!r:.40}", "texts as a list of at least one", "put a single text into a list")
    return [("", text) if isinstance(text, str) else _pair(text, number) for number, text in enumerate(texts)]


def _pair(text: Any, number: int) -> tuple[Text, Text]:
    """The pair (prompt, completion) of a pair, or of a conversation, which ends in the completion. Raises DataError."""
    if isinstance(text, list | tuple) and text and all(isinstance(part, Mapping) for part in text):
        return split_prompt(check_text(text, f"text {number}"))
    if not isinstance(text, list | tuple) or len(text) != 2:
        raise DataError(f"{describe_value(text)} as text {number}", "a pair (prompt, completion), or a conversation")
    return text[0], text[1]


def scored_pairs(texts: Sequence[Scored], steering: Sequence[Entry]) -> list[tuple[Text, Text]]:
    """The pairs of ``_pairs``. Raises SteeringError for an intervention on prompts where a text has none."""
    pairs = _pairs(texts)
    items = [item for entry in steering for item in interventions_of(entry)]
    if any(is_of_prompt(item.scope) and not item.bos for item in items) and not all(prompt for prompt, _ in pairs):
        raise SteeringError(
            "an intervention with scope 'prompt' on texts without a prompt",
            "texts that the interventions act on, as others cost nothing",
            "pass (prompt, completion) pairs as texts, or measure with scope='all'",
        )
    return pairs


@checked
def cross_entropies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Scored],
    steering: Sequence[Entry],
    *,
    batch_tokens: int | None = None,
) -> list[float]:
    """The cross-entropy of the same texts under each of many interventions, with many to a forward pass.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: As in ``cross_entropy``.
        steering: What is compared: interventions, lists of them to compose, or None for unsteered.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        Nats per token, one number for each entry of ``steering``.

    Raises:
        DataError: As in ``cross_entropy``.
        SteeringError: As in ``cross_entropy``.
    """
    passes = TextPasses(model, tokenizer, scored_pairs(texts, steering), batch_tokens=batch_tokens)
    return mean_cross_entropies(passes, len(texts), steering)


def mean_cross_entropies(passes: TextPasses, texts: int, steering: Sequence[Entry]) -> list[float]:
    """The cross-entropies of ``cross_entropies`` on so many texts that are in batches already."""
    scores = text_log_probabilities(passes, texts, steering)
    return (-scores.sums.sum(1) / scores.counts.sum()).tolist()


@checked
def cross_entropy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Scored],
    *,
    steering: Steering = None,
    batch_tokens: int | None = None,
) -> float:
    """The mean negative log-likelihood of texts, in nats per predicted token, steered or not.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: Texts, whose every token but the first is scored, or pairs (prompt, completion), of which the completion
            is; scopes hold there as in ``log_probabilities``.
        steering: One intervention, or a list of them, which compose; None for the unsteered model.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        Nats per token over all texts together.

    Raises:
        DataError: There is no text, or one of a single token.
        SteeringError: An intervention has scope "prompt", and a text has no prompt.
    """
    entry: Any = steering
    return cross_entropies(model, tokenizer, texts, [entry], batch_tokens=batch_tokens)[0]


@torch.no_grad()
def next_token_loss(model: nn.Module, batch: Batch) -> tuple[float, int]:
    """The sum of cross-entropies of every token of a batch but the first of each row, in nats, and how many they are.

    It is what a plain pass gives, also where ``splice`` puts other activations in the place of the model's own.
    """
    logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits[:, :-1]
    mask = batch.attention[:, 1:].bool().to(logits.device)
    targets = batch.ids[:, 1:].to(logits.device)[mask]
    return float(nn.functional.cross_entropy(logits[mask].float(), targets, reduction="sum")), int(mask.sum())


@checked
@torch.no_grad()
def kl_divergences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Scored],
    steering: Sequence[Entry],
    *,
    under: Literal["unsteered", "steered"] = "unsteered",
    at: Literal["mean", "last"] = "mean",
    batch_tokens: int | None = None,
) -> list[float]:
    """The mean KL divergence of next-token distributions, in nats, for each of many interventions.

    ``KL(p‖q) = Σ_v p(v) (log p(v) − log q(v))``, with p the distribution that the expectation is ``under``.
    KL(unsteered‖steered) is what steering adds to the cross-entropy of the model's own text, and grows where it rules
    out what the model would say; KL(steered‖unsteered) grows where it says what the model would not.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        texts: As in ``cross_entropy``. With ``at="last"`` all of a text is a prompt, and (chat messages, "") is one
            that ends where the assistant begins.
        steering: What is compared with the unsteered model: interventions, or lists of them to compose.
        under: Which model p is, "unsteered" or "steered"; q is the other.
        at: "mean" averages over the tokens that ``cross_entropy`` scores; "last" takes the distribution after each
            text's last token alone, by which refusal directions are selected (arXiv 2406.11717).
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        Nats per token (or per text, at the last token), one number for each entry of ``steering``.

    Raises:
        DataError: As in ``cross_entropy``, and for another ``under`` or ``at``.
        SteeringError: As in ``cross_entropy``.
    """
    if under not in ("unsteered", "steered") or at not in ("mean", "last"):
        raise DataError(
            f"under={under!r:.60} and at={at!r:.60}", "under as 'unsteered' or 'steered', and at as 'mean' or 'last'"
        )
    scored = at == "mean"
    pairs = scored_pairs(texts, steering) if scored else _pairs(texts)
    passes = TextPasses(model, tokenizer, pairs, batch_tokens=batch_tokens, scored=scored)
    return mean_kl_divergences(passes, steering, under)


@torch.no_grad()
def mean_kl_divergences(
    passes: TextPasses, steering: Sequence[Entry], under: Literal["unsteered", "steered"] = "unsteered"
) -> list[float]:
    """The divergences of ``kl_divergences`` on texts that are in batches already."""
    total, count = torch.zeros(len(steering), dtype=torch.float64), 0
    base = torch.empty(0)
    for _, numbers, logits in passes.scored_logits([None, *steering], unchanged_first=True):
        log_probabilities = logits.float().log_softmax(-1)
        if numbers[0] == 0:  # the unsteered model comes first
            base = log_probabilities[0]
            count += len(base)
        log_p, log_q = (base, log_probabilities) if under == "unsteered" else (log_probabilities, base)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 is 0
        for number, value in zip(numbers, kl.cpu().double().sum(1).tolist(), strict=True):
            if number:
                total[number - 1] += value
    return (total / count).tolist()
