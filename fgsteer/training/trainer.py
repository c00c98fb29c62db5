"""The training loop around sae-lens's trainer: checkpoints, and what is noted of how it went.

sae-lens computes losses, gradients and schedules (``SAETrainer.step``). A checkpoint is one file of safetensors that
holds all that the next step depends on, so that a run which was killed ends with the same weights.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgsteer.errors import PairingError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors
from fgsteer.storage.plans import check_same_plan
from fgsteer.training.activation_store import ActivationSource
from fgsteer.training.settings import SAETraining
from fgsteer.training.shuffling import Place, ShuffledBatches

if TYPE_CHECKING:
    from sae_lens import TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

KIND = "SAE checkpoint"
CHECKPOINT_SECONDS = 120.0
NORM_BATCHES = 8  # on which the mean norm is measured that inputs are scaled by
CURVE_POINTS = 50  # of the losses that are noted
# JumpReLU: the first threshold and the width of its straight-through window, for inputs scaled to a mean norm of
# sqrt(d_model), and the weight of 2/L0* (L0 - L0*)^2 beside the squared error
JUMP_THRESHOLD, JUMP_BANDWIDTH, JUMP_L0 = 0.5, 0.5, 0.1
PRE_ACTIVATION_WEIGHT = 3e-6  # sae-lens's recipe, for features that never come near their threshold
THRESHOLD_RATE = 0.1  # of the running threshold that a batchtopk is saved with: sae-lens's .01 outlasts short runs


def new_sae(settings: SAETraining, d_model: int, metadata: Mapping[str, Any], device: str) -> TrainingSAE[Any]:
    """Return an untrained SAE of sae-lens."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    assert settings.d_sae is not None
    common: dict[str, Any] = {
        "d_in": d_model,
        "d_sae": settings.d_sae,
        "device": device,
        "normalize_activations": "expected_average_only_in",
        "metadata": SAEMetadata(**metadata),
    }
    if settings.kind == "topk":
        config = sae_lens.TopKTrainingSAEConfig(k=settings.k, **common)
        if torch.device(device).type != "cpu":  # where dense products cost less than gathering
            return sae_lens.TopKTrainingSAE(config)
        from fgsteer.training.sparse_topk import SparseTopKTrainingSAE

        return SparseTopKTrainingSAE(config)
    if settings.kind == "jumprelu":
        return sae_lens.JumpReLUTrainingSAE(
            sae_lens.JumpReLUTrainingSAEConfig(
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=settings.k,
                jumprelu_ste_to_input=True,
                jumprelu_init_threshold=JUMP_THRESHOLD,
                jumprelu_bandwidth=JUMP_BANDWIDTH,
                l0_coefficient=JUMP_L0,
                l0_warm_up_steps=settings.steps // 4,
                pre_act_loss_coefficient=PRE_ACTIVATION_WEIGHT,
                **common,
            )
        )
    common |= {"k": float(settings.k), "topk_threshold_lr": THRESHOLD_RATE}
    if settings.kind == "batchtopk":
        return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**common))
    widths = [settings.d_sae // part for part in (16, 4, 1)]
    return sae_lens.MatryoshkaBatchTopKTrainingSAE(
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=widths, **common)
    )


def new_trainer(sae: TrainingSAE[Any], settings: SAETraining, device: str) -> SAETrainer[Any, Any]:
    """Return sae-lens's trainer of an SAE, whose steps are called one by one."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    assert settings.lr is not None
    config = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch,
        train_batch_size_samples=settings.batch,
        lr=settings.lr,
        lr_end=settings.lr / 10,
        lr_warm_up_steps=round(settings.steps * settings.warm_up),
        lr_decay_steps=round(settings.steps * settings.decay),
        device=device,
        autocast=settings.autocast,
        dead_feature_window=max(1, round(settings.steps * settings.dead_window)),
        n_batches_for_norm_estimate=NORM_BATCHES,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(()))


class TrainingRun:
    """The training of one SAE, from its beginning or from a checkpoint.

    Args:
        source: Where activations come from.
        hookpoint: At which hookpoint.
        settings: Settings that are filled in for the width of the activations.
        sae: The untrained SAE.
        plan: All that the run depends on.
        device: Where it is trained.
        checkpoint: The file that a killed run goes on from.
    """

    def __init__(
        self,
        source: ActivationSource,
        hookpoint: Hookpoint,
        settings: SAETraining,
        sae: TrainingSAE[Any],
        plan: Mapping[str, Any],
        device: str,
        checkpoint: Path,
    ) -> None:
        self.source, self.hookpoint, self.settings, self.plan = source, hookpoint, settings, dict(plan)
        self.trainer, self.device, self.checkpoint = new_trainer(sae, settings, device), device, checkpoint
        self.curve: list[dict[str, float]] = []
        self.place = Place()

    def run(self, progress: Callable[[int, int], None], seconds: float = CHECKPOINT_SECONDS) -> None:
        """Take all steps that are left, and write a checkpoint every so many ``seconds``.

        Args:
            progress: Called with the number of steps done and the number of all.
            seconds: How often a checkpoint is written.
        """
        if self.checkpoint.exists():
            self._load()
        trainer, settings = self.trainer, self.settings
        trainer.sae.to(self.device)
        batches = ShuffledBatches(
            self.source, self.hookpoint, settings.batch, settings.seed, self.place, device=self.device
        )
        if trainer.activation_scaler.scaling_factor is None:
            trainer.activation_scaler.scaling_factor = _input_scale(batches)
        saved = time.monotonic()
        every = max(1, settings.steps // CURVE_POINTS)
        while trainer.n_training_steps < settings.steps:
            output = trainer.step(next(batches))
            trainer.n_training_steps += 1
            self.place = batches.place
            if trainer.n_training_steps % every == 0:
                self.curve.append(_point(trainer, output.losses, output.sae_in))
            if time.monotonic() - saved > seconds:
                self.save()
                saved = time.monotonic()
            progress(trainer.n_training_steps, settings.steps)
        self.save()

    def finished(self) -> TrainingSAE[Any]:
        """Return the SAE with the scaling of its input folded into its weights. The run is over then."""
        scaler, sae = self.trainer.activation_scaler, self.trainer.sae
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        self.trainer.set_final_sae_metadata()
        sae.cfg.device = "cpu"  # whoever loads it may have no GPU
        return sae.to("cpu")

    def save(self) -> None:
        """Write the checkpoint."""
        trainer = self.trainer
        tensors: dict[str, Tensor] = {f"sae/{name}": value for name, value in trainer.sae.state_dict().items()}
        for number, state in trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{number}/{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors |= {"fired": trainer.act_freq_scores, "silent": trainer.n_forward_passes_since_fired}
        header = {
            "plan": self.plan,
            "steps": trainer.n_training_steps,
            "samples": trainer.n_training_samples,
            "active_samples": trainer.n_frac_active_samples,
            "scale": trainer.activation_scaler.scaling_factor,
            "place": asdict(self.place),
            "curve": self.curve,
        }
        write_tensors(self.checkpoint, tensors, kind=KIND, header=header)

    def _load(self) -> None:
        """Go on from the checkpoint. Raises PairingError for one of another run, FormatError for a damaged one."""
        tensors, header = read_tensors(self.checkpoint, kind=KIND)
        check_same_plan(self.checkpoint, header.get("plan"), self.plan)
        trainer = self.trainer
        with refuse_damaged(self.checkpoint, "a checkpoint of this run", "delete it, and the run starts over"):
            parts = {name: value for name, value in tensors.items() if name.startswith("sae/")}
            trainer.sae.load_state_dict({name.removeprefix("sae/"): value for name, value in parts.items()})
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("adam/"):
                    _, number, key = name.split("/")
                    states.setdefault(int(number), {})[key] = value
            groups = trainer.optimizer.state_dict()["param_groups"]
            trainer.optimizer.load_state_dict({"state": states, "param_groups": groups})
            trainer.act_freq_scores = tensors["fired"].to(self.device)
            trainer.n_forward_passes_since_fired = tensors["silent"].to(self.device)
            trainer.n_training_samples, trainer.n_frac_active_samples = header["samples"], header["active_samples"]
            trainer.activation_scaler.scaling_factor = float(header["scale"])
            self.place, self.curve = Place(**header["place"]), list(header["curve"])
            steps = int(header["steps"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a scheduler that steps before its optimizer
            for _ in range(steps):
                trainer.lr_scheduler.step()
                for scheduler in trainer.coefficient_schedulers.values():
                    scheduler.step()
        trainer.n_training_steps = steps


def _input_scale(batches: ShuffledBatches) -> float:
    """Return the factor that gives inputs a mean norm of sqrt(d_model), as sae-lens's expected_average_only_in."""
    inputs = [next(batches) for _ in range(NORM_BATCHES)]
    mean = float(torch.stack([x.norm(dim=1).mean() for x in inputs]).mean())
    if not mean > 0:
        raise PairingError("activations that are all 0", "activations with a norm", "look for another hookpoint")
    return math.sqrt(inputs[0].shape[1]) / mean


def _point(trainer: SAETrainer[Any, Any], losses: Mapping[str, Any], inputs: Tensor) -> dict[str, float]:
    """Return a point of the curve: the step, the share of the variance that is not explained, and dead features."""
    variance = float((inputs - inputs.mean(0)).pow(2).sum(1).mean())
    return {
        "step": trainer.n_training_steps,
        "unexplained": float(losses["mse_loss"].detach()) / variance,
        "dead": int(trainer.dead_neurons.sum()),
    }
