"""Where the prompt of a conversation ends, in rows that do not say it or say it twice.

separate("Is it war?", [user, assistant_yes], [user, assistant_no])     ([user], [assistant_yes], [assistant_no])
split([system, user, assistant])                                        ([system, user], [assistant])
"""

from __future__ import annotations

from collections.abc import Sequence

from fgsteer.data.chat import Message, Text
from fgsteer.errors import DataError


def split_prompt(text: Text) -> tuple[Text, Text]:
    """(prompt, completion): of a conversation what comes before its last assistant's message, and that message on.

    A string, and a conversation without such a message or with nothing before it, has the prompt "".
    """
    if isinstance(text, str):
        return "", text
    places = [place for place, message in enumerate(text) if message["role"] == "assistant"]
    if not places or not places[-1]:
        return "", text
    return text[: places[-1]], text[places[-1] :]


def after_prompt(prompt: Text, text: Text) -> tuple[Text, Text]:
    """(prompt, completion) of a completion that may bring turns of its own before its assistant's message."""
    if isinstance(text, str) or text[0]["role"] == "assistant":
        return prompt, text
    head, tail = split_prompt(text)
    if not head:
        return prompt, text
    return [*_messages(prompt), *head], tail


def separate(prompt: Text, positive: Text, negative: Text) -> tuple[Text, Text, Text]:
    """(prompt, positive, negative) where two completions that are conversations repeat the prompt, or hold it alone.

    The messages that both begin with belong to the prompt, as long as either side keeps one of its own. A prompt
    that they end in is not said twice, and a prompt without them stands before them. Raises DataError for
    conversations that begin with another user's message right after the prompt's, or with another system message.
    """
    if isinstance(positive, str) or isinstance(negative, str):
        return _beside_a_string(prompt, positive, negative)
    most = min(len(positive), len(negative)) - 1
    shared = 0
    while shared < most and _same(positive[shared], negative[shared]):
        shared += 1
    common, after = list(positive[:shared]), (positive[shared:], negative[shared:])
    before = _messages(prompt)
    if not before:
        return (common or "", *after)
    turns = _without_system(before)
    said = _without_system(common)
    if not turns or _agree(said, turns) or _agree(said[: len(turns)], turns):
        return ([*_system_before(before, common), *common], *after)
    for side in (positive, negative):
        opening = _without_system(side)[:1]
        if before[-1]["role"] == "user" and opening and opening[0]["role"] == "user":
            raise DataError(
                f"a completion that begins with the user's message {opening[0]['content']!r:.60} "
                f"after the prompt {before[-1]['content']!r:.60}",
                "the assistant's messages alone, or the whole conversation with the same prompt",
                "leave the field 'prompt' out: what both conversations begin with is then the prompt",
            )
    return ([*before, *common] if common else prompt, *after)


def _system_before(prompt: Sequence[Message], common: Sequence[Message]) -> list[Message]:
    """The prompt's system messages, for conversations that bring none. Raises DataError where they bring another."""
    told, own = ([m for m in messages if m["role"] == "system"] for messages in (prompt, common))
    for message in told:
        if own and not any(_agree([other], [message]) for other in own):
            raise DataError(
                f"a prompt with the system message {message['content']!r:.60} and conversations with "
                f"{own[0]['content']!r:.60}",
                "one system message",
                "leave the field 'prompt' out: what both conversations begin with is then the prompt",
            )
    return [] if own else told


def _beside_a_string(prompt: Text, positive: Text, negative: Text) -> tuple[Text, Text, Text]:
    """The same where one completion at least is a string, which holds no prompt. Raises DataError.

    Beside messages a string is an assistant's message too: both then go through the template.
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
                f"one completion with a prompt of its own, {_messages(head)[-1]['content']!r:.60}, beside a string",
                "two strings, two assistant's messages or two whole conversations",
                "give what both follow in the field 'prompt'",
            )
        prompt = head or prompt
        sides.append(list(tail))  # type: ignore[arg-type]
    return prompt, sides[0], sides[1]


def _messages(prompt: Text) -> list[Message]:
    """A prompt as messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt else []
    return list(prompt)


def _same(a: Message, b: Message) -> bool:
    return a["role"] == b["role"] and a["content"] == b["content"]


def _agree(turns: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether the turns end in the prompt's, of which there is one at least, white space around them aside."""
    last = turns[len(turns) - len(prompt) :]
    return len(last) == len(prompt) > 0 and all(
        a["role"] == b["role"] and a["content"].strip() == b["content"].strip()
        for a, b in zip(last, prompt, strict=True)
    )


def _without_system(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system"]
