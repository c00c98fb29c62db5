"""Conversations: messages as plain texts, and the one place where a chat template is applied.

apply_template(tokenizer, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fgsteer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Text = str | Sequence[Message]


def check_unicode(text: str, where: str) -> str:
    """The text. Raises DataError for one that holds half a character, as bytes of another encoding become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a character, {text[error.start]!r} at {error.start}", "Unicode text, as UTF-8 holds it"
        ) from error
    return text


def plain_message(message: object, where: str) -> Message:
    """The message with a text as its content; text parts ({"type": "text", "text": …}) are joined.

    Raises DataError for anything else, naming a part that is no text.
    """
    expected = 'an object {"role": text, "content": text}'
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: {message!r:.200}", expected)
    content = message.get("content")
    if isinstance(content, list | tuple) and content:
        message = {**message, "content": "".join(_text_part(part, where) for part in content)}
    elif not isinstance(content, str):
        raise DataError(f"{where}: {message!r:.200}", expected)
    check_unicode(message["role"] + message["content"], where)
    return message


def _text_part(part: object, where: str) -> str:
    """The text of one part of a message's content. Raises DataError naming another kind of part."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(
        f"{where} has a content part of type {kind!r}",
        'parts {"type": "text", "text": …} alone',
        "images, audio and the like are not read: leave them out",
    )


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """The conversation as one text, by the tokenizer's chat template; ``options`` as for ``apply_chat_template``.

    Raises DataError for a tokenizer without a template, or with one that refuses the messages.
    """
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "chat messages", "a tokenizer with a chat template", "set tokenizer.chat_template or pass strings"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, ValueError) as error:  # the latter for a message that the template leaves out
        roles = [message["role"] for message in messages]
        advice = "begin the first user message with the system message's text" if "system" in roles else ""
        raise DataError(
            f"the tokenizer's chat template refuses messages of the roles {', '.join(roles) or 'none'}: {error}",
            "roles in an order that the template knows",
            advice,
        ) from error
