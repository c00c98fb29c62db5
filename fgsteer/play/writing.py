"""Writing: the texts of a plan, token by token, by the local model or by a server that steers.

for event in write_texts(session, plan): ...           {"event": "text", "column": "steered", "seed": 0, "at": 4, …}

Each text is what ``fg.generate`` gives for one prompt after ``torch.manual_seed(seed)``, so that the code on the page
and the command line write it again.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fgsteer.interventions import Intervention
from fgsteer.play.building import build_control, build_steering
from fgsteer.play.plan import Plan
from fgsteer.play.session import PlaySession
from fgsteer.play.turns import Event, Events
from fgsteer.steering.streaming import stream_tokens

Column = Literal["unsteered", "steered", "random"]
COLUMNS: tuple[Column, ...] = ("steered", "unsteered", "random")
"""What is written for each seed, in this order: what was changed is seen first."""


@dataclass
class Written:
    """The texts of a plan.

    Args:
        plan: What was asked for.
        texts: {(column, seed): text}.
        ids: {(column, seed): token ids}, of local models.
        steering: The interventions of each column.
        first_token_seconds: How long the first token of the first text took.
    """

    plan: Plan
    texts: dict[tuple[Column, int], str] = field(default_factory=dict)
    ids: dict[tuple[Column, int], tuple[int, ...]] = field(default_factory=dict)
    steering: dict[Column, list[Intervention]] = field(default_factory=dict)
    first_token_seconds: float | None = None


def write_texts(session: PlaySession, plan: Plan, written: Written) -> Events:
    """Write every text of a plan, and note them in ``written``.

    The unsteered texts of a prompt are kept, and written once. Closing the iterator ends generation at the next token.
    """
    written.steering = {"unsteered": [], "steered": build_steering(session, plan)}
    if plan.control:
        written.steering["random"] = build_control(session, plan)
    for seed in plan.seeds:
        for column in COLUMNS:
            if column not in written.steering or (column != "unsteered" and not written.steering[column]):
                continue
            kept: dict[str, Any] = {}
            if column == "unsteered":
                kept = session.kept("unsteered", _unsteered_key(plan, seed), dict)
            if not kept:
                with closing(_write_one(session, plan, written, column, seed)) as events:
                    kept |= yield from events
            else:
                yield {"event": "text", "column": column, "seed": seed, "at": 0, "text": kept["text"]}
            written.texts[column, seed], written.ids[column, seed] = kept["text"], kept["ids"]
            yield {"event": "written", "column": column, "seed": seed, "tokens": len(kept["ids"])}


def _unsteered_key(plan: Plan, seed: int) -> tuple[Any, ...]:
    drawn = seed if plan.temperature else 0
    return plan.prompt, plan.chat, plan.system, plan.max_new_tokens, plan.temperature, drawn


def _write_one(
    session: PlaySession, plan: Plan, written: Written, column: Column, seed: int
) -> Generator[Event, None, dict[str, Any]]:
    """Write one text; each event holds what follows the first ``at`` characters, which further tokens may change."""
    text: str = ""
    ids: tuple[int, ...] = ()
    with closing(_pieces(session, plan, written.steering[column], seed)) as pieces:
        started = time.perf_counter()
        for piece in pieces:
            if written.first_token_seconds is None:
                written.first_token_seconds = time.perf_counter() - started
            shown, (text, ids) = text, piece
            at = _common_length(shown, text)
            yield {"event": "text", "column": column, "seed": seed, "at": at, "text": text[at:]}
    return {"text": text, "ids": ids}


def _pieces(
    session: PlaySession, plan: Plan, steering: list[Intervention], seed: int
) -> Generator[tuple[str, tuple[int, ...]]]:
    """All of a text and its tokens so far, after each token."""
    if session.server is not None:
        yield from session.server.pieces(plan, steering, seed)
        return
    ids: list[int] = []
    text = ""
    devices = sorted({p.device for p in session.model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices) if plan.temperature else nullcontext():
        torch.manual_seed(seed)
        entry: Any = [steering] if steering else None
        generated = stream_tokens(session.model, session.tokenizer, plan.text, steering=entry, **plan.options)
        with closing(generated):
            for tokens in generated:
                ids += tokens
                text = str(session.tokenizer.decode(ids, skip_special_tokens=True))
                yield text.rstrip("\ufffd"), tuple(ids)  # bytes that are not a character yet
            if text.endswith("\ufffd"):
                yield text, tuple(ids)


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    for at, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return at
    return min(len(first), len(second))
