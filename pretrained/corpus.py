"""Text for the embedded default: cleaning, the deterministic split, the tokenizer.

Why a module of its own: what was trained on, and under which licence, should be readable
in one place.

    train, held_out = split_corpus(Path("corpora"))
"""

from __future__ import annotations

import hashlib
import html
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
HELD_OUT = 100  # one document in this many, by hash, is never trained on
CHUNK_CHARS = 4000  # books are cut at paragraph ends into pieces of about this size


@dataclass(frozen=True)
class Source:
    """One corpus file: its licence, the share of it that is trained on, and whether excerpts of it may ship."""

    file: str
    title: str
    licence: str
    keep: float
    excerpts: bool = True


SOURCES = (
    Source("tinystories_real", "TinyStories sample (Eldan & Li 2023)", "CDLA-Sharing-1.0", 2.0, False),
    Source("tinyfabulist_fables", "Generated moral fables (klusai/tinyfabulist)", "MIT", 1.0),
    Source("children_stories_ccby", "African Storybook and Pratham stories (global-asp)", "CC-BY / public domain", 2.0),
    Source("fairytaleqa_stories", "FairytaleQA stories", "Apache-2.0, public-domain texts", 1.0),
    Source("tatoeba_english_sentences", "Tatoeba English sentences", "CC-BY 2.0 FR", 1.0),
    Source("classic_children_books", "Children's classics", "public domain", 1.0),
    Source("fiction_books", "Novels and stories by forty authors", "public domain", 0.8),
    Source("imdb_reviews", "Film reviews (Maas et al. 2011)", "research use; weights only are shipped", 0.6, False),
)


_HEADER = re.compile(r"\A\s*Title: .*?\n-{5,}\s*\n", re.S)
_CLEANERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<br\s*/?>", re.I), "\n"),
    (re.compile(r"</?[a-zA-Z][^<>]{0,80}>"), ""),
    (re.compile(r"\[(?:Illustration|Footnote|Transcriber)[^\]]*\]", re.I), ""),
    (re.compile(r"^(?:CHAPTER|BOOK|PART|VOLUME|CANTO)\b.{0,60}$", re.M), ""),
    (re.compile(r"^[ \t]*(?:\*[ \t]*){2,}$", re.M), ""),
    (re.compile(r"(?<!\w)_([^_\n]{1,200})_(?!\w)"), r"\1"),
    (re.compile(r"[\u2018\u2019\u201b]"), "'"),
    (re.compile(r"[\u201c\u201d]"), '"'),
    (re.compile(r"\s*[\u2014\u2013]\s*"), " - "),
    (re.compile(r"(?<=\w)--(?=\w)"), " - "),
    (re.compile(r"\u2026"), "..."),
    (re.compile(r"[ \t\u00a0]+"), " "),
    (re.compile(r" ?\n ?"), "\n"),
    (re.compile(r"\n{2,}"), "\n"),
)


def clean(text: str) -> str:
    """Plain text without markup, entities, front matter or typographic variants."""
    text = _HEADER.sub("", html.unescape(text))
    for pattern, replacement in _CLEANERS:
        text = pattern.sub(replacement, text)
    return text.strip()


def documents(path: Path) -> Iterator[str]:
    """Cleaned documents of one corpus file; books in pieces, single sentences in eights."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if END not in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        raw = [" ".join(lines[i : i + 8]) for i in range(0, len(lines), 8)]
    else:
        raw = text.split(END)
    for document in raw:
        document = clean(document)
        while len(document) > 2 * CHUNK_CHARS:
            cut = document.find("\n", CHUNK_CHARS)
            cut = cut if 0 < cut < 2 * CHUNK_CHARS else CHUNK_CHARS
            yield document[:cut].strip()
            document = document[cut:].strip()
        if document:
            yield document


def bucket(document: str, salt: str = "") -> float:
    """A number in [0, 1) that only the document's text (and the salt) decides."""
    digest = hashlib.sha256((salt + document).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_corpus(corpora: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and held-out documents per source; the split depends on the text alone."""
    train: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for source in SOURCES:
        paths = sorted(corpora.glob(f"{source.file}.txt*"))
        if not paths:
            raise SystemExit(f"no {source.file}.txt or .txt.xz in {corpora}")
        train[source.file], held[source.file] = [], []
        for document in documents(paths[0]):
            if bucket(document) < 1 / HELD_OUT:
                held[source.file].append(document)
                continue
            whole = int(source.keep)
            copies = whole + (bucket(document, "keep") < source.keep - whole)
            train[source.file].extend([document] * copies)
    return train, held


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer; every text starts with the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, core.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
