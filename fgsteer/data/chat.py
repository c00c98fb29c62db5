"""Texts and chat messages as users pass them, and the one place where a chat template is applied.

apply_template(tokenizer, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fgsteer.errors import DataError
from fgsteer.errors.wording import a

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Text = str | Sequence[Message]


def check_unicode(text: str, where: str) -> str:
    """Return the text. Raises DataError for one that holds half a character, as bytes of another encoding become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"half a character, {text[error.start]!r} at {error.start}, in {where}",
            "a Unicode text, which UTF-8 can hold",
            "read the file that it comes from in the encoding that it was written in",
        ) from error
    return text


def refuse_one_text(texts: object) -> None:
    """Raise DataError for one string in the place of a list of texts, and for what holds none."""
    if isinstance(texts, str):
        raise DataError(f"one text, {texts!r:.40}", "a list of texts", "pass [text]")
    if not isinstance(texts, Iterable):
        raise DataError(f"{a(type(texts).__name__)} as texts", "a list of texts")


def last_text(prompt: Text) -> str:
    """A prompt as text: of a conversation, its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def check_text(value: object, where: str, *, empty: bool = False) -> Text:
    """Return a value as a text or as messages of one text each.

    Args:
        value: A text, or a list of messages whose content is a text or text parts.
        where: How an error names the place that the value stood at.
        empty: Whether an empty text is allowed.

    Raises:
        DataError: The value is anything else.
    """
    if isinstance(value, str):
        if not value.strip() and not empty:
            raise DataError(f"an empty text in {where}", "a text or chat messages", "fill it in, or leave it out")
        return check_unicode(value, where)
    if isinstance(value, Sequence) and (value or empty):
        return [plain_message(message, f"{where}, message {number}") for number, message in enumerate(value)]
    hint = "put the message into a list: [message]" if isinstance(value, Mapping) and "role" in value else ""
    raise DataError(f"{a(type(value).__name__)}, {value!r:.60}, in {where}", "a text or a list of chat messages", hint)


def plain_message(message: object, where: str) -> Message:
    """Return a message with a text as its content; text parts ({"type": "text", "text": …}) are joined.

    Raises DataError for anything else, naming a part that is no text.
    """
    expected = 'a message {"role": text, "content": text}'
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{message!r:.200} in {where}", expected)
    content = message.get("content")
    if isinstance(content, list | tuple) and content:
        message = {**message, "content": "".join(_text_part(part, where) for part in content)}
    elif not isinstance(content, str):
        raise DataError(f"{message!r:.200} in {where}", expected)
    check_unicode(message["role"] + message["content"], where)
    return message


def _text_part(part: object, where: str) -> str:
    """Return the text of one part of a message's content. Raises DataError naming any other kind of part."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(
        f"a content part of type {kind!r} in {where}",
        'only parts {"type": "text", "text": …}',
        "leave out images, audio and the like, which are not read",
    )


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """Write a conversation as one text, by the tokenizer's chat template.

    ``options`` are those of ``tokenizer.apply_chat_template``.
    Raises DataError for a tokenizer without a template, or with one that refuses the messages.
    """
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "chat messages for a tokenizer without a chat template",
            "strings, or a tokenizer with a chat template",
            "set tokenizer.chat_template, or pass strings",
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, ValueError) as error:  # the latter for a message that the template leaves out
        roles = [message["role"] for message in messages]
        advice = "begin the first user message with the system message's text" if "system" in roles else ""
        raise DataError(
            f"The tokenizer's chat template refuses messages of the roles {', '.join(roles) or 'none'}: "
            f"{str(error).removesuffix('.')}.",
            "roles in an order that the template knows",
            advice,
        ) from error
