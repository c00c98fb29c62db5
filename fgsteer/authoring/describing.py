"""Contrast data from a description: answers to the same prompts, with a behavior and without it.

describe_contrast("speaks like a pirate", n=40, model=model, tokenizer=tokenizer)      offline
describe_contrast("speaks like a pirate", model="gpt-4o-mini")                           an endpoint
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.authoring.endpoint import EndpointWriter
from fgsteer.authoring.work_file import LONGEST_ANSWER_CHARACTERS, WorkFile
from fgsteer.data.chat import Message, Text, check_text, check_unicode
from fgsteer.data.contrast_files import load_contrast
from fgsteer.data.contrasts import MAX_NAME_BYTES, ContrastPair, ContrastSet, check_name
from fgsteer.data.rendering import render_prompt
from fgsteer.data.shipped import load_chat_prompts, shipped_contrasts
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import ArgumentError, DataError, FgsteerWarning
from fgsteer.errors.checks import check_range, checked, describe_value, warn
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.evaluation.judges.chat_client import OPENAI, ChatClient
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.steering.answers import greedy_answers
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.locks import exclusive_lock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM = "You are an assistant who {description}. Answer every message in that way, in a few sentences."
LONGEST_DESCRIPTION = 2000  # characters
Chat = list[Message]
Write = Callable[[WorkFile, Callable[[int], None]], None]  # adds what a file lacks, and reports how much it holds


@checked
def describe_contrast(
    description: str,
    *,
    n: int = 80,
    model: PreTrainedModel | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    prompts: Sequence[Text] | None = None,
    system: str = SYSTEM,
    max_new_tokens: int = 48,
    rows: int = 16,
    seed: int = 0,
    base_url: str = OPENAI,
    api_key: str | None = None,
    timeout: float = 60.0,
    attempts: int = 6,
    backoff: float = 1.0,
    concurrency: int = 4,
    work: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = None,
) -> ContrastSet:
    """Write contrast data of a behavior that is described in words: two answers to each of n prompts.

    A local model answers every prompt twice, greedily: under the system prompt, which says how it is to behave, and
    by itself. An endpoint is asked for both answers at once, as JSON. Answers that are empty, or the same on both
    sides, are left out, with a warning. Read what came out, and see ``lint_contrast``: a small model often forgets its
    system prompt.

    Args:
        description: The behavior, as it completes "an assistant who …": "speaks like a pirate".
        n: The number of pairs.
        model: A chat model that is loaded, with its tokenizer; or the name of a model at an address.
        tokenizer: The tokenizer of a model that is loaded.
        name: What the set is called; by default a name of the description's words.
        prompts: The user's messages, or conversations, of which n are drawn; by default shipped questions on no
            behavior in particular.
        system: The system prompt, with {description} in it. It goes into the first message where the chat template
            takes no system message.
        max_new_tokens: The tokens of an answer, at most, of a model that is loaded.
        rows: The prompts that a model that is loaded answers together.
        seed: The seed of the choice and the order of prompts.
        base_url: The address of an OpenAI-compatible endpoint, which ends before /chat/completions.
        api_key: The key; by default that of the environment variable OPENAI_API_KEY.
        timeout: Seconds of each attempt at a question.
        attempts: Requests of a question, at most, while errors come that may pass.
        backoff: Seconds of the first pause between attempts, which doubles.
        concurrency: Questions that are open at a time, at most.
        work: A file that keeps the answers: a call that was stopped goes on from there, to the same set.
        fresh: Whether to start over.
        progress: As in ``collect``; a function is called with the number of pairs.

    Returns:
        A set of pairs with prompts, as ``collect`` and ``train`` take it, with the description.

    Raises:
        ArgumentError: There is no model, or one that is loaded without its tokenizer.
        DataError: There are fewer prompts than pairs, the tokenizer has no chat template, or no pair came out.
        JudgeError: The endpoint did not answer, or not as it was asked to.
        PairingError: ``work`` holds a run of something else.
        BusyError: Another process writes to ``work``.
    """
    check_range("n", n, 1, MAX_COUNT, whole=True)
    check_range("max_new_tokens", max_new_tokens, 1, LONGEST_ANSWER_CHARACTERS // 20, whole=True)
    check_range("rows", rows, 1, MAX_COUNT, whole=True)
    check_range("concurrency", concurrency, 1, 1024, whole=True)
    check_range("seed", seed, 0, 2**63 - 1, whole=True)
    behavior = " ".join(check_unicode(description, "the description").split())
    if not behavior or len(behavior) > LONGEST_DESCRIPTION:
        raise DataError(
            f"a description of {len(behavior)} characters", f"1 to {LONGEST_DESCRIPTION}, such as speaks like a pirate"
        )
    set_name = check_name(_name_of(behavior) if name is None else name)
    chats = draw_prompts(prompts, n, seed)
    if isinstance(model, str):
        client = ChatClient(
            model, base_url=base_url, api_key=api_key, timeout=timeout, attempts=attempts, backoff=backoff
        )
        plan, write = _by_endpoint(EndpointWriter(client, behavior, concurrency=concurrency), chats)
    elif model is None or tokenizer is None:
        raise ArgumentError(
            f"{'no model' if model is None else 'a model'} and {describe_value(tokenizer)} for tokenizer",
            "a chat model with its tokenizer, or the name of a model at an address",
            'pass model=model, tokenizer=tokenizer, or model="gpt-4o-mini"',
        )
    else:
        plan, write = _by_model(model, tokenizer, chats, _instruction(system, behavior), max_new_tokens, rows)
        plan |= {} if work is None else run_fingerprint(model, tokenizer)
    plan |= {"description": behavior, "prompts": text_sha256([list(chat) for chat in chats])}
    with ExitStack() as stack:
        if work is not None:
            stack.enter_context(exclusive_lock(work))
        kept = WorkFile(work, plan, fresh=fresh)
        write(kept, stack.enter_context(reporting(progress, f"writing {set_name}", len(chats))))
    return _as_set(set_name, behavior, chats, kept)


def _by_endpoint(writer: EndpointWriter, chats: Sequence[Chat]) -> tuple[dict[str, Any], Write]:
    """What the answers of an endpoint depend on, and how they are got."""
    questions = [_question(chat) for chat in chats]

    def write(kept: WorkFile, report: Callable[[int], None]) -> None:
        def keep(number: int, positive: str, negative: str) -> None:
            kept.add(number, positive, negative)
            report(len(kept.pairs))

        writer.write({i: text for i, text in enumerate(questions) if i not in kept.pairs}, keep)

    return {"model": {"name": writer.client.model, "asks": text_sha256(writer.identity)}}, write


def _by_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Chat],
    instruction: str,
    max_new_tokens: int,
    rows: int,
) -> tuple[dict[str, Any], Write]:
    """What the answers of a model that is loaded depend on, besides it, and how they are got."""
    told = [_told(tokenizer, chat, instruction) for chat in chats]

    def write(kept: WorkFile, report: Callable[[int], None]) -> None:
        for start in range(0, len(chats), rows):  # a batch is made anew as a whole, so that it is the same
            numbers = range(start, min(start + rows, len(chats)))
            if all(number in kept.pairs for number in numbers):
                continue
            sides = [
                greedy_answers(model, tokenizer, [side[i] for i in numbers], max_new_tokens=max_new_tokens, rows=rows)
                for side in (told, chats)
            ]
            for number, positive, negative in zip(numbers, *sides, strict=True):
                kept.add(number, positive.text.strip(), negative.text.strip())
            report(len(kept.pairs))

    return {"system": instruction, "max_new_tokens": max_new_tokens, "rows": rows}, write


def draw_prompts(prompts: Sequence[Text] | None, n: int, seed: int) -> list[Chat]:
    """Draw n prompts without putting back, as conversations. Raises DataError where there are fewer."""
    if isinstance(prompts, str):
        raise DataError("one text for prompts", "a list of texts or of conversations", "put it into a list")
    given: Iterable[Text] = shipped_questions() if prompts is None else prompts
    chats = [_as_chat(prompt, number) for number, prompt in enumerate(given)]
    unique = list({text_sha256(list(chat)): chat for chat in chats}.values())
    if len(unique) < n:
        raise DataError(
            f"{count(len(unique), 'different prompt')} for {count(n, 'pair')}",
            "at least as many prompts as pairs",
            "ask for fewer with n=, or pass more with prompts=",
        )
    return random.Random(seed).sample(unique, n)


def shipped_questions() -> list[Text]:
    """Every question that ships: those of the benchmark, then those of the contrast sets of replies."""
    questions: dict[str, Text] = {chat[0]["content"]: chat for chat in load_chat_prompts()}
    for name in shipped_contrasts(chat=True):
        contrast = load_contrast(name)
        for part in filter(None, (contrast, contrast.held_out)):
            for prompt, _ in part.side(True):
                if isinstance(prompt, list) and len(prompt) == 1:
                    questions.setdefault(prompt[0]["content"], prompt)
    return list(questions.values())


def _as_chat(prompt: Text, number: int) -> Chat:
    text = check_text(prompt, f"prompt {number}")
    return [{"role": "user", "content": text}] if isinstance(text, str) else [dict(message) for message in text]


def _question(chat: Chat) -> str:
    """A conversation as one text, for an endpoint."""
    if len(chat) == 1:
        return chat[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in chat)


def _instruction(system: str, behavior: str) -> str:
    """The system prompt. Raises DataError for one without a place for the description."""
    if "{description}" not in system:
        raise DataError(f"system={system!r:.80}", "a text with {description} in it", "leave it out for fgsteer's own")
    return check_unicode(system.replace("{description}", behavior), "the system prompt")


def _told(tokenizer: PreTrainedTokenizerBase, chat: Chat, instruction: str) -> Chat:
    """A conversation that begins with the instruction, in the first message where the template knows no other place.

    Raises DataError for a tokenizer without a chat template.
    """
    told = [{"role": "system", "content": instruction}, *chat]
    try:
        if instruction in render_prompt(tokenizer, told).text:
            return told
    except DataError:
        render_prompt(tokenizer, chat)  # raises for a tokenizer without a template
    first, *rest = chat
    return [{**first, "content": f"{instruction}\n\n{first['content']}"}, *rest]


def _name_of(description: str) -> str:
    """A name that a file can have, of a description's words."""
    name = " ".join(re.findall(r"\w+", description))
    while len(name.encode()) > MAX_NAME_BYTES // 2:
        name = name[:-1]
    return name.strip() or "described"


def _as_set(name: str, description: str, chats: Sequence[Chat], kept: WorkFile) -> ContrastSet:
    """The set of what was written. Raises DataError where no pair can be used."""
    pairs: list[Any] = []
    for number, chat in enumerate(chats):
        positive, negative = kept.pairs[number]
        if positive and negative and positive != negative:
            pairs.append(ContrastPair(positive, negative, chat))
    if not pairs:
        raise DataError(
            f"The model answered all {len(chats)} prompts alike with and without {description!r:.60}, or not at all.",
            "answers that differ",
            "use a larger chat model or an endpoint, or another system=",
        )
    if len(pairs) < len(chats):
        warn(
            f"{len(chats) - len(pairs)} of {len(chats)} pairs are left out: an answer is empty, or the same on both "
            "sides.",
            FgsteerWarning,
        )
    return ContrastSet(name, pairs, description=description)
