"""``trace``: what steering did to each token of prompts and completions.

found = trace(model, tokenizer, ["I think that"], vec.add(8.0), sae=sae, top=6, max_new_tokens=32)
print(found); found.write("trace.html")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgsteer.activations.tokens import special_starts
from fgsteer.data.chat import Text, last_text
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import check_range, checked, describe_value, is_whole_number
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.interventions.base import Intervention
from fgsteer.models.pairing import check_pairing
from fgsteer.saes.examples import token_texts
from fgsteer.saes.sae import SAE
from fgsteer.steering.entries import Entry, checked_rows, interventions_of
from fgsteer.steering.generation import parse_prompts
from fgsteer.traces.parts import (
    NextToken,
    TokenAction,
    TokenKind,
    TracedFeature,
    TracedIntervention,
    TracedText,
    TracedToken,
)
from fgsteer.traces.passes import NextTokens, compare_next_tokens, run_text, token_actions
from fgsteer.traces.results import Trace
from fgsteer.traces.tokens import Row, given_rows, written_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_FEATURES = 64
"""The features whose activations a trace holds."""
TOP_TOKENS = 5
"""The likeliest tokens that a trace holds of each place."""
FeatureValues = tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]  # before and after, by token
AT_ONCE = 512  # tokens that are encoded by an SAE together


@checked
def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[Text],
    steering: Entry = None,
    *,
    sae: SAE | None = None,
    completions: Sequence[str] | None = None,
    features: Sequence[int] | None = None,
    top: int = 8,
    seed: int = 0,
    **options: Any,
) -> Trace:
    """What steering did to each token of texts: activations, gates, doses, log-probabilities, before and after.

    Each text is read twice, by the unsteered and by the steered model, in one pass over prompt and completion in which
    the completion's tokens count as generated ones. Without ``completions`` each prompt has two texts: what the steered
    model writes, which are the texts of ``fg.generate`` after ``torch.manual_seed(seed)``, and what the unsteered one
    writes. What generation rounds otherwise than one pass does is not in these numbers.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: A text, or a list of texts or of conversations.
        steering: One intervention, or a list of them that compose, for every prompt; None for none.
        sae: An SAE whose features are read, at its hookpoint after what acts there.
        completions: One text for each prompt, which follows it as it is.
        features: The features that are read, by id. By default those that steering changes most.
        top: How many features are chosen, by their mean ``|f_after − f_before|`` over all tokens that are not special;
            where steering changes none, by their mean activation.
        seed: The seed of the texts that are written, where ``do_sample=True`` is among the options.
        **options: What ``model.generate`` takes, such as ``max_new_tokens``.

    Returns:
        The trace; ``as_dict()``, ``page()`` and ``write(path)`` make JSON and a page of it.

    Raises:
        DataError: There are no prompts, other numbers of completions, an empty one, options beside completions, or more
            tokens than a trace holds.
        SelectionError: A feature is not one of the SAE's, or there are features and no SAE.
        SteeringError: There is a ``CacheSteering``, which acts while a text is written and in no pass over all of it;
            or ``generate`` raises it.
        HookpointError, PairingError: An intervention or the SAE does not fit the model.
    """
    texts, items = parse_prompts(prompts), interventions_of(steering)
    checked_rows(model, items, False)
    chosen = check_features(sae, features, top)
    if sae is not None:
        check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    if not texts:
        raise DataError("no prompts", "at least one prompt to trace")
    check_range("seed", seed, -MAX_COUNT, MAX_COUNT, whole=True)
    if completions is None:
        rows = written_rows(model, tokenizer, texts, steering, seed, options)
    else:
        rows = given_rows(model, tokenizer, texts, _check_completions(completions, len(texts), options))
    found = [_read_row(model, row, items, sae) for row in rows]
    specials = special_starts(tokenizer)
    traced, values = ([], [((), ())] * len(rows)) if sae is None else read_features(sae, chosen, top, found, specials)
    return Trace(
        tuple(map(last_text, texts)),
        tuple(_traced_text(tokenizer, one, of_row, specials) for one, of_row in zip(found, values, strict=True)),
        tuple(_describe(item) for item in items),
        tuple(traced),
        "" if sae is None else str(sae.input_hookpoint),
        _settings(model, sae, completions is None, seed, options),
    )


@dataclass(frozen=True, eq=False)
class _RowReading:
    """What both passes over one text gave, token by token."""

    row: Row
    places: list[NextTokens]
    actions: list[tuple[TokenAction, ...]]
    doses: list[float]
    before: Tensor | None
    after: Tensor | None


def _read_row(model: PreTrainedModel, row: Row, items: Sequence[Intervention], sae: SAE | None) -> _RowReading:
    hookpoint = None if sae is None else sae.input_hookpoint
    before, after = (run_text(model, row, entry, hookpoint) for entry in ((), items))
    order = sorted(range(len(items)), key=lambda number: items[number].hookpoint)  # that in which a block applies them
    actions, doses = token_actions(after.steps, order, len(row.ids))
    places = compare_next_tokens(before.logits, after.logits, row.ids, TOP_TOKENS)
    return _RowReading(row, places, actions, doses, before.states, after.states)


def _traced_text(
    tokenizer: PreTrainedTokenizerBase,
    found: _RowReading,
    features: FeatureValues,
    specials: frozenset[int],
) -> TracedText:
    """A text with all that was read of it."""
    row = found.row
    texts = token_texts(tokenizer, row.ids)
    before, after = (values or ((),) * len(texts) for values in features)
    tokens = []
    for n, text in enumerate(texts):
        place = found.places[n - 1] if n else None
        kind: TokenKind = "generated" if n >= row.prompt_tokens else "prompt"
        tokens.append(
            TracedToken(
                row.ids[n],
                text,
                "special" if row.ids[n] in specials else kind,
                place.before if place else None,
                place.after if place else None,
                place.kl_steered_unsteered if place else None,
                place.kl_unsteered_steered if place else None,
                _next_tokens(tokenizer, place.top_before) if place else (),
                _next_tokens(tokenizer, place.top_after) if place else (),
                found.doses[n],
                found.actions[n],
                tuple(before[n]),
                tuple(after[n]),
            )
        )
    return TracedText(row.prompt, row.source, row.completion, row.prompt_tokens, tuple(tokens))


def _next_tokens(tokenizer: PreTrainedTokenizerBase, top: Sequence[tuple[int, float]]) -> tuple[NextToken, ...]:
    return tuple(NextToken(token, str(tokenizer.decode([token])), value) for token, value in top)


def read_features(
    sae: SAE, chosen: Sequence[int] | None, top: int, found: Sequence[_RowReading], specials: frozenset[int]
) -> tuple[list[TracedFeature], list[FeatureValues]]:
    """The features that a trace holds, and their activations before and after at each token of each text.

    All features are encoded to choose among them, some tokens at a time; only those that are chosen are kept.
    """
    words = [torch.tensor([token not in specials for token in one.row.ids]) for one in found]
    sums = torch.zeros(3, sae.d_sae, dtype=torch.float64)  # before, after, of changes
    for one, word in zip(found, words, strict=True):
        for before, after in _encoded(sae, one, word):
            for part, encoded in zip(sums, (before, after, (after - before).abs()), strict=True):
                part += encoded.double().sum(0).cpu()
    means = sums / max(1, sum(int(word.sum()) for word in words))
    if chosen is None:
        scores = means[2] if means[2].any() else means[0]
        chosen = scores.topk(min(top, int((scores > 0).sum()))).indices.tolist()
    features = [TracedFeature(j, sae.labels.get(j, ""), float(means[0][j]), float(means[1][j])) for j in chosen]
    values: list[FeatureValues] = []
    for one in found:
        pieces = [(before[:, chosen], after[:, chosen]) for before, after in _encoded(sae, one)]
        of_text = [torch.cat(parts).tolist() for parts in zip(*pieces, strict=True)]
        values.append((of_text[0], of_text[1]))
    return features, values


def _encoded(sae: SAE, found: _RowReading, mask: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The features of a text's tokens, before and after, some tokens at a time."""
    assert found.before is not None
    assert found.after is not None
    wide = sae.to(found.before.device, torch.float32)
    for start in range(0, len(found.before), AT_ONCE):
        parts = [states[start : start + AT_ONCE] for states in (found.before, found.after)]
        if mask is not None:
            parts = [part[mask[start : start + AT_ONCE].to(part.device)] for part in parts]
        before, after = (wide.encode(part.to(found.before.device).float()) for part in parts)
        yield before, after


def check_features(sae: SAE | None, features: Sequence[int] | None, top: int) -> list[int] | None:
    """The ids of the features that are asked for, None for those that change most. Raises DataError, SelectionError."""
    check_range("top", top, 1, MOST_FEATURES, whole=True)
    if features is None:
        return None
    if sae is None:
        raise SelectionError(
            "features and no SAE", "the SAE whose features they are", "pass sae=, or leave features out"
        )
    if not isinstance(features, list | tuple | range) or not 0 < len(features) <= MOST_FEATURES:
        raise DataError(
            f"features = {features!r:.60}", f"a list of 1 to {MOST_FEATURES} ids of features", "pass features=[12, 40]"
        )
    for feature in features:
        if not is_whole_number(feature) or not 0 <= feature < sae.d_sae:
            raise SelectionError(
                f"{describe_value(feature)} among features",
                f"ids from 0 to {sae.d_sae - 1}",
                "look features up with fg.find_features",
            )
    return list(dict.fromkeys(int(feature) for feature in features))


def _check_completions(completions: Sequence[str], prompts: int, options: dict[str, Any]) -> Sequence[str]:
    """The completions. Raises DataError."""
    if options:
        raise DataError(
            f"completions beside {', '.join(sorted(options))!r:.100}",
            "either completions, or options of generation",
            "leave one of them out",
        )
    if isinstance(completions, str) or not isinstance(completions, Sequence) or len(completions) != prompts:
        other = "one text" if isinstance(completions, str) else describe_value(completions)
        got = f"{len(completions)} completions" if isinstance(completions, list | tuple) else other
        raise DataError(
            f"{got} for {count(prompts, 'prompt')}", "one completion for each prompt", "pass a list of as many texts"
        )
    for number, text in enumerate(completions):
        if not isinstance(text, str) or not text:
            raise DataError(f"{describe_value(text)} as completion {number}", "a text of at least one character")
    return completions


def _describe(item: Intervention) -> TracedIntervention:
    gate = "" if item.when is None else repr(item.when)
    return TracedIntervention(type(item).__name__, str(item.hookpoint), str(item.scope), gate, repr(item))


def _settings(
    model: PreTrainedModel, sae: SAE | None, written: bool, seed: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What was asked for, as plain JSON: of the options those that are numbers, texts or truth values."""
    made: dict[str, Any] = {"seed": int(seed)} if written else {}
    made |= {key: value for key, value in options.items() if isinstance(value, str | int | float | bool)}
    return {
        "model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "dtype": str(model.dtype).removeprefix("torch."),
        **({} if sae is None else {"sae": sae.source or repr(sae)}),
        **made,
    }
