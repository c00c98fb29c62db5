"""Which candidate is the refusal direction: three scores for each, and the rule that chooses.

found = select_direction(model, tokenizer, refused, answered, refusal_tokens=["I"], held_out=(refused2, answered2))
print(found.chosen, found.vector)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.data.chat import Text
from fgsteer.directions.candidates import candidate_directions, parse_positions
from fgsteer.directions.prompts import first_tokens, log_odds, prompt_passes, refusal_scores
from fgsteer.directions.removal import ablate_everywhere
from fgsteer.display.progress import Progress, reporting
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError, FgsteerWarning, SelectionError
from fgsteer.errors.checks import check_range, checked, describe_value, is_whole_number, warn
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.likelihood.passes import TextPasses
from fgsteer.methods.provenance import provenance
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.pairing import model_identity
from fgsteer.storage.files import refuse_damaged
from fgsteer.storage.json_files import read_json
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_KL, MIN_INDUCE, DEPTH = 0.1, 0.0, 0.8  # of the paper's rule
STORED_SCORES = ("refusal", "steering", "kl_div")  # bypass, induce and KL, as the paper's code calls them
KL_EPSILON = 1e-6  # that of the paper's code


@dataclass(frozen=True, repr=False)
class DirectionScore(OneLineRepr):
    """The scores of a candidate direction, each a mean over held-out requests.

    Args:
        position: The token that it was read at, −1 for the prompt's last.
        layer: The block at whose input it was read.
        bypass: The log-odds of a refusal of refused requests with the direction ablated; lower is better.
        induce: The log-odds of a refusal of answered requests with the direction added at its layer.
        kl: The divergence ``KL(unsteered‖ablated)`` after answered requests, in nats.
    """

    position: int
    layer: int
    bypass: float
    induce: float
    kl: float

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {
            "position": self.position,
            "layer": self.layer,
            "bypass": self.bypass,
            "induce": self.induce,
            "KL": self.kl,
        }


@dataclass(frozen=True, eq=False, repr=False)
class DirectionSelection(OneLineRepr):
    """A refusal direction, and what it was chosen among.

    Args:
        vector: The direction with its norm, at the input of its block.
        chosen: Its scores.
        scores: Those of every candidate.
        refused: How many of the refused requests remained, of those that were built from and of those held out.
        answered: The same of the answered ones.
    """

    vector: SteeringVector
    chosen: DirectionScore
    scores: Table[DirectionScore]
    refused: tuple[int, int]
    answered: tuple[int, int]


@checked
def load_direction_scores(path: str | Path) -> Table[DirectionScore]:
    """Load the scores of candidates from the ``direction_evaluations.json`` that the paper's code writes.

    Args:
        path: The file, a list of rows with position, layer, refusal_score (bypass), steering_score (induce) and
            kl_div_score.

    Raises:
        FormatError: The file is missing, damaged, or of another kind.
    """
    with refuse_damaged(path, "a list of rows with position, layer, refusal_score, steering_score and kl_div_score"):
        return Table(
            DirectionScore(
                int(row["position"]), int(row["layer"]), *(float(row[f"{name}_score"]) for name in STORED_SCORES)
            )
            for row in read_json(path)
        )


@checked
def choose_direction(
    scores: Iterable[DirectionScore],
    layers: int,
    *,
    max_kl: float | None = MAX_KL,
    min_induce: float | None = MIN_INDUCE,
    depth: float = DEPTH,
) -> DirectionScore:
    """The candidate of smallest bypass score, among those that the paper's filter leaves (arXiv 2406.11717).

    Left out are scores that are not numbers, layers from ``⌊depth · layers⌋`` on, a KL above ``max_kl``, and an induce
    score below ``min_induce``.

    Args:
        scores: The candidates' scores, such as stored ones.
        layers: The number of the model's blocks.
        max_kl: The largest KL divergence, in nats; None for any.
        min_induce: The smallest induce score; None for any.
        depth: The share of blocks, from the first on, that directions are taken from.

    Raises:
        SelectionError: No candidate is left; the error says how many each condition left out.
        DataError: A row is no score, or an argument is out of its range.
    """
    rows = list(scores)
    if others := [row for row in rows if not isinstance(row, DirectionScore)]:
        raise DataError(describe_value(others[0]), "scores of directions", "load stored ones: load_direction_scores")
    check_range("layers", layers, 1, MAX_COUNT, whole=True)
    check_range("depth", depth, 0, 1)
    for name, bound in (("max_kl", max_kl), ("min_induce", min_induce)):
        if bound is not None:
            check_range(name, bound, -sys.float_info.max, sys.float_info.max)
    failed: dict[str, Callable[[DirectionScore], bool]] = {
        "not numbers": lambda s: not all(map(math.isfinite, (s.bypass, s.induce, s.kl))),
        f"from block {int(depth * layers)} on": lambda s: s.layer >= int(depth * layers),
        f"a KL above {max_kl}": lambda s: max_kl is not None and s.kl > max_kl,
        f"an induce score below {min_induce}": lambda s: min_induce is not None and s.induce < min_induce,
    }
    left = [row for row in rows if not any(test(row) for test in failed.values())]
    if not left:
        counts = "; ".join(f"{what}: {sum(map(test, rows))}" for what, test in failed.items())
        raise SelectionError(
            f"{count(len(rows), 'candidate')}, none of which the filter leaves ({counts})",
            "at least one that passes",
            "check refusal_tokens and the requests, or pass other bounds: max_kl=, min_induce=, depth=",
        )
    return min(left, key=lambda row: row.bypass)


@checked
@torch.no_grad()
def select_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refused: Sequence[Text],
    answered: Sequence[Text],
    *,
    refusal_tokens: Sequence[str | int],
    held_out: tuple[Sequence[Text], Sequence[Text]],
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    filter_requests: bool = True,
    max_kl: float | None = MAX_KL,
    min_induce: float | None = MIN_INDUCE,
    depth: float = DEPTH,
    batch_tokens: int | None = None,
    progress: Progress = None,
) -> DirectionSelection:
    """Find the refusal direction: the difference of means whose removal best stops refusals (arXiv 2406.11717).

    ``r[p, ℓ] = mean_refused h − mean_answered h`` at resid_pre ℓ and position p. On held-out requests each candidate
    has three scores: bypass, the log-odds of a refusal where r̂ is ablated everywhere; induce, those of answered
    requests where r is added at its layer; and KL, how far ablation moves the answered ones. ``choose_direction``
    chooses.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        refused: Requests that it refuses: texts, which a chat model gets as a user's messages, or conversations.
        answered: Requests that it answers.
        refusal_tokens: The first tokens of its refusals, as texts of one token each or as ids.
        held_out: Further (refused, answered) requests, on which candidates are scored.
        positions: As in ``candidate_directions``.
        layers: The blocks whose inputs are tried; by default those that ``depth`` allows. A direction at block 0 is
            left out, because there it depends on the template's token alone.
        filter_requests: Whether requests are left out that the model does not treat as named: refused ones with a
            score of 0 or less, and answered ones with one of 0 or more.
        max_kl: As in ``choose_direction``.
        min_induce: As in ``choose_direction``.
        depth: As in ``choose_direction``.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.
        progress: As in ``collect``, by candidates.

    Returns:
        The vector at resid_pre of its layer, with the scores of all candidates.

    Raises:
        DataError: No request is left on a side, a token or a position is none, or a layer is none of the model's.
        SelectionError: No candidate passes the filter.
        HookpointError: The model's family has no known sublayers' outputs, which ablation needs.
    """
    blocks = len(blocks_of(model))
    held_out = _parse_held_out(held_out, refused, answered)
    places = parse_positions(model, tokenizer, positions)
    depths = _parse_layers(layers, blocks, depth)
    ids = first_tokens(tokenizer, refusal_tokens)
    sides = [[refused, held_out[0]], [answered, held_out[1]]]
    if filter_requests:
        sides = [
            [_as_named(model, tokenizer, part, ids, above=above, batch_tokens=batch_tokens) for part in side]
            for side, above in zip(sides, (True, False), strict=True)
        ]
    directions = candidate_directions(
        model, tokenizer, sides[0][0], sides[1][0], positions=places, batch_tokens=batch_tokens
    )
    scorer = _Scorer(
        model,
        prompt_passes(model, tokenizer, sides[0][1], batch_tokens=batch_tokens),
        prompt_passes(model, tokenizer, sides[1][1], batch_tokens=batch_tokens),
        ids,
    )
    rows: Table[DirectionScore] = Table()
    with reporting(progress, "scoring directions", len(places) * len(depths)) as report:
        for number, place in enumerate(places):
            for layer in depths:
                rows.append(scorer.score(place, layer, directions[number, layer]))
                report(len(rows))
    chosen = choose_direction(rows, blocks, max_kl=max_kl, min_induce=min_induce, depth=depth)
    settings = {"position": chosen.position, "refusal_tokens": ids, "filter_requests": filter_requests}
    about = {**provenance("refusal_direction", settings), "model": model_identity(model)}
    vector = SteeringVector(
        directions[places.index(chosen.position), chosen.layer].float(),
        Hookpoint(chosen.layer, "resid_pre"),
        provenance=about,
    )
    kept = [(len(side[0]), len(side[1])) for side in sides]
    return DirectionSelection(vector, chosen, rows, *kept)


def _parse_layers(layers: Sequence[int] | None, blocks: int, depth: float) -> list[int]:
    """The blocks that are tried. Raises DataError for one that the model lacks, and for block 0."""
    check_range("depth", depth, 0, 1)
    if layers is None:
        chosen = list(range(1, int(depth * blocks)))
    else:
        chosen = list(layers) if isinstance(layers, list | tuple | range) else []
        if not all(is_whole_number(layer) and 1 <= layer < blocks for layer in chosen):
            chosen = []
    if not chosen or len(set(chosen)) < len(chosen):
        raise DataError(f"layers {layers!r:.60}", f"a list of layers from 1 to {blocks - 1}, each once")
    return [int(layer) for layer in chosen]


def _parse_held_out(held_out: object, refused: Sequence[Text], answered: Sequence[Text]) -> tuple[list[Any], list[Any]]:
    """Held-out requests of both sides. Raises DataError for others; warns of such that directions are built from."""
    if not isinstance(held_out, list | tuple) or len(held_out) != 2:
        raise DataError(
            describe_value(held_out), "(refused, answered), two lists of requests", "pass both as held_out="
        )
    for name, own, others in (("refused", held_out[0], refused), ("answered", held_out[1], answered)):
        if isinstance(own, list | tuple) and isinstance(others, list | tuple):
            twice = sum(request in others for request in own)
            if twice:
                warn(
                    f"{count(twice, 'held-out request')} of the {name} ones are among those that directions are built "
                    "from, so that their scores flatter. Hold out others.",
                    FgsteerWarning,
                )
    return held_out[0], held_out[1]


def _as_named(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    ids: Sequence[int],
    *,
    above: bool,
    batch_tokens: int | None,
) -> list[Text]:
    """The requests that the model refuses (``above``) or answers. Raises DataError where none is left."""
    (scores,) = refusal_scores(model, tokenizer, prompts, ids, batch_tokens=batch_tokens).tolist()
    left = [prompt for prompt, score in zip(prompts, scores, strict=True) if (score > 0 if above else score < 0)]
    if not left:
        raise DataError(
            f"{count(len(prompts), 'request')} of which the model {'refuses' if above else 'answers'} none, by the "
            f"probability of its first token",
            f"some requests that it {'refuses' if above else 'answers'}",
            "check refusal_tokens, or pass filter_requests=False",
        )
    return left


class _Scorer:
    """Scores candidates on held-out requests, whose unsteered distributions are computed once."""

    def __init__(self, model: PreTrainedModel, refused: TextPasses, answered: TextPasses, ids: Sequence[int]) -> None:
        self.model, self.refused, self.answered, self.ids = model, refused, answered, ids
        self.unsteered = [
            logits[0].float().softmax(-1).double().cpu() for _, _, logits in answered.scored_logits([None])
        ]

    def score(self, position: int, layer: int, direction: Float[Tensor, " d_model"]) -> DirectionScore:
        """The three scores of a candidate; nan for a zero direction."""
        if not float(direction.norm()) > 0:
            return DirectionScore(position, layer, math.nan, math.nan, math.nan)
        vector = SteeringVector(direction.float(), Hookpoint(layer, "resid_pre"))
        ablated = ablate_everywhere(self.model, vector)
        bypass = torch.cat([log_odds(logits[0], self.ids) for _, _, logits in self.refused.scored_logits([ablated])])
        added = [vector.add(1.0, bos=True)]
        induce = torch.cat([log_odds(logits[0], self.ids) for _, _, logits in self.answered.scored_logits([added])])
        kl = torch.cat(
            [
                divergence(base, logits[0])
                for base, (_, _, logits) in zip(self.unsteered, self.answered.scored_logits([ablated]), strict=True)
            ]
        )
        return DirectionScore(position, layer, float(bypass.mean()), float(induce.mean()), float(kl.mean()))


def divergence(p: Float[Tensor, "n vocabulary"], logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """``Σ p (log(p + ε) − log(q + ε))``, ε = 1e-6 as in the paper's code, in float64."""
    q = logits.float().softmax(-1).double().cpu()
    return (p * (torch.log(p + KL_EPSILON) - torch.log(q + KL_EPSILON))).sum(-1)
