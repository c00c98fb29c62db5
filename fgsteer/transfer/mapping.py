"""The map from the activations of one model to those of another, and what it makes of vectors and forward passes.

vector = transfer.vector(stats)                                 W (mean⁺ − mean⁻), for a contrast of model A
stats_b = transfer.collect(model_a, tokenizer_a, contrast)      means of f(h), as if collected in model B
fg.generate(model_a, tokenizer_a, prompts, steering=transfer.switch())              h ← f(h)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.batches import Batch
from fgsteer.activations.pooling import pool
from fgsteer.activations.prefixes import SharedBatch, choose_batching, record_selected
from fgsteer.activations.token_rules import TokenRule
from fgsteer.activations.tokens import TokenReader, split_into_chunks
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import PairingError, SelectionError, SteeringError
from fgsteer.errors.checks import checked
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.reprs import MAX_TEXT_CHARACTERS, OneLineRepr
from fgsteer.interventions.gates import Gate
from fgsteer.interventions.remapping import Remap, check_map_shapes
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.values import finite_vector
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import context_window
from fgsteer.statistics.collecting import ChunkReader, check_finite, interleave, statistics_of
from fgsteer.statistics.contrast import ContrastStatistics
from fgsteer.statistics.moments import Space
from fgsteer.statistics.sums import join_sums
from fgsteer.storage.files import read_tensors, refuse_damaged, tensor_sha256, write_tensors
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_KIND = "transfer"


@dataclass(frozen=True, eq=False, repr=False)
class TransferMap(OneLineRepr):
    """A map from activations of model A to those of model B on the same text (arXiv 2503.04429).

    It is affine, ``f(x) = W x + b``, or has a hidden layer, ``f(x) = W ReLU(W₁x + b₁) + b``. A vector is a difference
    of activations, and is never mapped by f itself, which would add b: see ``vector``, ``direction`` and ``collect``.

    Args:
        weight: The matrix W, (d_target, d_source), or (d_target, hidden) with a hidden layer.
        bias: The vector b, (d_target,).
        mean: The mean activation of model B on the texts of the fit, (d_target,).
        source: Where model A is read.
        target: Where model B would have the activation.
        hidden_weight: The matrix W₁, (hidden, d_source); None for an affine map.
        hidden_bias: The vector b₁, (hidden,).
        source_model: What model A is: name, type, width, layers.
        target_model: What model B is.
        about: How it was fitted.

    Raises:
        PairingError: The shapes do not fit together.
        HookpointError: A hookpoint cannot be parsed.
    """

    weight: Float[Tensor, "d_target d_in"]
    bias: Float[Tensor, " d_target"]
    mean: Float[Tensor, " d_target"]
    source: Hookpoint
    target: Hookpoint
    hidden_weight: Float[Tensor, "hidden d_source"] | None = None
    hidden_bias: Float[Tensor, " hidden"] | None = None
    source_model: Mapping[str, Any] = field(default_factory=dict)
    target_model: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            object.__setattr__(self, name, Hookpoint.parse(getattr(self, name)))
        check_map_shapes(self.weight, self.bias, self.hidden_weight, self.hidden_bias)
        if self.mean.shape != self.bias.shape:
            raise PairingError(f"a mean of shape {tuple(self.mean.shape)}", f"{tuple(self.bias.shape)}, as the bias")

    def __repr__(self) -> str:
        hidden = "" if self.hidden_weight is None else f", hidden {len(self.hidden_weight)}"
        models = (self.source_model, self.target_model)
        names = [escape_text(str(model.get("name") or "a model"), keep="")[:MAX_TEXT_CHARACTERS] for model in models]
        sizes = f"d_model {self.d_source} → {self.d_target}{hidden}"
        return f"TransferMap({self.kind}, {names[0]} at {self.source} → {names[1]} at {self.target}, {sizes})"

    @property
    def kind(self) -> Literal["affine", "autoencoder"]:
        """Whether it is affine, or has a hidden layer."""
        return "affine" if self.hidden_weight is None else "autoencoder"

    @property
    def d_source(self) -> int:
        """The width of model A."""
        return (self.weight if self.hidden_weight is None else self.hidden_weight).shape[1]

    @property
    def d_target(self) -> int:
        """The width of model B."""
        return len(self.bias)

    @property
    def sha256(self) -> str:
        """A hash of what it computes with."""
        return tensor_sha256(self.weight, self.bias, self.hidden_weight, self.hidden_bias)

    def __call__(self, x: Float[Tensor, "*batch d_source"]) -> Float[Tensor, "*batch d_target"]:
        """What it makes of activations of model A: f(x), in float32 or wider, on their device."""
        if x.shape[-1] != self.d_source:
            raise PairingError(
                f"activations of width {x.shape[-1]}", f"width {self.d_source}, that of the map's source"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.hidden_weight is not None and self.hidden_bias is not None:
            x = (x @ self.hidden_weight.to(x).T + self.hidden_bias.to(x)).relu()
        return x @ self.weight.to(x).T + self.bias.to(x)

    @checked
    def direction(self, vector: SteeringVector) -> SteeringVector:
        """A vector of model A as one of model B, ``W v``, without the bias, as a vector is a difference.

        Args:
            vector: A vector at the map's source. Its reference, if it has one, becomes ``f(reference)``.

        Raises:
            SteeringError: The map has a hidden layer, through which a direction has no one image.
            PairingError: The vector has another width or hookpoint.
        """
        self._check_affine("a direction")
        if (vector.hookpoint, vector.d_model) != (self.source, self.d_source):
            raise PairingError(
                f"a vector at {vector.hookpoint} of d_model {vector.d_model}",
                f"one at {self.source} of d_model {self.d_source}, where the map reads",
                "fit a map from the vector's hookpoint",
            )
        reference = None if vector.reference is None else self(vector.reference.detach())
        about = {**vector.provenance, "model": dict(self.target_model), "transfer": self.describe()}
        for name in ("sae", "feature_density", "feature_labels"):  # of model A
            about.pop(name, None)
        return SteeringVector(self._turned(vector.direction.detach()), self.target, reference, provenance=about)

    @checked
    def vector(self, stats: ContrastStatistics) -> SteeringVector:
        """The vector of model B for a contrast of model A: ``mean f(h⁺) − mean f(h⁻) = W (mean h⁺ − mean h⁻)``.

        Its reference is ``mean f(h⁻)``, for ``.affine``. Its norm is what the map gives, not what a vector of model B
        would have: find a coefficient by its cost (``fg.calibrate``).

        Args:
            stats: Statistics of model A at the map's source.

        Raises:
            SteeringError: The map has a hidden layer, so that means are not enough.
            PairingError: Nothing was collected at the map's source.
            SelectionError: The two means are equal.
        """
        self._check_affine("the means of a contrast")
        _, contrast = stats.at("residual", self.source)
        if not contrast.difference.norm() > 0:
            raise SelectionError("the same mean on both sides", "positives and negatives whose mean activations differ")
        about = {**provenance("transfer", {}, stats), "model": dict(self.target_model), "transfer": self.describe()}
        reference = self(contrast.negative.mean).float()
        return SteeringVector(self._turned(contrast.difference), self.target, reference, provenance=about)

    def _turned(self, direction: Tensor) -> Tensor:
        return (self.weight.double() @ direction.to(self.weight.device).double()).float()

    def _check_affine(self, what: str) -> None:
        """Raises SteeringError for a map with a hidden layer."""
        if self.kind != "affine":
            raise SteeringError(
                f"{what} through a map with a hidden layer, f(h⁺) − f(h⁻) being no function of h⁺ − h⁻",
                "activations, or an affine map",
                "collect the contrast through the map: fg.caa(transfer.collect(model_a, tokenizer_a, contrast)); "
                'or fit with kind="affine"',
            )

    @checked
    def collect(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        contrast: Contrastable,
        *,
        tokens: TokenRule = "all",
        bos: bool = False,
        prepend_bos: bool | None = None,
        batch_tokens: int | None = None,
        max_tokens: int | None = None,
        keep_pooled: bool = False,
        progress: Progress = None,
    ) -> ContrastStatistics:
        """Collect a contrast in model A, every token's activation mapped before any mean is taken.

        What comes are statistics of model B at the map's target, from which ``caa``, ``ace`` and ``pca`` make vectors
        of model B: ``v = mean f(h⁺) − mean f(h⁻)``, whatever the map.

        Args:
            model: Model A.
            tokenizer: Its tokenizer.
            contrast: As in ``collect``.
            tokens: As in ``collect``.
            bos: As in ``collect``.
            prepend_bos: As in ``collect``.
            batch_tokens: As in ``collect``.
            max_tokens: As in ``collect``.
            keep_pooled: As in ``collect``.
            progress: As in ``collect``.

        Raises:
            DataError: As in ``collect``.
            PairingError: The model has another width than the map's source.
            HookpointError: The model lacks the hookpoint.
        """
        contrast = as_contrast(contrast)
        check_pairing(model, self.source, self.d_source, str(self.source_model.get("name") or ""), "map")
        token_reader = TokenReader(
            tokenizer,
            rule=tokens,
            bos=bos,
            prepend_bos=prepend_bos,
            max_tokens=max_tokens,
            window=context_window(model),
        )
        reading = {
            "model": dict(self.target_model),
            "sae": None,
            "tokens": tokens,
            "bos": bos,
            "prepend_bos": prepend_bos,
            "max_tokens": max_tokens,
            "transfer": self.describe(),
        }
        total = contrast.count(True) + contrast.count(False)
        with reporting(progress, "collecting texts", total) as report, token_reader:
            reader = _MappedReader(
                model,
                token_reader,
                None,
                [self.source],
                keep_pooled,
                choose_batching(model),
                batch_tokens,
                report,
                transfer=self,
            )
            chunks = split_into_chunks(interleave(contrast))
            sums = join_sums(reader.sum_chunk(number, chunk) for number, chunk in enumerate(chunks))
        reader.sinks.warn()
        return statistics_of(sums, contrast, reading)

    @checked
    def switch(
        self, strength: float = 1.0, *, scope: Scope = "all", bos: bool = False, when: Gate | None = None
    ) -> Remap:
        """Replace activations in model A's own passes by those that the map gives: ``h' = h + s·(f(h) − h)``.

        Between a base model and one that was tuned from it, this switches what tuning did on or off at one layer.

        Args:
            strength: The share s of the way, from 0, which changes no bit, to 1.
            scope: The tokens that are changed, as in ``Intervention``.
            bos: Whether a start token at position 0 is changed too, which no map is fitted to.
            when: The gate under which it acts.

        Raises:
            PairingError: The models have other widths, or the map leads to another hookpoint than it reads.
            DataError: The strength is not between 0 and 1.
        """
        if self.source != self.target:
            raise PairingError(
                f"a map from {self.source} to {self.target}",
                "one to the hookpoint that it reads, as what it gives takes the place of what is there",
                f"fit a map with hookpoint_b={str(self.source)!r}",
            )
        return Remap(
            hookpoint=self.source,
            weight=self.weight,
            bias=self.bias,
            hidden_weight=self.hidden_weight,
            hidden_bias=self.hidden_bias,
            strength=strength,
            scope=scope,
            bos=bos,
            when=when,
            model_name=str(self.source_model.get("name") or ""),
            method="transfer",
        )

    def describe(self) -> dict[str, Any]:
        """What vectors note of the map that they came through, as plain JSON."""
        return {
            "kind": self.kind,
            "sha256": self.sha256,
            "source": str(self.source),
            "target": str(self.target),
            "source_model": dict(self.source_model),
            "fit": dict(self.about),
        }

    def save(self, path: str | Path) -> None:
        """Write the map to one file: its tensors as safetensors, the rest as JSON in the header.

        Args:
            path: The file to write; one that is there is replaced, and never left half written.

        Raises:
            FormatError: The file cannot be written.
        """
        tensors = {"weight": self.weight, "bias": self.bias, "mean": self.mean}
        if self.hidden_weight is not None and self.hidden_bias is not None:
            tensors |= {"hidden_weight": self.hidden_weight, "hidden_bias": self.hidden_bias}
        header = {
            "source": str(self.source),
            "target": str(self.target),
            "source_model": dict(self.source_model),
            "target_model": dict(self.target_model),
            "about": dict(self.about),
        }
        write_tensors(path, tensors, kind=FILE_KIND, header=header)

    @classmethod
    def load(cls, path: str | Path) -> TransferMap:
        """Load a file that ``save`` wrote. Raises FormatError for one that is missing, damaged or of another kind."""
        tensors, header = read_tensors(path, kind=FILE_KIND)
        with refuse_damaged(path, "a file written by TransferMap.save"):
            names = ("weight", "bias", "mean", "hidden_weight", "hidden_bias")
            parts = {name: tensors[name].float() for name in names if name in tensors}
            for name, part in parts.items():
                finite_vector(name, part.flatten())
            texts = {name: dict(header[name]) for name in ("source_model", "target_model", "about")}
            places = {name: Hookpoint.from_name(header[name]) for name in ("source", "target")}
            return cls(**parts, **places, **texts)  # type: ignore[arg-type]


@dataclass(eq=False, kw_only=True)
class _MappedReader(ChunkReader):
    """Reads chunks of texts with one model, and maps every activation before means are taken."""

    transfer: TransferMap

    def mean_activations(self, batch: Batch | SharedBatch) -> list[tuple[Space, Hookpoint, Tensor]]:
        """Average the mapped activations of each text of a batch, (texts, d_target)."""
        acts, index = record_selected(self.model, batch, self.hookpoints)
        values = acts[self.hookpoints[0]]
        if not self.token_reader.bos:
            self.sinks.add(values, self.hookpoints[0])
        means = pool(self.transfer(values), index)
        check_finite(means, f"mapped activations at {self.hookpoints[0]}", batch.rows)
        return [("residual", self.transfer.target, means)]
