"""Feature density: on which share of ordinary tokens each feature fires, and whether only on BOS.

It is measured once per SAE over a generic corpus, token by token, and kept with the SAE.

    density = measure_density(model, tokenizer, sae, texts)
    density.save("density.safetensors")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from fgsteer.errors import PairingError
from fgsteer.errors.reprs import OneLineRepr, short_repr
from fgsteer.errors.wording import count
from fgsteer.saes.pairing import Identified, check_measured_on
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors

COUNTS = ("fired", "documents", "first")


@dataclass(frozen=True, eq=False, repr=False)
class FeatureDensity(OneLineRepr):
    """Counts of how often each feature fires over a corpus; two of them add up.

    Attributes:
        fired: On how many tokens each feature is above 0, (d_sae,). Special tokens before a text do not count.
        documents: In how many documents it fires at all, position 0 included, (d_sae,).
        first: In how many of these its largest activation is at position 0, (d_sae,).
        tokens: How many tokens were read, special ones before a text not counted.
        sae_sha256: Hash of the SAE.
        max_density: The θ of FGAA's filter that is recommended for this SAE, where one was tuned.
        corpus: What was read.
    """

    fired: Float[Tensor, " d_sae"]
    documents: Float[Tensor, " d_sae"]
    first: Float[Tensor, " d_sae"]
    tokens: int
    sae_sha256: str
    max_density: float | None = None
    corpus: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"FeatureDensity({self.summary})"

    @property
    def summary(self) -> str:
        """What was measured, in a line: tokens, features that fire at a time, and features that never fire."""
        dead, corpus = int((self.fired == 0).sum()), str(self.corpus.get("name") or "")
        text = f"{count(len(self.fired), 'feature')} on {count(self.tokens, 'token')}"
        text += f" of {short_repr(corpus)}" if corpus else ""
        return f"{text}, {float(self.density.sum()):.3g} firing at a time, {dead:,} never"

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each feature fires, (d_sae,); special tokens before a text do not count."""
        return self.fired / max(1, self.tokens)

    def bos_features(self, share: float = 0.99) -> Bool[Tensor, " d_sae"]:
        """Return a mask (d_sae,) of the features that peak on position 0 in at least this share of their documents.

        This is step 3 of FGAA's filter (arXiv 2501.09929).
        """
        return (self.documents > 0) & (self.first >= share * self.documents)

    def check(self, sae: Identified) -> FeatureDensity:
        """Return the density itself, if it was measured on this SAE. Raises PairingError otherwise."""
        check_measured_on(sae, self.sae_sha256, len(self.fired) == sae.d_sae, "density", "fgsteer density")
        return self

    def __add__(self, other: FeatureDensity) -> FeatureDensity:
        if self.sae_sha256 != other.sae_sha256:
            raise PairingError("densities of two SAEs", "two densities of one SAE", "measure both on the same SAE")
        return FeatureDensity(
            self.fired + other.fired,
            self.documents + other.documents,
            self.first + other.first,
            self.tokens + other.tokens,
            self.sae_sha256,
            self.max_density if self.max_density == other.max_density else None,
            {"parts": [self.corpus, other.corpus]},
        )

    def save(self, path: str | Path) -> None:
        """Write the counts as safetensors, atomically. Raises FormatError where the file cannot be written."""
        header = {
            "tokens": self.tokens,
            "sae_sha256": self.sae_sha256,
            "max_density": self.max_density,
            "corpus": self.corpus,
        }
        tensors = {name: getattr(self, name) for name in COUNTS}
        write_tensors(path, tensors, kind="density", header=header)

    @classmethod
    def load(cls, path: str | Path) -> FeatureDensity:
        """Load a file that ``save`` wrote. Raises FormatError for any other, or a damaged one."""
        tensors, header = read_tensors(path, kind="density")
        with refuse_damaged(path, "a file written by FeatureDensity.save"):
            if len({tuple(tensors[name].shape) for name in COUNTS}) != 1:
                raise ValueError("its counts are of unequal widths")
            if tensors["fired"].ndim != 1 or not 0 <= int(header["tokens"]) < 2**53:
                shape = tuple(tensors["fired"].shape)
                raise ValueError(f"it has counts of shape {shape} over {header['tokens']} tokens")
            return cls(
                tensors["fired"].double(),
                tensors["documents"].double(),
                tensors["first"].double(),
                tokens=int(header["tokens"]),
                sae_sha256=str(header["sae_sha256"]),
                max_density=None if header["max_density"] is None else float(header["max_density"]),
                corpus=dict(header["corpus"]),
            )
