"""Ctrl-C at each moment at which Python would raise it: models and torch are left as they were, or changed as a whole.

A signal reaches the handler after a call returns, when a function begins and where a loop turns. A trace finds all of
these moments in a block, and sends one at each of them.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

import fgsteer as fg
from fgsteer.activations import prompt_ends
from fgsteer.effects.rollouts import _without_own_settings
from fgsteer.errors.defaults import usual_defaults
from fgsteer.errors.interrupts import HeldSignals, WholeBlock, whole_contextmanager
from fgsteer.evaluation.drawing import drawing_style
from fgsteer.export.orthogonalizing import _in_eval_mode
from fgsteer.learning.checkpointing import checkpointed_blocks
from fgsteer.learning.kl_then_steer import KLThenSteerTraining, _student
from fgsteer.likelihood.lower_blocks import output_of_blocks, skip_blocks
from fgsteer.mechanisms.freezing import eager_attention
from fgsteer.models import claims
from fgsteer.models.gradients import frozen, gradients_on
from fgsteer.steering import watching
from fgsteer.steering.generation import seeded
from fgsteer.steering.splicing import splice
from tests.helpers.tiny import tiny_model, word_tokenizer

# Ctrl-C in a finalizer is printed, not raised; Python's own, and those of dropped generators
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
AT = fg.Hookpoint(1)
WORK = 400_000  # the moments that a test runs through in all, which decides how many of a job's it tries
_OTHERS = (inspect.getfile(torch.no_grad), inspect.getfile(torch.utils._contextlib))
_CHECKED_AFTER = {name for name in dis.opmap if name.startswith(("CALL", "JUMP_BACKWARD"))}


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handler, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


IDS = torch.tensor([[3, 4, 5]])
# what changes something that outlives it: context managers, and functions that are made of them
JOBS = {
    "steer": lambda m: inside(lambda: fg.steer(m, [adds(), adds(-1.0)])),
    "steer a gated vector": lambda m: inside(lambda: fg.steer(m, gated())),
    "an error in steer": lambda m: inside(lambda: fg.steer(m, adds()), ArithmeticError("of the block")),
    "a decorated function": lambda m: fg.steer(m, adds())(lambda: None),
    "splice": lambda m: inside(lambda: splice(m, AT, torch.zeros_like)),
    "note_prompt_ends": lambda m: inside(lambda: prompt_ends.note_prompt_ends(m, [1])),
    "reading_ahead": lambda m: inside(lambda: prompt_ends.reading_ahead(m)),
    "watch": lambda m: inside(lambda: watching.watch(m)),
    "frozen": lambda m: inside(lambda: frozen(m)),
    "gradients_on": lambda m: inside(gradients_on),
    "usual_defaults": lambda m: inside(usual_defaults),
    "checkpointed_blocks": lambda m: inside(lambda: checkpointed_blocks(m, 0)),
    "skip_blocks": lambda m: inside(lambda: skip_blocks(m, 1, (torch.zeros(1, 3, 32),))),
    "eager_attention": lambda m: inside(lambda: eager_attention(m)),
    "_without_own_settings": lambda m: inside(lambda: _without_own_settings(m)),
    "_in_eval_mode": lambda m: inside(lambda: _in_eval_mode(m)),
    "seeded": lambda m: inside(lambda: seeded(m, 3)),
    "drawing_style": lambda m: inside(drawing_style),
    "_student, all weights": lambda m: inside(lambda: _student(m, KLThenSteerTraining(rank=None))),
    "_student, an adapter": lambda m: inside(
        lambda: _student(m, KLThenSteerTraining(rank=2)), ArithmeticError("of the training")
    ),
    "record": lambda m: lambda: fg.record(m, IDS, None, [fg.Hookpoint(0), fg.Hookpoint(0, "mlp_out")]),
    "output_of_blocks": lambda m: lambda: output_of_blocks(m, IDS, torch.ones_like(IDS), 1),
    "generate": lambda m: lambda: fg.generate(m, word_tokenizer(), ["the man"], steering=adds(), max_new_tokens=2),
    "generate_frozen": lambda m: (
        lambda: fg.generate_frozen(m, word_tokenizer(), ["the man"], adds(), freeze=["qk"], max_new_tokens=2)
    ),
}


def state_of(model):
    """All that blocks may change: of the model, of fgsteer and of torch."""
    import matplotlib

    modules = [(name, m) for name, m in model.named_modules()]
    return {
        "modules": [(name, type(m).__name__, m.training) for name, m in modules],
        "hooks": [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in modules],
        "attributes": [(name, sorted(set(vars(m)) - {"_is_full_backward_hook"})) for name, m in modules],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "attention": model.config._attn_implementation,
        "generation_config": id(model.generation_config),
        "claims": dict(claims._open),
        "ends": dict(prompt_ends._ends),
        "ahead": set(prompt_ends._ahead),
        "watchers": dict(watching._watchers),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "device": torch.get_default_device(),
        "random": torch.get_rng_state().tolist(),
        "style": dict(matplotlib.rcParams),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
    }


class Moments:
    """A trace that counts the moments at which Python calls handlers of signals, and sends Ctrl-C at one of them.

    Two are left out: the one between a block's last call and the beginning of its ``__exit__``, which nothing can
    close, and those in torch's own switches of gradients, which may stay as they were inside of them.
    """

    def __init__(self, moment=None):
        self.moment, self.count, self.last, self.where = moment, 0, {}, None

    def __call__(self, frame, event, _):
        frame.f_trace_opcodes = True
        opcodes = frame.f_code.co_code
        if frame.f_code.co_filename in _OTHERS:
            return self
        if event == "call":
            if frame.f_code is not WholeBlock.__exit__.__code__:
                self.meet(frame)
        elif event == "opcode":
            if self.last.get(id(frame)) in _CHECKED_AFTER:
                self.meet(frame)
            self.last[id(frame)] = dis.opname[opcodes[frame.f_lasti]]
        elif event == "return":
            self.last.pop(id(frame), None)
        return self

    def meet(self, frame):
        if self.count == self.moment:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self.count += 1
            signal.raise_signal(signal.SIGINT)
        self.count += 1


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
    tried = range(0, counted.count, 1 + counted.count**2 // work)
    interrupted = 0
    for moment in tried:
        trace = Moments(moment)
        try:
            traced(job, trace)
        except KeyboardInterrupt:
            interrupted += 1
            after = state_of(model)  # while the traceback keeps every frame alive
            assert after == before, (trace.where, {k: (before[k], after[k]) for k in before if before[k] != after[k]})
    assert interrupted >= 0.9 * len(tried) > 0  # other libraries catch some of them


@pytest.fixture
def to_be_changed(name, model):
    """What a block is to change, and to give back, where it would find that it has nothing to do."""
    model.train("mode" in name)
    torch.set_default_dtype(torch.float64 if "defaults" in name else torch.float32)
    yield
    model.eval()
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("to_be_changed")
@pytest.mark.parametrize("name", JOBS)
def test_a_model_is_whole_whenever_ctrl_c_comes(model, name):
    interrupt_often(model, JOBS[name](model), WORK)


@pytest.mark.slow
@pytest.mark.usefixtures("to_be_changed")
@pytest.mark.parametrize("name", JOBS)
def test_a_model_is_whole_at_every_moment(model, name):
    interrupt_often(model, JOBS[name](model), 50 * WORK)


# ---------------------------------------------------------------- signals that wait


def test_signals_wait_for_the_end_of_a_block_and_are_all_called():
    came = []
    handlers = {n: lambda number, frame: came.append((number, frame)) for n in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with HeldSignals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert came == []
        assert [number for number, _ in came] == [signal.SIGTERM, signal.SIGINT]
        assert [frame for _, frame in came] == [sys._getframe()] * 2
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_handler_that_raises_keeps_no_other_from_its_signal():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), HeldSignals():
            [signal.raise_signal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_held_signals_nest():
    passed = []

    def nested():
        with HeldSignals():
            with HeldSignals():
                signal.raise_signal(signal.SIGINT)
            passed.append("the inner one")
        passed.append("the outer one")

    with pytest.raises(KeyboardInterrupt):
        nested()
    assert passed == ["the inner one"]


@pytest.mark.parametrize("setting", [signal.SIG_IGN, signal.SIG_DFL])
def test_handlers_of_the_system_stay(setting):
    before = signal.signal(signal.SIGTERM, setting)
    try:
        with HeldSignals():
            assert signal.getsignal(signal.SIGTERM) == setting
        assert signal.getsignal(signal.SIGTERM) == setting
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_hold_nothing(model):
    """Python calls handlers in the main thread alone, and lets no other set them."""
    found = []

    def work():
        with fg.steer(model, adds()):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_a_whole_contextmanager_is_one_of_contextlibs():
    """It gives what the generator yields, hands errors to it, may swallow them, decorates, and is entered once."""
    seen = []

    @whole_contextmanager
    def block(value):
        try:
            yield value
        except ArithmeticError as error:
            seen.append(error)
        finally:
            seen.append("left")

    with block(3) as value:
        assert value == 3
    error = ArithmeticError("of the block")
    with block(3):
        raise error
    with pytest.raises(KeyError), block(3):
        raise KeyError
    assert seen == ["left", error, "left", "left"]

    @block(3)
    def twice(x):
        return 2 * x

    assert [twice(1), twice(2)] == [2, 4]
    once = block(3)
    with once, pytest.raises(RuntimeError, match="entered once"):
        once.__enter__()
    assert block.__name__ == "block"


def test_no_hook_is_set_but_in_a_block_that_takes_it_off():
    """Modules register hooks through ``registered``, or where the whole block is one (``steer``, vLLM's workers)."""
    package = Path(fg.__file__).parent
    direct = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\.register_forward\w+\(", path.read_text(encoding="utf-8"))
    }
    assert direct == {"steering/hooks.py", "serving/worker.py"}
