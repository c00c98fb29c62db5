"""Search: the features of an SAE that have to do with a word, and why each was found.

for feature in find_features(model, tokenizer, sae, "wedding"): print(feature.id, feature.why)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import check_unicode
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked_after
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.unembedding import logit_lens
from fgsteer.saes.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fgsteer.saes.examples import FeatureExamples

BEGINNINGS = ("They talked about the", "I remember this", "It was all about", "She wrote the word")
NEAREST_FEATURES = 256  # those nearest the word's unembedding, whose raised tokens are looked at
RAISED_TOKENS = 10  # the first ones of a logit lens, which a feature counts as raising
MIN_STEM_LETTERS = 3
_ENDINGS = "(?:e|es|s|ed|er|ers|ing|ings|y|ying|ies|ied|iage|iages)"
MIN_SCORE = 0.03  # features of a lower score fire as much on any word


@dataclass(frozen=True, repr=False)
class FoundFeature(OneLineRepr):
    """A feature that a search found.

    Args:
        id: The feature's number in its SAE.
        score: How much it has to do with the word; 0.03 and more.
        why: The reasons, in words.
    """

    id: int
    score: float
    why: tuple[str, ...]

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {"feature": self.id, "score": float(self.score), "found because": "; ".join(self.why)}


@checked_after(("word", "sae", "model", "tokenizer"))
def find_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    word: str,
    *,
    examples: FeatureExamples | None = None,
    top: int = 20,
) -> Table[FoundFeature]:
    """Find the features that have most to do with a word or phrase; case does not matter.

    ``score = label + excerpts + fires + raises``:

    - ``label`` is 1 when the feature's label has the word, ½ when it has another form of it (wedding: wed, weddings,
      wedded).
    - ``excerpts`` is the share of its top excerpts that peak on the word; other forms, and excerpts (at least two) that
      have it beside the peak, count half.
    - ``fires`` is its least activation on the word's last token after each of a few plain beginnings, over the largest
      in its excerpts (of any feature on the word where none are given), times ln(density)/ln(1/tokens) where that is
      known, over the word's number of tokens: the more pieces a word has, the less the last stands for it.
    - ``raises`` is 1/rank of a word of one token among those the feature raises, where it is one of the first ten and
      its logit √(2 ln vocabulary) standard deviations over the mean, which is more than chance gives.

    Scores below 0.03 are left out, as any word gets such. So is a feature that fires on the last of several pieces and
    has nothing else to do with the word, as some fire on the last letters of any. In scripts without case any
    occurrence of the word counts, in others only whole words.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are searched, with its labels and density.
        word: A word or phrase.
        examples: Excerpts, which ``load_examples`` or ``measure_examples`` gives.
        top: The most features to return.

    Returns:
        The features, best first.

    Raises:
        DataError: The word is empty.
        PairingError: The excerpts are of another SAE.
    """
    check_range("top", top, 1, MAX_COUNT, whole=True)
    if not word.strip():
        raise DataError("an empty word", "a word or phrase to search for", "pass a word such as 'wedding'")
    word = " ".join(check_unicode(word, "the word").split())
    patterns = (word_pattern(word), forms_pattern(word))
    evidence = [
        _in_labels(patterns, sae.labels),
        {} if examples is None else _in_excerpts(patterns, examples.check(sae), tokenizer),
        _raises(word, sae, model, tokenizer),
    ]
    fires, pieces = _fires_on(word, sae, model, tokenizer, examples)
    related = {feature for part in evidence for feature in part}
    evidence.insert(2, fires if pieces == 1 else {feature: hit for feature, hit in fires.items() if feature in related})
    features = [
        FoundFeature(
            feature,
            sum(part[feature][0] for part in evidence if feature in part),
            tuple(part[feature][1] for part in evidence if feature in part),
        )
        for feature in {feature for part in evidence for feature in part}
    ]
    return Table(sorted((f for f in features if f.score >= MIN_SCORE), key=lambda f: (-f.score, f.id))[:top])


def _has_no_case(word: str) -> bool:
    """Whether a word is of a script without upper and lower case."""
    return not (word.isascii() or word.lower() != word.upper())


def word_pattern(word: str) -> re.Pattern[str]:
    """A pattern of a word and its plural in any case; within longer words only in scripts that have no case."""
    text = re.escape(word)
    if _has_no_case(word):
        return re.compile(text)
    return re.compile(rf"(?<!\w){text}(?:s|es)?(?!\w)", re.IGNORECASE)


def forms_pattern(word: str) -> re.Pattern[str]:
    """A pattern of English forms of a word, or of the last word of a phrase: marry, marries, married, marriage.

    Of a word that is not in ASCII it is ``word_pattern``.
    """
    *before, last = word.split()
    if not last.isascii() or not last.isalpha() or len(last) < MIN_STEM_LETTERS:
        return word_pattern(word)
    text = "".join(re.escape(part) + r"\s+" for part in before) + _stem(last)
    double = f"{text[-1]}?" if text[-1] not in "aeiouwxy" else ""
    return re.compile(rf"(?<!\w){text}(?:{double}{_ENDINGS})?(?!\w)", re.IGNORECASE)


def _stem(word: str) -> str:
    """The word without its ending: wed of wedding, marr of married, lov of loving and of love."""
    stem = word.lower()
    for ending in ("ings", "ing", "ies", "ied", "iage", "ed", "es", "s", "y", "e"):
        short = stem.removesuffix(ending)
        if short != stem and len(short) >= MIN_STEM_LETTERS and re.search("[aeiouy]", short):
            doubled = ending in ("ings", "ing", "ed") and short[-1] == short[-2] and short[-1] not in "lsz"
            return short[:-1] if doubled else short
    return stem


Evidence = dict[int, tuple[float, str]]


def _in_labels(patterns: tuple[re.Pattern[str], re.Pattern[str]], labels: Mapping[int, str]) -> Evidence:
    """The features whose label has the word or another form of it."""
    word, forms = patterns
    evidence: Evidence = {j: (0.5, "another form in its label") for j, label in labels.items() if forms.search(label)}
    return evidence | {j: (1.0, "label") for j, label in labels.items() if word.search(label)}


def _in_excerpts(
    patterns: tuple[re.Pattern[str], re.Pattern[str]], examples: FeatureExamples, tokenizer: PreTrainedTokenizerBase
) -> Evidence:
    """The share of each feature's excerpts that peak on the word, or have it or another form of it nearby."""
    word, forms = patterns
    tokens = examples.tokens.tolist()
    peaks: dict[int, int] = {}
    near: dict[int, int] = {}
    for row, slot in (examples.documents >= 0).nonzero().tolist():
        text = str(tokenizer.decode([i for i in tokens[row][slot] if i >= 0]))
        exact = word.search(text)
        if exact or forms.search(text):
            hits = peaks if exact and examples.excerpt(row, slot, tokenizer).peaks_on(word) else near
            if exact or examples.excerpt(row, slot, tokenizer).peaks_on(forms):
                hits[row] = hits.get(row, 0) + 1
    top, ids = examples.documents.shape[1], examples.features.tolist()
    filled = (examples.documents >= 0).sum(1).tolist()
    evidence: Evidence = {}
    for row in {*peaks, *(row for row, number in near.items() if number > 1)}:
        on, beside = peaks.get(row, 0), near.get(row, 0)
        why = f"peaks on it in {on} of {filled[row]} excerpts" if on else f"in {beside} of {filled[row]} excerpts"
        evidence[ids[row]] = ((on + beside / 2) / top, why)
    return evidence


def _spellings(word: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The spellings of a word that have the fewest tokens inside a sentence, with their tokens.

    The spellings are the word itself, in lower case, capitalised, and in the singular.
    """

    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    before = BEGINNINGS[0]
    spelled = {
        form: ids(f"{before} {form}")[len(ids(before)) :] for form in (word, word.lower(), word[0].upper() + word[1:])
    }
    singular = word.lower().removesuffix("s")
    if min(map(len, spelled.values())) > 1 and len(singular) > MIN_STEM_LETTERS:
        spelled[singular] = ids(f"{before} {singular}")[len(ids(before)) :]
    shortest = min(map(len, spelled.values()))
    return {form: tokens for form, tokens in spelled.items() if len(tokens) == shortest > 0}


@torch.no_grad()
def _fires_on(
    word: str, sae: SAE, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: FeatureExamples | None
) -> tuple[Evidence, int]:
    """Each feature's activation on the word, weighed by how strong and how rare that is, and the word's tokens."""
    forms = _spellings(word, tokenizer)
    if not forms:
        return {}, 0
    triples = [(beginning, form, True) for form in forms for beginning in BEGINNINGS]
    acts = torch.zeros(len(triples), sae.d_sae)
    reader = TokenReader(tokenizer, rule="last", prepend_bos=sae.prepend_bos)
    for batch in batch_texts(model, reader, triples, batch_tokens=1024):
        values = record_batch(model, batch, [sae.input_hookpoint])[sae.input_hookpoint]
        features = sae.encode(values[batch.selected.to(values.device)].to(sae.W_enc.device))
        acts[[row.index for row in batch.rows]] = features.float().cpu()
    least = acts.view(len(forms), len(BEGINNINGS), -1).amin(1).amax(0)
    largest = least.max().expand_as(least) if examples is None else examples.largest(sae.d_sae).maximum(least)
    share = least / largest.clamp(min=1e-9)
    if sae.density is not None:
        share *= 1 - (sae.density.fired + 1).log().float() / math.log(sae.density.tokens + 1)
    pieces = len(next(iter(forms.values())))
    share /= pieces
    itself = word.lower() in {form.lower() for form in forms}
    on = f"the last of its {pieces} tokens" if pieces > 1 else "it" if itself else repr(next(iter(forms)))
    ids = share.nonzero()[:, 0].tolist()
    return {j: (float(share[j]), f"fires on {on}: {float(least[j]):.1f}") for j in ids}, pieces


@torch.no_grad()
def _raises(word: str, sae: SAE, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Evidence:
    """The rank of a word of one token among those that each feature raises."""
    tokens = sorted({ids[0] for ids in _spellings(word, tokenizer).values() if len(ids) == 1})
    if not tokens:
        return {}
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    likeness = nn.functional.normalize(sae.W_dec.to(head), dim=1) @ head[tokens].T
    near = likeness.amax(1).topk(min(NEAREST_FEATURES, sae.d_sae)).indices.cpu()
    logits = logit_lens(model, sae.W_dec[near.to(sae.W_dec.device)]).cpu()
    chance = math.sqrt(2 * math.log(logits.shape[1]))  # what the largest of as many Gaussian draws comes to
    standing = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    best = standing[:, tokens].amax(1)
    ranks = 1 + (standing > best[:, None]).sum(1)
    chosen = ((best > chance) & (ranks <= RAISED_TOKENS)).nonzero()[:, 0].tolist()
    return {int(near[n]): (1 / int(ranks[n]), f"raises it (rank {int(ranks[n])})") for n in chosen}
