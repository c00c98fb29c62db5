"""What each feature of the embedded SAE fires on: excerpts, short labels, and whether it is one thing.

Why: a feature id says nothing to a reader. Excerpts ship only from sources whose licence
allows it; labels are single words, counted by rule over all sources, read by nobody.

    found, allowed = strongest(model, tokenizer, sae, documents)
    labels, share = label(found, tokenizer)
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import fgsteer as fg

TOP = 20  # excerpts that a label is read from
KEPT = 4  # excerpts that ship of each feature
WINDOW = 10  # tokens on either side of a peak
COMMON = 0.2  # share of the excerpts from which a word is part of the label
ONE_THING = 0.5  # share of the excerpts from which a feature counts as about one thing
WORD = re.compile(r"\w[\w'-]*")


def sample(documents: Mapping[str, Sequence[str]], texts: int, characters: int = 800) -> list[tuple[str, str]]:
    """(source, text) of equally many documents of each source, chosen and ordered by the hash of their text.

    A text is the document's beginning, cut at white space.
    """
    share = max(1, texts // len(documents))
    chosen = []
    for source, group in documents.items():
        order = sorted(set(group), key=lambda text: hashlib.sha256(text.encode()).digest())[:share]
        chosen += [(source, text[:characters].rsplit(None, 1)[0]) for text in order if len(text) > 80]
    return sorted(chosen, key=lambda pair: hashlib.sha256(pair[1].encode()).digest())


def peak_word(excerpt: fg.Excerpt) -> str:
    """The word that the peak is in or before, in lower case; "" where it is none."""
    before = "".join(excerpt.tokens[: excerpt.peak])
    token = excerpt.tokens[excerpt.peak]
    start = len(before) + len(token) - len(token.lstrip())
    end = len(before) + max(len(token.rstrip()), 1)
    text = "".join(excerpt.tokens)
    return next((m[0].lower() for m in WORD.finditer(text) if m.start() < end and m.end() > start), "")


def label(examples: fg.FeatureExamples, tokenizer: Any) -> tuple[dict[int, str], dict[str, float]]:
    """({feature: label}, figures): the words that a feature's excerpts peak on, most common first.

    A label is up to three words, each the peak of at least ``COMMON`` of the excerpts, or the
    token where only a piece of a word recurs. Live features fire in at least half of ``TOP``
    documents; they are about one thing when one word or token is the peak of ``ONE_THING``.
    """
    labels: dict[int, str] = {}
    live = single = 0
    for feature in examples.features.tolist():
        excerpts = examples.of(feature, tokenizer)
        if len(excerpts) < TOP // 2:
            continue
        live += 1
        words = Counter(word for word in map(peak_word, excerpts) if word)
        pieces = Counter(e.tokens[e.peak].strip().lower() for e in excerpts)
        least = COMMON * len(excerpts)
        common = [word for word, count in words.most_common(3) if count >= least]
        piece, often = pieces.most_common(1)[0]
        if not common and piece and often >= least:
            common = [f"-{piece}-"]
        if common:
            labels[feature] = ", ".join(common)
        single += max([often, *words.values()]) >= ONE_THING * len(excerpts)
    figures = {"live": live, "labelled": len(labels), "about_one_thing": single / max(1, live)}
    return labels, figures


def shippable(examples: fg.FeatureExamples, sources: Sequence[str], allowed: set[str]) -> fg.FeatureExamples:
    """The strongest ``KEPT`` excerpts of each feature from allowed sources, in half precision."""
    fine = torch.tensor([source in allowed for source in sources])
    keep = (examples.documents >= 0) & fine[examples.documents.clamp(min=0).long()]
    order = torch.sort(keep.int(), dim=1, descending=True, stable=True).indices[:, :KEPT]
    index = order[..., None].expand(-1, -1, examples.tokens.shape[2])
    kept = keep.gather(1, order)
    tokens = examples.tokens.gather(1, index).where(kept[..., None], -1)
    small = int(tokens.max()) <= torch.iinfo(torch.int16).max
    return replace(
        examples,
        tokens=tokens.to(torch.int16 if small else torch.int32),
        activations=examples.activations.gather(1, index).where(kept[..., None], 0.0).half(),
        documents=examples.documents.gather(1, order).where(kept, -1),
        corpus={**examples.corpus, "sources": sorted(allowed)},
    )
