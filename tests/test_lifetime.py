"""How long a steer block lasts and for whom: overlapping blocks, tasks, generators, copies, threads of others."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import gc
import io
import pickle
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

import fgsteer as fg
from tests.helpers.tiny import D_MODEL, tiny_model

AT = fg.Hookpoint(1)
IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
SHORT = {"max_new_tokens": 4, "do_sample": False}


def adds():
    draw = torch.Generator().manual_seed(3)
    return [fg.Add(hookpoint=AT, direction=torch.randn(D_MODEL, generator=draw), coefficient=c) for c in (3.0, -5.0)]


A, B = adds()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def traces(model):
    """Whatever a block might leave on a model."""
    names = ("forward", "generate", "__getstate__", "generate_batch", "init_continuous_batching")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return [(type(m).__name__, name) for m in model.modules() for name in names if name in vars(m)], hooks


@pytest.fixture
def model(llama):
    """A model that is as it was before the test, with the values that each steering gives alone."""
    llama.alone = SimpleNamespace(plain=logits(llama), before=traces(llama))
    for name, item in (("a", A), ("b", B)):
        with fg.steer(llama, item):
            setattr(llama.alone, name, logits(llama))
    yield llama
    gc.collect()
    assert traces(llama) == llama.alone.before
    assert torch.equal(logits(llama), llama.alone.plain)
    del llama.alone


# ---------------------------------------------------------------- tasks


def test_a_task_cannot_steer_or_run_a_model_that_another_task_steers(model):
    """Request B under A + B, and a plain request under A."""

    async def first(entered, done):
        with fg.steer(model, A):
            entered.set()
            await done.wait()
            assert torch.equal(logits(model), model.alone.a)

    async def others(entered, done):
        await entered.wait()
        with (
            pytest.raises(fg.SteeringError, match=r"a second steer block.*another task.*one batch"),
            fg.steer(model, B),
        ):
            pass
        with pytest.raises(fg.SteeringError, match="another task"):
            model(IDS)
        with pytest.raises(fg.SteeringError, match="another task"):
            model.generate(IDS, **SHORT)
        done.set()

    async def main():
        entered, done = asyncio.Event(), asyncio.Event()
        await asyncio.gather(first(entered, done), others(entered, done))
        with fg.steer(model, B):  # one after the other is fine
            assert torch.equal(logits(model), model.alone.b)

    asyncio.run(main())


def test_tasks_that_start_inside_a_block_are_inside_it(model):
    async def run():
        return logits(model)

    async def steered():
        with fg.steer(model, B):
            return logits(model)

    async def main():
        with fg.steer(model, A):
            late = asyncio.create_task(run())
            assert torch.equal(await asyncio.create_task(run()), model.alone.a)
            together = await asyncio.create_task(steered())
            held = asyncio.create_task(asyncio.sleep(0))
            await held
            await late
            gate = asyncio.Event()

            async def after():
                await gate.wait()
                return await run(), await steered()

            outlives = asyncio.create_task(after())
            await asyncio.sleep(0)
        gate.set()
        plain, alone = await outlives
        assert torch.equal(plain, model.alone.plain)
        assert torch.equal(alone, model.alone.b)
        return together

    with fg.steer(model, [B, A]):
        listed = logits(model)
    assert torch.equal(asyncio.run(main()), listed)
    with fg.steer(model, A):  # a loop that runs inside a block
        assert torch.equal(asyncio.run(run()), model.alone.a)


def test_a_task_that_leaves_while_its_child_steers(model):
    async def child(entered, go):
        with fg.steer(model, B):
            entered.set()
            await go.wait()
            with pytest.raises(fg.SteeringError, match="left first"):
                model(IDS)

    async def parent(entered, go):
        with fg.steer(model, A):
            task = asyncio.create_task(child(entered, go))
            await entered.wait()
        return task

    async def main():
        entered, go = asyncio.Event(), asyncio.Event()
        with pytest.raises(fg.SteeringError, match="overlap"):
            await parent(entered, go)
        go.set()
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))

    asyncio.run(main())


def test_another_context_of_the_same_thread(model):
    outside = contextvars.copy_context()
    with fg.steer(model, A):
        with pytest.raises(fg.SteeringError, match="another task"):
            outside.run(logits, model)
        assert torch.equal(contextvars.copy_context().run(logits, model), model.alone.a)


def test_worker_threads_of_a_loop_are_refused(model):
    """Two of them would share the positions of one pass, so asyncio.to_thread is a thread like any other."""

    async def main():
        with fg.steer(model, A), pytest.raises(fg.SteeringError, match="another thread"):
            await asyncio.to_thread(logits, model)

    asyncio.run(main())


# ---------------------------------------------------------------- generators and other orders


def steering(model, item):
    """A request that is answered bit by bit."""
    with fg.steer(model, item):
        while True:
            yield logits(model)


def test_a_generator_that_has_yielded_inside_its_block_lets_no_other_in(model):
    a, b = steering(model, A), steering(model, B)
    assert torch.equal(next(a), model.alone.a)
    with pytest.raises(fg.SteeringError, match=r"generator 'steering' has yielded.*contextmanager.*one batch"):
        next(b)
    with pytest.raises(fg.SteeringError, match="has yielded"), fg.steer(model, B):
        pass
    assert torch.equal(next(a), model.alone.a)
    a.close()
    assert torch.equal(next(steering(model, B)), model.alone.b)


def test_async_generators_of_one_task(model):
    async def steering(item):
        with fg.steer(model, item):
            while True:
                yield logits(model)

    async def main():
        a, b = steering(A), steering(B)
        assert torch.equal(await anext(a), model.alone.a)
        with pytest.raises(fg.SteeringError, match="has yielded"):
            await anext(b)
        assert torch.equal(await anext(a), model.alone.a)
        await a.aclose()

    asyncio.run(main())


def test_generators_inside_one_another(model):
    def inner():
        with fg.steer(model, B):
            yield logits(model)
            yield logits(model)

    def outer():
        with fg.steer(model, A):
            yield from inner()
            b = inner()
            yield next(b)
            yield next(b)
            b.close()

    with fg.steer(model, [B, A]):
        both = logits(model)
    assert all(torch.equal(one, both) for one in outer())


@contextlib.contextmanager
def manager(model, item):
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(fg.steer(model, item))


def test_context_managers_that_are_generators_nest(model):
    @contextlib.asynccontextmanager
    async def asynchronous(item):
        with manager(model, item):
            yield

    async def main():
        async with asynchronous(A), asynchronous(B):
            return logits(model)

    def held():
        with manager(model, A):
            yield

    with fg.steer(model, [B, A]):
        both = logits(model)
    with manager(model, A), manager(model, B):
        assert torch.equal(logits(model), both)
    assert torch.equal(asyncio.run(main()), both)
    a = held()
    next(a)
    with pytest.raises(fg.SteeringError, match="generator 'held'"), manager(model, B):
        pass
    a.close()


def test_an_async_generator_that_waits_for_its_child(model):
    """It is suspended because it waits, and what it waits for is inside its block."""

    async def child():
        with fg.steer(model, B):
            return logits(model)

    async def parent():
        with fg.steer(model, A):
            yield await asyncio.create_task(child())

    async def main():
        return [value async for value in parent()]

    with fg.steer(model, [B, A]):
        both = logits(model)
    assert torch.equal(asyncio.run(main())[0], both)


@pytest.fixture
def steered(model):
    with fg.steer(model, A):
        yield model


def test_a_fixture_of_pytest_stands_for_its_test(model, steered):
    with fg.steer(steered, B):
        both = logits(model)
    assert torch.equal(logits(model), model.alone.a)
    assert not torch.equal(both, model.alone.a)
    assert not torch.equal(both, model.alone.b)


def test_three_blocks_in_every_order(model):
    items = [A, B, A]
    for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        blocks = [fg.steer(model, item) for item in items]
        for block in blocks:
            block.__enter__()
        model(IDS)
        for done, number in enumerate(order):
            nested = all(other < number for other in range(3) if other not in order[: done + 1])
            with contextlib.nullcontext() if nested else pytest.raises(fg.SteeringError, match="overlap"):
                blocks[number].__exit__(None, None, None)
        assert traces(model) == model.alone.before, order


def test_an_error_in_an_overlapping_block_is_not_replaced(model):
    b = fg.steer(model, B)

    def work():
        with fg.steer(model, A):
            b.__enter__()
            model(IDS)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        work()
    b.__exit__(None, None, None)


def test_generators_that_are_dropped(model):
    a = steering(model, A)
    next(a)
    del a
    gc.collect()
    assert traces(model) == model.alone.before
    loop = [steering(model, A)]
    loop.append(loop)  # collected later, from another context
    next(loop[0])
    del loop
    contextvars.Context().run(gc.collect)
    assert traces(model) == model.alone.before


def test_a_block_that_is_dropped_comes_off(model):
    fg.steer(model, A).__enter__()
    gc.collect()


def test_exit_stacks(model):
    with contextlib.ExitStack() as stack:
        for item in (A, B):
            stack.enter_context(fg.steer(model, item))
        model(IDS)
    with fg.steer(model, [B, A]):
        pass


def test_a_block_is_entered_once_and_a_decorator_for_each_call(model):
    block = fg.steer(model, A)
    with block:
        model(IDS)
        with pytest.raises(fg.SteeringError, match="entered again"):
            block.__enter__()
        assert torch.equal(logits(model), model.alone.a)
    with pytest.raises(fg.SteeringError, match="entered again"), block:
        pass
    steered = fg.steer(model, A)(logits)
    assert torch.equal(steered(model), model.alone.a)
    assert torch.equal(steered(model), model.alone.a)
    assert steered.__name__ == "logits"


def test_functions_that_suspend_are_not_decorated(model):
    async def task():
        return logits(model)

    for function in (task, steering):
        with pytest.raises(fg.SteeringError, match="returns before it has run"):
            fg.steer(model, A)(function)


def test_what_others_set_inside_a_block_stays(model):
    """Undoing is by identity: a function that lies over ours is not taken off, and calls through it."""
    with fg.steer(model, A):
        below = model.generate
        model.generate = functools.partial(below)
        steered = model.generate(IDS, **SHORT)
    plain = model.generate(IDS, **SHORT)
    assert "generate" in vars(model)
    del model.generate
    assert torch.equal(plain, model.generate(IDS, **SHORT))
    with fg.steer(model, A):
        assert torch.equal(steered, model.generate(IDS, **SHORT))


# ---------------------------------------------------------------- copies, generation in threads


@pytest.mark.parametrize("dup", [copy.copy, copy.deepcopy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO())])
def test_copies_of_what_is_steered_are_refused(model, dup):
    parts = [model, model.model, model.model.layers[1], torch.nn.Sequential(model) if dup is not copy.copy else model]
    with fg.steer(model, A):
        model(IDS)
        for part in parts:
            with pytest.raises(fg.SteeringError, match="before or after the block"):
                dup(part)
        assert model.state_dict()
    twin = copy.copy(model)
    assert traces(twin) == model.alone.before
    copy.deepcopy(model)


def test_weights_may_be_saved_inside_a_block(model, tmp_path):
    with fg.steer(model, A):
        model(IDS)
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(model, name):
    with fg.steer(model, A):
        model(IDS)
        with pytest.raises(fg.SteeringError, match=f"{name}.*thread of its own"):
            getattr(model, name)([[1, 2]])


def test_generate_that_is_called_after_its_block(model):
    with fg.steer(model, A):
        kept = model.generate
        model(IDS)
    assert torch.equal(kept(IDS, **SHORT), model.generate(IDS, **SHORT))
    found = []

    def work():
        try:
            kept(IDS, **SHORT)
        except fg.SteeringError as error:
            found.append(error)

    thread = threading.Thread(target=work)  # was started inside the block, and began after it
    thread.start()
    thread.join(60)
    assert found


def test_models_apart_do_not_disturb_each_other(model):
    other = tiny_model("llama", seed=1)
    a = steering(model, A)
    next(a)
    with fg.steer(other, B):
        other(IDS)
        a.close()
        other(IDS)


# ---------------------------------------------------------------- modules that are replaced


def _peft(model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["o_proj"], r=2))


def _own_decoder(model):
    model.model = tiny_model("llama", seed=1).model


REPLACED = {
    "a block": lambda m: m.model.layers.__setitem__(1, tiny_model("llama", seed=1).model.layers[1]),
    "the decoder": _own_decoder,
    "all blocks": lambda m: setattr(m.model, "layers", torch.nn.ModuleList([*m.model.layers][::-1])),
    "fewer blocks": lambda m: setattr(m.model, "layers", m.model.layers[:2]),
    "a sublayer": lambda m: setattr(m.model.layers[1], "mlp", tiny_model("llama", seed=1).model.layers[1].mlp),
    "its projection": _peft,
    "its hooks": lambda m: [hooks.clear() for x in m.modules() for hooks in (x._forward_hooks, x._forward_pre_hooks)],
}
KEPT = {
    "dtype and device": lambda m: m.to(torch.float64).to("cpu"),
    "weights": lambda m: m.load_state_dict(tiny_model("llama", seed=1).state_dict(), assign=True),
    "a compiled decoder": lambda m: setattr(m, "model", torch.compile(m.model, backend="eager")),
    "a compiled block": lambda m: m.model.layers.__setitem__(1, torch.compile(m.model.layers[1], backend="eager")),
    "another block": lambda m: m.model.layers.__setitem__(2, tiny_model("llama", seed=1).model.layers[2]),
}
SITES = {"a sublayer": "mlp_out", "its projection": "z"}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("runs", ["a pass", "generate", "nothing"])
def test_a_steered_module_that_is_replaced_inside_the_block_is_warned_of(name, runs):
    model = tiny_model("llama")
    item = fg.Add(hookpoint=fg.Hookpoint(1, SITES.get(name, "resid_post")), direction=A.direction, coefficient=5.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fg.steer(model, item):
            logits(model)
            REPLACED[name](model)
            if name != "fewer blocks" and runs == "generate":
                model.generate(IDS, **SHORT)
            elif runs == "a pass":
                logits(model)
    (told,) = (warning for warning in caught if issubclass(warning.category, fg.FgsteerWarning))
    assert told.category is fg.errors.UntouchedWarning
    assert "inside the steer block, so that what runs there now is not steered" in str(told.message)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "compiled" in name else []) for name in KEPT]
)
def test_what_leaves_the_steered_modules_in_place_stays_steered(name):
    model = tiny_model("llama")
    with fg.steer(model, A):
        KEPT[name](model)
        steered = logits(model)
        told = model.generate(IDS, **SHORT)
    assert not torch.equal(steered, logits(model))
    assert told.shape[1] == IDS.shape[1] + 4


def test_a_warning_comes_before_the_pass_that_is_not_steered(model):
    """Where the decoder is the model's own; a block that is put back before the end is still told of."""
    own = model.model.layers[1]
    with fg.steer(model, A):
        model.model.layers[1] = tiny_model("llama", seed=1).model.layers[1]
        with pytest.warns(fg.errors.UntouchedWarning, match="block 1 was replaced"):
            model(IDS)
        model.model.layers[1] = own
        assert torch.equal(logits(model), model.alone.a)
