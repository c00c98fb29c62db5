"""Render prompts, completions and conversations as the strings that a tokenizer reads.

render(tokenizer, [{"role": "user", "content": "Is it war?"}], "Yes").text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fgsteer.data.chat import Message, Text, apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """A text as one string, with the characters at which its completion begins and its content ends.

    Attributes:
        text: The string.
        completion_start: Where the completion begins; None where the template does not let the prompt be told apart.
        end: Where the content ends.
        special: Whether the tokenizer is still to add its special tokens.
    """

    text: str
    completion_start: int | None
    end: int
    special: bool


def _between(before: str, after: str, joint: str | None) -> str:
    """Return what joins two strings: ``joint``, or for None a space unless one of them brings white space."""
    if not before or not after:
        return ""
    if joint is None:
        return "" if before[-1:].isspace() or after[:1].isspace() else " "
    return joint


def render(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, joint: str | None = None) -> Rendered:
    """Render a prompt and its completion as one string.

    Strings are joined by ``joint``, by default a space unless one of them brings white space. Chat messages go
    through the tokenizer's template. A completion of a prompt that ends in an assistant's message continues that
    message. Raises DataError for messages that the template refuses.
    """
    before = [] if isinstance(prompt, str) else list(prompt)
    completion = completion or ""  # no message is no text
    if isinstance(completion, str) and not before:
        head = str(prompt) if isinstance(prompt, str) else ""
        head += _between(head, completion, joint)
        return Rendered(head + completion, len(head), len(head + completion), True)
    if isinstance(prompt, str) and prompt:
        before = [{"role": "user", "content": prompt}]
    after = [] if isinstance(completion, str) else list(completion)
    continues = bool(before) and before[-1]["role"] == "assistant"
    if isinstance(completion, str):
        head = render_prompt(tokenizer, before).text
        if continues:
            head += _between(before[-1]["content"], completion, joint)
        return Rendered(head + completion, len(head), len(head + completion), False)
    if continues and after[0]["role"] == "assistant":
        head = render_prompt(tokenizer, before).text
        begun, rest = before[-1]["content"], after[0]["content"]
        between = _between(begun, rest, joint)
        joined = {"role": "assistant", "content": begun + between + rest}
        return _render_conversation(tokenizer, [*before[:-1], joined, *after[1:]], head + between)
    opens = bool(before) and after[0]["role"] == "assistant"
    head = apply_template(tokenizer, before, add_generation_prompt=opens) if before else ""
    rendered = _render_conversation(tokenizer, before + after, head)
    if (
        opens and rendered.completion_start
    ):  # a template may write into the assistant's turn, as Qwen 3 its <think></think>
        # what it writes may hold the message's own words; a single message is what the content ends with
        find = rendered.text.rfind if len(after) == 1 else rendered.text.find
        begin = find(after[0]["content"].strip(), rendered.completion_start, rendered.end)
        rendered = replace(rendered, completion_start=max(begin, rendered.completion_start))
    return rendered


def _render_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], head: str) -> Rendered:
    """Render a conversation whose prompt alone is rendered as ``head``."""
    text = apply_template(tokenizer, messages)
    content = apply_template(tokenizer, messages, continue_final_message=True)
    end = len(content) if text.startswith(content) else len(text)
    return Rendered(text, len(head) if text.startswith(head) else None, end, False)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> Rendered:
    """Render a prompt that is to be continued; one that ends in an assistant's message continues that message."""
    if isinstance(prompt, str):
        return Rendered(prompt, len(prompt), len(prompt), True)
    continues = bool(prompt) and prompt[-1]["role"] == "assistant"
    options = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
    text = apply_template(tokenizer, prompt, **options)
    return Rendered(text, len(text), len(text), False)
