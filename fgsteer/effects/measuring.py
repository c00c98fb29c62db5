"""Measuring what vectors do to features: calibrate, generate, read, one shard of vectors after another.

Each shard is written to its own file, from nothing but the plan and the shard's number. A run that was killed goes on
with the first missing shard, and ends with the same numbers as one that was not.

    plan = EffectPlan(decoder_directions(sae), prompts, texts)
    M, b, figures = fit_shards(plan.measure_shards(model, tokenizer, sae, folder))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader, encode_prompts
from fgsteer.effects.rollouts import Sampling, rollout_features
from fgsteer.errors import DataError, PairingError
from fgsteer.errors.checks import check_range, is_whole_number
from fgsteer.errors.wording import count
from fgsteer.interventions.adding import Add
from fgsteer.likelihood.calibration import calibrate_many
from fgsteer.models.fingerprints import run_fingerprint
from fgsteer.models.pairing import check_pairing, model_identity
from fgsteer.models.properties import context_window
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.storage.files import damage_error, read_tensors, tensor_sha256, write_tensors
from fgsteer.storage.json_files import text_sha256
from fgsteer.storage.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STRENGTH_TOLERANCE = 0.1  # relative error of the rise in cross-entropy; a measured vector needs no closer one


def decoder_directions(sae: SAE, count: int | None = None, seed: int = 0) -> Float[Tensor, "n d_model"]:
    """The SAE's decoder rows as unit vectors, in an order drawn by ``seed``; rows of norm 0 are left out.

    Args:
        sae: The SAE.
        count: The most rows to take; all of them by default.
        seed: The seed of the order.

    Raises:
        DataError: The count is below 1, or the seed beyond 64 bits.
    """
    if count is not None and (not is_whole_number(count) or count < 1):
        raise DataError(f"{count!r:.60}", "a number of vectors, at least one", "leave it out to take every decoder row")
    check_range("seed", seed, -(2**63), 2**63 - 1, whole=True)
    rows = sae.W_dec.detach().to("cpu", torch.float32)
    norms = rows.norm(dim=1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = order[norms[order] > 0][:count]
    unit: Tensor = rows[chosen] / norms[chosen, None]
    return unit


@dataclass(frozen=True, eq=False)
class EffectShard:
    """Some vectors ``x = c·v`` and their measured effects.

    Args:
        vectors: The vectors, (n, d_model).
        strengths: The c, (n,); nan, with zero rows, where none costs the texts the target.
        even: The effects in even rollouts, (n, d_sae).
        odd: The effects in odd rollouts, (n, d_sae).
        first: The number of the first vector.
    """

    vectors: Float[Tensor, "n d_model"]
    strengths: Float[Tensor, " n"]
    even: Float[Tensor, "n d_sae"]
    odd: Float[Tensor, "n d_sae"]
    first: int

    @property
    def effects(self) -> Float[Tensor, "n d_sae"]:
        """The mean effect over all rollouts."""
        return (self.even + self.odd) / 2


@dataclass(frozen=True, eq=False)
class EffectPlan:
    """Everything that measured effects depend on, besides model and SAE.

    Args:
        directions: The directions whose effects are measured, (n, d_model).
        prompts: The prompts that are continued.
        texts: The texts on which each vector's strength is set.
        rollouts: The continuations of each prompt for each vector, an even number.
        sampling: How continuations are drawn.
        target_ce_rise: The rise in cross-entropy on the texts at each vector's strength, in nats per token.
        rows: The sequences that share a forward pass.

    Raises:
        DataError: The rollouts are odd or none, there is no direction, prompt or text, or the rise is not above 0.
    """

    directions: Float[Tensor, "n d_model"]
    prompts: Sequence[str]
    texts: Sequence[str]
    rollouts: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    target_ce_rise: float = 0.5
    rows: int = 512

    def __post_init__(self) -> None:
        if not isinstance(self.rollouts, int) or self.rollouts < 2 or self.rollouts % 2:
            raise DataError(
                f"rollouts = {self.rollouts}",
                "an even number of rollouts",
                "half of them are compared with the other half, to tell noise from effect",
            )
        if self.directions.ndim != 2 or not len(self.directions):
            raise DataError(
                f"vectors of shape {tuple(self.directions.shape)}",
                "vectors of shape (n, d_model), at least one",
                "put a single vector into a batch with vector[None]",
            )
        if not len(self.prompts) or not len(self.texts):
            got = f"{count(len(self.prompts), 'prompt')} and {count(len(self.texts), 'text')}"
            raise DataError(got, "at least one of each", "leave prompts and texts out for the shipped ones")
        if not 0 < self.target_ce_rise < float("inf"):
            raise DataError(
                f"target_ce_rise = {self.target_ce_rise}",
                "a finite number of nats per token, above 0",
                "leave it out for 0.5",
            )

    @property
    def shard_size(self) -> int:
        """The number of vectors in a shard."""
        return max(1, self.rows // len(self.prompts))

    def describe(self, model: PreTrainedModel, sae: SAE) -> dict[str, Any]:
        """The plan as plain JSON; two runs with equal descriptions measure the same thing."""
        return {
            "model": {**model_identity(model), "dtype": str(model.dtype)},
            "sae_sha256": sae.sha256,
            "vectors": [len(self.directions), tensor_sha256(self.directions)],
            "prompts": [len(self.prompts), text_sha256(list(self.prompts))],
            "texts": [len(self.texts), text_sha256(list(self.texts))],
            "rollouts": self.rollouts,
            "sampling": asdict(self.sampling),
            "target_ce_rise": self.target_ce_rise,
            "rows": self.rows,
        }

    def measure_shards(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SAE,
        folder: Path,
        progress: Callable[[int], None] | None = None,
        *,
        fresh: bool = False,
    ) -> Iterator[EffectShard]:
        """Every shard in order, loaded from the folder where it is there, else measured and written to it.

        Args:
            model: A Hugging Face causal language model.
            tokenizer: Its tokenizer.
            sae: The SAE whose features are read.
            folder: Where shards are kept.
            progress: A function that is called with the number of vectors done.
            fresh: Whether to delete the shards that are there, and start over.

        Raises:
            PairingError: The folder holds the shards of another plan, or the SAE does not fit the model.
            FormatError: A shard is damaged.
            BusyError: Another process is writing there.
        """
        for hookpoint in {sae.hookpoint, sae.input_hookpoint}:
            check_pairing(model, hookpoint, sae.d_model, sae.model_name, "SAE")
        plan = {**self.describe(model, sae), **run_fingerprint(model, tokenizer), "sae": sae_identity(sae)}
        shards = Shards(folder, "effects part", plan, fresh=fresh)
        starts = range(0, len(self.directions), self.shard_size)

        @cache
        def meter() -> _Meter:
            return _Meter(self, model, tokenizer, sae, shards)

        def measure(_: int, start: int) -> dict[str, Tensor]:
            shard = meter().measure(start)
            return {name: getattr(shard, name) for name in ("vectors", "strengths", "even", "odd")}

        def report(shards_done: int) -> None:
            if progress is not None:
                progress(min(shards_done * self.shard_size, len(self.directions)))

        for number, tensors in enumerate(shards.each(starts, measure, str, report)):
            start = starts[number]
            n = len(self.directions[start : start + self.shard_size])
            shapes = {"vectors": (n, sae.d_model), "strengths": (n,), "even": (n, sae.d_sae), "odd": (n, sae.d_sae)}
            check_shapes(tensors, shapes, shards.path(number))
            yield EffectShard(**tensors, first=start)


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raises FormatError for tensors of a file that have other names or shapes."""
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if actual != shapes:
        raise damage_error(path, f"it holds {actual}", f"{shapes}", "delete it")


class _Meter:
    """The model, the prompts and the unsteered baseline, for measuring one shard after another."""

    def __init__(
        self,
        plan: EffectPlan,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SAE,
        shards: Shards,
    ) -> None:
        self.plan, self.model, self.tokenizer = plan, model, tokenizer
        self.hookpoint = sae.hookpoint
        self.sae = sae.to(next(model.parameters()).device, torch.float32)
        self.prompts = encode_prompts(tokenizer, plan.prompts, prepend_bos=sae.prepend_bos)
        path = shards.folder / "baseline.safetensors"
        if not path.exists():
            norm = median_norm(model, tokenizer, sae, plan.texts)
            tensors = {"unsteered": self.halves([None])[:, 0], "norm": torch.tensor(norm, dtype=torch.float64)}
            write_tensors(path, tensors, kind="baseline", header={"plan": shards.key})
        baseline, header = read_tensors(path, kind="baseline")
        if header.get("plan") != shards.key:
            raise PairingError(
                f"{path} is of another run.", "a baseline that this plan wrote", "delete it, or pass another folder"
            )
        check_shapes(baseline, {"unsteered": (2, sae.d_sae), "norm": ()}, path)
        self.baseline, self.start = baseline["unsteered"], float(baseline["norm"]) / 4

    def halves(self, steering: Sequence[Add | None]) -> Float[Tensor, "2 n d_sae"]:
        """The mean feature activations in even and in odd rollouts."""
        total = torch.zeros(2, len(steering), self.sae.d_sae)
        for number in range(self.plan.rollouts):
            acts = rollout_features(self.model, self.prompts, self.sae, steering, self.plan.sampling, number)
            total[number % 2] += acts.cpu()
        return total / (self.plan.rollouts // 2)

    def measure(self, first: int) -> EffectShard:
        """The shard that starts with vector number ``first``."""
        directions = self.plan.directions[first : first + self.plan.shard_size]

        def add_along(direction: Tensor) -> Callable[[float], Add]:
            return lambda c: Add(hookpoint=self.hookpoint, direction=direction, coefficient=c)

        coefficients = calibrate_many(
            self.model,
            self.tokenizer,
            [add_along(d) for d in directions],
            self.plan.texts,
            target_ce_rise=self.plan.target_ce_rise,
            start=self.start,
            tolerance=STRENGTH_TOLERANCE,
        )
        strengths = torch.tensor(coefficients)
        reached = strengths.isfinite()
        effects = torch.zeros(2, len(directions), self.sae.d_sae)
        if reached.any():
            steering = [add_along(d)(float(c)) for d, c in zip(directions[reached], strengths[reached], strict=True)]
            effects[:, reached] = self.halves(steering) - self.baseline[:, None]
        vectors = directions * strengths.nan_to_num(0.0)[:, None]
        return EffectShard(vectors, strengths, effects[0], effects[1], first)


@torch.no_grad()
def median_norm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: SAE, texts: Sequence[str]) -> float:
    """The median norm of the activations where the SAE writes, over the texts' tokens."""
    norms = []
    triples = (("", text, True) for text in texts)
    reader = TokenReader(tokenizer, prepend_bos=sae.prepend_bos, window=context_window(model))
    for batch in batch_texts(model, reader, triples, batch_tokens=4096):
        values = record_batch(model, batch, [sae.hookpoint])[sae.hookpoint]
        norms.append(values[batch.selected.to(values.device)].float().norm(dim=-1).cpu())
    return float(torch.cat(norms).median())
