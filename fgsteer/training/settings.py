"""How a sparse autoencoder is trained: its kind, its size, and the schedule of its optimizer.

SAETraining(kind="topk", d_sae=9216, k=32, tokens=3_000_000)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range

SAEKind = Literal["topk", "batchtopk", "jumprelu", "matryoshka"]
KINDS: tuple[SAEKind, ...] = ("topk", "batchtopk", "jumprelu", "matryoshka")
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
MOST_TOKENS = 10**12
# On 200 steps of a TopK SAE (9,216 features, k 32) at layer 12 of SmolLM2-135M, 8e-4, 2e-3 and 4e-3 explained .740,
# .803 and .789 of the variance of held-out tokens; long runs of others use a few 1e-4.
SHORT_RATE, SHORT_STEPS = 2e-3, 2000


@dataclass(frozen=True)
class SAETraining:
    """Settings of the training of a sparse autoencoder, for one to fifty million tokens.

    Attributes:
        kind: "topk" keeps the ``k`` largest features of each token; "batchtopk" the ``k · batch`` largest of a batch,
            and is saved as a jumprelu; "matryoshka" is a batchtopk whose first sixteenth and first quarter of features
            also reconstruct alone; "jumprelu" learns a threshold a feature, with a penalty around ``k`` active ones.
        d_sae: Number of features; None takes 8 · d_model.
        k: Features active at a token, on average for all but topk.
        tokens: Tokens trained on; where there are fewer, they are read several times.
        batch: Tokens in a step of the optimizer.
        lr: The learning rate of Adam; None takes 2e-3 for up to 2,000 steps, and 2e-3 · sqrt(2000 / steps) for more.
        warm_up: The share of the steps over which the rate rises to ``lr``.
        decay: The share of the steps, at the end, over which it falls to a tenth.
        dead_window: A feature that has not fired for this share of the steps counts as dead, and learns from what the
            others do not reconstruct.
        seed: The seed of the first weights and of the order of the tokens.
        dtype: The dtype in which the weights are saved.
        autocast: Whether to multiply in bfloat16, which a GPU does faster.

    Raises:
        DataError: A value is out of range.
    """

    kind: SAEKind = "topk"
    d_sae: int | None = None
    k: int = 32
    tokens: int = 2_000_000
    batch: int = 2048
    lr: float | None = None
    warm_up: float = 0.1
    decay: float = 0.2
    dead_window: float = 0.15
    seed: int = 0
    dtype: str = "float32"
    autocast: bool = False

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("dtype", WEIGHT_DTYPES)):
            if getattr(self, name) not in known:
                raise DataError(f"{name} = {getattr(self, name)!r:.60}", f"one of {', '.join(known)}")
        for name, least in (("d_sae", 2), ("k", 1), ("batch", 1), ("tokens", 1)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least, MOST_TOKENS, whole=True)
        for name in ("warm_up", "decay", "dead_window"):
            check_range(name, getattr(self, name), 0, 1)
        if self.lr is not None:
            check_range("lr", self.lr, 1e-9, 10)
        if self.warm_up + self.decay > 1:
            raise DataError(
                f"warm_up + decay = {self.warm_up + self.decay}", "at most 1, as both are shares of the steps"
            )
        if self.tokens < self.batch:
            raise DataError(f"tokens = {self.tokens} and batch = {self.batch}", "tokens for at least one batch")

    @property
    def steps(self) -> int:
        """The number of steps of the optimizer."""
        return self.tokens // self.batch

    def filled(self, d_model: int) -> SAETraining:
        """Return the settings with what depends on the width of the activations. Raises DataError for k > d_sae."""
        d_sae = self.d_sae or 8 * d_model
        if self.k > d_sae:
            raise DataError(f"k = {self.k} and d_sae = {d_sae}", "k of at most d_sae features")
        values = {
            **self.as_dict(),
            "d_sae": d_sae,
            "lr": self.lr or SHORT_RATE * math.sqrt(SHORT_STEPS / max(SHORT_STEPS, self.steps)),
        }
        return SAETraining(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON."""
        return asdict(self)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all settings."""
        return [field.name for field in fields(cls)]
