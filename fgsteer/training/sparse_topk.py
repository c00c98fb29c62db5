"""A TopK SAE of sae-lens whose training step computes with the active features alone.

Of the five products of a step, (batch, d_model) with (d_model, d_sae), sae-lens computes all densely. Here only the
encoder's is: what is decoded, and every gradient, has k entries a token. The result is that of sae-lens up to
rounding, at two to three times its speed on a CPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import TopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

ROWS_AT_ONCE = 32  # whose decoder rows are gathered together, so that they stay in a cache


class ByFeature:
    """The order of k features a token, by feature: with their values a sparse matrix (d_sae, batch)."""

    def __init__(self, features: Int[Tensor, "batch k"], d_sae: int) -> None:
        self.size = (d_sae, len(features))
        self.order = features.flatten().argsort()
        counts = torch.bincount(features.flatten(), minlength=d_sae).cumsum(0)
        self.starts = torch.cat([counts.new_zeros(1), counts])
        self.tokens = self.order // features.shape[1]

    def matrix(self, values: Float[Tensor, "batch k"]) -> Float[Tensor, "d_sae batch"]:
        """Return the values as a sparse matrix with a row for each feature."""
        return _sparse_rows(self.starts, self.tokens, values.flatten()[self.order], self.size)


def by_token(
    values: Float[Tensor, "batch k"], features: Int[Tensor, "batch k"], d_sae: int
) -> Float[Tensor, "batch d_sae"]:
    """Return k values a token as a sparse matrix with a row for each token."""
    batch, k = values.shape
    starts = torch.arange(0, batch * k + 1, k, device=values.device)
    return _sparse_rows(starts, features.flatten(), values.flatten(), (batch, d_sae))


def _sparse_rows(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a sparse matrix by rows, without torch's warnings that these are new and are not checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, size)


class _Reconstruct(torch.autograd.Function):
    """Encode, keep k features a token, decode.

    The features with the largest ``pre · ‖W_dec‖`` are kept, and written with ``relu(pre)``: the norm by which
    sae-lens multiplies an activation is divided by again where it decodes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x - b_dec if centred else x
        pre = torch.addmm(b_enc, x, W_enc).to(W_dec.dtype).mul_(W_dec.norm(dim=1))
        scaled, features = pre.topk(k, dim=1, sorted=False)
        acts = scaled.relu()
        written = acts / W_dec.norm(dim=1)[features]
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 there are no sparse products
            out = torch.sparse.mm(by_token(written, features, len(W_dec)), W_dec) + b_dec
        ctx.save_for_backward(x, W_enc, W_dec, written, features)
        ctx.centred = centred
        ctx.mark_non_differentiable(acts, features)
        return out, acts, features

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, written, features = ctx.saved_tensors
        d_sae = len(W_dec)
        grad_pre = torch.empty_like(written)
        for start in range(0, len(x), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            grad_pre[rows] = torch.einsum("bd,bkd->bk", grad[rows], W_dec[features[rows]])
        grad_pre *= written > 0
        by_feature = ByFeature(features, d_sae)
        grad_W_dec = torch.sparse.mm(by_feature.matrix(written), grad)
        grad_W_enc = torch.sparse.mm(by_feature.matrix(grad_pre), x).T
        grad_b_enc = grad_pre.new_zeros(d_sae).index_add_(0, features.flatten(), grad_pre.flatten())
        grad_b_dec = grad.sum(0) - (W_enc @ grad_b_enc if ctx.centred else 0)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None


class SparseTopKTrainingSAE(TopKTrainingSAE):  # type: ignore[misc]
    """``TopKTrainingSAE`` with a quicker training step: the same losses, gradients and statistics up to rounding."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Compute the losses of a step."""
        x, k = step_input.sae_in, self.cfg.k
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        out, acts, features = _Reconstruct.apply(x, *weights, k, self.cfg.apply_b_dec_to_input)  # type: ignore[no-untyped-call]
        mse_loss = self.mse_loss_fn(out, x).sum(dim=-1).mean()
        aux_loss = self._dead_features_loss(x, (x - out).detach(), step_input.dead_neuron_mask)
        tokens = torch.arange(len(x), device=x.device).repeat_interleave(k)
        size = (len(x), self.cfg.d_sae)
        feature_acts = torch.sparse_coo_tensor(torch.stack([tokens, features.flatten()]), acts.flatten(), size)
        losses = {"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss}
        return TrainStepOutput(
            sae_in=x,
            sae_out=out,
            feature_acts=feature_acts,
            hidden_pre=feature_acts,
            loss=mse_loss + aux_loss,
            losses=losses,
        )

    def _dead_features_loss(self, x: Tensor, residual: Tensor, dead: Tensor | None) -> Tensor:
        """Let dead features reconstruct what the others leave, as sae-lens does, without computing the others."""
        count = 0 if dead is None else int(dead.sum())
        if dead is None or not count:
            return x.new_tensor(0.0)
        k = min(x.shape[1] // 2, count)
        W_dec = self.W_dec[dead]
        norms = W_dec.norm(dim=1)
        pre = (self.process_sae_in(x) @ self.W_enc[:, dead] + self.b_enc[dead]) * norms
        values, features = pre.topk(k, dim=1, sorted=False)
        acts = torch.zeros_like(pre).scatter(1, features, values)
        loss: Tensor = ((acts / norms) @ W_dec - residual).pow(2).sum(dim=-1).mean()
        weighted: Tensor = loss * (self.cfg.aux_loss_coefficient * min(count / (x.shape[1] // 2), 1.0))
        return weighted
