"""Prompts as batches of tokens, and how likely their replies begin as a refusal.

refusal_scores(model, tokenizer, ["How do I bake bread?"], ["I", "Sorry"], [None, vec.add(1.0)])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.tokens import prompt_ids
from fgsteer.data.chat import Text, check_text, refuse_one_text
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked, describe_value, is_whole_number
from fgsteer.likelihood.passes import TextPasses
from fgsteer.models.chat import is_chat_model
from fgsteer.models.properties import context_window
from fgsteer.steering.entries import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ODDS_EPSILON = 1e-8  # that of the paper's code, so that a probability of 0 or 1 has a score


def prompt_passes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    batch_tokens: int | None = None,
) -> TextPasses:
    """Prompts in batches, each up to where its reply begins; a chat model is asked texts as a user's messages.

    Raises DataError for no prompts, one that is neither a text nor messages, or one beyond the model's window.
    """
    asked = as_requests(model, tokenizer, prompts)
    pairs: list[tuple[Text, Text]] = [("", text) if isinstance(text, str) else (text, "") for text in asked]
    longest, window = max(map(len, prompt_ids(tokenizer, asked))), context_window(model)
    if window is not None and longest > window:  # cut off, a prompt would lack its end, where its reply begins
        raise DataError(f"a prompt of {longest} tokens", f"at most {window}, the model's window", "shorten it")
    return TextPasses(model, tokenizer, pairs, batch_tokens=batch_tokens, scored=False, keep=True)


def as_requests(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[Text]:
    """Prompts as ``generate`` takes them: texts are a user's messages where the model chats.

    Raises DataError for no prompts, or one that is neither a text nor messages.
    """
    refuse_one_text(prompts)
    if not isinstance(prompts, list | tuple) or not prompts:
        raise DataError(describe_value(prompts) if prompts else "no prompts", "a list of at least one request")
    chats = is_chat_model(model, tokenizer)
    texts = [check_text(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
    return [[{"role": "user", "content": text}] if chats and isinstance(text, str) else text for text in texts]


def first_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str | int]) -> list[int]:
    """The ids of the tokens with which a refusal begins.

    Raises DataError for none, for an id that the vocabulary lacks, and for a text of several tokens.
    """
    if isinstance(tokens, str):
        refuse_one_text(tokens)
    if not isinstance(tokens, list | tuple):
        raise DataError(describe_value(tokens), "a list of tokens", "pass refusal_tokens=['I']")
    ids = []
    for token in tokens:
        if is_whole_number(token):
            if not 0 <= int(token) < len(tokenizer):
                raise DataError(f"the token id {token}", f"an id from 0 to {len(tokenizer) - 1}")
            ids.append(int(token))
            continue
        pieces = tokenizer(token, add_special_tokens=False)["input_ids"] if isinstance(token, str) else []
        if len(pieces) != 1:
            shown = tokenizer.convert_ids_to_tokens(pieces) if pieces else "no token"
            raise DataError(
                f"{describe_value(token)}, which is {shown}",
                "the text or the id of one token",
                "name the first token alone of what refusals begin with, such as 'I' or 'Sorry'",
            )
        ids.append(int(pieces[0]))
    if not ids:
        raise DataError("no tokens", "at least one token with which a refusal begins", "pass refusal_tokens=['I']")
    return sorted(set(ids))


@checked
@torch.no_grad()
def refusal_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    refusal_tokens: Sequence[str | int],
    steering: Sequence[Entry] = (None,),
    *,
    batch_tokens: int | None = None,
) -> Float[Tensor, "entries prompts"]:
    """The log-odds that a reply begins with one of some tokens: ``S = log(p + ε) − log(1 − p + ε)``, ε = 1e-8.

    p is the sum of the tokens' probabilities after the prompt (arXiv 2406.11717).

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: Requests: texts, which a chat model gets as a user's messages, or conversations.
        refusal_tokens: The first tokens of refusals, as texts of one token each or as ids.
        steering: What is compared: interventions, lists of them to compose, or None for the unsteered model.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The scores, (entries, prompts), in float64; above 0 a refusal is the more likely.

    Raises:
        DataError: There is no prompt, or a token is none.
    """
    ids = first_tokens(tokenizer, refusal_tokens)
    passes = prompt_passes(model, tokenizer, prompts, batch_tokens=batch_tokens)
    scores = torch.empty(len(steering), len(prompts), dtype=torch.float64)
    for batch, numbers, logits in passes.scored_logits(steering):
        columns = [row.index for row in batch.rows]
        scores[torch.tensor(numbers)[:, None], torch.tensor(columns)] = log_odds(logits, ids)
    return scores


def log_odds(logits: Float[Tensor, "entries n vocabulary"], ids: Sequence[int]) -> Float[Tensor, "entries n"]:
    """The log-odds S of these tokens together, in float64 on the CPU."""
    p = logits.float().softmax(-1)[..., list(ids)].double().sum(-1).cpu()
    return torch.log(p + ODDS_EPSILON) - torch.log(1 - p + ODDS_EPSILON)
