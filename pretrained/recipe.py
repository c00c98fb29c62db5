"""Every number that the embedded default depends on, in one place.

Recipe(steps=10).middle
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What is trained, on how much, and how it is measured."""

    seed: int = 0
    vocab_size: int = 8192
    layers: int = 5
    d_model: int = 320
    d_mlp: int = 832
    context: int = 256  # tokens in a training block
    batch: int = 64  # blocks in an optimizer step
    steps: int = 1600
    warmup: int = 50  # steps
    decay: float = 0.4375  # final share of the steps over which the rate falls linearly to 0
    lr_matrix: float = 0.02  # Muon, on the blocks' matrices
    lr_other: float = 3e-3  # AdamW, on embedding and norms
    compile: bool = True

    sae_layers: tuple[int, ...] = (1, 2, 3)  # resid_post; the middle one is the default
    sae_kind: str = "topk"  # by what the comparison of kinds shows
    sae_width: int = 5120
    sae_k: int = 24  # active features a token
    sae_tokens: int = 1_600_000
    sae_batch: int = 1024  # tokens in an optimizer step
    sae_lr: float = 8e-4
    sae_autocast: bool = True  # bfloat16 products, where the processor has them
    compare_seeds: int = 2  # of every kind, at the middle layer
    compare_tokens: int = 400_000

    feature_texts: int = 8000  # beginnings of training documents that features are read on
    compare_texts: int = 1000  # of these, in the comparison of kinds
    effects_layers: tuple[int, ...] = (2, 3)  # the default SAE's, and the one at which differences of means do best
    effects_vectors: int = 5120  # decoder rows of each of these SAEs measured
    effects_texts: int = 8  # neutral texts that set each row's strength
    effects_ce_rise: float = 0.5  # nats a token that it costs them
    effects_rollouts: int = 2  # of each neutral prompt
    effects_tokens: int = 24
    effects_top_p: float = 1.0
    effects_rows: int = 512  # sequences generated together

    @property
    def middle(self) -> int:
        """The layer whose SAE is the default one."""
        return self.sae_layers[len(self.sae_layers) // 2]


@dataclass(frozen=True)
class SmolRecipe:
    """How the sparse autoencoders of SmolLM2-135M-Instruct are made, and how they are measured."""

    seed: int = 0
    layers: tuple[int, ...] = (8, 12, 21)  # resid_post; by fgsteer sweep, CAA works best at 12 and 13, or about 21
    default_layer: int = 21  # where features show most in what the model writes
    effects_layers: tuple[int, ...] = (12, 21)
    requests: int = 768  # user messages, of which the model answers
    answers: int = 576  # the first so many
    tokens: int = 12_000_000  # recorded; a GPU is meant, on two CPU cores 3 million are a matter of some hours
    passes: int = 3  # how often they are read
    context: int = 256  # tokens of a block
    kind: str = "topk"
    width: int = 9216  # 16 · d_model
    k: int = 32
    batch: int = 4096  # tokens of an optimizer step
    feature_texts: int = 1600  # beginnings of training documents that features are read on
    density_texts: int = 600  # held-out documents
    quality_texts: int = 160  # held-out texts, one block of each
    effects_vectors: int = 1536
    effects_texts: int = 8
    effects_ce_rise: float = 0.5
    effects_rollouts: int = 2
    effects_tokens: int = 24
    effects_top_p: float = 1.0
    effects_rows: int = 1024  # sequences generated together
