"""Output scores: which features move the next token towards the tokens that they stand for.

Some features detect, and others write; only the latter are good to steer with (Arad, Mueller & Belinkov 2025,
arXiv 2505.20063). The model runs once per feature, with many features to a batch.

    out = output_scores(model, tokenizer, sae)                                      (d_sae,)
    difference = stats.at("feature")[1].difference
    vec = fgaa(stats, sae, score=difference * (out > out.median()))    # as a filter
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.recording import record
from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.chat import check_text
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import checked
from fgsteer.interventions.adding import Add
from fgsteer.methods.selection import feature_id
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import context_window, input_device
from fgsteer.models.unembedding import logit_lens
from fgsteer.saes.sae import SAE
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
@torch.no_grad()
def output_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    features: Iterable[int] | None = None,
    *,
    prompt: str = "From my experience,",
    coefficient: float = 10.0,
    top_tokens: int = 20,
    batch_size: int = 64,
    progress: Progress = None,
) -> Float[Tensor, " d_sae"]:
    """How much each feature, when amplified, makes the model say the tokens that it stands for.

    ``S_out(j) = (1 − r/|V|) · p``, in [0, 1]. With L the ``top_tokens`` tokens of the highest logit lens of
    ``W_dec[j]``, ``p`` is the highest probability of a token of L after the prompt, and ``r`` its rank in the
    vocabulary V, from 0, while ``h ← h + c·a·W_dec[j]`` at the prompt's last token; ``a`` is the largest activation of
    any feature there, so that every feature is amplified alike (arXiv 2505.20063, and its published code,
    src/output_score.py).

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are scored.
        features: The ids of some features; by default all of them.
        prompt: The prompt; the authors' by default.
        coefficient: The c of the equation; the authors' by default.
        top_tokens: The number of tokens that a feature stands for; the authors' by default.
        batch_size: The features in a forward pass.
        progress: As in ``collect``; a function is called with the number of features done.

    Returns:
        The scores, (d_sae,), with 0 for features that were not asked for.

    Raises:
        DataError: The prompt has no token, or no feature fires on its last one.
        SelectionError: A feature is unknown, or a count is impossible.
        PairingError: The SAE does not fit the model.
    """
    vocabulary = len(model.get_output_embeddings().weight)
    if not 1 <= top_tokens <= vocabulary:
        raise SelectionError(
            f"top_tokens = {top_tokens}", f"from 1 to {vocabulary}, the vocabulary's size", "leave it out for 20"
        )
    amplified = AmplifiedFeatures(model, tokenizer, sae, prompt, coefficient)
    scores = torch.zeros(sae.d_sae, dtype=torch.float64)
    for part, logits in amplified.logits(features, batch_size, progress):
        lens = logit_lens(model, sae.W_dec[part]).topk(top_tokens).indices.to(logits.device)
        best = logits.gather(1, lens).amax(1, keepdim=True)
        rank_share = (logits > best).float().mean(1)  # r/|V|
        scores[part] = ((1 - rank_share) * logits.softmax(1).gather(1, lens).amax(1)).cpu().double()
    return scores


class AmplifiedFeatures:
    """What a model says after a prompt while a feature is amplified at the prompt's last token.

    ``h ← h + c·a·W_dec[j]``, where ``a`` is the largest activation of any feature there, so that every feature is
    amplified alike.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        sae: The SAE whose features are amplified.
        prompt: The prompt.
        coefficient: The c of the equation.

    Raises:
        DataError: The prompt has no token, is too long, or no feature fires on its last one.
        PairingError: The SAE does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SAE,
        prompt: str,
        coefficient: float,
    ) -> None:
        check_pairing(model, sae.hookpoint, sae.d_model, sae.model_name, "SAE")
        ids = encode_prompts(tokenizer, [check_text(prompt, "the prompt")], prepend_bos=sae.prepend_bos)[0]
        window = context_window(model)
        if window is not None and ids.shape[1] > window:
            raise DataError(
                f"a prompt of {ids.shape[1]} tokens",
                f"at most {window} tokens, the model's window",
                "shorten the prompt",
            )
        self.model, self.sae, self.ids = model, sae, ids.to(input_device(model))
        self.size = coefficient * _largest_activation(model, self.ids, sae)

    def logits(
        self, features: Iterable[int] | None, batch_size: int, progress: Progress = None
    ) -> Iterator[tuple[list[int], Float[Tensor, "part vocabulary"]]]:
        """Yield some features, None for all of them, and the logits of the next token under each, in float32.

        Raises SelectionError for a feature that the SAE lacks, and for a batch of none.
        """
        if batch_size < 1:
            raise SelectionError(f"batch_size = {batch_size}", "at least 1", "leave it out for 64")
        sae = self.sae
        chosen = list(range(sae.d_sae)) if features is None else [feature_id(j, sae) for j in features]
        with reporting(progress, "amplifying features", len(chosen)) as report:
            for start in range(0, len(chosen), batch_size):
                part = chosen[start : start + batch_size]
                # the last token is steered even where it is also the first
                entries = [
                    Add(hookpoint=sae.hookpoint, direction=row, coefficient=self.size, scope="reply", bos=True)
                    for row in sae.W_dec[part]
                ]
                with steer(self.model, entries, per_row=True):
                    found = self._next(len(part))
                yield part, found
                report(start + len(part))

    def unsteered(self) -> Float[Tensor, "1 vocabulary"]:
        """The logits of the next token without steering, in float32."""
        return self._next(1)

    def _next(self, rows: int) -> Tensor:
        logits: Tensor = self.model(input_ids=self.ids.expand(rows, -1), use_cache=False).logits
        return logits[:, -1].float()


def _largest_activation(model: PreTrainedModel, ids: Tensor, sae: SAE) -> float:
    """The largest feature activation on the last token of ids (1, tokens), in units of the residual stream."""
    h = record(model, ids, None, [sae.input_hookpoint])[sae.input_hookpoint][:, -1].float()
    local = sae.to(h.device, torch.float32)
    largest = float((local.encode(h) * local.input_scale(h)).max())
    if not largest > 0:
        raise DataError(
            "a prompt on whose last token no feature fires",
            "a prompt whose activations say how far to amplify",
            "pass another prompt=",
        )
    return largest
