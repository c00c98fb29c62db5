"""What a projection comes from: its share by token and by component of a lower layer, through integrated gradients.

found = token_relevance(tuned, tokenizer, shift.vector(), ["How do I bake bread?"])[0]
effects = component_effects(tuned, tokenizer, shifts[11], shifts[12].vector(), prompts)

This is not the layer-wise relevance propagation (LRP) of arXiv 2502.09674, whose rules differ by architecture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import record_batch, tokens_in_batch
from fgsteer.data.chat import Text
from fgsteer.directions.prompts import prompt_passes
from fgsteer.directions.shift import ResidualShift
from fgsteer.errors import DataError, PairingError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.gradients import frozen, through_model
from fgsteer.models.hookpoints import Hookpoint, decoder_of
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import input_device, virtual_tokens
from fgsteer.steering.splicing import splice
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS = 20  # of an integral, by default
WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True, eq=False, repr=False)
class TokenRelevance(OneLineRepr):
    """How much each token of a prompt adds to a projection.

    Args:
        tokens: The tokens, a chat template's too.
        words: The word of the request that each lies in, "" for those in none.
        values: What each adds, in units of the residual stream, (tokens,).
        difference: What they add together: the projection less that of the baseline.
    """

    tokens: tuple[str, ...]
    words: tuple[str, ...]
    values: Float[Tensor, " tokens"]
    difference: float

    def by_word(self) -> dict[str, float]:
        """What each word of the request adds, over all its tokens and places, in lower case."""
        sums: dict[str, float] = {}
        for word, value in zip(self.words, self.values.tolist(), strict=True):
            if word:
                sums[word.lower()] = sums.get(word.lower(), 0.0) + value
        return sums


@checked
@through_model
def token_relevance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    prompts: Sequence[Text],
    *,
    baseline: Literal["mean", "zero"] = "mean",
    steps: int = STEPS,
    batch_tokens: int | None = None,
) -> list[TokenRelevance]:
    """Which tokens of prompts raise a projection: integrated gradients of ``v̂·h[last]`` over the embeddings.

    With e the input of the first block and e⁰ the baseline, token t has the relevance ``Σ_d (e − e⁰)·∫ ∂(v̂·h)/∂e``,
    the integral along the line from e⁰ to e by the midpoint rule. Relevances add up to the difference of the
    projections at e and e⁰, but for the integral's error.

    Args:
        model: A Hugging Face causal language model, such as the tuned one.
        tokenizer: Its tokenizer.
        vector: The direction v and the place where it is read, such as a component of a shift.
        prompts: Requests: texts, which a chat model gets as a user's messages, or conversations.
        baseline: What tokens are compared with: the "mean" of the prompt's embeddings, or "zero".
        steps: The points of the integral.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The relevances, by prompt.

    Raises:
        DataError: There is no prompt, or an argument is out of its range.
        PairingError: The vector has another width than the model.
        HookpointError: The model lacks the vector's hookpoint.
        SelectionError: The vector is zero.
    """
    if baseline not in ("mean", "zero"):
        raise DataError(f"baseline = {baseline!r:.40}", "'mean' or 'zero'")
    place = Hookpoint(0, "resid_pre")
    found = []
    for ids, text, e in _streams(model, tokenizer, vector, prompts, place, steps):
        begin = (e.mean(0, keepdim=True) if baseline == "mean" else torch.zeros_like(e[:1])).expand_as(e)
        gradient, difference = _integrate(model, ids, place, begin, e, vector, steps, batch_tokens)
        values = ((e - begin) * gradient).sum(1)
        tokens = tuple(tokenizer.convert_ids_to_tokens(ids))
        found.append(TokenRelevance(tokens, tuple(words_of(tokenizer, ids, text)), values, difference))
    return found


@checked
@through_model
def component_effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shift: ResidualShift,
    vector: SteeringVector,
    prompts: Sequence[Text],
    *,
    components: int = 5,
    steps: int = STEPS,
    batch_tokens: int | None = None,
) -> Float[Tensor, "prompts components"]:
    """What components of a shift at a lower layer add to a projection: integrated gradients of ``v̂·h[last]``.

    At the shift's hookpoint ``h = Σ_k c_k u_k + rest`` for its first components u; the coefficients c of all tokens go
    from 0 to their values, and the rest stays. The effects of a prompt add up to what the projection loses where these
    components are ablated there, but for the integral's error.

    Args:
        model: A Hugging Face causal language model, such as the tuned one.
        tokenizer: Its tokenizer.
        shift: The components u, as of the layer below.
        vector: The direction v and the place where it is read, such as the dominant component of a higher layer.
        prompts: Requests: texts, which a chat model gets as a user's messages, or conversations.
        components: How many components, from the dominant one on; all of them where there are fewer.
        steps: The points of the integral.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The effects in units of the residual stream, float64.

    Raises:
        PairingError: The vector is not read after the shift's hookpoint, or of another width.
        DataError: There is no prompt, or an argument is out of its range.
        SelectionError: The vector is zero.
    """
    check_range("components", components, 1, MAX_COUNT, whole=True)
    if not shift.hookpoint.precedes(vector.hookpoint):
        raise PairingError(
            f"components at {shift.hookpoint} and a direction at {vector.hookpoint}",
            "components below the direction",
            "pass the shift of a lower layer",
        )
    effects = []
    for ids, _, h in _streams(model, tokenizer, vector, prompts, shift.hookpoint, steps):
        u = shift.components[:components].to(h)
        coefficients = h @ u.T
        gradient, _ = _integrate(model, ids, shift.hookpoint, h - coefficients @ u, h, vector, steps, batch_tokens)
        effects.append((coefficients * (gradient @ u.T)).sum(0))
    return torch.stack(effects)


def _streams(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    prompts: Sequence[Text],
    place: Hookpoint,
    steps: int,
) -> list[tuple[list[int], Text, Float[Tensor, "tokens d_model"]]]:
    """The ids of each prompt, the prompt, and its activations at a place, in float64 on the CPU."""
    check_range("steps", steps, 1, MAX_COUNT, whole=True)
    check_pairing(model, vector.hookpoint, vector.d_model, "", "vector")
    vector.unit()  # raises for a zero vector
    found = []
    for batch in prompt_passes(model, tokenizer, prompts).batches:
        acts = record_batch(model, batch, [place])[place]
        for number, row in enumerate(batch.rows):
            h = acts[number, : len(row.ids)].double().cpu()
            found.append((row.index, list(row.ids), prompts[row.index], h))
    return [(ids, text, h) for _, ids, text, h in sorted(found, key=lambda one: one[0])]


def _integrate(
    model: PreTrainedModel,
    ids: list[int],
    place: Hookpoint,
    begin: Float[Tensor, "tokens d_model"],
    end: Float[Tensor, "tokens d_model"],
    vector: SteeringVector,
    steps: int,
    batch_tokens: int | None,
) -> tuple[Float[Tensor, "tokens d_model"], float]:
    """The mean gradient of the projection along the line between activations at a place, and its difference."""
    size = max(1, tokens_in_batch(batch_tokens, input_device(model)) // len(ids))
    points = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    total = torch.zeros_like(end)
    with frozen(model):
        for part in torch.split(points, size):
            x = (begin + part[:, None, None] * (end - begin)).requires_grad_(True)
            (gradient,) = torch.autograd.grad(_projections(model, ids, place, x, vector).sum(), x)
            total += gradient.sum(0)
        with torch.no_grad():
            low, high = _projections(model, ids, place, torch.stack([begin, end]), vector).tolist()
    return total / steps, high - low


def _projections(
    model: PreTrainedModel,
    ids: list[int],
    place: Hookpoint,
    h: Float[Tensor, "rows tokens d_model"],
    vector: SteeringVector,
) -> Float[Tensor, " rows"]:
    """The projections ``v̂·h[last]`` in passes whose activations at a place are replaced, float64 on the CPU."""
    seen: list[Tensor] = []

    def replace(old: Tensor) -> Tensor:
        before = old.shape[1] - h.shape[1]  # virtual tokens
        return torch.cat([old[:, :before], h.to(old)], 1)

    def keep(now: Tensor) -> Tensor:
        seen.append(now[:, -1])
        return now

    rows = torch.tensor(ids, device=input_device(model)).expand(len(h), -1)
    run = model if virtual_tokens(model) else decoder_of(model)
    with splice(model, place, replace), splice(model, vector.hookpoint, keep):
        run(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
    return seen[0].double().cpu() @ vector.unit().direction.double().cpu()


def words_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt: Text) -> list[str]:
    """The word of a request, the last message of a conversation, that each token lies in; "" for those in none."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    ends = [len(tokenizer.decode(list(ids[: n + 1]), clean_up_tokenization_spaces=False)) for n in range(len(ids))]
    whole = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    begin = whole.rfind(text)
    if begin < 0:  # a template that strips messages
        text = text.strip()
        begin = whole.rfind(text)
    if begin < 0:  # a tokenizer that normalises texts
        begin, text = 0, whole
    spans = [(begin + match.start(), begin + match.end(), match[0]) for match in WORD.finditer(text)]
    words = []
    for start, end in zip([0, *ends], ends, strict=False):
        last = start + len(whole[start:end].rstrip()) - 1
        words.append(next((word for first, after, word in spans if first <= last < after and last >= start), ""))
    return words
