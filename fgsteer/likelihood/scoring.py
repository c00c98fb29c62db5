"""What a model makes of given texts: log-probabilities, cross-entropy and KL under many interventions.

One forward pass serves many texts and many interventions. Only tokens that are scored leave
it, and their log-softmax is taken in float32, whatever the model's dtype.

    cross_entropies(model, tokenizer, texts, [None, vec.add(4.0), vec.add(8.0)])      nats a token
    log_probabilities(model, tokenizer, [("2 + 2 =", "4")], [None]).sums              (1, 1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from fgsteer.activations.batches import Batch, batch_texts, default_batch_tokens
from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text, check_text
from fgsteer.data.conversations import split_prompt
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import checked, describe_value
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions import Intervention
from fgsteer.models.properties import context_window, input_device
from fgsteer.steering.hooks import Steering, listed, steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGIT_ELEMENTS = 1 << 26  # logits held at once when many rows are scored: bounds memory, not results
PIECE_ELEMENTS = 1 << 21  # logits turned to float32 at once

Entry = Intervention | Sequence[Intervention] | None
Scored = str | tuple[Text, Text]  # a text whose every token but the first is scored, or (prompt, completion)


@dataclass(frozen=True, eq=False, repr=False)
class LogProbabilities(OneLineRepr):
    """``sums (interventions, texts)``, nats, of the ``counts (texts,)`` scored tokens of each text; float64."""

    sums: Float[Tensor, "interventions texts"]
    counts: Float[Tensor, " texts"]

    @property
    def cross_entropy(self) -> Float[Tensor, "interventions texts"]:
        """Nats a token of each text; nan for one without a scored token."""
        return -self.sums / self.counts


def _run(
    model: PreTrainedModel, batch: Batch, part: Sequence[Any], ends: Sequence[int]
) -> Float[Tensor, "interventions_rows tokens vocabulary"]:
    """Logits of the batch under each intervention, to which prompts end at ``ends`` and the rest is generated."""
    rows, times = len(batch.ids), len(part)
    steering = part[0] if times == 1 else [entry for entry in part for _ in range(rows)]
    ids, attention = batch.ids.repeat(times, 1), batch.attention.repeat(times, 1)
    with note_prompt_ends(model, [*ends] * times), steer(model, steering, per_row=times > 1):
        logits: Tensor = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    return logits[:, -ids.shape[1] :]  # without those of virtual tokens


def _logits(model: PreTrainedModel, batch: Batch, part: Sequence[Any]) -> Float[Tensor, "interventions n vocabulary"]:
    """What each intervention makes of the batch's n scored tokens: the logits before them, in the model's dtype."""
    logits = _run(model, batch, part, [row.prompt_length for row in batch.rows])[:, :-1]
    scored = batch.selected[:, 1:].repeat(len(part), 1).to(logits.device)
    return logits[scored].view(len(part), -1, logits.shape[-1])


def _end_logits(
    model: PreTrainedModel, batch: Batch, part: Sequence[Any]
) -> Float[Tensor, "interventions rows vocabulary"]:
    """What each intervention makes of the token after each row, all of which is a prompt to it."""
    ends = [len(row.ids) for row in batch.rows]
    logits = _run(model, batch, part, ends)
    last = torch.tensor(ends * len(part), device=logits.device) - 1
    return logits[torch.arange(len(last), device=logits.device), last].view(len(part), len(ends), -1)


def _chosen(logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-softmax of the logits at the targets, float32, in pieces that stay in a processor's cache."""
    size = max(1, PIECE_ELEMENTS // logits.shape[-1])
    found = []
    for start in range(0, len(logits), size):
        part = logits[start : start + size].float()
        found.append(part.gather(-1, targets[start : start + size, None])[:, 0] - part.logsumexp(-1))
    return torch.cat(found)


def _passes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[Text, Text]],
    interventions: int,
    *,
    batch_tokens: int | None,
    joint: str | None = None,
    skip_empty: bool = False,
    scored: bool = True,
) -> Iterator[tuple[Batch, list[slice]]]:
    """Batches of (prompt, completion), each with the interventions to run on it together.

    Those of which no token is to be ``scored`` may be prompts alone.
    """
    pairs = [_pair(text, number) for number, text in enumerate(texts)]
    triples = ((prompt, completion, True) for prompt, completion in pairs)
    wanted = batch_tokens or default_batch_tokens(input_device(model))
    fits = max(1, min(wanted, LOGIT_ELEMENTS // model.config.get_text_config().vocab_size))
    with TokenReader(
        tokenizer,
        rule="answer" if scored else "all",
        bos=not scored,
        window=context_window(model),
        joint=joint,
        skip_empty=skip_empty,
        scored=scored,
    ) as reader:
        for batch in batch_texts(model, reader, triples, batch_tokens=fits):
            at_once = max(1, fits // batch.ids.numel())
            yield batch, [slice(start, start + at_once) for start in range(0, interventions, at_once)]


def _row_sums(batch: Batch, values: Float[Tensor, "interventions n"]) -> Float[Tensor, "interventions batch"]:
    """Sums over each row's scored tokens, float64 on the CPU."""
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
    """``Σ_t log p(completion_t | prompt, completion_<t)`` of every (prompt, completion) under every intervention.

    Entries of ``steering`` are interventions, lists of them to compose, or None for unsteered. Their scopes hold as in
    ``generate``: what comes before the completion is the prompt, its tokens are the generated ones, as if they were
    fed one by one. The prompt is context and is not scored; without one, the first token (BOS, where the tokenizer
    writes it) is, and all others are scored. What a chat template writes after the completion is not. ``joint``
    stands between the two: "" joins them as they are, None as ``collect`` does (a space, unless
    one of them brings white space). A token that spans both is the completion's.
    ``batch_tokens`` bounds a forward pass and changes nothing but speed.

    A text without a token to score raises DataError, or with ``skip_empty`` counts 0 tokens.
    """
    sums = torch.zeros(len(steering), len(texts), dtype=torch.float64)
    counts = torch.zeros(len(texts), dtype=torch.float64)
    passes = _passes(
        model, tokenizer, texts, len(steering), batch_tokens=batch_tokens, joint=joint, skip_empty=skip_empty
    )
    for batch, parts in passes:
        places = [row.index for row in batch.rows]
        counts[places] = batch.selected[:, 1:].sum(1).cpu().double()
        targets = batch.ids[:, 1:][batch.selected[:, 1:]]
        for part in parts:
            logits = _logits(model, batch, steering[part])
            by_token = rearrange(logits, "interventions n vocabulary -> (interventions n) vocabulary")
            chosen = _chosen(by_token, targets.to(logits.device).repeat(len(logits)))
            by_intervention = rearrange(chosen, "(interventions n) -> interventions n", interventions=len(logits))
            sums[part, places] = _row_sums(batch, by_intervention)
    return LogProbabilities(sums, counts)


def _pairs(texts: Sequence[Scored]) -> list[tuple[Text, Text]]:
    """(prompt, completion) of each text. Raises DataError for none, a single string, or one that is neither."""
    if isinstance(texts, str) or not len(texts):
        raise DataError(f"texts {texts!r:.40}", "a list of at least one text")
    return [("", text) if isinstance(text, str) else _pair(text, number) for number, text in enumerate(texts)]


def _pair(text: Any, number: int) -> tuple[Text, Text]:
    """(prompt, completion) of a pair, or of a conversation, which ends in the completion. Raises DataError."""
    if isinstance(text, list | tuple) and text and all(isinstance(part, Mapping) for part in text):
        return split_prompt(check_text(text, f"text {number}"))
    if not isinstance(text, list | tuple) or len(text) != 2:
        raise DataError(f"text {number} is {describe_value(text)}", "a pair (prompt, completion), or a conversation")
    return text[0], text[1]


def _whole(texts: Sequence[Scored], steering: Sequence[Entry]) -> list[tuple[Text, Text]]:
    """``_pairs``. Raises SteeringError for an intervention on prompts, where a text has none: it would cost nothing."""
    pairs = _pairs(texts)
    items = [item for entry in steering for item in listed(entry)]
    if any(item.scope == "prompt" and not item.bos for item in items) and not all(prompt for prompt, _ in pairs):
        raise SteeringError(
            "an intervention with scope 'prompt' on texts without a prompt",
            "texts that it acts on",
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
    """``cross_entropy`` of the same texts under each intervention (None: unsteered), many to a forward pass.

    Raises DataError and SteeringError as ``cross_entropy`` does.
    """
    found = log_probabilities(model, tokenizer, _whole(texts, steering), steering, batch_tokens=batch_tokens)
    return (-found.sums.sum(1) / found.counts.sum()).tolist()


@checked
def cross_entropy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Scored],
    *,
    steering: Steering = None,
    batch_tokens: int | None = None,
) -> float:
    """Mean negative log-likelihood of the texts, in nats per predicted token, under steering if given.

    A text may be (prompt, completion), of which the completion is scored; scopes as in ``log_probabilities``.
    Raises DataError for no text, or a text of one token, SteeringError for scope "prompt" where a text has no prompt.
    """
    entry: Any = steering
    return cross_entropies(model, tokenizer, texts, [entry], batch_tokens=batch_tokens)[0]


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
    """Mean KL divergence of next-token distributions, in nats, for each intervention.

    ``KL(p‖q) = Σ_v p(v) (log p(v) − log q(v))`` where p, the distribution that the expectation is
    ``under``, is the unsteered model and q the steered one, or the reverse; averaged over the tokens that
    ``cross_entropy`` scores (nats a token). With ``at="last"`` it is that of the distribution after each text's
    last token alone, averaged over texts: how the model would go on, by which refusal directions are selected
    (arXiv 2406.11717); all of a text is then a prompt, and (chat messages, "") is one that ends where the assistant
    begins. KL(unsteered‖steered) is what steering adds to the cross-entropy of the
    model's own text, and grows where it rules out what the model would say; KL(steered‖unsteered)
    grows where it says what the model would not. Raises DataError as ``cross_entropy`` does,
    and for another ``under`` or ``at``.
    """
    if under not in ("unsteered", "steered") or at not in ("mean", "last"):
        raise DataError(f"under={under!r}, at={at!r}", "under unsteered or steered, at mean or last")
    whole = at == "mean"
    read, pairs = (_logits, _whole(texts, steering)) if whole else (_end_logits, _pairs(texts))
    total, count = torch.zeros(len(steering), dtype=torch.float64), 0
    for batch, parts in _passes(model, tokenizer, pairs, len(steering), batch_tokens=batch_tokens, scored=whole):
        base = read(model, batch, [None]).float().log_softmax(-1)
        count += base.shape[1]
        for part in parts:
            steered = read(model, batch, steering[part]).float().log_softmax(-1)
            log_p, log_q = (base, steered) if under == "unsteered" else (steered, base)
            p = log_p.exp()
            kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 is 0
            total[part] += kl.cpu().double().sum(1)
    return (total / count).tolist()
