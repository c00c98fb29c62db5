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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.data.shipped import load_neutral
from fgsteer.display.progress import Progress, reporting
from fgsteer.effects.fitting import fit_shards
from fgsteer.effects.measuring import EffectPlan, decoder_directions
from fgsteer.effects.ridge import LinearMoments, best_ridge
from fgsteer.effects.rollouts import Sampling
from fgsteer.errors import DataError, FormatError, PairingError, SelectionError
from fgsteer.errors.checks import check_flags, check_number, checked
from fgsteer.errors.wording import count
from fgsteer.models.fingerprints import stored_sha256
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.shipped import DEFAULT, find_shipped
from fgsteer.saes.pairing import check_measured_on
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors
from fgsteer.storage.json_files import text_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE


@dataclass(frozen=True, eq=False, repr=False, init=False)
class EffectApproximator:
    """Predicts the effects of a vector x on features of generated text, as ``ŷ = x M + b`` (SAE-TS, arXiv 2411.02193).

    Args:
        M: The linear map, (d_model, d_sae).
        b: The bias, (d_sae,): the mean effect of any vector.
        hookpoint: Where vectors are added: a Hookpoint, its name, or a layer.
        sae_sha256: The hash of the SAE whose features are meant.
        about: How it was fitted: figures and the plan of the measurement.

    Raises:
        PairingError: The shapes do not fit together.
        HookpointError: The hookpoint cannot be parsed.
    """

    M: Float[Tensor, "d_model d_sae"]
    b: Float[Tensor, " d_sae"]
    hookpoint: Hookpoint
    sae_sha256: str
    about: dict[str, Any]

    def __init__(
        self,
        M: Tensor,
        b: Tensor,
        hookpoint: Hookpoint | str | int,
        sae_sha256: str,
        about: dict[str, Any] | None = None,
    ) -> None:
        if M.ndim != 2 or b.shape != M.shape[1:]:
            raise PairingError(
                f"M of shape {tuple(M.shape)} and b of shape {tuple(b.shape)}",
                "M of shape (d_model, d_sae) and b of shape (d_sae,)",
                "check that both are of one SAE, and that M is not transposed",
            )
        values = {"M": M, "b": b, "hookpoint": Hookpoint.parse(hookpoint), "sae_sha256": sae_sha256}
        for name, value in {**values, "about": {} if about is None else about}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        vectors = self.about.get("vectors")
        fitted = f", fitted to {count(vectors, 'vector')}" if isinstance(vectors, int) else ""
        sizes = f"d_model {self.M.shape[0]}, d_sae {self.M.shape[1]}"
        return f"EffectApproximator(at {self.hookpoint}, {sizes}{fitted})"

    @classmethod
    @checked
    def fit(
        cls,
        vectors: Float[Tensor, "n d_model"],
        effects: Float[Tensor, "n d_sae"],
        *,
        hookpoint: Hookpoint | str | int,
        sae_sha256: str,
        ridge: float | None = None,
    ) -> EffectApproximator:
        """Fit measured effects by ridge regression on centred data: ``M = (XᵀX + λI)⁻¹ XᵀY``, ``b = ȳ − x̄ M``.

        Args:
            vectors: The vectors, (n, d_model).
            effects: Their effects, (n, d_sae).
            hookpoint: Where the vectors were added: a Hookpoint, its name, or a layer.
            sae_sha256: The hash of the SAE, ``sae.sha256``.
            ridge: λ, on the scale of the sum XᵀX; by default it is chosen on every tenth vector, left out for that, and
                the fit repeated with all.

        Raises:
            PairingError: There are other numbers of vectors than effects.
            DataError: There are too few vectors to choose λ, or values that are not finite.
        """
        if not (torch.isfinite(vectors).all() and torch.isfinite(effects).all()):
            raise DataError(
                "nan or inf among them", "finite vectors and effects", "leave out vectors that could not be measured"
            )
        everything = LinearMoments.of(vectors, effects)
        if ridge is None:
            if len(vectors) < 20:
                raise DataError(
                    f"{count(len(vectors), 'vector')}", "at least twenty vectors to choose λ on", "pass ridge= yourself"
                )
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
        rollouts: int = EffectPlan.rollouts,
        sampling: Sampling | None = None,
        target_ce_rise: float = EffectPlan.target_ce_rise,
        rows: int = EffectPlan.rows,
    ) -> EffectApproximator:
        """Measure the effects of vectors on features of generated text, and fit them.

        For each vector ``x = c·v̂``, with c set so that adding x costs the texts ``target_ce_rise``, the effect is
        ``y = E_steered[f] − E_unsteered[f]``: feature activations of sampled continuations, read by the unsteered model
        and averaged over rollouts and new tokens, steered and unsteered drawn with the same random numbers (SAE-TS,
        arXiv 2411.02193). Of every ten vectors, one chooses λ and one is held out; figures on the held-out ones are in
        ``about``.

        Args:
            model: A Hugging Face causal language model.
            tokenizer: Its tokenizer.
            sae: The SAE whose features are read.
            vectors: Directions in random order, (n, d_model), or how many of the SAE's decoder rows to take; all of
                them by default.
            prompts: The prompts that are continued; by default the shipped neutral ones.
            texts: The texts on which strengths are set; by default the shipped neutral ones.
            work: A folder for shards of the measurement, from which a killed run goes on to the same result.
            fresh: Whether to delete the shards in ``work`` and start over.
            progress: As in ``collect``; a function is called with the number of vectors done.
            rollouts: The continuations of each prompt for each vector, an even number.
            sampling: How continuations are drawn; by default as in SAE-TS.
            target_ce_rise: The rise in cross-entropy at each vector's strength, in nats per token.
            rows: The sequences that share a forward pass.

        Raises:
            PairingError: The SAE does not fit the model, or ``work`` holds shards of another plan.
            DataError: There are too few vectors, prompts or texts, or a value is out of its range.
            BusyError: Another process is writing to ``work``.
        """
        neutral_texts, neutral_prompts = load_neutral()
        plan = EffectPlan(
            vectors if isinstance(vectors, Tensor) else decoder_directions(sae, vectors),
            neutral_prompts if prompts is None else prompts,
            neutral_texts if texts is None else texts,
            rollouts,
            Sampling() if sampling is None else sampling,
            target_ce_rise,
            rows,
        )
        number = len(plan.directions)
        with reporting(progress, "measuring effects", number) as report, ExitStack() as stack:
            folder = Path(work) if work else Path(stack.enter_context(TemporaryDirectory()))
            M, b, figures = fit_shards(plan.measure_shards(model, tokenizer, sae, folder, report, fresh=fresh))
        M, b = M.float(), b.float()
        moved = (M.norm(dim=0) > 0).cpu()
        cosine = torch.cosine_similarity(M.T.cpu()[moved], sae.W_dec.cpu().float()[moved], dim=1).mean()
        figures["cosine_to_decoder"] = float(cosine)
        return cls(M, b, sae.hookpoint, sae.sha256, {**figures, "plan": plan.describe(model, sae)})

    def predict(self, vector: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The predicted effect ``x M + b``.

        Args:
            vector: One vector or several, (..., d_model).

        Returns:
            The change of each feature's mean activation, (..., d_sae).
        """
        return vector.to(self.M) @ self.M + self.b

    def project(
        self,
        target: Float[Tensor, " d_sae"],
        *,
        bias_weight: float = 1.0,
        mu: float = math.inf,
        unit_effects: bool = False,
    ) -> Float[Tensor, " d_model"]:
        """The direction that moves target features, ``M t/‖M t‖ − λ_b · M b/‖M b‖``.

        This is SAE-TS (arXiv 2411.02193), and step 5 of FGAA (arXiv 2501.09929).

        Args:
            target: The weights t of the features that are to be moved, (d_sae,).
            bias_weight: The weight λ_b of the bias's term; a zero ``M b`` drops the term.
            mu: How little effects on other features weigh: ``(M Mᵀ + μI)⁻¹ M`` stands for M in both terms, with μ in
                mean eigenvalues of ``M Mᵀ``. inf is SAE-TS, 0 the pseudo-inverse.
            unit_effects: Whether the columns of M in ``M t`` are scaled to norm 1, so that t weighs the features' own
                SAE-TS vectors, and not how easily each feature moves.

        Returns:
            The direction, (d_model,).

        Raises:
            SelectionError: ``M t`` is zero or not finite, or ``mu`` is negative.
            PairingError: The target has another width.
        """
        if target.shape != self.b.shape:
            raise PairingError(
                f"a target of shape {tuple(target.shape)}",
                f"a weight for each feature, {tuple(self.b.shape)}",
                "pass effects and target of one SAE",
            )
        check_flags(unit_effects=unit_effects)
        check_number("mu", mu)
        check_number("bias_weight", bias_weight)
        if not mu >= 0 or not math.isfinite(bias_weight):
            raise SelectionError(
                f"mu = {mu} and bias_weight = {bias_weight}",
                "mu of at least 0, or inf, and a finite bias_weight",
                "leave both out for SAE-TS",
            )
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
        towards, bias = (terms / terms.norm(dim=0).where(terms.norm(dim=0) > 0, 1.0)).T
        if not towards.any():
            raise SelectionError(
                "a target whose M t is zero",
                "a target with at least one feature that vectors can move",
                "select other features, or pass effects=None to decode them",
            )
        direction: Tensor = towards - bias_weight * bias
        if not torch.isfinite(direction).all():
            raise SelectionError(
                "a direction with nan or inf",
                "finite target weights and effects",
                "check the weights of the target, and measure the effects anew if they are not finite",
            )
        return direction

    def check(self, sae: SAE) -> EffectApproximator:
        """Return itself, if it was measured on this SAE. Raises PairingError otherwise."""
        same_place = tuple(self.M.shape) == (sae.d_model, sae.d_sae) and self.hookpoint == sae.hookpoint
        what = f"effects {tuple(self.M.shape)} at {self.hookpoint}"
        check_measured_on(sae, self.sae_sha256, same_place, what, "fgsteer effects")
        return self

    @property
    def sha256(self) -> str:
        """A hash of what it predicts."""
        return text_sha256([stored_sha256(self.M), stored_sha256(self.b), str(self.hookpoint)])

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file; one that is there is replaced, and never left half written.

        Raises FormatError where the file cannot be written.
        """
        header = {"hookpoint": str(self.hookpoint), "sae_sha256": self.sae_sha256, "about": self.about}
        write_tensors(path, {"M": self.M, "b": self.b}, kind="effects", header=header)

    @classmethod
    def load(cls, path: str | Path) -> EffectApproximator:
        """Load a file that ``save`` wrote. Raises FormatError for one that is missing, damaged or of another kind."""
        tensors, header = read_tensors(path, kind="effects")
        with refuse_damaged(path, "a file written by EffectApproximator.save"):
            return cls(
                tensors["M"].float(),
                tensors["b"].float(),
                Hookpoint.from_name(header["hookpoint"]),
                str(header["sae_sha256"]),
                dict(header["about"]),
            )


@checked
def load_effects(source: str | Path = DEFAULT, sae_id: str | None = None) -> EffectApproximator:
    """Load an effect approximator.

    Args:
        source: A file that ``EffectApproximator.save`` wrote, or "default" or "smollm2" for that of a shipped SAE.
        sae_id: Which of the shipped SAEs, as in ``load_sae``; by default the one that ``load_sae`` gives.

    Raises:
        FormatError: The file is missing, damaged or of another kind; or the shipped SAE has no effects.
        DataError: An id is given for a file, which is of one SAE.
    """
    shipped = find_shipped(source)
    if shipped is None and sae_id is not None:
        raise DataError(f"sae_id = {sae_id!r:.60} for the file {source}", "a file alone", "leave sae_id out")
    path = Path(source) if shipped is None else shipped.effects_file(sae_id)
    if not path.is_file():
        raise FormatError(
            f"There is no file {path}.",
            "a file written by EffectApproximator.save",
            "measure one with fgsteer effects; without one, fgaa(…, effects=None) projects through the decoder",
        )
    return EffectApproximator.load(path)
