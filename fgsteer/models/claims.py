"""Claims on a model that is being steered: only the thread and the context that opened a block may run it.

Hooks act on every forward pass of the model, whoever runs it. A block therefore belongs to the thread that opened it
and to that thread's context (``contextvars``): an asyncio task, and the tasks that it starts inside the block. Blocks
of one context nest. Two requests never mix, even if they are generators: no block is entered while another one is
held by a generator that has yielded.

    claim = Claim(model)
    claim.take(changes)
    claim.check()
    changes.undo()
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from contextvars import ContextVar
from types import FrameType

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward

from fgsteer.errors import SteeringError
from fgsteer.errors.changes import Changes
from fgsteer.models.hookpoints import decoder_of

_ALTERNATIVE = "hold a lock around both, or put the requests into one batch: generate(…, steering=[a, b, None])"
# packages that run generators up to a yield in order to set something up
_SETUP_PACKAGES = ("contextlib", "_pytest", "pytest_asyncio", "anyio")
backward_pass = torch._C._current_graph_task_id  # the number of the backward pass that runs in this thread, or -1
_lock = threading.RLock()  # a block may be dropped, and collected, while another one is entered
_open: dict[int, list[Claim]] = {}  # the open blocks on a decoder, by its id, the outermost first
_of_context: ContextVar[tuple[Claim, ...]] = ContextVar("fgsteer_claims", default=())  # that this context is inside of


class Claim:
    """One block's hold on a model, from ``take`` until the changes that it was given are undone."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder = id(decoder_of(model))
        self.thread = threading.get_ident()
        self.open = False
        self.overlapped = False  # whether a block around this one was left before it
        self.failure: SteeringError | None = None  # of another thread, for the thread that opened the block
        self.generator: FrameType | None = None  # whose code opened the block
        self.task: asyncio.Task[object] | None = None  # in which that generator ran

    def take(self, changes: Changes) -> None:
        """Open the block, inside the blocks of this context. Raises SteeringError while another one holds it."""
        changes.undo_by(self._release)
        with _lock:
            for other in _open.get(self.decoder, ()):
                other.check("a second steer block")
                other.check_resumed()
            self.open = True
            self.generator, self.task = _generator(), _task()
            _open.setdefault(self.decoder, []).append(self)
        _of_context.set((*(claim for claim in _of_context.get() if claim.open), self))

    def _release(self) -> None:
        """Close the block; those that were opened inside it and are still open run no further pass."""
        with _lock:
            blocks = _open.get(self.decoder, [])
            inner = blocks[blocks.index(self) + 1 :] if self in blocks else []
            for claim in inner:
                claim.overlapped = True
            if inner and self.failure is None:
                self.failure = _overlap("a steer block that was left before one that was opened inside it")
            self.open, self.generator, self.task = False, None, None
            if left := [claim for claim in blocks if claim is not self]:
                _open[self.decoder] = left
            else:
                _open.pop(self.decoder, None)
        _of_context.set(tuple(claim for claim in _of_context.get() if claim is not self))

    def left(self) -> bool:
        """Tell whether the block has been left and the thread that opened it is the one that runs."""
        return not self.open and threading.get_ident() == self.thread

    def report(self) -> None:
        """Raise SteeringError for what went wrong outside the code of the block, where it could not be raised."""
        if self.failure is not None:
            raise self.failure

    def check(self, what: str = "a forward pass") -> None:
        """Do nothing inside the block. Raises SteeringError elsewhere.

        A backward pass may compute parts of the model again in a thread of autograd, while
        the thread that opened the block waits for it.
        """
        if threading.get_ident() != self.thread:
            if backward_pass() >= 0 and _waits_for_backward(self.thread):
                return
            raise SteeringError(
                f"{what} on a model that another thread is steering",
                "one thread at a time",
                f"enter steer in the thread that runs the model, {_ALTERNATIVE}",
            )
        if self not in _of_context.get():
            raise SteeringError(
                f"{what} on a model that another task is steering, whose steer block is still open",
                "one task at a time",
                f"enter steer in the task that runs the model and leave it before another enters, {_ALTERNATIVE}",
            )
        if self.overlapped:
            raise _overlap(f"{what} in a steer block around which another one was left first")

    def check_resumed(self) -> None:
        """Raise SteeringError where a generator opened the block and has yielded."""
        if self.generator is None or self.task is not _task():
            return
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.generator:
            frame = frame.f_back
        if frame is None:
            raise SteeringError(
                f"a second steer block, while the generator {self.generator.f_code.co_name!r} has yielded inside one",
                "blocks that nest",
                "pass both to steer in one list; make a generator that only sets up steering a context manager "
                f"with contextlib.contextmanager; for two requests, {_ALTERNATIVE}",
            )


def _generator() -> FrameType | None:
    """Return the generator whose code enters the block, None where no generator's does.

    A generator that contextlib drives acts for the code that enters the context manager, and a fixture of pytest
    for the test: both yield so that others run inside the block.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = _package(frame)
        if package not in ("fgsteer", "contextlib"):
            if not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
                return None
            if frame.f_back is None or _package(frame.f_back) not in _SETUP_PACKAGES:
                return frame
        frame = frame.f_back
    return None


def _package(frame: FrameType) -> str:
    """Return the name of the package that the code of a frame belongs to."""
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _task() -> asyncio.Task[object] | None:
    """Return the asyncio task that runs in this thread, None where none does."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _overlap(what: str) -> SteeringError:
    """Make the error of blocks that overlap."""
    return SteeringError(
        f"{what}, so that the blocks overlap: passes would be steered by one, by both, then by the other",
        "blocks that nest, the inner one left first",
        _ALTERNATIVE,
    )


def is_claimed(model: nn.Module) -> bool:
    """Tell whether any steer block is open on the model."""
    return id(decoder_of(model)) in _open


def _waits_for_backward(thread: int) -> bool:
    """Tell whether a thread is inside a call of autograd's engine, and so runs no pass itself."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        frame = frame.f_back
    return frame is not None
