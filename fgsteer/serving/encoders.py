"""The SAEs that an engine knows: those of files of steering, and of TopK SAEs the encoders, which workers hold.

The features of a TopK SAE compete: which of them fire is known only once all of them are read. So a worker that serves
clamps of them has the whole encoder, d_model × d_sae float32 values beside the model, and reads it at every token once
for each steering that a request may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save

from fgsteer.errors import PairingError
from fgsteer.interventions.files import steering_sae_sha256
from fgsteer.saes.sae import SAE
from fgsteer.serving.rows import TableRows, block_of

PIECE_BYTES = 32 << 20  # of an encoder in one message to the workers


@dataclass(frozen=True, eq=False)
class TopKEncoder:
    """The encoder of a TopK SAE at the output of block ``layer``, the ``number``-th of those at this layer."""

    sae: SAE
    sha256: str
    layer: int
    number: int

    @property
    def settings(self) -> tuple[int, int, int]:
        """(layer, d_sae, k), by which workers make room before anything is compiled."""
        return self.layer, self.sae.d_sae, int(self.sae.k or 0)

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(first column, tensors) of parts of the weights and of the bias."""
        step = max(1, PIECE_BYTES // (4 * self.sae.d_model))
        for start in range(0, self.sae.d_sae, step):
            weight, bias = (t[..., start : start + step] for t in (self.sae.W_enc, self.sae.b_enc))
            yield start, save({"weight": _plain(weight), "bias": _plain(bias)})


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().to(torch.float32, copy=True).contiguous()


def topk_encoders(saes: Iterable[SAE]) -> tuple[TopKEncoder, ...]:
    """The encoders of the TopK SAEs among ``saes``, each once.

    Raises:
        HookpointError: One is for a hookpoint within a block.
        PairingError: One normalises its input, or is a transcoder.
    """
    made: list[TopKEncoder] = []
    for sae in saes:
        sha256 = steering_sae_sha256(sae)
        if sae.activation != "topk" or sha256 in [other.sha256 for other in made]:
            continue
        if sae.input_norm != "none" or sae.reads is not None:
            kind = "a transcoder" if sae.reads is not None else f"input_norm={sae.input_norm!r}"
            raise PairingError(
                f"a TopK SAE with {kind}",
                'a TopK SAE with input_norm="none" that reads where it steers',
                "leave it out, and serve the features' directions as a vector (from_features)",
            )
        layer = block_of(sae.hookpoint)
        made.append(TopKEncoder(sae, sha256, layer, sum(other.layer == layer for other in made)))
    return tuple(made)


def groups_of(rows: TableRows, encoders: Sequence[TopKEncoder]) -> dict[str, int]:
    """{hash of a TopK SAE that rows read: its number among those of their layer}.

    Raises PairingError where the engine does not have it.
    """
    own = {encoder.sha256: encoder for encoder in encoders if encoder.layer == rows.layer}
    for sha256, feature in rows.topk_features:
        if sha256 and (sha256 not in own or feature >= own[sha256].sae.d_sae):
            known = ", ".join(str(encoder.sae) for encoder in encoders)
            raise PairingError(
                f"features of the TopK SAE with the hash {sha256[:12]} at layer {rows.layer}",
                f"features of the TopK SAEs that this engine was started with ({known or 'none'})",
                "start the engine with this SAE (saes=[sae], or fgsteer serve --sae), as all of its features decide "
                "which of them fire",
            )
    return {sha256: encoder.number for sha256, encoder in own.items()}
