"""Measuring what vectors do to features: calibrate, roll out, read; a part at a time, resumable.

Each part of the vectors is written whole to its own file, from nothing but the plan and
the part's number; a run that was killed goes on with the first missing part and ends with
the same numbers as one that was not.

    plan = Plan(decoder_directions(sae), prompts, texts)
    M, b, figures = fit_parts(plan.parts(model, tokenizer, sae, folder))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader, encode_prompts
from fgsteer.effects.ridge import LinearMoments, best_ridge
from fgsteer.effects.rollouts import Sampling, rollout_features
from fgsteer.errors import DataError, PairingError
from fgsteer.errors.checks import check_range, is_whole_number
from fgsteer.interventions import Add
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

DEALT = 20  # training vectors at least whose effects are shuffled together, from several parts where these are small
TOLERANCE = 0.1  # of the rise in cross-entropy; the strength of a measured vector need not be closer


def decoder_directions(sae: SAE, count: int | None = None, seed: int = 0) -> Float[Tensor, "n d_model"]:
    """Unit decoder rows in an order drawn by seed, at most ``count`` of them; rows of norm 0 are left out.

    Raises DataError for a count below 1, or a seed that torch does not take.
    """
    if count is not None and (not is_whole_number(count) or count < 1):
        raise DataError(f"{count!r:.60} vectors", "at least one")
    check_range("seed", seed, -(2**63), 2**63 - 1, whole=True)
    rows = sae.W_dec.detach().to("cpu", torch.float32)
    norms = rows.norm(dim=1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = order[norms[order] > 0][:count]
    unit: Tensor = rows[chosen] / norms[chosen, None]
    return unit


@dataclass(frozen=True, eq=False)
class Part:
    """Some vectors ``x = c·v (n, d_model)`` and their effects (n, d_sae) in even and in odd rollouts.

    ``strengths (n,)`` are the c; nan, with zero rows, where none costs the texts the target.
    """

    vectors: Float[Tensor, "n d_model"]
    strengths: Float[Tensor, " n"]
    even: Float[Tensor, "n d_sae"]
    odd: Float[Tensor, "n d_sae"]
    first: int  # number of the first vector

    @property
    def effects(self) -> Float[Tensor, "n d_sae"]:
        """Mean effect over all rollouts."""
        return (self.even + self.odd) / 2


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that the effects of ``directions (n, d_model)`` depend on, besides model and SAE.

    ``rollouts`` (even) continuations of each prompt per vector; ``target_ce_rise`` nats a token
    over the ``texts`` set each vector's strength; ``rows`` sequences share a forward pass.
    Raises DataError for odd or no rollouts or no vector.
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
                f"rollouts = {self.rollouts}", "an even number: halves are compared to tell noise from effect"
            )
        if self.directions.ndim != 2 or not len(self.directions):
            raise DataError(f"vectors of shape {tuple(self.directions.shape)}", "(n, d_model) with n > 0")
        if not len(self.prompts) or not len(self.texts):
            raise DataError(f"{len(self.prompts)} prompts and {len(self.texts)} texts", "at least one of each")
        if not 0 < self.target_ce_rise < float("inf"):
            raise DataError(f"target_ce_rise = {self.target_ce_rise}", "nats a token, > 0")

    @property
    def size(self) -> int:
        """Vectors in a part."""
        return max(1, self.rows // len(self.prompts))

    def describe(self, model: PreTrainedModel, sae: SAE) -> dict[str, Any]:
        """The plan as plain JSON: two runs with equal descriptions measure the same thing."""
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

    def parts(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SAE,
        folder: Path,
        progress: Callable[[int], None] | None = None,
        *,
        fresh: bool = False,
    ) -> Iterator[Part]:
        """Every part in order: read from the folder where it is there, else measured and written to it.

        ``fresh`` starts over. Raises PairingError when the folder holds the parts of another plan, FormatError when
        one is damaged, BusyError while another process writes there.
        """
        for place in {sae.hookpoint, sae.input_hookpoint}:
            check_pairing(model, place, sae.d_model, sae.model_name, "SAE")
        plan = {**self.describe(model, sae), **run_fingerprint(model, tokenizer), "sae": sae_identity(sae)}
        parts = Shards(folder, "effects part", plan, fresh=fresh)
        starts = range(0, len(self.directions), self.size)

        @cache
        def meter() -> _Meter:
            return _Meter(self, model, tokenizer, sae, parts)

        def make(_: int, start: int) -> dict[str, Tensor]:
            part = meter().measure(start)
            return {name: getattr(part, name) for name in ("vectors", "strengths", "even", "odd")}

        def told(count: int) -> None:
            if progress is not None:
                progress(min(count * self.size, len(self.directions)))

        for number, tensors in enumerate(parts.each(starts, make, str, told)):
            start = starts[number]
            n = len(self.directions[start : start + self.size])
            shapes = {"vectors": (n, sae.d_model), "strengths": (n,), "even": (n, sae.d_sae), "odd": (n, sae.d_sae)}
            _check_shapes(tensors, shapes, parts.path(number))
            yield Part(**tensors, first=start)


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise damage_error(path, f"it holds {found}", f"{shapes}", "delete it")


class _Meter:
    """Model, prompts and the unsteered baseline at hand: measures one part after another."""

    def __init__(
        self,
        plan: Plan,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SAE,
        parts: Shards,
    ) -> None:
        self.plan, self.model, self.tokenizer = plan, model, tokenizer
        self.place = sae.hookpoint
        self.sae = sae.to(next(model.parameters()).device, torch.float32)
        self.prompts = encode_prompts(tokenizer, plan.prompts, prepend_bos=sae.prepend_bos)
        path, ours = parts.folder / "baseline.safetensors", {"plan": parts.key}
        if not path.exists():
            start = typical_norm(model, tokenizer, sae, plan.texts)
            tensors = {"unsteered": self.halves([None])[:, 0], "norm": torch.tensor(start, dtype=torch.float64)}
            write_tensors(path, tensors, kind="baseline", header=ours)
        found, header = read_tensors(path, kind="baseline")
        if header.get("plan") != parts.key:
            raise PairingError(f"{path} of another run", "what this plan wrote there", "delete it")
        _check_shapes(found, {"unsteered": (2, sae.d_sae), "norm": ()}, path)
        self.baseline, self.start = found["unsteered"], float(found["norm"]) / 4

    def halves(self, steering: Sequence[Add | None]) -> Float[Tensor, "2 n d_sae"]:
        """Mean feature activations in even and in odd rollouts."""
        total = torch.zeros(2, len(steering), self.sae.d_sae)
        for number in range(self.plan.rollouts):
            acts = rollout_features(self.model, self.prompts, self.sae, steering, self.plan.sampling, number)
            total[number % 2] += acts.cpu()
        return total / (self.plan.rollouts // 2)

    def measure(self, first: int) -> Part:
        """The part that starts with this vector."""
        directions = self.plan.directions[first : first + self.plan.size]

        def maker(direction: Tensor) -> Callable[[float], Add]:
            return lambda c: Add(hookpoint=self.place, direction=direction, coefficient=c)

        found = calibrate_many(
            self.model,
            self.tokenizer,
            [maker(d) for d in directions],
            self.plan.texts,
            target_ce_rise=self.plan.target_ce_rise,
            start=self.start,
            tolerance=TOLERANCE,
        )
        strengths = torch.tensor(found)
        works = strengths.isfinite()
        effects = torch.zeros(2, len(directions), self.sae.d_sae)
        if works.any():
            steering = [maker(d)(float(c)) for d, c in zip(directions[works], strengths[works], strict=True)]
            effects[:, works] = self.halves(steering) - self.baseline[:, None]
        vectors = directions * strengths.nan_to_num(0.0)[:, None]
        return Part(vectors, strengths, effects[0], effects[1], first)


@torch.no_grad()
def typical_norm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: SAE, texts: Sequence[str]) -> float:
    """Median norm of the activations where the SAE writes, over the texts' tokens."""
    norms = []
    triples = (("", text, True) for text in texts)
    reader = TokenReader(tokenizer, prepend_bos=sae.prepend_bos, window=context_window(model))
    for batch in batch_texts(model, reader, triples, batch_tokens=4096):
        values = record_batch(model, batch, [sae.hookpoint])[sae.hookpoint]
        norms.append(values[batch.selected.to(values.device)].float().norm(dim=-1).cpu())
    return float(torch.cat(norms).median())


@dataclass(frozen=True, eq=False)
class Agreement:
    """Sums that tell effect from sampling noise: even and odd rollouts of the same vectors; two of them add up."""

    count: int
    even: Float[Tensor, " n"]
    odd: Float[Tensor, " n"]
    product: float
    square: float  # of their mean

    @classmethod
    def of(cls, even: Float[Tensor, "count n"], odd: Float[Tensor, "count n"]) -> Agreement:
        """Sums over the rows."""
        e, o = even.double(), odd.double()
        return cls(len(e), e.sum(0), o.sum(0), float((e * o).sum()), float(((e + o) / 2).square().sum()))

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.count + other.count,
            self.even + other.even,
            self.odd + other.odd,
            self.product + other.product,
            self.square + other.square,
        )

    @property
    def ceiling(self) -> float:
        """Share of the variance of the rollouts' mean that is effect: covariance of the halves over variance."""
        mean = (self.even + self.odd) / 2
        variance = self.square - float(mean @ mean) / self.count
        return (self.product - float(self.even @ self.odd) / self.count) / variance if variance > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Sums:
    """What a fit needs of all parts: moments by split, and the agreement of the held-out halves."""

    train: LinearMoments
    shuffled: LinearMoments
    validation: LinearMoments
    held_out: LinearMoments
    agreement: Agreement

    @classmethod
    def over(cls, parts: Iterable[Part]) -> tuple[Sums, int]:
        """(sums, vectors left out for want of a strength). Raises DataError with too few vectors."""
        sums: dict[str, Any] = {}
        waiting: list[tuple[Tensor, Tensor]] = []
        skipped, first = 0, 0

        def add(name: str, value: LinearMoments | Agreement) -> None:
            sums[name] = sums[name] + value if name in sums else value

        def deal() -> None:
            x, y = (torch.cat(rows) for rows in zip(*waiting, strict=True))
            waiting.clear()
            add(
                "shuffled",
                LinearMoments.of(x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(first))]),
            )

        for part in parts:
            skipped += int((~part.strengths.isfinite()).sum())
            for name, value in _part_sums(part):
                add(name, value)
            waiting.append(_train_rows(part))
            if sum(len(x) for x, _ in waiting) >= DEALT:
                first = part.first
                deal()
        if sum(len(x) for x, _ in waiting):
            deal()
        if len(sums) < 5 or sums["held_out"].count < 2:
            raise DataError("too few vectors that move the model", "at least twenty, a tenth of them to be held out")
        return cls(**sums), skipped


def _train_rows(part: Part) -> tuple[Tensor, Tensor]:
    """Vectors and effects of a part that are neither for validation nor held out."""
    rows = part.strengths.isfinite() & ((part.first + torch.arange(len(part.strengths))) % 10 > 1)
    return part.vectors[rows], part.effects[rows]


def _part_sums(part: Part) -> Iterator[tuple[str, LinearMoments | Agreement]]:
    """A part's contribution to each of the sums."""
    works = part.strengths.isfinite()
    number = part.first + torch.arange(len(works))
    x, y = part.vectors, part.effects
    for name, rows in (
        ("train", works & (number % 10 > 1)),
        ("validation", works & (number % 10 == 0)),
        ("held_out", works & (number % 10 == 1)),
    ):
        if not rows.any():
            continue
        yield name, LinearMoments.of(x[rows], y[rows])
        if name == "held_out":
            yield "agreement", Agreement.of(part.even[rows], part.odd[rows])


def fit_parts(parts: Iterable[Part]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(M (d_model, d_sae), b (d_sae,), figures): streaming ridge with λ by validation.

    A tenth of the vectors validates and a tenth is held out. λ maximises R² on the validation
    vectors; the fit then takes training and validation vectors together. Figures, all on
    the held-out vectors: ``r2 = 1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖²`` with ȳ of the training vectors, so
    that the bias alone scores 0; ``ceiling``, what each vector's true effect would score, from
    the agreement of even and odd rollouts; ``shuffled``, a fit to effects dealt to the wrong
    vectors; ``explained`` and ``explained_by_bias``, the shares of ``Σ‖y‖²`` that the fit and
    the mean effect of any vector explain. Raises DataError with too few vectors.
    """
    sums, skipped = Sums.over(parts)
    share = best_ridge(sums.train, sums.validation)
    both = sums.train + sums.validation
    ridge = share * both.mean_eigenvalue()
    M, b = both.fit(ridge)
    held = sums.held_out
    mean = both.y / both.count
    deviations = held.about(torch.zeros_like(held.x), mean).yy
    wrong = sums.shuffled.fit(share * sums.shuffled.mean_eigenvalue())
    figures = {
        "vectors": both.count + held.count,
        "skipped": skipped,
        "ridge": ridge,
        "ridge_in_mean_eigenvalues": share,
        "held_out_vectors": held.count,
        "r2": 1 - held.squared_error(M, b) / deviations,
        "ceiling": sums.agreement.ceiling,
        "shuffled": 1 - held.squared_error(*wrong) / deviations,
        "explained": 1 - held.squared_error(M, b) / held.yy,
        "explained_by_bias": 1 - deviations / held.yy,
    }
    return M, b, figures
