"""Steering from one pair of prompts: activation addition (ActAdd), which keeps a vector for each token.

act = act_add(model, tokenizer, "Love", "Hate", "blocks.6.hook_resid_pre", 5.0)
generate(model, tokenizer, "I hate you because", steering=act)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fgsteer.activations.recording import record
from fgsteer.activations.tokens import encode_prompts, pad
from fgsteer.data.chat import Text, check_text
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.interventions.adding import Add
from fgsteer.interventions.token_scopes import at
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import context_window, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked
def act_add(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    positive: Text,
    negative: Text,
    hookpoint: Hookpoint | str | int,
    coefficient: float = 1.0,
    *,
    padding: str | None = None,
    prepend_bos: bool | None = None,
) -> list[Add]:
    """Activation addition: ``h'_i = h_i + c·(h⁺_i − h⁻_i)`` at the first n tokens of a prompt (arXiv 2308.10248).

    ``h⁺_i`` and ``h⁻_i`` are the activations of token i of the two prompts, of which the shorter one is padded on its
    right to the n tokens of the longer one. Position 0 is BOS, where prompts begin with one, and its vector is exactly
    0, as are those of all tokens up to the first that differs. Equal prompts change nothing. A prompt of fewer than n
    tokens gets the vectors of those that it has, and an UntouchedWarning says so.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        positive: The prompt that is added: a text, or a conversation as ``generate`` reads it.
        negative: The prompt that is subtracted.
        hookpoint: Where it is read and added; the paper's is the input of a block, "blocks.6.hook_resid_pre".
        coefficient: The strength c; the paper uses 3 to 15.
        padding: The text of one token that the shorter prompt is padded with, such as " ". By default it is the
            tokenizer's pad token, or EOS where there is none. The model reads it as it reads any other token, so that
            it matters at the positions that one prompt alone has.
        prepend_bos: True puts BOS before both prompts, False takes the tokenizer's away, None leaves it to the
            tokenizer, as ``generate`` does; steered prompts should begin alike.

    Returns:
        n interventions that compose, of which the i-th adds its vector (d_model,), in units of the activation, to token
        i of every prompt. For ``steering=``, alone or as one entry of a batch: ``[act, None, act]``.

    Raises:
        HookpointError: The model lacks the hookpoint.
        DataError: A prompt is empty, exceeds the model's window, or padding is needed and is not one token.
        SteeringError: The coefficient or an activation is not finite.
    """
    where = Hookpoint.parse(hookpoint)
    texts = check_text(positive, "positive", empty=True), check_text(negative, "negative", empty=True)
    rows = [encode_prompts(tokenizer, [text], prepend_bos=prepend_bos)[0][0].tolist() for text in texts]
    window = context_window(model)
    if window is not None and max(map(len, rows)) > window:
        raise DataError(
            f"a prompt of {max(map(len, rows))} tokens", f"at most {window}, the model's window", "shorten it"
        )
    pad_id = 0 if len(rows[0]) == len(rows[1]) else padding_id(tokenizer, padding)
    ids = pad(rows, pad_id)[0].to(input_device(model))
    acts = record(model, ids, torch.ones_like(ids), [where])[where].float()
    differs = (ids[0] != ids[1]).cumsum(0) > 0
    vectors = torch.where(differs[:, None].to(acts.device), acts[0] - acts[1], 0.0)
    name = model_identity(model)["name"]
    return [
        Add(
            direction=vector,
            coefficient=coefficient,
            hookpoint=where,
            scope=at([number]),
            bos=True,
            model_name=name,
            method="act_add",
        )
        for number, vector in enumerate(vectors)
    ]


def padding_id(tokenizer: PreTrainedTokenizerBase, padding: str | None) -> int:
    """The token to pad with. Raises DataError for a text that is not one token, or a tokenizer without pad and EOS."""
    if padding is None:
        known = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = [] if known is None else [known]
    else:
        ids = tokenizer(padding, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise DataError(
            f"{padding!r:.40} to pad with, which is {len(ids)} tokens of this tokenizer",
            "a text of one token, or a tokenizer with a pad or an EOS token",
            'pass " ", or two prompts of as many tokens',
        )
    return int(ids[0])
