"""Find where the prompt of a conversation ends, in rows that do not give the prompt or give it twice.

separate("Is it war?", [user, assistant_yes], [user, assistant_no])     ([user], [assistant_yes], [assistant_no])
split_prompt([system, user, assistant])                                        ([system, user], [assistant])
"""

from __future__ import annotations

from collections.abc import Sequence

from fgsteer.data.chat import Message, Text
from fgsteer.errors import DataError

_LEAVE_PROMPT_OUT = "leave the field 'prompt' out: what both conversations begin with is then the prompt"


def split_prompt(text: Text) -> tuple[Text, Text]:
    """Split a conversation before its last message by the assistant, into (prompt, completion).

    A string, and a conversation without such a message or with nothing before it, has the prompt "".
    """
    if isinstance(text, str):
        return "", text
    last = max((number for number, message in enumerate(text) if message["role"] == "assistant"), default=0)
    return (text[:last], text[last:]) if last else ("", text)


def after_prompt(prompt: Text, text: Text) -> tuple[Text, Text]:
    """Return (prompt, completion) where the completion may bring turns of its own before the assistant's message."""
    if isinstance(text, str) or text[0]["role"] == "assistant":
        return prompt, text
    head, tail = split_prompt(text)
    if not head:
        return prompt, text
    return [*_messages(prompt), *head], tail


def separate(prompt: Text, positive: Text, negative: Text) -> tuple[Text, Text, Text]:
    """Return (prompt, positive, negative) of two completions that may be conversations with the prompt in them.

    The messages with which both begin belong to the prompt, as long as either side keeps one of its own. A prompt
    with which these messages end is not repeated, and any other prompt comes before them. Raises DataError for
    conversations that begin with another user's message right after the prompt's, or with another system message.
    """
    if isinstance(positive, str) or isinstance(negative, str):
        return _beside_a_string(prompt, positive, negative)
    limit = min(len(positive), len(negative)) - 1
    shared = 0
    while shared < limit and _same(positive[shared], negative[shared]):
        shared += 1
    common, after = list(positive[:shared]), (positive[shared:], negative[shared:])
    before = _messages(prompt)
    if not before:
        return (common or "", *after)
    turns = _without_system(before)
    common_turns = _without_system(common)
    if not turns or _agree(common_turns, turns) or _agree(common_turns[: len(turns)], turns):
        return ([*_system_before(before, common), *common], *after)
    for side in (positive, negative):
        opening = _without_system(side)[:1]
        if before[-1]["role"] == "user" and opening and opening[0]["role"] == "user":
            raise DataError(
                f"a completion that begins with the user's message {opening[0]['content']!r:.60} "
                f"after the prompt {before[-1]['content']!r:.60}",
                "the assistant's messages alone, or the whole conversation with the same prompt",
                _LEAVE_PROMPT_OUT,
            )
    return ([*before, *common] if common else prompt, *after)


def _system_before(prompt: Sequence[Message], common: Sequence[Message]) -> list[Message]:
    """Return the prompt's system messages, or none where both conversations bring them. Raises DataError for others."""
    from_prompt, own = ([m for m in messages if m["role"] == "system"] for messages in (prompt, common))
    for message in from_prompt:
        if own and not any(_agree([other], [message]) for other in own):
            raise DataError(
                f"a prompt with the system message {message['content']!r:.60} and conversations with "
                f"{own[0]['content']!r:.60}",
                "the same system message in both",
                _LEAVE_PROMPT_OUT,
            )
    return [] if own else from_prompt


def _beside_a_string(prompt: Text, positive: Text, negative: Text) -> tuple[Text, Text, Text]:
    """Separate two completions of which at least one is a string, which holds no prompt. Raises DataError.

    Beside messages a string becomes an assistant's message: both then go through the template.
    """
    if isinstance(positive, str) and isinstance(negative, str):
        return prompt, positive, negative
    sides = []
    for side in (positive, negative):
        if isinstance(side, str):
            sides.append([{"role": "assistant", "content": side}])
            continue
        head, tail = ("", side) if side[0]["role"] == "assistant" else split_prompt(side)
        if head and not _agree(_without_system(_messages(head)), _without_system(_messages(prompt))):
            raise DataError(
                f"a completion with a prompt of its own, {_messages(head)[-1]['content']!r:.60}, beside a string",
                "two strings, two assistant's messages or two whole conversations",
                "put what both follow into the field 'prompt'",
            )
        prompt = head or prompt
        sides.append(list(tail))  # type: ignore[arg-type]
    return prompt, sides[0], sides[1]


def _messages(prompt: Text) -> list[Message]:
    """Return a prompt as messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt else []
    return list(prompt)


def _same(a: Message, b: Message) -> bool:
    """Tell whether two messages have the same role and content."""
    return a["role"] == b["role"] and a["content"] == b["content"]


def _agree(turns: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Tell whether turns end with those of a prompt, at least one; outer white space does not count."""
    last = turns[len(turns) - len(prompt) :]
    return len(last) == len(prompt) > 0 and all(
        a["role"] == b["role"] and a["content"].strip() == b["content"].strip()
        for a, b in zip(last, prompt, strict=True)
    )


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages that are not system messages."""
    return [message for message in messages if message["role"] != "system"]
