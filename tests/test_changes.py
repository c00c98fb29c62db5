"""Ctrl-C at each moment at which Python would raise it: models and torch are left as they were, or changed as a whole.

Python raises it after a call returns, when a function begins and where a loop turns. A trace finds all of these moments
in a block, and raises it at one of them.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import inspect
import re
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fgsteer as fg
from fgsteer.activations import prompt_ends
from fgsteer.activations.recording import record
from fgsteer.effects.rollouts import _without_own_settings
from fgsteer.errors import defaults
from fgsteer.errors.changes import Changes, TemporaryChange, temporary_change
from fgsteer.errors.defaults import usual_defaults
from fgsteer.export.orthogonalizing import _in_eval_mode
from fgsteer.learning.checkpointing import checkpointed_blocks
from fgsteer.learning.kl_then_steer import KLThenSteerTraining, _student
from fgsteer.likelihood.lower_blocks import output_of_blocks, skip_blocks
from fgsteer.mechanisms.freezing import eager_attention
from fgsteer.mechanisms.texts import from_block
from fgsteer.models import claims
from fgsteer.models.gradients import frozen
from fgsteer.models.registering import registered
from fgsteer.steering import watching
from fgsteer.steering.splicing import splice
from fgsteer.storage import network
from tests.helpers.tiny import tiny_model, word_tokenizer

# what is raised in a finalizer is printed
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
AT = fg.Hookpoint(1)
IDS = torch.tensor([[3, 4, 5]])
WORK = 400_000  # the moments that a test runs through in all, which decides how many of a job's it tries
_OTHERS = (inspect.getfile(torch.no_grad), inspect.getfile(torch.utils._contextlib))
_CHECKED_AFTER = {name for name in dis.opmap if name.startswith(("CALL", "JUMP_BACKWARD"))}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def adds(strength=3.0):
    return fg.SteeringVector(torch.arange(32.0), AT).add(strength)


def gated():
    vector = fg.SteeringVector(torch.arange(32.0), AT)
    return vector.add(3.0, when=fg.Preview(fg.Probe(torch.ones(32), 0)) > 0.0)


def inside(make, error=None):
    """A function that enters a block and leaves it, with an error where one is given."""

    def run():
        block = make()
        with contextlib.suppress(ArithmeticError), block:
            if error is not None:
                raise error

    return run


# what changes something that outlives it: context managers, and functions that are made of them
JOBS = {
    "steer": lambda m: inside(lambda: fg.steer(m, [adds(), adds(-1.0)])),
    "steer, a gate": lambda m: inside(lambda: fg.steer(m, gated())),
    "steer, an error": lambda m: inside(lambda: fg.steer(m, adds()), ArithmeticError("of the block")),
    "steer, a decorator": lambda m: fg.steer(m, adds())(lambda: None),
    "steer, in a steer block": lambda m: fg.steer(m, adds())(inside(lambda: fg.steer(m, adds()))),
    "registered": lambda m: inside(lambda: registered([(m, True, print), (m.model, False, print)])),
    "splice": lambda m: inside(lambda: splice(m, AT, torch.zeros_like)),
    "note_prompt_ends": lambda m: inside(lambda: prompt_ends.note_prompt_ends(m, [1])),
    "reading_ahead": lambda m: inside(lambda: prompt_ends.reading_ahead(m)),
    "watch": lambda m: inside(lambda: watching.watch(m)),
    "frozen": lambda m: inside(lambda: frozen(m)),
    "usual_defaults": lambda m: inside(usual_defaults),
    "checkpointed_blocks": lambda m: inside(lambda: checkpointed_blocks(m, 0)),
    "skip_blocks": lambda m: inside(lambda: skip_blocks(m, 1, (torch.zeros(1, 3, 32),))),
    "from_block": lambda m: inside(lambda: from_block(m, IDS, 1, 2)),
    "eager_attention": lambda m: inside(lambda: eager_attention(m)),
    "_without_own_settings": lambda m: inside(lambda: _without_own_settings(m)),
    "_in_eval_mode": lambda m: inside(lambda: _in_eval_mode(m)),
    "hub_or_cache": lambda m: inside(lambda: network.hub_or_cache("someone/something")),
    "_student, all weights": lambda m: inside(
        lambda: _student(m, KLThenSteerTraining(rank=None)), ArithmeticError("of the training")
    ),
    "_student, an adapter": lambda m: inside(
        lambda: _student(m, KLThenSteerTraining(rank=2)), ArithmeticError("of the training")
    ),
    "record": lambda m: partial(record, m, IDS, None, [fg.Hookpoint(0), fg.Hookpoint(0, "mlp_out")]),
    "output_of_blocks": lambda m: partial(output_of_blocks, m, IDS, torch.ones_like(IDS), 1),
    "log_probabilities": lambda m: partial(
        fg.log_probabilities, m, word_tokenizer(), [("the man", " sat")], steering=[adds(), None]
    ),
    "trace": lambda m: partial(fg.trace, m, word_tokenizer(), "the man", adds(), completions=["sat"]),
    "generate": lambda m: partial(fg.generate, m, word_tokenizer(), ["the man"], steering=adds(), max_new_tokens=2),
    "generate_frozen": lambda m: partial(
        fg.generate_frozen, m, word_tokenizer(), ["the man"], adds(), freeze=["qk"], max_new_tokens=2
    ),
}


def state_of(model):
    """All that blocks may change: of the model, of fgsteer, of torch and of huggingface_hub."""
    import huggingface_hub.constants

    modules = list(model.named_modules())
    locks: list[Any] = [network._switch, claims._lock, defaults._lock]
    return {
        "modes": [(name, m.training) for name, m in modules],
        "hooks": [(name, list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for name, m in modules],
        "keyword arguments": [(name, list(m._forward_pre_hooks_with_kwargs)) for name, m in modules],
        "attributes": [(name, sorted(vars(m))) for name, m in modules],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "attention": model.config._attn_implementation,
        "generation_config": id(model.generation_config),
        "claims": (dict(claims._open), claims._of_context.get()),
        "ends": dict(prompt_ends._ends),
        "ahead": set(prompt_ends._ahead),
        "watchers": dict(watching._watchers),
        "modules": [(name, type(m).__name__) for name, m in modules],
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "locks": [lock._is_owned() for lock in locks],
        "hub": huggingface_hub.constants.HF_HUB_OFFLINE,
    }


class Moments:
    """A trace that counts the moments at which Python raises KeyboardInterrupt, and raises it at one of them.

    Two are left out: the one between a block's last call and the beginning of its ``__exit__``, which nothing can
    close, and those in torch's own switches of gradients, which are not fgsteer's to close.
    """

    def __init__(self, moment=None):
        self.moment, self.count, self.last, self.where = moment, 0, {}, None

    def __call__(self, frame, event, _):
        frame.f_trace_opcodes = True
        if frame.f_code.co_filename in _OTHERS:
            return self
        if event == "call":
            if frame.f_code is not TemporaryChange.__exit__.__code__:
                self.meet(frame)
        elif event == "opcode":
            if self.last.get(id(frame)) in _CHECKED_AFTER:
                self.meet(frame)
            self.last[id(frame)] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        elif event == "return":
            self.last.pop(id(frame), None)
        return self

    def meet(self, frame):
        self.count += 1
        if self.count == self.moment:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            raise KeyboardInterrupt


def traced(job, trace):
    sys.settrace(trace)
    try:
        job()
    finally:
        sys.settrace(None)


def interrupt_often(model, job, work):
    """Interrupt a job at moments that are spread over it, each of which costs a run through all."""
    job()  # what is set up once, such as imports
    before = state_of(model)
    counted = Moments()
    traced(job, counted)
    assert state_of(model) == before
    tried = range(1, counted.count + 1, 1 + counted.count**2 // work)
    interrupted = 0
    for moment in tried:
        trace = Moments(moment)
        try:
            traced(job, trace)
        except KeyboardInterrupt:
            interrupted += 1
            after = state_of(model)  # while the traceback keeps every frame alive
            assert after == before, (trace.where, {k: (before[k], after[k]) for k in before if before[k] != after[k]})
        else:
            assert state_of(model) == before, trace.where
    assert interrupted >= 0.9 * len(tried) > 0  # some fall into finalizers, and other libraries catch some


@pytest.fixture
def to_be_changed(name, model, monkeypatch):
    """What a block is to change, and to give back, where it would find that it has nothing to do."""
    monkeypatch.setattr(network, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model.train("mode" in name)
    if "defaults" in name:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
    yield
    model.eval()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.usefixtures("to_be_changed")
@pytest.mark.parametrize("name", JOBS)
def test_a_model_is_whole_whenever_ctrl_c_comes(model, name):
    interrupt_often(model, JOBS[name](model), WORK)


@pytest.mark.slow
@pytest.mark.usefixtures("to_be_changed")
@pytest.mark.parametrize("name", JOBS)
def test_a_model_is_whole_at_every_moment(model, name):
    interrupt_often(model, JOBS[name](model), 50 * WORK)


def test_ctrl_c_while_a_stream_begins_ends_its_thread(model, monkeypatch):
    """``Thread.start`` waits for its thread, and an interrupt there comes from a thread that runs."""
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(fg.stream(model, word_tokenizer(), "the man", steering=adds(), max_new_tokens=100_000))
    assert not [thread for thread in threading.enumerate() if thread.name == "fgsteer.stream"]
    assert claims._open == {}


# ---------------------------------------------------------------- changes


def test_undoing_goes_on_where_an_exception_broke_it_off():
    """Each is undone, last first; one that was broken off again; and the exception is raised when all is done."""
    changes, undone, failures = Changes(), [], iter([KeyboardInterrupt("1")])

    def breaks_off():
        undone.append("begun")
        for failure in failures:
            raise failure
        undone.append("done")

    for name in "ab":
        changes.undo_by(partial(undone.append, name))
    changes.undo_by(breaks_off)
    changes.undo_by(partial(undone.append, "c"))
    with pytest.raises(KeyboardInterrupt, match="1"):
        changes.undo()
    assert undone == ["c", "begun", "begun", "done", "b", "a"]
    changes.undo()
    assert len(undone) == 6


def test_what_cannot_be_undone_keeps_nothing_else():
    changes, undone = Changes(), []
    changes.undo_by(partial(undone.append, "a"))
    changes.undo_by(partial(dict[str, int]().__getitem__, "missing"))
    with pytest.raises(KeyError, match="missing"):
        changes.undo()
    assert undone == ["a"]


def test_attributes_and_items_get_their_values_back():
    class Thing:
        value = 1

    thing, mapping, changes = Thing(), {"a": 1}, Changes()
    for value in (2, 3):
        changes.set_attribute(thing, "value", value)
        changes.set_item(mapping, "a", value)
        changes.set_item(mapping, "b", value)
    assert (thing.value, mapping) == (3, {"a": 3, "b": 3})
    changes.undo()
    assert (thing.value, mapping) == (1, {"a": 1})


def test_a_temporary_change_is_a_context_manager_as_contextlibs():
    """It gives what the generator yields, hands errors to it, may swallow them, decorates, and is entered once."""
    seen = []

    @temporary_change
    def block(changes, value):
        changes.undo_by(partial(seen.append, "undone"))
        try:
            yield value
        except ArithmeticError as error:
            seen.append(error)

    with block(3) as value:
        assert value == 3
    error = ArithmeticError("of the block")
    with block(3):
        raise error
    with pytest.raises(KeyError), block(3):
        raise KeyError
    assert seen == ["undone", error, "undone", "undone"]

    @block(3)
    def twice(x):
        return 2 * x

    assert [twice(1), twice(2)] == [2, 4]
    once = block(3)
    with once, pytest.raises(RuntimeError, match="entered once"):
        once.__enter__()
    assert block.__name__ == "block"


def test_a_change_is_undone_where_its_block_is_dropped(model):
    before = state_of(model)
    block = splice(model, AT, torch.zeros_like)
    block.__enter__()
    assert state_of(model) != before
    del block
    gc.collect()
    assert state_of(model) == before


def test_hooks_come_off_by_what_they_are(model):
    """Others' stay, also those of the same function, with what they are given."""
    given = []

    def other(*args):
        given.append(len(args))

    handle = model.register_forward_pre_hook(other, with_kwargs=True)
    before = state_of(model)
    with registered([(model, True, other), (model, False, lambda *_: None)]):
        assert state_of(model) != before
    assert state_of(model) == before
    model(IDS)
    assert given == [3]
    handle.remove()
    assert not model._forward_pre_hooks_with_kwargs


def test_no_hook_is_set_but_until_changes_are_undone():
    """Modules register hooks through ``register`` alone, but for vLLM's workers, which keep theirs."""
    package = Path(fg.__file__).parent
    direct = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\.register_forward\w+\(", path.read_text(encoding="utf-8"))
    }
    assert direct == {"models/registering.py", "serving/worker.py"}
