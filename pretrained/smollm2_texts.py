"""Text for the sparse autoencoders of SmolLM2: what kinds, how much of each, and in which order.

Why a module of its own: what was trained on should be readable in one place.

    train, held_out = texts(corpora, chats, SmolRecipe())        lists of strings and conversations, shuffled
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from chats import Conversation, documents_as_answers
from corpus import split_corpus

Text = str | Conversation

# the share of the training characters that each source has at most; a source with fewer is read once
SHARES = {
    "tinystories_real": 0.05,
    "tinyfabulist_fables": 0.08,
    "children_stories_ccby": 0.08,
    "fairytaleqa_stories": 0.08,
    "tatoeba_english_sentences": 0.05,
    "classic_children_books": 0.14,
    "fiction_books": 0.18,
    "imdb_reviews": 0.18,
}
CHAT_SHARE = 0.16  # documents as answers to a request; the model's own answers come on top
CHARACTERS_PER_TOKEN = 4.0  # of the tokenizer on these texts, roughly
HELD_OUT_CHATS = 40


def of_share(documents: Sequence[str], characters: float, rng: random.Random) -> list[str]:
    """Different documents at random, of so many characters together or all of them."""
    chosen, held = [], 0
    for document in rng.sample(sorted(set(documents)), len(set(documents))):
        if held >= characters:
            break
        chosen.append(document)
        held += len(document)
    return chosen


def texts(corpora: Path, own_chats: Sequence[Conversation], tokens: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Texts to train on, a little more than ``tokens``, and held-out ones, both in random order."""
    train, held = split_corpus(corpora)
    rng = random.Random(seed)
    characters = 1.2 * tokens * CHARACTERS_PER_TOKEN
    plain = {name: of_share(train[name], share * characters, rng) for name, share in SHARES.items()}
    used = {document for group in plain.values() for document in group}
    rest = [
        document
        for name, group in train.items()
        if name != "imdb_reviews"
        for document in group
        if document not in used
    ]
    rest += [document for document in train["imdb_reviews"] if document not in used][:2000]
    chats = documents_as_answers(of_share(rest, CHAT_SHARE * characters, rng), seed)
    mixed: list[Text] = [document for group in plain.values() for document in group]
    mixed += [*chats, *own_chats[HELD_OUT_CHATS:]]
    rng.shuffle(mixed)
    kept: list[Text] = [text for group in held.values() for text in group[:40] if len(text) > 100]
    kept += [
        *documents_as_answers([text for group in held.values() for text in group[40:50]], seed),
        *own_chats[:HELD_OUT_CHATS],
    ]
    rng.shuffle(kept)
    return mixed, kept
