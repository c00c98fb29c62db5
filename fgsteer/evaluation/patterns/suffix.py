"""A search for a suffix of prompts that undoes a vector: it turns the activation at the steered layer against it.

found = find_suffix(model, tokenizer, vec, prompts, held_out=others, coefficient=4.0)
print(found.suffix, found.flips, found.random_flips)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fgsteer.activations.batches import tokens_in_batch
from fgsteer.activations.outputs import hidden_states_of, reshape_by_token
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import pad
from fgsteer.data.chat import Text, apply_template
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.directions.prompts import prompt_passes
from fgsteer.directions.shift import last_states
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_number, check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval, wilson
from fgsteer.evaluation.patterns.styles import pairs_of
from fgsteer.interventions.values import unit_and_norm
from fgsteer.models.chat import is_chat_model
from fgsteer.models.gradients import through_model
from fgsteer.models.hookpoints import Hookpoint, decoder_of, resolve
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import input_device
from fgsteer.models.registering import Hook, registered
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MARK = "Hello"  # what stands for a user's message where a template's own tokens are looked for


class _Reached(Exception):  # noqa: N818
    """The hookpoint is reached: the forward pass may stop."""


@dataclass(frozen=True, eq=False, repr=False)
class SuffixSearch(OneLineRepr):
    """A suffix that turns activations against a vector, and what it does to prompts that it was not searched on.

    Projections are ``v̂·h`` at the vector's hookpoint and a prompt's last token, in units of the residual stream.

    Args:
        suffix: The suffix, as it stands after a prompt.
        ids: Its tokens.
        history: The mean projection over the prompts of the search, before it and after each step.
        plain: The held-out prompts' projections without a suffix.
        changed: Their projections with the suffix.
        random: Their projections with each of some random suffixes of the same number of tokens.
        added: What steering adds to every projection, ``c‖v‖``.
        threshold: The projection at which the sign changes.
    """

    suffix: str
    ids: tuple[int, ...]
    history: tuple[float, ...]
    plain: Float[Tensor, " prompts"]
    changed: Float[Tensor, " prompts"]
    random: Float[Tensor, "suffixes prompts"]
    added: float
    threshold: float

    @property
    def flips(self) -> Interval:
        """The share of the prompts on the vector's side of the threshold that the suffix brings to the other side."""
        flipped = self._flipped(self.changed[None])[0]
        return wilson(float(flipped.sum()), len(flipped))

    @property
    def random_flips(self) -> Interval:
        """The same share for random suffixes, averaged over them; the interval is over prompts."""
        shares = self._flipped(self.random).mean(0)
        return mean_interval([dict(enumerate(shares.tolist()))], lambda prompt: prompt)

    def append_to(self, contrast: ContrastSet) -> ContrastSet:
        """Pairs with the suffix after each prompt. Raises DataError for a set of other texts."""
        pairs = tuple(
            ContrastPair(pair.positive, pair.negative, prompt=_with_suffix(pair.prompt, self.suffix))
            for pair in pairs_of(contrast)
        )
        return replace(contrast, name=f"{contrast.name}, suffix", pairs=pairs, held_out=None)

    def _flipped(self, projections: Float[Tensor, "suffixes prompts"]) -> Float[Tensor, "suffixes counted"]:
        counted = self.plain + self.added > self.threshold
        return (projections[:, counted] + self.added < self.threshold).double()


@checked
@through_model
def find_suffix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    prompts: Sequence[Text],
    *,
    held_out: Sequence[Text] | None = None,
    coefficient: float = 0.0,
    threshold: float | None = None,
    length: int = 8,
    steps: int = 32,
    candidates: int = 32,
    top: int = 64,
    randoms: int = 8,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> SuffixSearch:
    """Search a suffix of prompts that lowers the projection ``v̂·h`` at the vector's hookpoint (arXiv 2505.03189).

    One suffix is searched for all prompts: at each step the gradient of the mean projection by the embeddings of its
    tokens says which replacements promise most, some of these are tried, and the best one is kept if it is better than
    the suffix (greedy coordinate search, after arXiv 2307.15043). Steering adds ``c‖v‖`` to the projection, so that a
    prompt whose sign flips is one where the suffix outweighs what is there and what steering adds.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vector: The vector.
        prompts: Texts on which the suffix is searched; a chat model gets them as a user's messages.
        held_out: Texts on which it is reported; by default ``prompts``, which flatters the search.
        coefficient: The strength c of steering with ``vec.add``.
        threshold: The projection at which the sign changes; by default the mean of the held-out prompts' own, so that a
            flip undoes what steering adds.
        length: The number of tokens of the suffix.
        steps: The number of steps; 0 keeps the random suffix that the search starts from.
        candidates: Replacements that a step tries, of one token each.
        top: Tokens for each place, by the gradient, that they are drawn from.
        randoms: Random suffixes that are reported beside it.
        seed: The seed of all draws.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.
        progress: As in ``collect``; a function is called with the number of steps that are done.

    Raises:
        DataError: There is no prompt, a prompt is a conversation where the model does not chat, fewer than two held-out
            prompts are on the vector's side of the threshold, or an argument is out of its range.
        PairingError: The vector is of another width than the model.
        SteeringError: The vector has norm 0.
    """
    check_number("coefficient", coefficient)
    if threshold is not None:
        check_number("threshold", threshold)
    for name, value in (("length", length), ("candidates", candidates), ("top", top), ("randoms", randoms)):
        check_range(name, value, 1, MAX_COUNT, whole=True)
    check_range("steps", steps, 0, MAX_COUNT, whole=True)
    made_for = (vector.provenance.get("model") or {}).get("name") or ""
    check_pairing(model, vector.hookpoint, vector.d_model, str(made_for), "vector")
    unit, norm = unit_and_norm(vector.direction)
    reported = prompts if held_out is None else held_out
    added = float(coefficient) * float(norm)

    def project(texts: Sequence[Text]) -> Float[Tensor, " texts"]:
        states = last_states(model, tokenizer, texts, [vector.hookpoint], batch_tokens)
        return states[vector.hookpoint] @ unit.double().cpu()

    plain = project(reported)
    threshold = float(plain.mean()) if threshold is None else float(threshold)
    counted = int((plain + added > threshold).sum())
    if counted < 2:
        raise DataError(
            f"{len(reported)} prompts of which {counted} is on the vector's side of threshold = {threshold:g}",
            "at least two whose sign can flip",
            "pass a lower threshold=, a larger coefficient=, or more prompts",
        )
    search = _Search(model, tokenizer, vector.hookpoint, unit, prompts, batch_tokens)
    generator = torch.Generator().manual_seed(seed)
    random = [search.random_suffix(length, generator) for _ in range(randoms)]
    ids, lowest = random[0], float(search.means([random[0]])[0])
    history = [lowest]
    with reporting(progress, "searching a suffix", steps) as report:
        for step in range(steps):
            if tried := search.replacements(ids, candidates, top, generator):
                means = search.means(tried)
                if float(means.min()) < lowest:
                    ids, lowest = tried[int(means.argmin())], float(means.min())
            history.append(lowest)
            report(step + 1)

    def with_ids(suffix: Sequence[int]) -> Float[Tensor, " prompts"]:
        text = search.text(suffix)
        return project([_with_suffix(prompt, text) for prompt in reported])

    others = torch.stack([with_ids(suffix) for suffix in random])
    return SuffixSearch(search.text(ids), tuple(ids), tuple(history), plain, with_ids(ids), others, added, threshold)


class _Search:
    """Prompts as tokens with a place for a suffix, and the projection of their last tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hookpoint: Hookpoint,
        unit: Float[Tensor, " d_model"],
        prompts: Sequence[Text],
        batch_tokens: int | None,
    ) -> None:
        self.model, self.tokenizer, self.hookpoint, self.unit = model, tokenizer, hookpoint, unit
        self.batch_tokens = tokens_in_batch(batch_tokens, input_device(model))
        rows = [row for batch in prompt_passes(model, tokenizer, prompts).batches for row in batch.rows]
        self.tail = _template_tail(model, tokenizer, prompts)
        self.heads: list[list[int]] = []
        for row in sorted(rows, key=lambda row: row.index):
            if self.tail and list(row.ids[-len(self.tail) :]) != self.tail:
                raise DataError(
                    f"{row.where}, after which the chat template writes other tokens than after {_MARK!r}",
                    "prompts that end in a user's message",
                    "pass texts, or conversations whose last message is a user's",
                )
            self.heads.append(list(row.ids[: len(row.ids) - len(self.tail)]))
        self.allowed = _allowed_tokens(tokenizer, model)
        first = prompts[0]
        self.context = first if isinstance(first, str) else first[-1]["content"]
        ids: Any = tokenizer(self.context, add_special_tokens=False)["input_ids"]
        self.context_ids: list[int] = list(ids)

    def text(self, suffix: Sequence[int]) -> str:
        """The suffix as it stands after a prompt, with the space that its first token may need."""
        before, whole = (
            self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (self.context_ids, [*self.context_ids, *suffix])
        )
        return str(whole)[len(before) :]

    def is_stable(self, suffix: Sequence[int]) -> bool:
        """Whether the suffix, written after a prompt and read again, is the same tokens."""
        again: Any = self.tokenizer(self.context + self.text(suffix), add_special_tokens=False)["input_ids"]
        return list(again) == [*self.context_ids, *suffix]

    def random_suffix(self, length: int, generator: torch.Generator) -> list[int]:
        """A random suffix that is stable, or the last of some that were drawn."""
        suffix: list[int] = []
        for _ in range(100):
            suffix = self.allowed[torch.randint(len(self.allowed), (length,), generator=generator)].tolist()
            if self.is_stable(suffix):
                break
        return suffix

    def replacements(
        self, suffix: Sequence[int], candidates: int, top: int, generator: torch.Generator
    ) -> list[list[int]]:
        """Suffixes with one token replaced, drawn among those that the gradient promises most of."""
        scores = self.gradient(suffix)[:, self.allowed]
        best = self.allowed[scores.topk(min(top, scores.shape[1]), largest=False).indices]
        drawn = torch.randperm(best.numel(), generator=generator).tolist()
        found: list[list[int]] = []
        for number in drawn:
            place, column = divmod(number, best.shape[1])
            changed = list(suffix)
            changed[place] = int(best[place, column])
            if changed != list(suffix) and self.is_stable(changed):
                found.append(changed)
            if len(found) == candidates:
                break
        return found

    @torch.no_grad()
    def means(self, suffixes: Sequence[Sequence[int]]) -> Float[Tensor, " suffixes"]:
        """The mean projection over prompts under each suffix, in float64."""
        rows = [[*head, *suffix, *self.tail] for suffix in suffixes for head in self.heads]
        found = torch.empty(len(rows), dtype=torch.float64)
        for start, ids, mask, last in self._batches(rows):
            h = record(self.model, ids, mask, [self.hookpoint])[self.hookpoint]
            found[start : start + len(ids)] = self._project(h, last).double().cpu()
        return found.view(len(suffixes), -1).mean(1)

    def gradient(self, suffix: Sequence[int]) -> Float[Tensor, "length vocabulary"]:
        """By how much each token, at each place of the suffix, raises the summed projection to first order."""
        embedding = self.model.get_input_embeddings()
        rows = [[*head, *suffix, *self.tail] for head in self.heads]
        total: Tensor | None = None
        for start, ids, mask, last in self._batches(rows):
            embedded, h = self._with_gradient(ids, mask, embedding)
            (slope,) = torch.autograd.grad(self._project(h, last).sum(), embedded)
            heads = torch.tensor([len(head) for head in self.heads[start : start + len(ids)]])
            places = (heads[:, None] + torch.arange(len(suffix))).to(slope.device)
            own = slope[torch.arange(len(ids), device=slope.device)[:, None], places].float().sum(0)
            total = own if total is None else total + own
        assert total is not None
        table: Any = embedding.weight  # up to a factor that all tokens share, what the embedding gives
        scores: Tensor = total.to(table.device) @ table.detach().float().T
        return scores.cpu()

    def _batches(
        self, rows: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]]:
        """(first row, ids, attention mask, index of the last token) of rows that fit together."""
        device = input_device(self.model)
        size = max(1, self.batch_tokens // max(map(len, rows)))
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            ids, mask = pad(chosen, self.tokenizer.pad_token_id or 0)
            yield start, ids.to(device), mask.to(device), torch.tensor([len(row) - 1 for row in chosen])

    def _project(self, h: Float[Tensor, "batch tokens d_model"], last: Int[Tensor, " batch"]) -> Tensor:
        return h[torch.arange(len(h), device=h.device), last.to(h.device)].float() @ self.unit.to(h.device)

    def _with_gradient(self, ids: Tensor, mask: Tensor, embedding: nn.Module) -> tuple[Tensor, Tensor]:
        """The embeddings of tokens, as leaves, and the activations at the hookpoint that depend on them."""
        seen: dict[str, Tensor] = {}
        module, is_input = resolve(self.model, self.hookpoint)

        def embed(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            seen["embedded"] = output.detach().requires_grad_()
            return seen["embedded"]

        def reach(value: Tensor) -> None:
            seen["h"] = reshape_by_token(value, *ids.shape)
            raise _Reached

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reach(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            reach(hidden_states_of(output))

        hooks: list[Hook] = [(embedding, False, embed), (module, is_input, before if is_input else after)]
        with registered(hooks):
            with suppress(_Reached):
                decoder_of(self.model)(input_ids=ids, attention_mask=mask, use_cache=False)
            return seen.pop("embedded"), seen.pop("h")  # calls, at which Ctrl-C is raised as in ``record``


def _with_suffix(prompt: Text, suffix: str) -> Text:
    """A prompt, or the last message of a conversation, with a suffix."""
    if isinstance(prompt, str):
        return prompt + suffix
    *before, last = prompt
    return [*before, {**last, "content": last["content"] + suffix}]


def _template_tail(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]) -> list[int]:
    """The tokens that a chat template writes after a user's message; none where the model does not chat.

    Raises DataError for conversations in that case.
    """
    if not is_chat_model(model, tokenizer):
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise DataError("a conversation for a model that does not chat", "prompts as texts")
        return []
    text = apply_template(tokenizer, [{"role": "user", "content": _MARK}], add_generation_prompt=True)
    ids: Any = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    return list(ids)


def _allowed_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Int[Tensor, " allowed"]:
    """The tokens that a suffix may hold: those that can be seen and are not special."""
    size = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    texts = tokenizer.batch_decode([[number] for number in range(size)])
    return torch.tensor(
        [
            number
            for number, text in enumerate(texts)
            if number not in special and text.strip() and text.isprintable() and "\ufffd" not in text
        ]
    )
