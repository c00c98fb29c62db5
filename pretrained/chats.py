"""Chats for the sparse autoencoders of a chat model: its own answers, and documents as answers to a request.

Why both: the answers of the model are what steering will meet, and documents under a request show it the chat
template around more kinds of text than a small model writes by itself.

    asked = requests(train, 1800, seed=0)
    answered(model, tokenizer, asked, path)        one line of JSON a batch: a killed run goes on
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fgsteer as fg

ANSWER_TOKENS = 96
BATCH = 192  # rows generated together: on a CPU a step of many costs little more than of a few
Conversation = list[dict[str, str]]

_ABOUT = (
    "Write a few sentences about {}.",
    "Tell me about {}.",
    "What do you think of {}?",
    "Give me three tips about {}.",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "Write a short poem about {}.",
    "What should I know about {}?",
    "Describe {} in your own words.",
    "Write an email to a friend about {}.",
)
_WITH = (
    "Continue this story: {}",
    "Rewrite this in other words: {}",
    "What happens in this text? {}",
    "How does the person feel who says this? {}",
    "Translate into simple English: {}",
)
_ASK_FOR = (
    "Go on from here: {}",
    "Write a text that begins with these words: {}",
    "Please continue: {}",
    "Here is how it starts. {} What comes next?",
)
_SENTENCE = re.compile(r".{20,}?[.!?][\"']?(?=\s)", re.S)
_NOUN = re.compile(r"\b(?:the|a|an|his|her|my|their|our) ([a-z]{4,12}(?: of [a-z]{4,12})?)\b")


def first_sentence(text: str, most: int = 200) -> str:
    """The beginning of a text up to the end of its first sentence."""
    match = _SENTENCE.match(text[: most + 2])
    return " ".join((match[0] if match else text[:most]).split())


def requests(train: dict[str, list[str]], count: int, seed: int) -> list[str]:
    """Different user messages: sentences people say, requests about things that texts name, and about texts."""
    rng = random.Random(seed)
    said = [s for d in train["tatoeba_english_sentences"] for s in re.findall(r"[^.!?]+[.!?]", d) if len(s) > 15]
    documents = [d for name, group in train.items() if name != "imdb_reviews" for d in rng.sample(group, 200)]
    things = sorted({thing for document in documents for thing in _NOUN.findall(document)})
    made = [s.strip() for s in rng.sample(said, count // 2)]
    made += [rng.choice(_ABOUT).format(f"the {thing}") for thing in rng.sample(things, count // 4)]
    made += [rng.choice(_WITH).format(first_sentence(d)) for d in rng.sample(documents, count - len(made))]
    rng.shuffle(made)
    return made


def answered(model: Any, tokenizer: Any, asked: Sequence[str], path: Path, seed: int = 0) -> list[Conversation]:
    """The model's own answers at temperature 1, kept batch by batch."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    chats: list[Conversation] = [chat for line in lines for chat in json.loads(line)]
    for start in range(len(lines) * BATCH, len(asked), BATCH):
        conversations: list[Conversation] = [
            [{"role": "user", "content": text}] for text in asked[start : start + BATCH]
        ]
        torch.manual_seed(seed + start)
        texts = fg.generate(model, tokenizer, conversations, max_new_tokens=ANSWER_TOKENS, do_sample=True, top_p=0.95)
        done = [
            [*chat, {"role": "assistant", "content": text.strip()}]
            for chat, text in zip(conversations, texts, strict=True)
            if text.strip()
        ]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done, ensure_ascii=False) + "\n")
        chats += done
        print(f"answered {start + len(conversations)} of {len(asked)} requests", flush=True)
    return chats


def documents_as_answers(documents: Sequence[str], seed: int) -> list[Conversation]:
    """Documents under the request to go on from their first sentence."""
    rng = random.Random(seed)
    chats = []
    for document in documents:
        begin = first_sentence(document)
        rest = document[len(begin) :].strip()
        if len(rest) > 100:
            user = {"role": "user", "content": rng.choice(_ASK_FOR).format(begin)}
            chats.append([user, {"role": "assistant", "content": rest}])
    return chats
