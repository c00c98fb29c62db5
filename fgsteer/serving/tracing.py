"""``POST /v1/steering/trace``: what steering did to each token of a text, from log-probabilities alone.

    {"prompt": "The next day", "max_tokens": 32, "vllm_xargs": {"steer": "love", "steer_scale": 200.0}}

A trace is two requests to the engine: one writes the text, steered, and the other reads it, unsteered. vLLM returns the
log-probabilities of each token and of the likeliest ones, and no activations, so the answer is a ``fg.Trace`` without
features, gates and doses, and without divergences, which need the whole vocabulary: ``fg.trace`` has all of them. Of a
text that is sampled at temperature 1, ``TracedText.log_ratio`` estimates the divergence without bias.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fgsteer.activations.tokens import special_starts
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import check_range, describe_value, is_whole_number
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.saes.examples import token_texts
from fgsteer.serving.control import Control
from fgsteer.serving.request import RequestedSteering, parse_request
from fgsteer.serving.sources import Stage
from fgsteer.storage.json_files import parse_json
from fgsteer.traces.parts import NextToken, TokenKind, TracedIntervention, TracedText, TracedToken
from fgsteer.traces.results import Trace
from fgsteer.traces.trace import TOP_TOKENS

MAX_TRACED_TOKENS = 1024
"""The tokens of a trace: those of the prompt and the new ones."""
MAX_TRACED_CHARS = 32768
"""The characters of its prompt."""
DEFAULT_NEW_TOKENS = 64
MAX_TEMPERATURE = 100.0
KEYS = ("prompt", "max_tokens", "temperature", "seed", "vllm_xargs")
LEFT_OUT = (
    "divergences, doses, gates, strengths and features: vLLM returns the log-probabilities of some tokens and no "
    "activations. fg.trace gives them in transformers."
)


@dataclass(frozen=True)
class TraceRequest:
    """What a request for a trace asks for.

    Args:
        prompt: A text, or the ids of its tokens, such as those of a rendered conversation.
        steering: The steer keys, as in "vllm_xargs".
        max_tokens: How many tokens are written at most.
        temperature: 0 takes the most probable token.
        seed: The seed of a text that is sampled.
    """

    prompt: str | tuple[int, ...]
    steering: Mapping[str, Any]
    max_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0


def parse_trace_request(body: bytes) -> TraceRequest:
    """The request for a trace that a body holds.

    Raises:
        DataError: It is no JSON object with the keys of one, or a prompt or a number is not within its bounds.
        SteeringError: It asks for no steering, or the steer keys make no sense.
    """
    expected = 'a JSON object such as {"prompt": "I think", "vllm_xargs": {"steer": "love"}}'
    try:
        asked = parse_json(body)
    except ValueError as error:
        raise DataError(f"a body that cannot be read: {str(error)!a:.100}", expected) from error
    if not isinstance(asked, dict):
        raise DataError(describe_value(asked), expected)
    if unknown := sorted(set(asked) - set(KEYS)):
        raise DataError(
            f"the keys {', '.join(unknown)!a:.60} in a request for a trace", f"keys among {', '.join(KEYS)}"
        )
    extra = asked.get("vllm_xargs")
    if not isinstance(extra, dict) or not parse_request(extra):
        raise SteeringError(
            "a request for a trace without steering", "the steer keys in vllm_xargs", 'add {"steer": "NAME"}'
        )
    numbers = {"max_tokens": DEFAULT_NEW_TOKENS, "temperature": 0.0, "seed": 0}
    numbers |= {name: asked[name] for name in numbers if name in asked}
    check_range("max_tokens", numbers["max_tokens"], 1, MAX_TRACED_TOKENS, whole=True)
    check_range("temperature", numbers["temperature"], 0.0, MAX_TEMPERATURE)
    check_range("seed", numbers["seed"], 0, MAX_COUNT, whole=True)
    temperature = float(numbers["temperature"])
    return TraceRequest(
        _parse_prompt(asked.get("prompt")), extra, int(numbers["max_tokens"]), temperature, int(numbers["seed"])
    )


def _parse_prompt(prompt: Any) -> str | tuple[int, ...]:
    """The prompt of a request. Raises DataError for anything but a text or ids of bounded length."""
    if isinstance(prompt, str) and 0 < len(prompt) <= MAX_TRACED_CHARS:
        return prompt
    if isinstance(prompt, list) and 0 < len(prompt) <= MAX_TRACED_TOKENS and all(map(is_whole_number, prompt)):
        return tuple(prompt)
    got = f"{len(prompt):,} characters" if isinstance(prompt, str) else describe_value(prompt)
    raise DataError(
        f"{got} as prompt",
        f"a text of 1 to {MAX_TRACED_CHARS:,} characters, or a list of 1 to {MAX_TRACED_TOKENS:,} token ids",
    )


async def trace_request(client: Any, control: Control, asked: TraceRequest) -> dict[str, Any]:
    """The trace of a request, as ``Trace.as_dict()``. Cancelling it ends what the engine does for it.

    Args:
        client: The engine's ``AsyncLLM``, whose requests ``control`` admits.
        control: What is served.
        asked: The request.

    Raises:
        DataError: Prompt and new tokens together are more than a trace or the model's window holds.
        SteeringError: Nothing is loaded under a name, or the server returns other log-probabilities than the model's.
    """
    steered_by = [row for one in parse_request(asked.steering) for row in _describe(one, control.stages(one))]
    config, tokenizer = client.vllm_config.model_config, client.get_tokenizer()
    if (mode := getattr(config, "logprobs_mode", "raw_logprobs")) != "raw_logprobs":
        raise SteeringError(
            f"a server that returns {mode}", "one that returns raw_logprobs", "start it without --logprobs-mode"
        )
    ids = tokenizer.encode(asked.prompt) if isinstance(asked.prompt, str) else list(asked.prompt)
    most = min(MAX_TRACED_TOKENS, config.max_model_len - 1)  # to read a text, an engine must write one token more
    if not ids:
        raise DataError("a prompt of no tokens", "a prompt that the model's tokenizer makes tokens of")
    if not 0 <= min(ids) <= max(ids) < config.get_vocab_size():
        raise DataError("a token id that the model does not have", f"ids from 0 to {config.get_vocab_size() - 1}")
    if len(ids) + asked.max_tokens > most:
        raise DataError(
            f"{len(ids):,} tokens of the prompt and max_tokens = {asked.max_tokens:,}",
            f"at most {most:,} tokens in a trace of this server",
            "shorten the prompt, or ask for fewer tokens",
        )
    steered = await _answer(
        client, ids, asked.steering, max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed
    )
    written = list(steered.outputs[0].token_ids)
    unsteered = await _answer(client, [*ids, *written], {}, max_tokens=1)
    after = [*steered.prompt_logprobs, *steered.outputs[0].logprobs]
    # a long text takes a quarter of a second, which others' streams need not wait
    text = await asyncio.to_thread(
        _traced_text, tokenizer, [*ids, *written], len(ids), unsteered.prompt_logprobs, after
    )
    settings = {"max_tokens": asked.max_tokens, "temperature": asked.temperature, "seed": asked.seed}
    return Trace(
        prompts=(asked.prompt if isinstance(asked.prompt, str) else str(tokenizer.decode(ids)),),
        texts=(text,),
        interventions=tuple(steered_by),
        settings={"model": config.served_model_name, **settings, "left out": LEFT_OUT},
    ).as_dict()


def _describe(asked: RequestedSteering, stages: Sequence[Stage]) -> list[TracedIntervention]:
    """What a steering does, in words: a row for each of its steps."""
    name = asked.name if asked.vector is None else "a vector in the request"
    return [
        TracedIntervention(
            kind=asked.operation or ("as loaded" if stage.rows[0].norm is None else "add"),
            hookpoint=", ".join(str(rows.hookpoint) for rows in stage.rows),
            scope=str(stage.scope if asked.scope is None else asked.scope),
            gate="as loaded" if any(rows.conditions for rows in stage.rows) else "",
            description=f"{name}, scale {asked.scale:g}",
        )
        for stage in stages
    ]


async def _answer(client: Any, ids: Sequence[int], steering: Mapping[str, Any], **options: Any) -> Any:
    """The last output of a request, with the log-probabilities of all its tokens. Raises SteeringError if refused."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
        logprobs=TOP_TOKENS,
        prompt_logprobs=TOP_TOKENS,
        detokenize=False,
        extra_args=dict(steering),
        **{"temperature": 0.0, **options},
    )
    outputs = client.generate({"prompt_token_ids": list(ids)}, params, f"trace-{secrets.token_hex(8)}")
    try:
        return [output async for output in outputs][-1]  # the only one
    except VLLMClientError as error:
        raise SteeringError(str(error.args[0])) from error


def _traced_text(
    tokenizer: Any,
    ids: Sequence[int],
    prompt_tokens: int,
    before: Sequence[Mapping[int, Any] | None],
    after: Sequence[Mapping[int, Any] | None],
) -> TracedText:
    """A text with vLLM's log-probabilities of its tokens, {token id: ``Logprob``} in each place, None in the first."""
    specials = special_starts(tokenizer)
    tokens = []
    for place, (text, old, new) in enumerate(zip(token_texts(tokenizer, ids), before, after, strict=True)):
        kind: TokenKind = "generated" if place >= prompt_tokens else "prompt"
        tokens.append(
            TracedToken(
                id=ids[place],
                text=text,
                kind="special" if ids[place] in specials else kind,
                log_probability_before=_log_probability(old, ids[place]),
                log_probability_after=_log_probability(new, ids[place]),
                kl_steered_unsteered=None,
                kl_unsteered_steered=None,
                top_before=_likeliest(tokenizer, old),
                top_after=_likeliest(tokenizer, new),
                dose=math.nan,
            )
        )
    completion = str(tokenizer.decode(ids[prompt_tokens:], skip_special_tokens=True))
    return TracedText(0, "steered", completion, prompt_tokens, tuple(tokens))


def _log_probability(by_id: Mapping[int, Any] | None, token: int) -> float | None:
    return None if by_id is None else float(by_id[token].logprob)


def _likeliest(tokenizer: Any, by_id: Mapping[int, Any] | None) -> tuple[NextToken, ...]:
    """The likeliest tokens, most likely first. vLLM adds the token itself, where it is not among them."""
    ranked = sorted((by_id or {}).items(), key=lambda entry: -entry[1].logprob)[:TOP_TOKENS]
    return tuple(NextToken(token, str(tokenizer.decode([token])), float(one.logprob)) for token, one in ranked)
