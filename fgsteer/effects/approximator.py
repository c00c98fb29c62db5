"""Effect approximators: which features a steering vector will move, as a linear map.

``ŷ = x M + b`` predicts the change of every feature's mean activation in generated text
when ``x`` is added to the residual stream (SAE-TS, arXiv 2411.02193).

    effects = EffectApproximator.measure(model, tokenizer, sae, work="effects.parts")
    v = effects.project(target)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.data.contrasts import load_neutral
from fgsteer.display.progress import Progress, reporting
from fgsteer.effects.ridge import LinearMoments, best_ridge
from fgsteer.errors import DataError, FormatError, PairingError, SelectionError
from fgsteer.errors.checks import check_flags, check_number, checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.models.embedded import DEFAULT, embedded_sae_dir
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.pairing import check_measured_on
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE


@dataclass(frozen=True, eq=False, repr=False)
class EffectApproximator(OneLineRepr):
    """``ŷ = x M + b``: ``M (d_model, d_sae)``, ``b (d_sae,)``, bound to one SAE by its hash.

    Raises PairingError when the shapes do not fit together.
    """

    M: Float[Tensor, "d_model d_sae"]
    b: Float[Tensor, " d_sae"]
    hookpoint: Hookpoint
    sae_sha256: str
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        if self.M.ndim != 2 or self.b.shape != self.M.shape[1:]:
            raise PairingError(f"M {tuple(self.M.shape)} and b {tuple(self.b.shape)}", "(d_model, d_sae) and (d_sae,)")

    def __repr__(self) -> str:
        vectors = self.about.get("vectors")
        fitted = f", fitted to {count(vectors, 'vector')}" if isinstance(vectors, int) else ""
        sizes = f"d_model {self.M.shape[0]}, d_sae {self.M.shape[1]}"
        return f"EffectApproximator(at {self.hookpoint}, {sizes}{fitted})"

    @classmethod
    def fit(
        cls,
        vectors: Float[Tensor, "n d_model"],
        effects: Float[Tensor, "n d_sae"],
        *,
        hookpoint: Hookpoint | str,
        sae_sha256: str,
        ridge: float | None = None,
    ) -> EffectApproximator:
        """Ridge regression on centred data: ``M = (XᵀX + λI)⁻¹ XᵀY``, ``b = ȳ − x̄ M`` (SAE-TS, arXiv 2411.02193).

        ``ridge`` is λ on the scale of the sum XᵀX; by default it is chosen on every tenth
        vector, left out for that, and the fit repeated with all. Raises PairingError for
        unequal numbers of rows, DataError for too few to choose λ or values that are not finite.
        """
        if not (torch.isfinite(vectors).all() and torch.isfinite(effects).all()):
            raise DataError("vectors or effects with nan or inf", "finite values")
        everything = LinearMoments.of(vectors, effects)
        if ridge is None:
            if len(vectors) < 20:
                raise DataError(f"{count(len(vectors), 'vector')} to choose λ on", "at least twenty", "pass ridge=")
            left_out = torch.arange(len(vectors)) % 10 == 0
            train = LinearMoments.of(vectors[~left_out], effects[~left_out])
            share = best_ridge(train, LinearMoments.of(vectors[left_out], effects[left_out]))
            ridge = share * everything.mean_eigenvalue()
        M, b = everything.fit(ridge)
        about = {"ridge": ridge, "vectors": len(vectors)}
        return cls(M.float(), b.float(), Hookpoint.parse(hookpoint), sae_sha256, about)

    @classmethod
    @checked
    def measure(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SAE,
        *,
        vectors: int | Float[Tensor, "n d_model"] | None = None,
        prompts: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        work: str | Path | None = None,
        fresh: bool = False,
        progress: Progress = None,
        **plan: Any,
    ) -> EffectApproximator:
        """Measure effects on features of generated text and fit them (SAE-TS, arXiv 2411.02193).

        For each vector ``x = c·v̂``, with c set so that adding x costs the texts
        ``target_ce_rise`` nats a token, ``y = E_steered[f] − E_unsteered[f]``: feature activations
        of sampled continuations, read by the unsteered model and averaged over rollouts and
        new tokens, steered and unsteered drawn with the same random numbers. Then ridge, with λ
        by validation, as ``measuring.fit_parts`` says; its figures are in ``about``.

        ``vectors (n, d_model)`` are directions in random order (of every ten, one chooses λ and one
        is held out), by default the SAE's decoder rows (a number:
        that many of them); ``prompts`` and ``texts`` default to the shipped neutral ones;
        ``rollouts``, ``sampling``, ``target_ce_rise`` and ``rows`` go to ``measuring.Plan``.
        ``work`` is a folder for measured parts, from which a killed run goes on to the same
        result; ``fresh`` starts it over;
        ``progress`` as in ``collect``. Raises PairingError for an SAE of another width or parts of another plan,
        DataError for too few vectors, prompts or texts.
        """
        from fgsteer.effects.measuring import Plan, decoder_directions, fit_parts

        neutral_texts, neutral_prompts = load_neutral()
        directions = vectors if isinstance(vectors, Tensor) else decoder_directions(sae, vectors)
        given = neutral_prompts if prompts is None else prompts, neutral_texts if texts is None else texts
        chosen = Plan(directions, *given, **plan)
        with reporting(progress, "measuring effects", len(directions)) as report, ExitStack() as stack:
            folder = Path(work) if work else Path(stack.enter_context(TemporaryDirectory()))
            M, b, figures = fit_parts(chosen.parts(model, tokenizer, sae, folder, report, fresh=fresh))
        M, b = M.float(), b.float()
        alive = (M.norm(dim=0) > 0).cpu()
        cosine = torch.cosine_similarity(M.T.cpu()[alive], sae.W_dec.cpu().float()[alive], dim=1).mean()
        figures["cosine_to_decoder"] = float(cosine)
        return cls(M, b, sae.hookpoint, sae.sha256, {**figures, "plan": chosen.describe(model, sae)})

    def predict(self, vector: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Predicted effect ``x M + b`` (..., d_sae) of a vector (..., d_model)."""
        return vector.to(self.M) @ self.M + self.b

    def project(
        self,
        target: Float[Tensor, " d_sae"],
        *,
        bias_weight: float = 1.0,
        mu: float = math.inf,
        unit_effects: bool = False,
    ) -> Float[Tensor, " d_model"]:
        """``M t/‖M t‖ − λ_b · M b/‖M b‖`` (d_model,) for target feature weights t (d_sae,).

        ``bias_weight`` is λ_b; a zero ``M b`` drops its term. A finite ``mu`` weighs effects on other
        features: ``(M Mᵀ + μI)⁻¹ M`` stands for M in both terms, with μ in mean eigenvalues of
        ``M Mᵀ``; inf is SAE-TS, 0 the pseudo-inverse. ``unit_effects`` scales the columns of M in ``M t`` to
        norm 1: t then weighs the features' own SAE-TS vectors, and not how easily each feature moves.
        SAE-TS (arXiv 2411.02193), FGAA step 5 (arXiv 2501.09929). Raises SelectionError when ``M t`` is
        zero or not finite, or μ is negative, PairingError for a target of another width.
        """
        if target.shape != self.b.shape:
            raise PairingError(
                f"a target of shape {tuple(target.shape)}", f"{tuple(self.b.shape)}, one weight a feature"
            )
        check_flags(unit_effects=unit_effects)
        check_number("mu", mu)
        check_number("bias_weight", bias_weight)
        if not mu >= 0 or not math.isfinite(bias_weight):
            raise SelectionError(f"mu = {mu}, bias_weight = {bias_weight}", "mu ≥ 0 or inf, a finite bias_weight")
        mu, bias_weight = float(mu), float(bias_weight)
        M = self.M.double()
        if mu != math.inf:
            gram = M @ M.T
            level = mu * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            M = torch.linalg.pinv(gram + level, hermitian=True) @ M
        weights = target.to(M)
        if unit_effects:
            norms = M.norm(dim=0)
            weights = weights / norms.where(norms > 0, 1.0)
        terms = M @ torch.stack([weights, self.b.double()], 1)
        wanted, bias = (terms / terms.norm(dim=0).where(terms.norm(dim=0) > 0, 1.0)).T
        if not wanted.any():
            raise SelectionError("a target whose M t is zero", "at least one feature that the approximator can move")
        direction: Tensor = wanted - bias_weight * bias
        if not torch.isfinite(direction).all():
            raise SelectionError("a direction with nan or inf", "finite target weights, effects and bias_weight")
        return direction

    def check(self, sae: SAE) -> EffectApproximator:
        """Itself, when it was measured on this SAE. Raises PairingError otherwise."""
        fits = tuple(self.M.shape) == (sae.d_model, sae.d_sae) and self.hookpoint == sae.hookpoint
        what = f"effects {tuple(self.M.shape)} at {self.hookpoint}"
        check_measured_on(sae, self.sae_sha256, fits, what, "fgsteer effects")
        return self

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole."""
        header = {"hookpoint": str(self.hookpoint), "sae_sha256": self.sae_sha256, "about": self.about}
        write_tensors(path, {"M": self.M, "b": self.b}, kind="effects", header=header)

    @classmethod
    def load(cls, path: str | Path) -> EffectApproximator:
        """Read a file that ``save`` wrote. Raises FormatError."""
        tensors, header = read_tensors(path, kind="effects")
        with refuse_damaged(path, "a file written by EffectApproximator.save"):
            return cls(
                tensors["M"].float(),
                tensors["b"].float(),
                Hookpoint.from_name(header["hookpoint"]),
                str(header["sae_sha256"]),
                dict(header["about"]),
            )


def load_effects(source: str | Path = DEFAULT) -> EffectApproximator:
    """An effect approximator from a file, or "default" for the embedded SAE's.

    Raises FormatError when there is none.
    """
    path = embedded_sae_dir() / "effects.safetensors" if str(source) == DEFAULT else Path(source)
    if not path.is_file():
        raise FormatError(
            f"no effect approximator at {path}",
            "a file written by EffectApproximator.save",
            "without one, fgaa projects through the decoder: pass effects=None",
        )
    return EffectApproximator.load(path)
