"""The receipt of a vector, composed of its parts, with the reason of each that was left out.

slip = fg.receipt(model, tokenizer, vec, 8.0, contrast=fg.load_contrast("love").held_out)
print(slip)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.data.chat import Text
from fgsteer.data.contrasts import ContrastSet
from fgsteer.data.shipped import load_neutral
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, FgsteerError, SteeringError
from fgsteer.errors.checks import check_number, checked
from fgsteer.evaluation.metrics.own_text import NEW_TOKENS, own_text_kl
from fgsteer.interventions.base import Intervention
from fgsteer.models.chat import is_chat_model
from fgsteer.models.pairing import check_pairing
from fgsteer.receipts.dose import CONTEXT, measure_dose
from fgsteer.receipts.drift import CONVERSATIONS, measure_drift
from fgsteer.receipts.inputs import wrong_way
from fgsteer.receipts.record import MAX_CHARACTERS, PARTS, OwnText, Receipt, parse_receipt
from fgsteer.receipts.refusals import measure_refusals
from fgsteer.receipts.rerouting import measure_rerouting
from fgsteer.receipts.retention import Choice, measure_retention
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
def receipt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    coefficient: float,
    *,
    make: Callable[[float], Intervention] | None = None,
    contrast: ContrastSet | str | Path | None = None,
    prompts: Sequence[Text] | None = None,
    max_new_tokens: int = NEW_TOKENS,
    harmful: Sequence[Text] | None = None,
    harmless: Sequence[Text] | None = None,
    refusal_tokens: Sequence[str | int] = (),
    conversations: Sequence[Sequence[str]] = CONVERSATIONS,
    choices: Sequence[Choice] | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    context: int = CONTEXT,
    parts: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> Receipt:
    """Measure what a vector at a strength does besides what it is for.

    The parts are: the relative dose at deployment length (``dose``); KL on the steered model's own text (``own_text``);
    the share of inputs that move the wrong way (``wrong_way``, with a ``contrast``); perplexity of plain text and
    questions with one right answer, and tasks of lm-eval where any are named (``retention``); over- and under-refusal
    (``refusals``, with requests); drift over the turns of a chat (``drift``); and rerouting of attention
    (``rerouting``). What cannot be measured is left out, with the reason.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vector: The vector.
        coefficient: Its coefficient.
        make: From a coefficient to the intervention; by default ``vector.add``, on replies alone where the model chats.
        contrast: Texts with and without the behavior, of which no vector was built from the held-out part.
        prompts: What own texts go on from, at least two; by default the shipped neutral prompts.
        max_new_tokens: The most tokens of an own text.
        harmful: Requests that should be refused.
        harmless: Requests that should not be refused.
        refusal_tokens: The first tokens of refusals.
        conversations: The user's turns of conversations, for drift.
        choices: Questions in place of the shipped ones.
        tasks: Tasks of lm-eval, which must then be installed.
        limit: Documents of each task.
        context: The tokens of the context at whose end the dose is measured.
        parts: The names of the parts that are measured; by default all.
        seed: The seed of own texts and of pairs of keys.
        progress: As in ``collect``; a function is called with the number of parts that are done.

    Raises:
        DataError: A part has another name.
        PairingError: The vector does not fit the model.
        SteeringError: The coefficient is so large that activations overflow.
    """
    check_number("coefficient", coefficient)
    wanted = list(PARTS if parts is None else parts)
    if isinstance(parts, str) or not set(wanted) <= set(PARTS):
        raise DataError(f"parts = {parts!r:.80}", f"some of {', '.join(PARTS)}")
    check_pairing(model, vector.hookpoint, vector.d_model, "", "vector")
    chats = is_chat_model(model, tokenizer)
    steering = (make or (lambda c: vector.add(c, scope="reply" if chats else "all")))(float(coefficient))
    if not isinstance(steering, Intervention):
        raise SteeringError(f"{type(steering).__name__} from make", "an intervention", "pass vector.add without a call")
    both: tuple[Any, Any] = (model, tokenizer)

    def own_text() -> OwnText:
        asked = _own_prompts(chats) if prompts is None else prompts
        own = own_text_kl(*both, asked, steering, max_new_tokens=max_new_tokens, seed=seed)
        return OwnText(own.kl, own.distinct_3grams, max_new_tokens)

    def inputs() -> Any:
        return wrong_way(*both, steering, _given("contrast", contrast))

    def refusals() -> Any:
        requests = _given("harmful", harmful), _given("harmless", harmless)
        return measure_refusals(*both, steering, *requests, _given("refusal_tokens", refusal_tokens or None))

    measures: dict[str, Callable[[], Any]] = {
        "dose": lambda: measure_dose(*both, steering, context=context),
        "own_text": own_text,
        "wrong_way": inputs,
        "retention": lambda: measure_retention(*both, steering, choices=choices, tasks=tasks, limit=limit),
        "refusals": refusals,
        "drift": lambda: measure_drift(*both, vector, steering, conversations=conversations),
        "rerouting": lambda: measure_rerouting(*both, vector, seed=seed),
    }
    method = str(vector.provenance.get("method", "bare"))
    kind, scope = type(steering).__name__, str(steering.scope)
    made = Receipt(method, str(vector.hookpoint), vector.norm, kind, scope, float(coefficient))
    with reporting(progress, "measuring parts of the receipt", len(wanted)) as report:
        for number, name in enumerate(wanted):
            try:
                made = _finite(replace(made, **{name: measures[name]()}), name)
            except FgsteerError as error:
                reason = " ".join(str(error).split())
                reason = reason if len(reason) <= MAX_CHARACTERS else f"{reason[: MAX_CHARACTERS - 1]}…"
                made = replace(made, left_out={**made.left_out, name: reason})
            report(number + 1)
    return made


def _given(name: str, value: Any) -> Any:
    """What the caller passed. Raises DataError for nothing."""
    if value is None:
        raise DataError(f"no {name}", f"{name}=, on which this is measured")
    return value


def _own_prompts(chats: bool) -> list[Text]:
    """The prompts that own texts go on from: openers, or in a chat a user's questions."""
    if not chats:
        return list(load_neutral()[1])
    return [[{"role": "user", "content": turns[0]}] for turns in CONVERSATIONS]


def _finite(made: Receipt, name: str) -> Receipt:
    """The receipt, whose numbers JSON can hold. Raises SteeringError for a part with others."""
    try:
        parse_receipt(made.as_dict())
    except ValueError as error:
        raise SteeringError(f"{name}: {error}", "finite numbers", "use a smaller coefficient") from error
    return made
