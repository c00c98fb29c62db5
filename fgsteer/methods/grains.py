"""GrAInS: vectors of what the words of a prompt that matter do, found by gradients and taken out.

vec = grains(model, tokenizer, pairs, 12)
generate(model, tokenizer, prompt, steering=vec.add_keeping_norm(10.0))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.batches import tokens_in_batch
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import TokenReader, TokenRow, pad
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastPair
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.methods.prompt_pairs import padding_id
from fgsteer.methods.provenance import provenance
from fgsteer.models.gradients import through_model
from fgsteer.models.hookpoints import Hookpoint, resolve
from fgsteer.models.pairing import model_identity
from fgsteer.models.properties import context_window, input_device, warn_of_dropout
from fgsteer.models.registering import registered
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked
@through_model
def grains(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Contrastable,
    hookpoint: Hookpoint | str | int,
    *,
    top: int = 5,
    steps: int = 20,
    component: Literal["mean", "pca"] = "mean",
    replacement: str | None = None,
    batch_tokens: int | None = None,
) -> SteeringVector:
    """Attribution steering: ``v = v⁺ − v⁻`` of the words that speak for and against (GrAInS, arXiv 2507.18043).

    Integrated gradients of ``f = log p(positive | prompt) − log p(negative | prompt)`` say how much each token of a
    prompt speaks for the positive completion. v⁺ is what those that speak most for it do to the stream at the end of
    both completions: the mean of ``h − h(without them)``, each replaced by the pad token; v⁻ is that of those that
    speak most against it. Only tokens of prompts are replaced, no special ones, and only those whose attribution has
    the sign in question. In the paper's code the vector is applied as ``add_keeping_norm(10·α)``, with α = 4.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        pairs: Pairs of completions of one prompt each: ``ContrastPair``s, or a contrast set that holds some.
        hookpoint: Where the vector is read and added.
        top: How many tokens k of each sign are replaced at most; 5 and 10 are published.
        steps: The points of the integral, the middles of so many equal parts of the way from zero embeddings.
        component: What of the differences: their "mean", or their first principal component ("pca"), not centred and
            pointing along their mean. The paper's code takes either; its components have arbitrary signs, which leaves
            v undefined.
        replacement: The text of one token that replaces; by default the pad token, or EOS where there is none.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Returns:
        The vector (d_model,), in residual-stream units.

    Raises:
        DataError: There is no pair, a pair has no token to replace, or a text exceeds the model's window.
        SelectionError: Nothing speaks for or against, or both do the same.
        HookpointError: The model lacks the hookpoint.
    """
    where = Hookpoint.parse(hookpoint)
    resolve(model, where)
    warn_of_dropout(model)
    check_range("top", top, 1, MAX_COUNT, whole=True)
    check_range("steps", steps, 1, MAX_COUNT, whole=True)
    if component not in ("mean", "pca"):
        raise DataError(f"component = {component!r:.40}", "'mean' or 'pca'")
    contrast = as_contrast(pairs)
    if not contrast.pairs:
        raise DataError("a contrast without pairs", "pairs of two completions of one prompt", "pass ContrastPairs")
    tokens = tokens_in_batch(batch_tokens, input_device(model))
    replaced_by = padding_id(tokenizer, replacement)
    differences: dict[int, list[Tensor]] = {1: [], -1: []}
    for number, pair in enumerate(contrast.pairs):
        found = attribute(model, tokenizer, pair, steps=steps, batch_tokens=tokens, number=number)
        for sign, moved in _without_words(model, found, where, top, replaced_by).items():
            differences[sign] += moved
    parts = {sign: _component(rows, component) for sign, rows in differences.items() if rows}
    direction = sum(sign * part for sign, part in parts.items()) if parts else torch.zeros(1)
    assert isinstance(direction, Tensor)
    if not float(direction.norm()) > 0:
        raise SelectionError(
            "no word whose replacement moves the stream",
            "prompts whose words speak for one completion more than for the other",
            "pass other pairs, or another replacement=",
        )
    settings = {"top": top, "steps": steps, "component": component, "pairs": len(contrast.pairs)}
    about = {**provenance("grains", settings), "model": model_identity(model)}
    return SteeringVector(direction.float(), where, provenance=about)


@dataclass(frozen=True, eq=False)
class Attributions:
    """How much each token of a prompt speaks for the positive completion.

    Args:
        rows: The tokens of the prompt with the positive and with the negative completion.
        values: The attribution of each token that both begin with and that is the prompt's, (tokens,), in nats.
        replaceable: Which of them may be replaced: all but special ones.
    """

    rows: tuple[TokenRow, TokenRow]
    values: Float[Tensor, " tokens"]
    replaceable: Tensor

    def chosen(self, sign: int, top: int) -> list[int]:
        """The tokens of the largest attributions of a sign, at most so many."""
        signed = torch.where(self.replaceable, sign * self.values, 0.0)
        order = signed.argsort(descending=True, stable=True)[:top]
        return [int(place) for place in order if signed[place] > 0]


def attribute(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pair: ContrastPair,
    *,
    steps: int,
    batch_tokens: int,
    number: int = 0,
) -> Attributions:
    """Integrated gradients of a pair's difference of log-probabilities: ``aᵢ = eᵢ · mean_s ∂f/∂eᵢ`` at s times all eᵢ.

    They add up to f at the prompt less f near zero embeddings, but for the error of ``steps`` points. Norms magnify
    what is near zero, so that f all but jumps there, in the first of the equal parts, which points do not see.
    """
    rows = _rows(model, tokenizer, pair, number)
    shared = 0
    for first, second in zip(rows[0].ids, rows[1].ids, strict=False):
        if first != second:
            break
        shared += 1
    width = min(shared, *(row.prompt_length for row in rows))
    special = set(tokenizer.all_special_ids)
    replaceable = torch.tensor([token not in special for token in rows[0].ids[:width]], dtype=torch.bool)
    if not replaceable.any():
        raise DataError(
            f"pair {number}, whose prompt has no word",
            "a prompt with a word to replace",
            "write ContrastPair(positive, negative, prompt)",
        )
    values = torch.zeros(width, dtype=torch.float64)
    for sign, row in zip((1, -1), rows, strict=True):
        values += sign * _integrated_gradients(model, row, width, steps, batch_tokens)
    return Attributions(rows, values, replaceable)


def _rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pair: ContrastPair, number: int
) -> tuple[TokenRow, TokenRow]:
    """A prompt with either completion, which is what is read of it. Raises DataError for one beyond the window."""
    with TokenReader(tokenizer, rule="answer", window=context_window(model), scored=True) as reader:
        triples = [(pair.prompt, pair.positive, True), (pair.prompt, pair.negative, False)]
        rows = sorted((row for chunk in reader.rows(triples) for row in chunk), key=lambda row: row.index)
        if reader.too_long:
            raise DataError(f"pair {number} beyond the model's window", "a text that fits into it", "shorten it")
    return rows[0], rows[1]


def _integrated_gradients(
    model: nn.Module, row: TokenRow, width: int, steps: int, batch_tokens: int
) -> Float[Tensor, " width"]:
    """The integrated gradients of the completion's log-probability over the first tokens, from zero embeddings."""
    points = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    targets = torch.tensor([row.ids[at] for at in row.selected])
    before = torch.tensor(row.selected) - 1
    total = torch.zeros(width, dtype=torch.float64)
    for part in torch.split(points, max(1, batch_tokens // len(row.ids))):
        ids = torch.tensor(row.ids, device=input_device(model)).repeat(len(part), 1)
        embedded, leaf, logits = _embedded_pass(model, ids, part, width)
        picked = logits[:, before.to(logits.device)].float().log_softmax(-1)
        score = picked.gather(-1, targets.to(logits.device).expand(len(part), -1)[..., None]).sum()
        (gradient,) = torch.autograd.grad(score, leaf)
        total += (embedded[0, :width].double() * gradient[:, :width].double().sum(0)).sum(-1).cpu()
    return total / steps


def _embedded_pass(
    model: nn.Module, ids: Tensor, points: Float[Tensor, " rows"], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(embeddings, those that the pass went on with, logits): each row's first tokens are scaled by its point."""
    held: list[Tensor] = []

    def scale(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        factors = torch.ones(output.shape[:2], dtype=output.dtype, device=output.device)
        factors[:, :width] = points.to(output)[:, None]
        held[:] = [output.detach(), (output.detach() * factors[..., None]).requires_grad_()]
        return held[1]

    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    with registered([(embedding, False, scale)]):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return held[0], held[1], logits


def _without_words(
    model: nn.Module, found: Attributions, where: Hookpoint, top: int, replaced_by: int
) -> dict[int, list[Tensor]]:
    """By sign, ``h − h(without the words of the sign)`` at the end of either completion, in float64 on the CPU."""
    places = {sign: chosen for sign in (1, -1) if (chosen := found.chosen(sign, top))}
    if not places:
        return {}
    rows, ends = [], []
    for chosen in ([], *places.values()):
        for row in found.rows:
            rows.append([replaced_by if n in chosen else token for n, token in enumerate(row.ids)])
            ends.append(row.selected[-1])
    ids, attention = (part.to(input_device(model)) for part in pad(rows, 0))
    h = record(model, ids, attention, [where])[where]
    states = h[torch.arange(len(rows), device=h.device), torch.tensor(ends, device=h.device)].double().cpu()
    whole, rest = states[:2], torch.split(states[2:], 2)
    return {sign: list(whole - without) for sign, without in zip(places, rest, strict=True)}


def _component(rows: Sequence[Tensor], component: str) -> Float[Tensor, " d_model"]:
    """The mean of differences, or their first right singular vector, which points along the mean."""
    stacked = torch.stack(list(rows))
    mean = stacked.mean(0)
    if component == "mean":
        return mean
    first: Tensor = torch.linalg.svd(stacked, full_matrices=False).Vh[0]
    return -first if float(first @ mean) < 0 else first
