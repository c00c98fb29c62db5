"""Whether a model chats: whether it has learned to answer a user's message and to end its turn.

is_chat_model(model, tokenizer)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fgsteer.data.chat import apply_template
from fgsteer.errors import DataError
from fgsteer.models.properties import eos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLY = "Certainly"


def is_chat_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether generation stops at a token that the chat template writes after a reply.

    A base model may bring the chat template of its family too, but its generation runs on past the end of a turn.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _REPLY}]
    try:
        text = apply_template(tokenizer, messages)
    except DataError:  # a template that takes other messages than these two
        return False
    before, _, tail = text.rpartition(_REPLY)
    if not before or not tail:
        return False
    ids: Any = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return not eos_ids(model).isdisjoint(ids)
