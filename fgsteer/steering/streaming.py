"""Steered text as it is generated, word by word.

for piece in stream(model, tokenizer, "I think", steering=vec.add(8.0), max_new_tokens=32):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from contextvars import copy_context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgsteer.data.chat import Text, check_text
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import checked
from fgsteer.models.claims import is_claimed
from fgsteer.steering.entries import Steering, checked_rows, is_per_prompt
from fgsteer.steering.generation import check_options, prompt_inputs
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The end of a text that further tokens may change: a word that is not complete, the space before it
# (tokenizers may take it away again), and bytes that are not a character yet.
_UNSETTLED = re.compile(r"\s*[!-~]*\ufffd*\Z")
_ROW_OPTIONS = ("num_beams", "num_return_sequences")


@checked
def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    *,
    steering: Steering = None,
    **options: Any,
) -> Iterator[str]:
    """Generate the continuation of one prompt, steered, and yield it piece by piece.

    The model generates in a thread of its own from the first piece on, steered all the while; other steer blocks and
    passes on it raise SteeringError meanwhile. Closing the iterator, or leaving a loop over it, ends generation at the
    next token and frees the model.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, or a processor that has one.
        prompt: A text, or a conversation, of which the assistant's last message is continued.
        steering: One intervention or ``CacheSteering``, or a list of them, which compose.
        **options: What ``model.generate`` takes, such as ``max_new_tokens``; for one sequence, without beams.

    Returns:
        An iterator of pieces, each yielded as soon as its words are complete; joined, they are what ``generate`` gives.

    Raises:
        DataError: The prompt is no text and no conversation, or options ask for beams or several sequences. Like the
            errors below, this is raised before anything runs; what fails during generation is raised by the iterator.
        SteeringError: A steer block already steers the model.
        HookpointError: The model does not have the hookpoint.
        PairingError: An intervention has another width than the model.
    """
    return _settled_pieces(tokenizer, stream_tokens(model, tokenizer, prompt, steering=steering, **options))


def stream_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    *,
    steering: Steering = None,
    **options: Any,
) -> Generator[list[int]]:
    """Generate the continuation of one prompt, steered, and yield its tokens' ids as they come.

    The arguments, what closing does and the errors are those of ``stream``.
    """
    check_options(options)
    inputs = prompt_inputs(model, tokenizer, [check_text(prompt, "prompt", empty=True)], options.get("max_new_tokens"))
    per_row = is_per_prompt(steering, 1, None)
    checked_rows(model, steering, per_row)
    if is_claimed(model):
        raise SteeringError(
            "stream on a model that a steer block steers, although it generates in a thread of its own",
            "a model outside any block",
            "leave the block, and pass its interventions: stream(…, steering=[[a, b]])",
        )
    if "streamer" in options:
        raise DataError("a streamer", "no streamer among the options of stream", "read the pieces that stream yields")
    config = options.get("generation_config") or model.generation_config
    for name in _ROW_OPTIONS:
        number = options.get(name) or getattr(config, name, None) or 1
        if number > 1:
            raise DataError(
                f"{name} = {number}",
                "one continuation, token by token",
                "call fgsteer.generate, which returns several when all are complete",
            )
    if tokenizer.pad_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
    return _generated(_Worker(model, dict(inputs), steering, per_row, options))


def _generated(worker: _Worker) -> Generator[list[int]]:
    """Start a worker with the first token that is asked for, and end it with the last."""
    try:
        worker.thread.start()
        yield from worker
    finally:
        worker.stop()


def _settled_pieces(tokenizer: PreTrainedTokenizerBase, generated: Generator[list[int]]) -> Iterator[str]:
    """Decode tokens as they come, all of them anew each time, as a text is not the sum of its tokens."""
    ids: list[int] = []
    yielded = 0
    with closing(generated):
        for tokens in generated:
            ids += tokens
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            settled = _UNSETTLED.search(text).start()  # type: ignore[union-attr]
            if settled > yielded:
                yield text[yielded:settled]
                yielded = settled
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        if len(text) > yielded:
            yield text[yielded:]


class _Worker:
    """A thread that generates and hands over tokens; to ``model.generate`` it is the streamer."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        steering: Steering,
        per_row: bool | None,
        options: dict[str, Any],
    ) -> None:
        self._model, self._inputs, self._options = model, inputs, options
        self._block = steer(model, steering, per_row=per_row)
        self._tokens: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self._asked_to_end, self._past_prompt = threading.Event(), False
        self._autocast = _autocast(model.device.type)
        self.thread = threading.Thread(target=copy_context().run, args=(self._run,), name="fgsteer.stream")

    def _run(self) -> None:
        from transformers import StoppingCriteriaList

        if self._asked_to_end.is_set():  # before it began
            return
        own_criteria = self._options.pop("stopping_criteria", None) or ()
        criteria = StoppingCriteriaList([*own_criteria, self._is_over])
        try:
            with self._autocast, self._block:
                self._model.generate(**self._inputs, **self._options, streamer=self, stopping_criteria=criteria)
        except BaseException as error:  # the reader raises it
            self._tokens.put(error)
        else:
            self._tokens.put(None)

    def _is_over(self, input_ids: Tensor, _: Any, **__: Any) -> Tensor:
        """Whether to generate no further token: the reader has left, or the program ends."""
        over = self._asked_to_end.is_set() or not threading.main_thread().is_alive()
        return torch.full((len(input_ids),), over, device=input_ids.device)

    def put(self, tokens: Tensor) -> None:
        """Take tokens from ``generate``, which puts the prompt first."""
        if self._past_prompt:
            self._tokens.put(tokens.flatten().tolist())
        self._past_prompt = True

    def end(self) -> None:
        """Do nothing: ``_run`` announces the end itself, whether or not ``generate`` came to it."""

    def __iter__(self) -> Iterator[list[int]]:
        while (tokens := self._tokens.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            yield tokens

    def stop(self) -> None:
        """End generation at the next token, and wait for it."""
        self._asked_to_end.set()
        # it may not have started, and it may collect an iterator that was dropped
        if self.thread.is_alive() and threading.current_thread() is not self.thread:
            self.thread.join()


def _autocast(device: str) -> AbstractContextManager[Any]:
    """The autocast of this thread, for another thread: threads do not inherit it."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=torch.is_autocast_cache_enabled())
