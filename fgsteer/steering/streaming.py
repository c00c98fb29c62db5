"""Text as it is generated.

for piece in stream(model, tokenizer, "I think", steering=vec.add(8.0), max_new_tokens=32):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgsteer.data.chat import Text, check_text
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import checked
from fgsteer.models.claims import is_claimed
from fgsteer.steering.generation import by_prompt, check_options, prompt_inputs
from fgsteer.steering.hooks import Steering, checked_rows, steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The end of a text that further tokens may change: a word that is not over, the space before it
# (tokenizers may take it away again), bytes that are not a character yet.
_UNSETTLED = re.compile(r"\s*[!-~]*\ufffd*\Z")
_ONE_ROW = ("num_beams", "num_return_sequences")


@checked
def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    *,
    steering: Steering = None,
    **options: Any,
) -> Iterator[str]:
    """Pieces of the continuation of one prompt, each as soon as its words are whole; joined, what ``generate`` gives.

    ``steering`` and other keywords are as in ``generate`` with this prompt alone. The model
    generates in a thread of its own from the first piece on, steered all the while, and other
    steer blocks and passes on it raise SteeringError. To close the iterator, or to
    leave a loop over it, ends generation at the next token and frees the model.

    Raises, before anything runs, DataError for a prompt that is neither text nor chat messages and
    for beams or several sequences, SteeringError inside a steer block, HookpointError and
    PairingError as ``steer``. What fails while it generates is raised where the pieces are read.
    """
    check_options(options)
    inputs = prompt_inputs(model, tokenizer, [check_text(prompt, "prompt", empty=True)], options.get("max_new_tokens"))
    listed = by_prompt(steering, 1, None)
    checked_rows(model, steering, listed)
    if is_claimed(model):
        raise SteeringError(
            "stream on a model that a steer block steers: it generates in a thread of its own",
            "a model outside any block",
            "leave the block, and pass its interventions: stream(…, steering=[[a, b]])",
        )
    if "streamer" in options:
        raise DataError("a streamer among the options of stream", "none", "read the pieces that stream yields")
    config = options.get("generation_config") or model.generation_config
    for name in _ONE_ROW:
        number = options.get(name) or getattr(config, name, None) or 1
        if number > 1:
            raise DataError(f"{name} = {number} in stream", "one continuation, token by token", "call generate")
    if tokenizer.pad_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
    return _pieces(model, tokenizer, dict(inputs), steering, listed, options)


def _pieces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Any],
    steering: Steering,
    listed: bool | None,
    options: dict[str, Any],
) -> Iterator[str]:
    """Decode what a thread generates. Everything is decoded anew each time, as a text is not the sum of its tokens."""
    worker = _Worker(model, inputs, steering, listed, options)
    ids: list[int] = []
    told = 0
    worker.thread.start()
    try:
        for tokens in worker:
            ids += tokens
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            settled = _UNSETTLED.search(text).start()  # type: ignore[union-attr]
            if settled > told:
                yield text[told:settled]
                told = settled
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        if len(text) > told:
            yield text[told:]
    finally:
        worker.leave()


class _Worker:
    """A thread that generates and hands over tokens; it is the streamer that ``model.generate`` puts them to."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        steering: Steering,
        listed: bool | None,
        options: dict[str, Any],
    ) -> None:
        self._model, self._inputs, self._options = model, inputs, options
        self._block = steer(model, steering, per_row=listed)
        self._tokens: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self._asked_to_end, self._past_prompt = threading.Event(), False
        self._autocast = _autocast(model.device.type)
        self.thread = threading.Thread(target=copy_context().run, args=(self._run,), name="fgsteer.stream")

    def _run(self) -> None:
        from transformers import StoppingCriteriaList

        given = self._options.pop("stopping_criteria", None) or ()
        criteria = StoppingCriteriaList([*given, self._is_over])
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
        """Nothing: the thread tells its end itself, whether or not ``generate`` came to its own."""

    def __iter__(self) -> Iterator[list[int]]:
        while (tokens := self._tokens.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            yield tokens

    def leave(self) -> None:
        """End generation at the next token, and wait for it."""
        self._asked_to_end.set()
        if threading.current_thread() is not self.thread:  # which may collect an iterator that was dropped
            self.thread.join()


def _autocast(device: str) -> AbstractContextManager[Any]:
    """The autocast of this thread, for another thread: threads do not inherit it."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=torch.is_autocast_cache_enabled())
