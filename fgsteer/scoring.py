"""What a model makes of given texts: log-probabilities, cross-entropy and KL under many interventions.

One forward pass serves many texts and many interventions. Only tokens that are scored leave
it, and their log-softmax is taken in float32, whatever the model's dtype.

    cross_entropies(model, tokenizer, texts, [None, vec.add(4.0), vec.add(8.0)])      nats a token
    log_probabilities(model, tokenizer, [("2 + 2 =", "4")], [None]).sums              (1, 1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgsteer.activations import Batch, text_batches, usual_batch_tokens
from fgsteer.checks import checked
from fgsteer.data import Text
from fgsteer.errors import DataError
from fgsteer.interventions import Intervention
from fgsteer.models import input_device
from fgsteer.steering import Steering, steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGIT_ELEMENTS = 1 << 26  # logits held at once when many rows are scored: bounds memory, not results
PIECE_ELEMENTS = 1 << 21  # logits turned to float32 at once

Entry = Intervention | Sequence[Intervention] | None


@dataclass(frozen=True, eq=False)
class LogProbabilities:
    """``sums (interventions, texts)``, nats, of the ``counts (texts,)`` scored tokens of each text; float64."""

    sums: Float[Tensor, "interventions texts"]
    counts: Float[Tensor, " texts"]

    @property
    def cross_entropy(self) -> Float[Tensor, "interventions texts"]:
        """Nats a token of each text; nan for one without a scored token."""
        return -self.sums / self.counts


def _logits(model: PreTrainedModel, batch: Batch, part: Sequence[Any]) -> Float[Tensor, "interventions n vocabulary"]:
    """What each intervention makes of the batch's n scored tokens: the logits before them, in the model's dtype."""
    rows, times = len(batch.ids), len(part)
    steering = part[0] if times == 1 else [entry for entry in part for _ in range(rows)]
    ids, attention = batch.ids.repeat(times, 1), batch.attention.repeat(times, 1)
    with steer(model, steering, per_row=times > 1):
        logits: Tensor = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    scored = batch.selected[:, 1:].repeat(times, 1).to(logits.device)
    return logits[scored].view(times, -1, logits.shape[-1])


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
    **options: Any,
) -> Iterator[tuple[Batch, list[slice]]]:
    """Batches of (prompt, completion), each with the interventions to run on it together."""
    triples = ((prompt, completion, True) for prompt, completion in texts)
    wanted = options["batch_tokens"] or usual_batch_tokens(input_device(model))
    fits = max(1, min(wanted, LOGIT_ELEMENTS // model.config.get_text_config().vocab_size))
    options["batch_tokens"] = fits
    for batch in text_batches(model, tokenizer, triples, rule="answer", **options):
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

    Entries of ``steering`` are interventions, lists of them to compose, or None for unsteered. The
    prompt is context and is not scored; without one, all tokens but the first are. ``joint``
    stands between the two: "" joins them as they are, None as ``collect`` does (a space, unless
    one of them brings white space). A token that spans both is the completion's.
    ``batch_tokens`` bounds a forward pass and changes nothing but speed.

    A text without a token to score raises DataError, or with ``skip_empty`` counts 0 tokens.
    """
    sums = torch.zeros(len(steering), len(texts), dtype=torch.float64)
    counts = torch.zeros(len(texts), dtype=torch.float64)
    options = {"joint": joint, "skip_empty": skip_empty, "batch_tokens": batch_tokens}
    for batch, parts in _passes(model, tokenizer, texts, len(steering), **options):
        places = [row.index for row in batch.rows]
        counts[places] = batch.selected[:, 1:].sum(1).cpu().double()
        targets = batch.ids[:, 1:][batch.selected[:, 1:]]
        for part in parts:
            logits = _logits(model, batch, steering[part])
            chosen = _chosen(logits.flatten(0, 1), targets.to(logits.device).repeat(len(logits)))
            sums[part, places] = _row_sums(batch, chosen.view(len(logits), -1))
    return LogProbabilities(sums, counts)


def _whole(texts: Sequence[str]) -> list[tuple[Text, Text]]:
    """Texts without prompts. Raises DataError for none, or for a single string."""
    if isinstance(texts, str) or not len(texts):
        raise DataError(f"texts {texts!r:.40}", "a list of at least one text")
    return [("", text) for text in texts]


@checked
def cross_entropies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    steering: Sequence[Entry],
    *,
    batch_tokens: int | None = None,
) -> list[float]:
    """``cross_entropy`` of the same texts under each intervention (None: unsteered), many to a forward pass.

    Raises DataError as ``cross_entropy`` does.
    """
    found = log_probabilities(model, tokenizer, _whole(texts), steering, batch_tokens=batch_tokens)
    return (-found.sums.sum(1) / found.counts.sum()).tolist()


@checked
def cross_entropy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    steering: Steering = None,
    batch_tokens: int | None = None,
) -> float:
    """Mean negative log-likelihood of the texts, in nats per predicted token, under steering if given.

    Raises DataError for no text, or a text of one token.
    """
    entry: Any = steering
    return cross_entropies(model, tokenizer, texts, [entry], batch_tokens=batch_tokens)[0]


@checked
@torch.no_grad()
def kl_divergences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    steering: Sequence[Entry],
    *,
    under: Literal["unsteered", "steered"] = "unsteered",
    batch_tokens: int | None = None,
) -> list[float]:
    """Mean KL divergence of next-token distributions, in nats per predicted token, for each intervention.

    ``KL(p‖q) = Σ_v p(v) (log p(v) − log q(v))`` where p, the distribution that the expectation is
    ``under``, is the unsteered model and q the steered one, or the reverse; averaged over the tokens that
    ``cross_entropy`` scores. KL(unsteered‖steered) is what steering adds to the cross-entropy of the
    model's own text, and grows where it rules out what the model would say; KL(steered‖unsteered)
    grows where it says what the model would not. Raises DataError as ``cross_entropy`` does,
    and for another ``under``.
    """
    if under not in ("unsteered", "steered"):
        raise DataError(f"under={under!r}", "unsteered or steered")
    total, count = torch.zeros(len(steering), dtype=torch.float64), 0
    for batch, parts in _passes(model, tokenizer, _whole(texts), len(steering), batch_tokens=batch_tokens):
        base = _logits(model, batch, [None]).float().log_softmax(-1)
        count += base.shape[1]
        for part in parts:
            steered = _logits(model, batch, steering[part]).float().log_softmax(-1)
            log_p, log_q = (base, steered) if under == "unsteered" else (steered, base)
            p = log_p.exp()
            kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 is 0
            total[part] += kl.cpu().double().sum(1)
    return (total / count).tolist()
